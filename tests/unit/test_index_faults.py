"""Indexes that are damaged, foreign or half written: noticed, and built again or refused."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from llfast import KLIndex, SearchError, Store
from llfast.errors import LlfastWarning
from llfast.search import building, listing
from llfast.search.segment import Segment
from tests.indexes import assert_right, index_result, make_store, model_values, name
from tests.spaces import make_matrix
from tests.stores import run_with_mount

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")


@pytest.fixture(scope="module", autouse=True)
def _lists():
    """Also for few models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "LEAST_ROWS", 20)
        patch.setattr(listing, "_HELD_OUT", 4)
        yield


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


# ------------------------------------------------------------------ damaged files

FILES = ["points.f32", "first.f32", "rest.f32", "checks.u64", "models.parquet", "index.npz"]
OF_BOUNDS = ["first.f32", "rest.f32", "lists.u32", "centroids.f32"]
FILES += OF_BOUNDS[2:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store with an index that no test changes."""
    store = make_store(tmp_path_factory.mktemp("built") / "store")
    KLIndex.build(store, "certified")
    return store


def segment_of(store):
    (current,) = store.folder.glob("_index/*/current")
    return current.parent / current.read_text()


def contents(segment):
    """All that a segment holds, after all checks."""
    segment.verify()
    rows, basis, projection = segment.rows, segment.basis, segment.projection
    models, lists = segment.models(), segment.lists
    arrays = [rows.points, rows.reduced.first, rows.reduced.rest, projection.directions]
    arrays += [lists.centroids, lists.numbers, basis.reference, basis.text_bytes]
    kept = [each.tobytes() for each in arrays], projection.first, segment.facts
    kept += lists.probes, lists.recall
    kept += basis.digest, basis.ids, basis.groups, models.dtypes, models.adds_bos
    return [*kept, [models[number] for number in range(models.count)]]


def damages(whole, rng, count):
    """`count` damaged copies: truncated, longer, with flipped bits, with a block of zeros."""
    for number in range(count):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        kind = ("bit", "bit", "bit", "cut", "zeros", "bytes", "longer")[number % 7]
        if kind == "bit":
            damaged[place] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del damaged[place:]
        elif kind == "zeros":
            damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
        elif kind == "bytes":
            block = len(damaged[place : place + 16])
            damaged[place : place + 16] = rng.bytes(block)
        else:
            damaged += rng.bytes(1 + place % 64)
        yield bytes(damaged)


def refused(act):
    """What something gives, or the words with which it is refused."""
    try:
        return act(), ""
    except SearchError as error:
        return None, str(error)


def damage_everywhere(store, folder, file, count):
    """How many of so many damages are noticed; none other may change anything."""
    whole = segment_of(store)
    shutil.copytree(whole, folder / whole.name)
    copy = folder / whole.name
    expected, noticed = contents(Segment(copy)), 0
    good = (copy / file).read_bytes()
    for damaged in damages(good, np.random.default_rng(len(file)), count):
        (copy / file).write_bytes(damaged)
        found, error = refused(lambda: contents(Segment(copy)))
        if error:
            assert str(copy / file) in error
            assert "\n" not in error
            noticed += 1
        else:
            assert found == expected
            assert damaged == good, "every bit is summed"
    return noticed


def test_no_thread_outlives_the_reading_of_names(built):
    """One that lets go of Python's bytes while Python ends would abort the process."""
    code = (
        "import os, sys; from pathlib import Path; from llfast.search.segment import Segment\n"
        "segment = Segment(Path(sys.argv[1]))\n"
        "before = os.listdir('/proc/self/task'); segment.table\n"
        "print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(segment_of(built))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "0\n"


@pytest.mark.parametrize("file", FILES)
def test_no_damage_goes_unnoticed(built, tmp_path, file):
    assert damage_everywhere(built, tmp_path, file, 400) > 300


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_no_damage_of_thousands_goes_unnoticed(built, tmp_path, file):
    assert damage_everywhere(built, tmp_path, file, 20_000) > 15_000


@pytest.mark.parametrize("file", [*FILES, "current"])
@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_a_damaged_index_is_built_again_or_refused(built, tmp_path, file, mode):
    shutil.copytree(built.folder, tmp_path / "store")
    store = Store(tmp_path / "store")
    rng = np.random.default_rng(0)
    for number in range(6):
        if mode == "exact" and number and file in OF_BOUNDS:
            break  # it was built again, without them
        path = segment_of(store) / file
        path = path if file != "current" else path.parents[1] / file
        whole = path.read_bytes()
        (damaged,) = list(damages(whole, rng, number + 1))[-1:]
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            index = KLIndex.build(store, mode)
            _, error = refused(lambda built=index: assert_right(built, store))
        messages = [str(each.message) for each in caught] + [error] * bool(error)
        assert all("\n" not in message for message in messages)
        if damaged != whole:
            (message,) = messages
            assert str(path.parent) in message
        if error:
            assert file == "points.f32"
            assert "refit=True" in error
            index = KLIndex.build(store, mode, refit=True)
        assert_right(index, store)
        assert_right(KLIndex.build(store, mode), store)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_gone_is_missed(built, tmp_path, file):
    shutil.copytree(built.folder, tmp_path / "store")
    store = Store(tmp_path / "store")
    (segment_of(store) / file).unlink()
    with pytest.warns(LlfastWarning, match="an index is built again.*must be there"):
        index = KLIndex.build(store, "certified")
    assert_right(index, store)


# ------------------------------------------------------------------ foreign files


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_index_of_the_same_size_is_noticed(store, tmp_path, file):
    """Of the same models with other numbers, or of others with the same numbers."""
    KLIndex.build(store, "certified")
    other = Store(tmp_path / "other")
    values = np.array([model_values(number) for number in range(24)])
    if file == "models.parquet":
        other.add_matrix(make_matrix(values, models=[name(23 - number) for number in range(24)]))
    else:
        other.add_matrix(make_matrix(values[::-1], models=[name(row) for row in range(24)]))
    KLIndex.build(other, "certified")
    assert segment_of(other) != segment_of(store)
    shutil.copy(segment_of(other) / file, segment_of(store) / file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = KLIndex.build(store, "certified")
        _, error = refused(lambda: assert_right(index, store))
    messages = [str(each.message) for each in caught] + [error] * bool(error)
    assert len(messages) == 1


def test_an_index_of_another_store_or_selection_is_noticed_or_brought_up_to_date(store, tmp_path):
    other = make_store(tmp_path / "other", 20)
    other.add(index_result(3, values=model_values(77)))
    KLIndex.build(other, "certified")
    shutil.copytree(other.folder / "_index", store.folder / "_index")
    assert_right(KLIndex.build(store, "certified"), store)
    # Of another convention: its rows are not those of the folder that it is in.
    store.add(index_result(5, convention="always-bos"))
    store.add(index_result(6, convention="always-bos"))
    paper = KLIndex.build(store, "certified", convention="paper")
    bos = KLIndex.build(store, "certified", convention="always-bos")
    shutil.rmtree(bos.folder)
    shutil.copytree(paper.folder, bos.folder)
    with pytest.warns(LlfastWarning, match="must be an index of this selection"):
        again = KLIndex.build(store, "certified", convention="always-bos")
    assert_right(again, store, convention="always-bos")


@pytest.mark.parametrize(
    "name_of_it",
    [
        b"",
        b"../..",
        b"/etc",
        b"0" * 31,
        b"0" * 32,
        b"0" * 32 + b"\n",
        b"\xff" * 32,
        b"g" * 32,
    ],
)
def test_a_current_that_names_nothing_of_ours_is_noticed(store, name_of_it):
    index = KLIndex.build(store, "certified")
    (index.folder / "current").write_bytes(name_of_it)
    with pytest.warns(LlfastWarning, match="an index is built again") as caught:
        again = KLIndex.build(store, "certified")
    assert len(caught) == 1
    assert_right(again, store)


def test_a_current_that_is_a_folder_is_an_error_of_the_system(store):
    index = KLIndex.build(store)
    (index.folder / "current").unlink()
    (index.folder / "current").mkdir()
    with pytest.warns(LlfastWarning, match="built again"), pytest.raises(OSError, match="current"):
        KLIndex.build(store)


def test_what_builders_left_behind_goes_with_the_next_one(store):
    index = KLIndex.build(store)
    (index.folder / ".0123.tmp").mkdir()
    (index.folder / ".0123.tmp" / "points.f32").write_bytes(b"half")
    (index.folder / ".current.0123.tmp").write_bytes(b"half")
    (index.folder / ("a" * 32)).mkdir()
    store.add(index_result(24))
    index.refresh()
    index.merge()
    found = {path.name for path in index.folder.iterdir()}
    assert found == {"lock", "current", index.segment.folder.name}


def test_a_folder_that_is_removed_amid_a_build_is_made_again(store, monkeypatch):
    own, calls = building.choose, []

    def choose(*arguments):
        if not calls:
            shutil.rmtree(store.folder / "_index")
        calls.append(arguments)
        return own(*arguments)

    monkeypatch.setattr(building, "choose", choose)
    assert_right(KLIndex.build(store, "certified"), store)
    assert len(calls) < 3
    assert segment_of(store).is_dir()


def test_the_same_index_written_again_is_there_at_every_moment(store, monkeypatch):
    index = KLIndex.build(store, "certified")
    before = segment_of(store)
    rename = Path.rename

    def refuse(self, target):
        assert self != before, "the current one is not moved"
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    again = KLIndex.build(store, "certified", refit=True)
    assert again.segment.folder.name == index.segment.folder.name
    assert_right(again, store)


# ------------------------------------------------------------------ disks


def no_space(*_args, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_a_disk_that_refuses_leaves_the_old_index(store, monkeypatch, call):
    index = KLIndex.build(store, "certified")
    store.add(index_result(24))
    index.refresh()
    before = sorted(path.name for path in index.folder.iterdir())
    place = os if call == "fsync" else Path
    with monkeypatch.context() as patched:
        patched.setattr(place, call, no_space)
        for act in (index.merge, lambda: KLIndex.build(store, "certified", refit=True)):
            with pytest.raises(OSError, match="No space left"):
                act()
            assert_right(index, store)
    assert sorted(path.name for path in index.folder.iterdir()) == before
    assert_right(KLIndex.build(store, "certified"), store)
    index.merge()
    assert_right(index, store)


FULL = """
import sys
from llfast import KLIndex, Store
from tests.indexes import assert_right, index_result
store = Store(sys.argv[1])
index = KLIndex.build(store, "certified", folder=sys.argv[1] + "/_index")
for number in range(24, 28):
    index.add(index_result(number))
with open(sys.argv[1] + "/_index/ballast", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
for act in (index.merge, lambda: KLIndex.build(store, "certified", refit=True)):
    try:
        act()
    except OSError as error:
        print(error.strerror)
assert_right(index, store)
assert_right(KLIndex.build(store, "certified"), store)
import os
os.remove(sys.argv[1] + "/_index/ballast")
index.merge()
assert_right(KLIndex.build(store, "certified"), store)
print(*sorted(os.listdir(index.folder)))
"""


def test_a_full_disk_leaves_the_old_index_and_no_rubbish(store):
    (store.folder / "_index").mkdir()
    run = run_with_mount('mount -t tmpfs -o size=200k tmpfs "$1/_index"', FULL, store.folder)
    *errors, left = run.stdout.splitlines()
    assert errors == ["No space left on device"] * 2
    assert len(left.split()) == 3


READ_ONLY = """
import sys
from llfast import KLIndex, Store
from tests.indexes import assert_right, index_result
store = Store(sys.argv[1])
index = KLIndex.build(store, "certified")
assert_right(index, store)
for act in (
    lambda: KLIndex.build(store, "certified", refit=True),
    lambda: KLIndex.build(store, dtype=""),
    lambda: index.add(index_result(40)),
    index.merge,
):
    try:
        act()
    except OSError as error:
        print(error)
assert_right(index, store)
"""


def test_a_read_only_index_is_searched_and_refuses_changes_in_one_line(store):
    KLIndex.build(store, "certified")
    for number in range(24, 29):  # more than an eighth: whoever may write would merge them
        store.add(index_result(number))
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    run = run_with_mount(mount, READ_ONLY, store.folder)
    messages = run.stdout.splitlines()
    assert len(messages) == 4
    for message in messages:
        assert "Read-only file system" in message
        assert str(store.folder) in message

"""Damaged shards, folders that are no store, disks that are full or read-only."""

import errno
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llfast import Store, StoreError
from llfast.errors import LlfastWarning
from tests.stores import (
    make_result,
    numbers,
    run_python,
    run_with_mount,
    store_contents,
    store_shards,
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def snapshot(folder):
    """Everything in a folder: names, times of change and bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


# ------------------------------------------------------------------------------ damaged shards


@pytest.mark.parametrize("length", [0, 1, 3, 4, 8, 100, 0.3, 0.6, -9, -8, -5, -1])
def test_a_half_written_shard_is_noticed_and_costs_nothing_else(store, length):
    store.add(make_result("a"))
    store.add(make_result("b"))
    torn = store_shards(store)[1]
    whole = torn.read_bytes()
    torn.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    with pytest.warns(LlfastWarning, match="left out of the store") as caught:
        matrix = store.matrix()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(torn) in message
    assert "move it away and score its models again" in message
    assert "\n" not in message
    assert matrix.models == ("a",)
    np.testing.assert_array_equal(matrix.row("a"), numbers("a"))
    # Scored again, as it is not among what is done.
    with pytest.warns(LlfastWarning, match="left out"):
        assert {key.model for key in store.completed()} == {"a"}
    with pytest.warns(LlfastWarning, match="left out"):
        assert store.compact() == 0
    assert torn.exists(), "what cannot be read may still be mended"
    torn.write_bytes(whole)
    assert store.matrix().models == ("a", "b")


def test_a_shard_that_may_not_be_read_is_not_to_be_moved_away(store, monkeypatch):
    store.add(make_result("a"))
    store.add(make_result("b"))
    private, own = store_shards(store)[0], pq.ParquetFile

    def refuse(shard, **options):
        if shard == private:
            raise PermissionError(errno.EACCES, "Failed to open local file")
        return own(shard, **options)

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.warns(LlfastWarning, match="Failed to open local file; let it be read$") as caught:
        assert store.matrix().models == ("b",)
    assert str(private) in str(caught[0].message)


def test_a_temporary_file_left_by_a_killed_writer_is_no_shard(store):
    store.add(make_result("a"))
    shard = store_shards(store)[0]
    leftover = shard.with_name(f".{shard.name}.0123.tmp")
    shutil.copy(shard, leftover)
    leftover.write_bytes(leftover.read_bytes()[:50])
    store.add(make_result("b"))
    assert store.matrix().models == ("a", "b")
    assert store.compact() == 2
    assert store.matrix().models == ("a", "b")


def read(store):
    try:
        return store_contents(store), None
    except StoreError as error:
        return None, str(error)


def test_flipped_bits_are_noticed_or_change_nothing(store):
    store.add(make_result("a", metadata={"family": "f"}))
    store.add(make_result("b"))
    expected = store_contents(store)
    shard = store_shards(store)[0]
    whole = shard.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.choice(len(whole), 150, replace=False):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        shard.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, error = read(store)
        messages = [str(each.message) for each in caught] + ([error] if error else [])
        # Everything is as it was, or this shard is missing, and named in one line.
        assert found == expected or messages
        assert found in (expected, expected[1:], None)
        assert all(str(shard) in message and "\n" not in message for message in messages)
        noticed += bool(messages)
    assert noticed > 75, "most bits matter"


def test_compaction_keeps_shards_whose_numbers_are_damaged(store):
    # The row itself can be read, and is newer than a whole one.
    store.add(make_result("a"))
    store.add(make_result("a", loglikelihoods=numbers("newer")))
    store.add(make_result("b"))
    shard = store_shards(store)[1]
    data = bytearray(shard.read_bytes())
    column = pq.ParquetFile(shard).metadata.row_group(0).column(9)
    assert column.path_in_schema.startswith("loglikelihoods")
    data[column.data_page_offset + column.total_compressed_size - 20] ^= 1  # in the numbers
    shard.write_bytes(data)
    with pytest.raises(StoreError, match="must be a whole shard.*move it away") as caught:
        store.matrix()
    assert str(shard) in str(caught.value)
    with pytest.warns(LlfastWarning, match="left out of the store"):
        assert store.compact() == 2
    assert shard.exists()
    shard.unlink()
    np.testing.assert_array_equal(store.matrix().row("a"), numbers("a"))
    assert store.matrix().models == ("a", "b")


def test_compaction_of_nothing_but_damaged_shards_leaves_them(store):
    store.add(make_result("a"))
    store.add(make_result("b"))
    for shard in store_shards(store):
        shard.write_bytes(b"PAR1 but no more")
    with pytest.warns(LlfastWarning) as caught:
        assert store.compact() == 0
    assert len(caught) == len(store_shards(store)) == 2


def test_parquet_files_of_others_are_left_out(store):
    store.add(make_result("a"))
    other = store_shards(store)[0].with_name("other.parquet")
    table = pq.read_table(store_shards(store)[0], partitioning=None)
    foreign = [
        pa.table({"x": [1, 2]}),
        table.slice(0, 0),
        table.drop_columns("metadata"),
        table.set_column(0, "model", pa.array([3])),
    ]
    for each in foreign:
        pq.write_table(each, other)
        with pytest.warns(LlfastWarning, match=r"other\.parquet must be a whole shard"):
            assert store.matrix().models == ("a",)
    pq.write_table(table.append_column("more", pa.array([1])), other)
    assert len(store.rows()) == 1, "a column more does no harm"


def test_rows_of_another_length_are_refused(store):
    store.add(make_result("a"))
    shard = store_shards(store)[0]
    table = pq.read_table(shard, partitioning=None)
    column = table.column_names.index("loglikelihoods")
    shorter = pa.array([[-1.0, -2.0]], table.schema.field(column).type)
    pq.write_table(table.set_column(column, table.schema.field(column), shorter), shard)
    for read in (store.matrix, lambda: store.load(store.rows()[0])):
        with pytest.raises(StoreError, match="must have 8 loglikelihoods a model, got 2 for a"):
            read()


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"ids": ["a"]}', b"\xff\xfe"])
def test_a_damaged_description_of_the_texts_is_said_and_mended(store, content):
    store.add(make_result("a"))
    path = store_shards(store)[0].with_name("_texts.json")
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"_texts\.json must describe the texts") as caught:
        store.matrix()
    assert str(path) in str(caught.value)
    store.add(make_result("b"))
    assert store.matrix().models == ("a", "b")
    assert store.matrix().ids == make_result("a").ids


# ------------------------------------------------------------------------------ no store


def test_a_folder_with_other_things_is_refused_and_not_touched(tmp_path):
    (tmp_path / "photos" / "2019").mkdir(parents=True)
    (tmp_path / "photos" / "2019" / "sea.jpg").write_bytes(b"\xff\xd8")
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match="photos must be a store or an empty folder") as caught:
        Store(tmp_path / "photos")
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=r"sea\.jpg must be a store or an empty folder"):
        Store(tmp_path / "photos" / "2019" / "sea.jpg")
    assert snapshot(tmp_path) == before


def test_an_empty_folder_becomes_a_store_with_the_first_result(tmp_path):
    store = Store(tmp_path)
    assert store.rows() == []
    assert list(tmp_path.iterdir()) == []
    store.add(make_result("a"))
    assert Store(tmp_path).matrix().models == ("a",)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (b'{"format": 2}', "must be a store of format 1, got 2; use the llfast that wrote it"),
        (b"", "must name the store's format"),
        (b"[]", "must name the store's format"),
        (b"[" * 100_000, "must name the store's format"),
        (b"\xff", "must name the store's format"),
    ],
)
def test_a_store_of_another_format_is_refused(store, marker, message):
    store.add(make_result("a"))
    (path,) = store.folder.glob("*.json")
    path.write_bytes(marker)
    with pytest.raises(StoreError, match=message):
        Store(store.folder)


# ------------------------------------------------------------------------------ disks

WRITE = """
import sys
from llfast import Store
from tests.stores import make_result
store = Store(sys.argv[1])
try:
    for number in range(1000):
        store.add(make_result(f"m{number}", n=2000))
except OSError as error:
    print(number, len(store.rows()), len(store.matrix()) if number else 0)
    print(error)
    left = [path for path in store.folder.rglob("*") if path.name.endswith(".tmp")]
    print(len(left))
"""


def check_full(output, folder, reason):
    added, message, left = output.splitlines()  # so the message is one line
    count, rows, models = map(int, added.split())
    assert count == rows == models
    assert reason in message
    assert str(folder) in message
    assert left == "0", "nothing half-written is left"
    return count


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    run = run_with_mount('mount -t tmpfs -o size=256k tmpfs "$1"', WRITE, tmp_path)
    assert check_full(run.stdout, tmp_path, "No space left on device") > 2
    assert list(tmp_path.iterdir()) == [], "it was on the small disk"


def test_a_file_that_may_not_grow_is_one_line_and_loses_nothing(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n" + WRITE
    more = limit.replace("n=2000)", "n=2000 if number < 3 else 20_000, textset_digest=str(number))")
    run = run_python(more.replace("len(store.matrix())", "len(store.rows())"), tmp_path / "s")
    assert check_full(run.stdout, tmp_path, "File too large") == 3


def test_a_compaction_without_space_loses_nothing(store):
    for number in range(8):
        store.add(make_result(f"m{number}", n=500))
    before = store_contents(store)
    biggest = max(shard.stat().st_size for shard in store_shards(store))
    run = run_python(
        """
import resource, sys
from llfast import Store
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    Store(sys.argv[1]).compact()
except OSError as error:
    print(error)
""",
        store.folder,
        biggest + 1000,
    )
    (message,) = run.stdout.splitlines()
    assert "File too large" in message
    assert str(store.folder) in message
    assert store_contents(store) == before
    assert len(store_shards(store)) == 8


def test_a_read_only_store_is_read_and_refuses_results_in_one_line(store):
    store.add(make_result("a"))
    store.add(make_result("b"))
    before = snapshot(store.folder)
    run = run_with_mount(
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"',
        """
import sys
from llfast import Store
from tests.stores import make_result
store = Store(sys.argv[1])
store.prepare()
print(*store.matrix().models)
for act in (
    lambda: store.add(make_result("c")),
    lambda: store.add_failure(make_result("d", textset_digest="e" * 64).key, "reason"),
    lambda: store.compact(),
):
    try:
        act()
    except OSError as error:
        print(error)
""",
        store.folder,
    )
    models, *messages = run.stdout.splitlines()
    assert models == "a b"
    assert len(messages) == 3
    for message in messages:
        assert "Read-only file system" in message
        assert str(store.folder) in message
    assert snapshot(store.folder) == before

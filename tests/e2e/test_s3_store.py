"""A store at s3://, on a server that is S3's like, with writers who are killed."""

import os
import time

import numpy as np
import pytest

from llfast import KLIndex, LlfastWarning, RemoteError, Store, StoreError, s3, shards
from llfast.files import atomic_write
from llfast.fleet.ledger import Ledger
from llfast.remote import to_path
from tests.s3 import call, keys, proxy
from tests.stores import (
    DIGEST,
    N,
    add_together,
    make_result,
    numbers,
    process,
    run_python,
    store_contents,
    tell,
)

DEADLINE_SECONDS = 60


@pytest.fixture
def url(bucket):
    return f"{bucket}/some/store"


def fill(store):
    """Results, one of them replaced, one removed; a failure; a matrix of three."""
    for model in "abcd":
        store.add(make_result(model, metadata={"family": model}))
    store.add(make_result("a", loglikelihoods=numbers("a, newer")))
    store.remove(["b"])
    store.add_failure(make_result("e").key, "it has burnt", attempts=2)
    add_together(store, ["x", "y", "z"])


def without_times(contents):
    return [(key, error, *rest) for key, error, _, *rest in contents]


def test_a_store_is_the_same_as_on_disk_to_the_bit(url, tmp_path):
    remote, local = Store(url), Store(tmp_path / "store")
    for store in (remote, local):
        fill(store)
    for _ in range(2):
        assert without_times(store_contents(remote)) == without_times(store_contents(local))
        assert remote.matrix().values.tobytes() == local.matrix().values.tobytes()
        assert remote.textsets() == local.textsets() == [DIGEST]
        for store in (remote, local):
            store.compact()
    shards = {f"textset={DIGEST}/{name}" for name in remote.shards(DIGEST)}
    assert set(keys(url)) == {"_llfast-store.json", f"textset={DIGEST}/_texts.json", *shards}
    ((name, size),) = remote.shards(DIGEST).items()
    assert size == len((to_path(url) / f"textset={DIGEST}" / name).read_bytes())
    assert str(remote.folder) == url


# ------------------------------------------------------------------------------ many processes

WRITE = """
import sys
from llfast import Store
from tests.stores import make_result
print("ready", flush=True)
input()
for number in range(15):
    Store(sys.argv[1]).add(make_result(f"{sys.argv[2]} {number}"))
    Store(sys.argv[1]).add(make_result("both"))
print("done", flush=True)
"""

COMPACT = """
import sys
from pathlib import Path
from llfast import Store
print("ready", flush=True)
input()
count = 0
while not Path(sys.argv[2]).exists():
    Store(sys.argv[1]).compact()
    count += 1
print(count, flush=True)
"""


def test_writers_compactions_and_a_reader_lose_and_double_nothing(url, tmp_path):
    store, enough, seen, reads = Store(url), tmp_path / "enough", set(), 0
    store.prepare()
    expected = {"both", *(f"{name} {number}" for name in "xy" for number in range(15))}
    with (
        process(WRITE, url, "x") as one,
        process(WRITE, url, "y") as other,
        process(COMPACT, url, enough) as compacts,
        process(COMPACT, url, enough) as too,
    ):
        for each in (one, other, compacts, too):
            tell(each)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while seen != expected and time.monotonic() < deadline:
            if not (rows := [row for row in store.rows() if row.error is None]):
                continue
            for part, values in store.scan(rows, block_bytes=3 * 8 * N):
                np.testing.assert_array_equal(values, [numbers(rows[n].label) for n in part])
            labels = [row.label for row in rows]
            assert len(set(labels)) == len(labels)
            assert seen <= set(labels), "what was there once stays there"
            seen, reads = set(labels), reads + 1
        assert one.stdout.readline() == other.stdout.readline() == "done\n"
        enough.touch()
        assert int(compacts.stdout.readline()) + int(too.stdout.readline()) > 3
    assert seen == expected
    assert reads > 2
    store.compact()
    assert len(store.shards(DIGEST)) == 1
    matrix = store.matrix()
    assert set(matrix.models) == expected
    np.testing.assert_array_equal(matrix.values, [numbers(model) for model in matrix.models])


# A process that forks others: each kills itself before one of the requests that change a bucket.
KILLED = """
import os, signal, sys
from llfast import Store, compaction, s3
from tests.stores import die_before, make_result
print("ready", flush=True)
for line in sys.stdin:
    what, step = line.split()
    child = os.fork()
    if not child:
        store, left = Store(sys.argv[1]), [int(step)]
        for name in ("_write", "remove"):
            die_before(s3, name, left)
        if what == "compact":
            compaction.GROUP_BYTES, compaction.SHARD_BYTES = 600, 1
            store.compact()
        else:
            s3._PART_BYTES = 2048  # a shard is sent in parts
            store.add(make_result(what))
        os._exit(0)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]), flush=True)
"""


def contents(store):
    """By key: when it was made, and its numbers."""
    return {
        row.key: (row.created, store.load(row).values.tolist())
        for row in store.rows()
        if row.error is None
    }


def test_a_writer_killed_at_any_request_leaves_its_row_or_nothing(url):
    step, killed, lost = 0, True, 0
    with process(KILLED, url) as killer:
        while killed:
            before = contents(Store(url))
            tell(killer, f"m{step} {step}")
            killed = killer.stdout.readline() == "True\n"
            after = contents(Store(url))
            assert before.items() <= after.items()
            assert {key.model for key in after.keys() - before.keys()} <= {f"m{step}"}
            lost += after == before
            step += 1
    assert after != before, "the last one was not killed"
    assert lost > 3, "of the parts of an upload, too"
    bucket = url.removeprefix("s3://").partition("/")[0]
    assert call("list_multipart_uploads", Bucket=bucket)["Uploads"], "nobody sees what they sent"


def test_a_compaction_killed_at_any_request_leaves_every_row(url):
    store = Store(url)
    step, killed = 0, True
    with process(KILLED, url) as killer:
        while killed:
            for model in "ab":
                store.add(make_result(model))
            before = contents(store)
            tell(killer, f"compact {step}")
            killed = killer.stdout.readline() == "True\n"
            assert contents(store) == before
            step += 1
    assert step > 4
    store.compact()
    assert contents(store) == before


# ------------------------------------------------------------------------------ what is sent


@pytest.fixture
def between(bucket, monkeypatch):
    """A proxy that all requests pass from now on."""
    with proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def test_what_is_to_be_done_is_known_without_the_numbers(url, between):
    store, n = Store(url), 100_000
    for model in "abcd":
        store.add(make_result(model, n=n))
    add_together(store, [f"x{number}" for number in range(8)], n=n, digest="e" * 64)
    for digest, of_all in ((DIGEST, 0.15), ("e" * 64, 0.03)):
        (size,) = {sum(store.shards(digest).values())}
        for look in (store.rows, lambda digest: Ledger(store, digest, "paper").refresh()):
            before = between.fetched
            look(digest)
            assert between.fetched - before < of_all * size


def test_a_connection_that_breaks_is_told_in_a_line_and_nothing_is_half_there(
    url, between, monkeypatch
):
    store = Store(url)
    store.add(make_result("a", n=100_000))
    before = contents(store)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # or it takes a minute
    for look in (store.rows, store.matrix, store.compact):
        between.most_fetched = between.fetched + 20_000  # a shard's names are within that
        with pytest.raises(RemoteError, match=r"\.parquet cannot be read: ") as caught:
            look()
        assert "\n" not in str(caught.value)
    between.most_fetched = None
    between.most_sent = between.sent + 200_000
    with pytest.raises(RemoteError, match="cannot be (written|looked up): "):
        store.add(make_result("b", n=100_000))
    between.most_sent = None
    assert contents(store) == before
    assert len(store.shards(DIGEST)) == 1
    store.add(make_result("b", n=100_000))
    assert store.matrix().models == ("a", "b")


def test_what_is_not_written_to_its_end_is_not_there(url, monkeypatch):
    monkeypatch.setattr(s3, "_PART_BYTES", 1000)
    for size in (10, 5000):  # of which parts have been sent
        with pytest.raises(ZeroDivisionError), atomic_write(to_path(url) / "file") as file:
            file.write(bytes(size))
            size / 0
    assert keys(url) == []
    assert "Uploads" not in call("list_multipart_uploads", Bucket=url.split("/")[2])
    content = bytes(range(250)) * 21
    with atomic_write(to_path(url) / "file") as file:
        for start in range(0, len(content), 700):
            file.write(content[start : start + 700])
        assert keys(url) == []
    assert (to_path(url) / "file").read_bytes() == content


def test_a_damaged_shard_is_left_out_with_a_warning(url):
    store = Store(url)
    for model in "ab":
        store.add(make_result(model))
    name = min(store.shards(DIGEST))
    shard = store.partition(DIGEST) / name
    for whole in (shard.read_bytes()[:-9], b""):
        shard.write_bytes(whole)
        with pytest.warns(LlfastWarning, match=f"left out of the store: {shard} must be a whole"):
            assert store.matrix().models == ("b",)


def test_what_is_no_store_is_left_alone(url):
    (to_path(url) / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match="must be a store or an empty folder"):
        Store(url)
    (to_path(url) / "_llfast-store.json").write_bytes(b'{"format": 99}')
    with pytest.raises(StoreError, match="must be a store of format 1, got 99"):
        Store(url)


def test_many_shards_are_listed_page_by_page(url, monkeypatch):
    store = Store(url)
    for number in range(7):
        store.add(make_result(f"m{number}"))
    ask = s3._request
    monkeypatch.setattr(
        s3,
        "_request",
        lambda done, method, place, **arguments: ask(
            done, method, place, **arguments, **({"MaxKeys": 2} if "list" in method else {})
        ),
    )
    assert len(store.shards(DIGEST)) == 7
    assert len(store.rows()) == 7
    assert store.compact() == 7
    assert len(store.shards(DIGEST)) == 1


def test_a_row_whose_shard_goes_while_it_is_read_is_found_again(url, monkeypatch):
    store = Store(url)
    monkeypatch.setattr(shards, "_REQUEST_BYTES", 1)  # or it would be here before it goes
    monkeypatch.setattr(s3, "_AHEAD_BYTES", 0)
    n = 30_000
    add_together(store, [f"m{number}" for number in range(6)], n=n)
    add_together(store, ["other"], n=n)
    rows = [row for row in store.rows() if row.label != "other"]
    found = {}
    for part, values in store.scan(rows, block_bytes=8 * n):
        for number, value in zip(part, values, strict=True):
            assert number not in found
            found[number] = value.tolist()
        if len(found) == 1:
            assert store.compact() == 2
    assert found == {n_: numbers(row.label, n).tolist() for n_, row in enumerate(rows)}


def test_an_index_is_kept_on_this_machine_and_follows_the_store(url, tmp_path, monkeypatch):
    monkeypatch.setenv("LLFAST_CACHE", str(tmp_path / "cache"))
    store = Store(url)
    for model in "abcd":
        store.add(make_result(model))
    index = KLIndex.build(store, "exact")
    assert not [key for key in keys(url) if "index" in key]
    store.remove(["b"])
    store.add(make_result("e"))
    index.refresh()
    assert sorted(index.names) == ["a", "c", "d", "e"]
    assert list((tmp_path / "cache" / "index").iterdir())


def test_a_process_and_its_fork_can_both_ask(url):
    code = """
import os, sys
from llfast import Store
from tests.stores import make_result
Store(sys.argv[1]).add(make_result("before"))
child = os.fork()
Store(sys.argv[1]).add(make_result("parent" if child else "child"))
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0)
"""
    run_python(code, url)
    assert Store(url).matrix().models == ("before", "child", "parent")

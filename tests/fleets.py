"""Lists of tiny models for fleets, what they score alone, and workers that ask at once."""

import json
import threading
from collections import Counter

import pyarrow.parquet as pq
import torch

from llfast import Store
from llfast.fleet import score_models
from llfast.fleet.leases import Leases
from llfast.model_list import read_model_list
from tests.tiny import copy_checkpoint, one_thread

KINDS = ("gpt2", "llama")
OPTIONS = {"token_budget": 64, "dtype": "float32"}


def make_list(folder, checkpoints, count, name="org/{kind}-{number}", *, others=None):
    """A list of models, no two alike.

    Args:
        folder: where models and list go.
        checkpoints: the folder of those that they are made from, gpt2 and llama in turn.
        count: how many.
        name: what they are called.
        others: lines to be put in, by their place.
    """
    rng = torch.Generator().manual_seed(0)

    def shake(_, weight):
        return weight + 0.01 * torch.randn(weight.shape, generator=rng)

    lines = []
    for number in range(count):
        kind = KINDS[number % 2]
        model = copy_checkpoint(checkpoints / kind, folder / f"{kind}-{number}", shake)
        called = name.format(kind=kind, number=number)
        lines.append({"model": str(model), "name": called, "family": kind, "number": number})
    for place, line in (others or {}).items():
        lines.insert(place, line)
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score_alone(path, texts, store):
    """The truth: what one process after the other gives, with one thread."""
    texts.save(path.parent / "texts.jsonl")
    with one_thread():
        score_models(read_model_list(path), texts, Store(store), **OPTIONS)
    return Store(store)


def check_all_stored(store, truth, *, count, failed):
    """Every healthy model once, to the bit; the others with their reasons."""
    found, expected = store.matrix(), truth.matrix()
    assert found.models == expected.models
    assert len(found.models) == count
    assert found.values.tobytes() == expected.values.tobytes()
    shards = store.folder.glob("textset=*/*.parquet")
    rows = [row for shard in shards for row in pq.ParquetFile(shard).read().to_pylist()]
    stored = Counter(row["model"] for row in rows if row["status"] == "complete")
    assert set(stored.values()) == {1}
    reasons = {row.key.model: row.error for row in store.rows() if row.error is not None}
    assert reasons == {r.key.model: r.error for r in truth.rows() if r.error is not None}
    assert reasons.keys() == failed


def ask_at_once(folder, subject, count):
    """What as many workers are given who ask for one lease at the same moment."""
    workers = [Leases(folder, seconds=10) for _ in range(count)]
    start, taken = threading.Barrier(count), []

    def ask(worker):
        start.wait(30)
        taken.append(worker.take(subject))

    threads = [threading.Thread(target=ask, args=(each,)) for each in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken

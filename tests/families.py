"""Checkpoints that share tensors."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import llfast
from llfast.errors import LlfastWarning
from llfast.paging import LoadingStatistics
from tests.paging import check_same, least_budget
from tests.tiny import TEXTS, make_model, save

FEW = TEXTS[1::2]
OPTIONS = {"token_budget": 64, "per_token": True, "weights": "paged"}


def make_family(folder, kind, tokenizer, changes, dtype=torch.float32, **sizes):
    """A base, and for each of `changes` a checkpoint that differs from it where it says.

    A change is (seed, predicate of stored names): equal seeds make equal numbers. Files are older
    than what a cache would take for still being written.
    """
    base = save(make_model(kind, **sizes).to(dtype), tokenizer, folder / f"{kind}-base")
    members = [base]
    for number, (seed, is_changed) in enumerate(changes):
        members.append(fine_tune(base, folder / f"{kind}-{number}", seed, is_changed))
    for member in members:
        age(member)
    return members


def fine_tune(base, copy, seed, is_changed, *, metadata=None):
    """A copy with other numbers where it is changed; `metadata` makes a longer header."""
    copy.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(base / "model.safetensors").items():
        noise = 0.02 * torch.randn(weight.shape, generator=generator)
        weights[name] = (weight + noise).to(weight.dtype) if is_changed(name) else weight.clone()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt", **(metadata or {})})
    age(copy)
    return copy


def age(folder):
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


def second_layer(name):
    return "layers.1." in name or "h.1." in name


def second_norm(name):
    return "layers.1." in name and norm(name)


def embedding(name):
    return "embed" in name or "wte" in name


def norm(name):
    return "norm" in name or "ln_" in name


CHANGES = [(1, second_layer), (2, second_layer), (3, embedding), (4, norm), (1, second_layer)]


def together(folders, texts=FEW, memory_budget="1GiB", **options):
    """Results, and what loading took."""
    loading = LoadingStatistics()
    results = llfast.score_many(
        folders, texts, memory_budget=memory_budget, loading=loading, **OPTIONS | options
    )
    return results, loading


def alone(folders, texts=FEW, **options):
    return [
        llfast.score(each, texts, memory_budget="1GiB", **OPTIONS | options) for each in folders
    ]


def check_together(folders, memory_budget="1GiB", **options):
    results, loading = together(folders, memory_budget=memory_budget, **options)
    for result, expected in zip(results, alone(folders, **options), strict=True):
        check_same(result, expected)
        assert result.model == expected.model
        assert result.revision == expected.revision
    assert len({result.values.tobytes() for result in results}) > 1, "the truth tells them apart"
    return loading


def least_together(folders, **options):
    """The least budget that lets them go together."""
    too_little = least_budget(folders[0], FEW, token_budget=64, **options)
    with pytest.warns(LlfastWarning, match="one after the other, for memory_budget must") as caught:
        together(folders, memory_budget=too_little, **options)
    return int(str(caught[0].message).rpartition(" ")[2].replace(",", "")) + 1

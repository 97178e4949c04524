"""Checkpoints that share tensors."""

import os

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_model, save


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

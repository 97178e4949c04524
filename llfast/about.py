"""Facts about this machine, a store or a checkpoint, for people who ask."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, cache
from .checkpoint import is_adapter
from .errors import StoreError
from .remote import is_remote
from .rows import StoredRow
from .store import Store

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "pyarrow",
    "duckdb",
    "faiss-cpu",
    "faiss-gpu",
    "s3fs",
)


def describe(
    target: str | None, adapter_base: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts by name, and rows of a table, about a store, a checkpoint, or (None) this machine.

    Args:
        target: a folder, a Hub id, or s3://bucket/prefix.
        adapter_base: the model that a LoRA adapter belongs to.

    Raises:
        StoreError: if a folder is neither store nor checkpoint.
        CheckpointError: if a checkpoint cannot be used.
    """
    if target is None:
        return _machine(), []
    if is_remote(target) and adapter_base is None:
        store = Store(target)
        if not store.folder.is_dir():
            raise StoreError(f"{store.folder} must be a store, got nothing there")
        return _store(store)
    if adapter_base is not None or _is_model(Path(target)):
        return _checkpoint(target, adapter_base), []
    return _store(Store(target))


def _is_model(folder: Path) -> bool:
    """Whether it is no store, but a model, or what `open_model` has the right words for."""
    if (folder / "config.json").exists() or not folder.exists():
        return True
    others = ("*.gguf", "consolidated*.safetensors")
    return is_adapter(folder) or any(path for each in others for path in folder.glob(each))


def _machine() -> dict[str, Any]:
    import torch

    from .devices import device_name
    from .kernels import instruction_set

    facts: dict[str, Any] = {"llfast": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["processor"] = device_name(torch.device("cpu"))
    facts["cpu kernel"] = instruction_set()
    facts["threads"] = torch.get_num_threads()
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["cuda devices"] = ", ".join(cuda) or "none"
    try:
        facts["cache"] = str(cache.folder())
    except FileNotFoundError as error:
        facts["cache"] = f"none: {error.strerror}"
    return facts


def _checkpoint(target: str, adapter_base: str | None) -> dict[str, Any]:
    from .models import open_model

    source = open_model(target, adapter_base=adapter_base)
    assert source.checkpoint is not None
    base = {} if adapter_base is None else {"adapter base": adapter_base}
    return {
        "model": source.name,
        **base,
        "revision": source.revision,
        "architecture": ", ".join(source.config.architectures or [source.config.model_type]),
        "parameters": source.checkpoint.parameters,
        "stored dtype": source.checkpoint.stored_dtype,
        "weight bytes": source.checkpoint.weight_bytes,
        "weight files": len(source.checkpoint.weights),
    }


def _store(store: Store) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = store.rows()
    models = [row for row in rows if row.key.layer is None]
    facts = {
        "store": str(store.folder),
        "complete": sum(row.error is None for row in models),
        "failed": sum(row.error is not None for row in models),
        "layers": len(rows) - len(models),
        "texts": {
            digest: len(store.texts(digest)["ids"])
            for digest in store.textsets()
            if any(row.key.textset_digest == digest and row.error is None for row in rows)
        },
    }
    table = [
        {
            "model": label,
            "revision": row.key.revision,
            "text set": row.key.textset_digest,
            "convention": row.key.convention,
            "dtype": row.key.dtype,
            "head": row.provenance.get("head", ""),
            "status": row.error or "complete",
            "when": row.created.isoformat(timespec="seconds"),
        }
        for label, row in _lines(rows)
    ]
    return facts, table


def _lines(rows: Sequence[StoredRow]) -> list[tuple[str, StoredRow]]:
    """A row a model, and the newest of those of its layers."""
    groups: dict[tuple[Any, ...], list[StoredRow]] = {}
    for row in sorted(rows, key=lambda each: each.key.model):
        kind = row.key._replace(layer=None), row.key.layer is None, row.error
        groups.setdefault(kind, []).append(row)
    lines = []
    for group in groups.values():
        row = max(group, key=lambda each: each.created)
        layers = f"{row.key.model} at {len(group)} layers"
        lines.append((row.label if row.key.layer is None else layers, row))
    return lines

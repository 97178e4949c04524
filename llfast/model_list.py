"""Which models are to be scored, and files that list them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import as_utf8

_WORDS = "model name revision tokenizer adapter_base dtype weights memory_budget".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One model to score.

    Attributes:
        model: a checkpoint folder or Hub id.
        name: what to call it; its path or id by default.
        revision: branch, tag or commit of a Hub id.
        tokenizer: the folder of another tokenizer.
        adapter_base: the model that a LoRA adapter belongs to.
        dtype: what it runs in, if not what all others do.
        weights: how its weights are had, if not as those of all others: "resident", "paged".
        memory_budget: for them, "8GiB".
        trust_remote_code: let its checkpoint bring code of its own.
        metadata: columns to keep with the result.
    """

    model: str
    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    adapter_base: str | None = None
    dtype: str | None = None
    weights: str | None = None
    memory_budget: str | None = None
    trust_remote_code: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_model_list(path: str | Path) -> list[ModelRequest]:
    """Models from a file: a name or path a line, or (.jsonl) one object a line.

    An object has `model`, and may have the other fields of `ModelRequest`; what else it has is
    metadata. Empty lines and lines that begin with # are passed over.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if there is no model, or with the line, if one cannot be used.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got {error}") from None
    requests = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        if path.suffix == ".jsonl":
            requests.append(_parse_request(line, where))
        elif line.lstrip().startswith("{"):
            raise ValueError(
                f"{where} must be a name or path, got {line[:60]!r}; for a list of objects, end "
                "its name in .jsonl"
            )
        else:
            requests.append(ModelRequest(model=line.strip()))
    if not requests:
        raise ValueError(f"{path} must name a model a line, got none")
    return requests


def _parse_request(line: str, where: str) -> ModelRequest:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be a JSON object, got {error}") from None
    model = fields.get("model") if isinstance(fields, dict) else None
    if not (isinstance(model, str) and model.strip()):
        raise ValueError(f'{where} must be an object with a string "model", got {line[:60]!r}')
    trusted = fields.pop("trust_remote_code", False)
    if not isinstance(trusted, bool):
        raise ValueError(f"{where}: trust_remote_code must be true or false, got {trusted!r}")
    own: dict[str, Any] = {"trust_remote_code": trusted}
    for name in _WORDS:
        value = fields.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be a string, got {value!r}")
        if value is not None and as_utf8(value) != value:
            raise ValueError(f"{where}: {name} must be text, got {as_utf8(value)}")
        own[name] = value or None
    nested = fields.pop("metadata", None) or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{where}: metadata must be an object, got {nested!r}")
    return ModelRequest(**own, metadata=fields | nested)

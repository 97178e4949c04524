"""A model's layers in a store: scored once, and compared with one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .errors import SpaceError
from .layers import score_layers
from .models import open_model
from .results import KLEstimate, LogLikelihoodMatrix, LogLikelihoods
from .runs import result_key
from .space import ModelSpace
from .store import Store
from .storefiles import refuse_unwritable_store
from .texts import TextSet


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReading:
    """What a model says at one layer.

    Attributes:
        layer: its number; 0 is what enters the first.
        bits_per_byte: of all texts.
        kl_to_next: KL divergence to the layer after it; None for the last.
        kl_to_output: to the last; None for that.
    """

    layer: int
    bits_per_byte: float
    kl_to_next: KLEstimate | None
    kl_to_output: KLEstimate | None


def store_layers(
    model: str,
    texts: TextSet,
    store: Store,
    *,
    tokenizer: str | None = None,
    convention: str = "paper",
    dtype: str = "auto",
    device: str = "auto",
    token_budget: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    adapter_base: str | None = None,
) -> tuple[list[LogLikelihoods], bool]:
    """Put a model's layers into a store, all in one shard; what is there already is not scored.

    Each says in its metadata how many there are (`layers`), so that a store that lacks some of
    them, if only the last, is not taken for one that has all.

    Args:
        model: a folder or a Hub id.
        texts: N texts.
        store: where results go.
        tokenizer: the folder of another one.
        convention: as for `score_layers`, and so are:
        dtype: "auto" or a dtype.
        device: "auto" or a device.
        token_budget: the most tokens in a batch.
        name: what to call the model.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: let the checkpoint bring code of its own.
        allow_pickle: let weights be pickles.
        adapter_base: the model that a LoRA adapter belongs to.

    Returns: a result a layer, and whether they had to be scored.

    Raises:
        LlfastError: as `score_layers`, and as `compare_layers` of texts.
        OSError: if the store cannot be written. It is made with the first results alone.
    """
    source = open_model(
        model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        adapter_base=adapter_base,
    )
    key = result_key(source, texts, convention=convention, dtype=dtype, device=device)
    stored = {
        row.key.layer: row
        for row in store.rows(texts.digest)
        if row.error is None and row.key.layer is not None and row.key._replace(layer=None) == key
    }
    counts = {row.metadata.get("layers") for row in stored.values()}
    if counts == {len(stored)}:
        return [store.load(stored[layer]) for layer in range(len(stored))], False
    refuse_unwritable_store(store.folder)
    results = score_layers(
        source,
        texts,
        convention=convention,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
    )
    _refuse_unscored(results)
    results = [replace(each, metadata={"layers": len(results)}) for each in results]
    store.add_all(results)
    return results, True


def compare_layers(results: Sequence[LogLikelihoods]) -> list[LayerReading]:
    """KL divergences between layers of one model, in a space of these layers alone.

    Args:
        results: of all layers, as `score_layers` gives them.

    Raises:
        SpaceError: if no text has a scored token, or bytes, which KL is counted by.
    """
    _refuse_unscored(results)
    first, last = results[0], len(results) - 1
    names = [str(number) for number in range(len(results))]
    space = ModelSpace.fit(
        LogLikelihoodMatrix(
            names,
            np.array([result.values for result in results]),
            first.text_bytes,
            ids=first.ids,
            groups=first.groups,
            textset_digest=first.textset_digest,
            convention=first.convention,
        )
    )
    return [
        LayerReading(
            layer=number,
            bits_per_byte=result.mean_bits_per_byte,
            kl_to_next=None if number == last else space.kl(names[number], names[number + 1]),
            kl_to_output=None if number == last else space.kl(names[number], names[last]),
        )
        for number, result in enumerate(results)
    ]


def _refuse_unscored(results: Sequence[LogLikelihoods]) -> None:
    """Layers that have said nothing would all seem to be equal."""
    counts = results[-1].token_counts
    if not counts.any():
        raise SpaceError(
            f"texts must have a scored token for layers to be compared, got none in {len(counts)} "
            "texts; give longer ones, or score their first token, too, with convention 'always-bos'"
        )

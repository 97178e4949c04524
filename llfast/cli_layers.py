"""`llfast layers`: the logit lens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import (
    AdapterBase,
    AllowPickle,
    AsJson,
    Convention,
    Device,
    Dtype,
    Revision,
    StorePath,
    TextsPath,
    TokenBudget,
    TokenizerFolder,
    TrustRemoteCode,
)
from .output import print_json, print_line, print_table

if TYPE_CHECKING:
    from .results import KLEstimate


def layers_command(
    model: Annotated[str, typer.Argument(help="A folder or a Hub id.")],
    texts: TextsPath,
    store: StorePath,
    name: Annotated[str | None, typer.Option(help="What to call the model.")] = None,
    revision: Revision = None,
    convention: Convention = "paper",
    dtype: Dtype = "auto",
    device: Device = "auto",
    token_budget: TokenBudget = None,
    tokenizer: TokenizerFolder = None,
    adapter_base: AdapterBase = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Score a model at each of its layers, through its final norm and head, and compare them."""
    from .store import Store
    from .stored_layers import compare_layers, store_layers
    from .texts import TextSet

    results, is_new = store_layers(
        model,
        TextSet.load(texts),
        Store(store),
        tokenizer=tokenizer,
        convention=convention,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
        name=name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        adapter_base=adapter_base,
    )
    output, layers = results[-1], compare_layers(results)
    if as_json:
        facts = {"model": output.model, "revision": output.revision, "dtype": output.dtype}
        status = "scored" if is_new else "skipped"
        print_json(facts | {"status": status, "layers": layers})
        return
    if not is_new:
        print_line(f"skipped  {output.model} at {len(results)} layers: in the store already")
    print_table(
        ["layer", "bits/byte", "KL to the next (bits/byte)", "to the output"],
        [
            (
                each.layer,
                each.bits_per_byte,
                _with_error(each.kl_to_next),
                _with_error(each.kl_to_output),
            )
            for each in layers
        ],
        title=f"{output.model} at each layer",
    )


def _with_error(kl: KLEstimate | None) -> str:
    return "" if kl is None else f"{kl.value:.4g} ± {kl.standard_error:.2g}"

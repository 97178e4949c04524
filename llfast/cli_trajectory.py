"""`llfast trajectory`: how a model moved while it was trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import (
    AdapterBase,
    AllowPickle,
    AsJson,
    Convention,
    Device,
    Dtype,
    MemoryBudget,
    StorePath,
    TextsPath,
    TokenBudget,
    TokenizerFolder,
    TrustRemoteCode,
    UsageError,
    Weights,
)
from .output import print_json, print_line, print_outcome, print_table

if TYPE_CHECKING:
    from .trajectory import Trajectory


def trajectory_command(
    texts: TextsPath,
    store: StorePath,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="A Hub id; or folders after --checkpoints."),
    ] = None,
    revisions: Annotated[
        str | None, typer.Option(help="Its revisions, with commas: step1000,step2000.")
    ] = None,
    checkpoints: Annotated[
        list[str] | None, typer.Option(help="Instead: folders, as in --checkpoints runs/step*.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="The step of each, with commas, if names do not say it.")
    ] = None,
    clip_quantile: Annotated[
        float, typer.Option(help="The share of log-likelihoods that is clipped; 0 for none.")
    ] = 0.02,
    drop: Annotated[
        float, typer.Option(help="The share of texts dropped for their jumps; 0 for none.")
    ] = 0.03,
    warm_up: Annotated[int, typer.Option(help="Only jumps from this step on count.")] = 0,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Leave out distances between weights.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .svg or .pdf.")] = None,
    convention: Convention = "paper",
    dtype: Dtype = "auto",
    device: Device = "auto",
    token_budget: TokenBudget = None,
    weights: Weights = "auto",
    memory_budget: MemoryBudget = None,
    tokenizer: TokenizerFolder = None,
    adapter_base: AdapterBase = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Follow a model through its training: KL from step to step, its path, how fast it moves."""
    from .drawing import refuse_undrawable
    from .model_list import ModelRequest
    from .store import Store
    from .texts import TextSet
    from .trajectory_plots import draw_trajectory
    from .trajectory_scoring import trajectory_of

    folders = [*(checkpoints or ()), *(models or ())]
    if (revisions is None) == (checkpoints is None):
        raise UsageError("give either MODEL --revisions A,B or --checkpoints DIR DIR")
    if revisions is not None and len(folders) != 1:
        raise UsageError(f"--revisions goes with one MODEL, got {len(folders)}")
    if plot is not None:
        refuse_undrawable(plot)
    requests = [
        ModelRequest(model=each, tokenizer=tokenizer, adapter_base=adapter_base) for each in folders
    ]
    if revisions is not None:
        named = [each.strip() for each in revisions.split(",")]
        if not all(named):
            raise UsageError(f"--revisions must be names with commas, got {revisions!r}")
        requests = [
            replace(requests[0], revision=each, name=f"{folders[0]}@{each}") for each in named
        ]
    found = trajectory_of(
        requests,
        TextSet.load(texts),
        Store(store),
        steps=None if steps is None else _numbers(steps),
        clip_quantile=clip_quantile,
        drop_share=drop,
        warm_up=warm_up,
        compare_weights=not no_weights,
        convention=convention,
        dtype=dtype,
        device=device,
        token_budget=token_budget,
        weights=weights,
        memory_budget=memory_budget,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        report=None if as_json else print_outcome,
    )
    if plot is not None:
        draw_trajectory(found, plot)
    if as_json:
        print_json(found.summary())
        return
    first = (int(found.steps[0]), float(found.bits_per_byte[0]), None, None, None, None)
    others = zip(
        found.steps[1:].tolist(),
        found.bits_per_byte[1:].tolist(),
        found.from_previous,
        found.from_start,
        strict=True,
    )
    print_table(
        ["step", "bits/byte", "KL from previous", "±", "KL from start", "±"],
        [
            first,
            *(
                (step, bits, near.value, near.standard_error, far.value, far.standard_error)
                for step, bits, near, far in others
            ),
        ],
        title="Steps, KL in bits/byte with standard errors",
    )
    for name, fact in _facts(found).items():
        print_line(f"{name:24} {fact}")


def _facts(found: Trajectory) -> dict[str, str]:
    """What is printed below the table, a line each."""
    winding = f", {found.tortuosity:.2f} times as long" if found.tortuosity else ""
    if not found.kl.any():
        winding = ": all checkpoints say the same"
    facts = {
        "path": f"{found.path_length:.4g} √(bits/byte), straight {found.straight_length:.4g}"
        + winding
    }
    for space, exponents in (
        ("log-likelihood", found.diffusion),
        ("weight", found.weight_diffusion),
    ):
        if exponents is not None:
            facts[f"exponent, {space}"] = str(exponents)
    if found.clip is not None:
        share = 100 * found.clipped_share
        facts["clipped"] = f"{share:.1f} % of log-likelihoods, at {found.clip:.6g} nats"
    if found.dropped:
        listed = ", ".join((*found.dropped[:3], "...") if len(found.dropped) > 3 else found.dropped)
        facts["dropped"] = (
            f"{len(found.dropped)} of {len(found.dropped) + found.texts} texts, for jumps from "
            f"step {found.warm_up} on ({listed})"
        )
    return facts


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--steps must be whole numbers with commas, got {text!r}") from None

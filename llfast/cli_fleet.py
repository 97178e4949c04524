"""`llfast fleet`: many workers at one list of models."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_fleet_status import fleet_status_command
from .cli_options import (
    AllowPickle,
    AsJson,
    Attempts,
    Convention,
    Device,
    Dtype,
    Manifest,
    MemoryBudget,
    StorePath,
    TextsPath,
    TokenBudget,
    TrustRemoteCode,
    UsageError,
    Verify,
    Weights,
)
from .output import print_json, print_line, print_note, print_outcome

if TYPE_CHECKING:
    from .outcomes import Outcome

fleet_app = typer.Typer(help="Score a list of models with many workers.", no_args_is_help=True)
fleet_app.command("status")(fleet_status_command)

ModelList = Annotated[Path, typer.Option("--models", help="A file with a model a line, or .jsonl.")]


@fleet_app.command("score")
def fleet_score(
    texts: TextsPath,
    store: StorePath,
    models: ModelList,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Which worker this is; found in job arrays.")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="How many workers there are.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Hand models to a Ray cluster: auto, local, or where it is."
        ),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(min=0.01, help="With --ray, cores a model; one with GPUs, else a machine's."),
    ] = None,
    convention: Convention = "paper",
    dtype: Dtype = "auto",
    device: Device = "auto",
    token_budget: TokenBudget = None,
    weights: Weights = "auto",
    memory_budget: MemoryBudget = None,
    verify: Verify = False,
    manifest: Manifest = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    attempts: Attempts = 3,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try what has failed before, too.")
    ] = False,
    lease_seconds: Annotated[
        float, typer.Option(min=1, help="A worker that is silent for so long has lost its model.")
    ] = 120.0,
    wait: Annotated[
        bool, typer.Option(help="Stay while others are at models, to take over if they die.")
    ] = True,
    log: Annotated[
        Path | None, typer.Option(help="Append events to this file, a line of JSON each.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score what the store lacks of a list, as one of many workers on one store.

    With --ray, all workers of a cluster are its workers.
    """
    from .fleet import score_share
    from .fleet.events import JsonLog, no_log
    from .fleet.ranks import find_rank
    from .model_list import read_model_list
    from .store import Store
    from .texts import TextSet

    if ray is not None and (rank, world_size) != (None, None):
        raise UsageError("--rank and --world-size go without --ray, which hands out models")
    if ray is None and cpus is not None:
        raise UsageError("--cpus goes with --ray; other workers use the cores they are on")
    rank, world_size = (0, 1) if ray is not None else find_rank(rank, world_size)
    requests = read_model_list(models)
    ended: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        """Schedulers ask first: give models back to others, which then need not wait."""
        ended.append(number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    who: dict[str, Any] = {"rank": rank} if ray is None else {"ray": ray}
    options: dict[str, Any] = {
        "convention": convention,
        "dtype": dtype,
        "device": device,
        "token_budget": token_budget,
        "weights": weights,
        "memory_budget": memory_budget,
        "verify": verify if manifest is None else manifest,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "attempts": attempts,
        "retry_failed": retry_failed,
        "lease_seconds": lease_seconds,
        "wait": wait,
        "report": None if as_json else print_outcome,
        "log": no_log if log is None else JsonLog(log, **who),
    }
    opened = TextSet.load(texts), Store(store)
    if ray is not None:
        from .fleet.ray_driver import score_on_ray

        out = sys.stdout

        def report(outcome: Outcome) -> None:
            with contextlib.redirect_stdout(out):
                print_outcome(outcome)

        options["report"] = None if as_json else report
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where what Ray has to say belongs
                shared = score_on_ray(requests, *opened, address=ray, cpus=cpus, **options)
        except (KeyboardInterrupt, SystemExit):  # by Ray's own code, for what the handler raised
            if ended:
                sys.exit(128 + ended[0])
            raise
    else:
        shared = score_share(requests, *opened, rank=rank, world_size=world_size, **options)
    failed, left = shared.failed, shared.left
    if as_json:
        outcomes = [outcome.summary() for outcome in shared.outcomes]
        facts = {"models": len(requests), "rank": rank, "world_size": world_size}
        print_json(facts | {"outcomes": outcomes, "failed": sorted(failed), "left": left})
    else:
        by = f"worker {rank} of {world_size}" if ray is None else "the cluster"
        print_line(f"{by}: {len(shared.outcomes)} of {len(requests)} models")
    if failed:
        print_note(
            f"llfast: {len(failed)} of {len(requests)} models have failed; the store has why, and "
            "--retry-failed tries them again"
        )
    if left:
        print_note(f"llfast: others are at {len(left)} of {len(requests)} models")
    if failed or left:
        raise typer.Exit(1)

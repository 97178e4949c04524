"""The whole way on real models, with no network: train a zoo, score it, find its families again."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ScoringError
from .fleet import score_models
from .map_files import write_map
from .mapping import make_map
from .model_list import ModelRequest
from .outcomes import Outcome
from .search import Hit, KLIndex
from .space import ModelSpace
from .store import Store
from .texts import TextSet
from .zoo import build_zoo
from .zoo_corpora import installed_corpora
from .zoo_plan import ZooConfig, ZooModel


def run_demo(
    out: str | os.PathLike[str],
    *,
    config: ZooConfig | None = None,
    texts: int = 500,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, score, compare and draw a zoo of small models under `out`.

    What is there already is kept: a second run is short.

    Args:
        out: the folder for texts, models, results and the map.
        config: what to train; by default 17 models of four architectures.
        texts: how many texts to score.
        say: is called with each line of the report.

    Returns:
        The report: files, nearest relatives, and whether each light fine-tune's nearest relative
        outside its own run is of its family (`"families_found"`).

    Raises:
        ScoringError: if a model could not be scored.
        TextSetError: if the Python installation has no sources to train on.
        OSError: if `out` cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    corpora = installed_corpora()
    sample, documents = corpora.evaluation_texts(texts)
    sample.save(out / "texts.jsonl")
    say(
        f"{len(sample)} texts of up to 1,024 bytes from {documents} documents of this Python "
        "installation"
    )
    zoo = build_zoo(
        out / "zoo",
        config=config,
        corpora=corpora,
        progress=lambda model, done, total: say(f"  trained {model.name} ({done}/{total})"),
    )
    trained = time.monotonic()
    say(
        f"{len(zoo)} models of {len({model.architecture for model in zoo})} architectures in "
        f"{out / 'zoo'}, trained on other documents of the same kinds"
    )
    store = Store(out / "store")
    outcomes = score_models([_request(model) for model in zoo], sample, store, progress=None)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        raise ScoringError(
            f"all {len(zoo)} models must be scored, got {len(failed)} failures, the first of "
            f"{failed[0].request.name}: {failed[0].error}"
        )
    say(_scoring_line(outcomes, sample, time.monotonic() - trained))

    matrix = store.matrix(sample.digest, models=[model.name for model in zoo], duplicates="newest")
    space = ModelSpace.fit(matrix)
    index = KLIndex.build(space)
    nearest = {model: index.search(model, k=len(zoo)) for model in space.models}
    say("")
    say("The nearest three of each model, KL in bits/byte with its 95 % interval:")
    width = max(len(name) for name in space.models)
    for model in space.models:
        hits = (
            f"{hit.model:{width}} {hit.kl:.2f} [{hit.interval[0]:.2f}, {hit.interval[1]:.2f}]"
            for hit in nearest[model][:3]
        )
        say(f"  {model:{width}}  " + "  ".join(f"{hit:{width + 19}}" for hit in hits).rstrip())
    say("")
    checks = [
        _check(model, zoo, nearest[model.name])
        for model in zoo
        if model.relation in ("fine-tune", "heavy fine-tune")
    ]
    found = [check for check in checks if check["light"]]
    say(
        f"{sum(check['same_family'] for check in found)} of {len(found)} light fine-tunes have "
        "their base or a sibling as nearest relative outside their own run"
    )
    for check in checks:
        if not (check["light"] and check["same_family"]):
            verb = "is still at home" if check["same_family"] else "has left its family"
            say(f"  {check['model']} {verb}: nearest is {check['nearest']} at {check['kl']:.3f}")
    map_path, page_path = out / "map.png", out / "map.html"
    drawn = make_map(matrix, method="mds", space=space)
    for path in (map_path, page_path):
        write_map(drawn, path, title=f"{len(zoo)} small models by what they say")
    say("")
    say(f"Map: {page_path} (and {map_path.name})   Results: {out / 'store'}")
    say(f"{time.monotonic() - start:.0f} s in all")
    example = next(model.name for model in zoo if model.relation == "fine-tune")
    say("Try next:")
    for command in next_commands(out, example, zoo[0].name):
        say(f"  {command}")
    return {
        "texts": str(out / "texts.jsonl"),
        "store": str(out / "store"),
        "map": str(map_path),
        "models": list(space.models),
        "page": str(page_path),
        "families": {model.name: model.family for model in zoo},
        "parents": _parents(zoo),
        "kl_bits_per_byte": space.kl_matrix(unit="bits_per_byte").tolist(),
        "nearest": {name: [hit.summary() for hit in hits[:3]] for name, hits in nearest.items()},
        "checks": checks,
        "families_found": all(check["same_family"] for check in found),
    }


def _parents(zoo: Sequence[ZooModel]) -> dict[str, Sequence[str]]:
    """What each model was made from; of a run's later checkpoints, the one before."""
    parents: dict[str, Sequence[str]] = {m.name: m.parents for m in zoo if m.parents}
    by_step = sorted(zoo, key=lambda model: model.steps)
    for earlier, later in itertools.combinations(by_step, 2):
        if earlier.run == later.run:
            parents[later.name] = [earlier.name]
    return parents


def next_commands(out: Path, model: str, other: str) -> list[str]:
    """What to try after the demo."""
    store, texts = (shlex.quote(str(out / name)) for name in ("store", "texts.jsonl"))
    return [
        f"llfast search {model} --store {store} -k 5",
        f"llfast kl {model} {other} --store {store}",
        f"llfast info {store}",
        f"llfast map --store {store} --out map.html",
        f"llfast score YOUR_MODEL --texts {texts} --store {store}",
    ]


def _request(model: ZooModel) -> ModelRequest:
    metadata = {
        "family": model.family,
        "architecture": model.architecture,
        "relation": model.relation,
        "parents": list(model.parents),
        "run": model.run,
        "step": model.steps,
    }
    return ModelRequest(model=str(model.path), name=model.name, metadata=metadata)


def _scoring_line(outcomes: Sequence[Outcome], texts: TextSet, seconds: float) -> str:
    scored = [outcome.result for outcome in outcomes if outcome.result is not None]
    kept = sum(outcome.status == "skipped" for outcome in outcomes)
    tokens = sum(int(result.token_counts.sum()) for result in scored)
    line = f"scored {len(scored)} models on {len(texts)} texts"
    if scored:
        line += f": {tokens:,} tokens in {seconds:.0f} s"
    return line + (f", {kept} were in the store" if kept else "")


def _check(model: ZooModel, zoo: Sequence[ZooModel], hits: Sequence[Hit]) -> dict[str, Any]:
    """A fine-tune's nearest relative outside its own run, and whether it is of its family."""
    by_name = {each.name: each for each in zoo}
    hit = next(hit for hit in hits if by_name[hit.model].run != model.run)
    return {
        "model": model.name,
        "light": model.relation == "fine-tune",
        "nearest": hit.model,
        "kl": hit.kl,
        "same_family": by_name[hit.model].family == model.family,
    }

"""What a zoo is made of: families, the runs that make their models, and their order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from .zoo_training import ARCHITECTURES, Mixture, Sizes, TrainingRun

Relation = Literal["base", "checkpoint", "fine-tune", "heavy fine-tune", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Models that descend from one base.

    Attributes:
        architecture: transformers' model type: gpt2, llama, gpt_neox or qwen3.
        prose_share: the share of prose in what its base reads; the rest is code.
        checkpoints: the steps of the base's run at which checkpoints are kept.
        merged: whether the mean of its two fine-tunes is made.
        heavy_corpus: the family on whose corpus a heavy fine-tune is trained, if any.
    """

    architecture: str
    prose_share: float
    checkpoints: tuple[int, ...] = ()
    merged: bool = False
    heavy_corpus: str | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}"
            )
        if not 0.0 <= self.prose_share <= 1.0:
            raise ValueError(f"prose_share must lie in 0 to 1, got {self.prose_share}")


FAMILIES = (
    # The longest chain of runs comes first, so that no process waits for it at the end.
    Family(architecture="qwen3", prose_share=0.15, heavy_corpus="llama"),
    Family(architecture="gpt2", prose_share=0.6),
    Family(architecture="llama", prose_share=0.85, merged=True),
    Family(architecture="gpt_neox", prose_share=0.4, checkpoints=(90, 180, 270)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooConfig:
    """What a zoo is made of. The defaults take about three minutes of one CPU core.

    Attributes:
        families: one base, two fine-tunes, and what else each family says.
        sizes: the shape of models and batches.
        seed: seeds weights, batches and the families' pools of documents.
        base_steps: optimiser steps of a base.
        fine_tune_steps: of a light fine-tune.
        heavy_steps: of a heavy fine-tune.
        base_learning_rate: the peak for bases.
        fine_tune_learning_rate: for light fine-tunes.
        heavy_learning_rate: for heavy fine-tunes.
    """

    families: tuple[Family, ...] = FAMILIES
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    base_steps: int = 360
    fine_tune_steps: int = 40
    heavy_steps: int = 180
    base_learning_rate: float = 2e-3
    fine_tune_learning_rate: float = 3e-4
    heavy_learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        architectures = [family.architecture for family in self.families]
        if not architectures or len(set(architectures)) != len(architectures):
            raise ValueError(
                f"families must have one architecture each, none twice, got {architectures}"
            )
        for name in ("base_steps", "fine_tune_steps", "heavy_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for family in self.families:
            if list(family.checkpoints) != sorted(
                {step for step in family.checkpoints if 0 < step < self.base_steps}
            ):
                raise ValueError(
                    f"checkpoints must rise and lie between 0 and base_steps ({self.base_steps}), "
                    f"got {family.checkpoints}"
                )
            if family.heavy_corpus not in {None, *architectures} - {family.architecture}:
                raise ValueError(
                    f"heavy_corpus must name another family of {architectures}, "
                    f"got {family.heavy_corpus!r}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ZooModel:
    """One model of a zoo, and where it comes from.

    Attributes:
        name: also the name of its folder.
        path: its checkpoint folder.
        family: models of one family descend from one base.
        architecture: transformers' model type.
        relation: what it is to its parents.
        parents: names of the models it was made from.
        run: names the optimiser run; the checkpoints of a base and the base itself share one.
        corpus: what its run read.
        steps: optimiser steps of its run until it was saved; 0 for a merge.
    """

    name: str
    path: Path
    family: str
    architecture: str
    relation: Relation
    parents: tuple[str, ...]
    run: str
    corpus: str
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process does at a time: a run of an optimiser, or a merge (no run)."""

    models: tuple[ZooModel, ...]
    run: TrainingRun | None

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the models that must be there before it starts."""
        if self.run is None:
            return self.models[0].parents
        return (self.run.start,) if self.run.start else ()


def plan(config: ZooConfig, folder: Path) -> list[Job]:
    """Every job, after those it needs; the longer ones come first, so that none is last alone."""
    own = {
        family.architecture: Mixture(
            name=f"{family.architecture}'s corpus", prose_share=family.prose_share, pool_share=0.5
        )
        for family in config.families
    }
    prose = Mixture(name="prose", prose_share=1.0, pool_share=1.0)
    code = Mixture(name="code", prose_share=0.0, pool_share=1.0)
    bases, heavies, fine_tunes, merges = [], [], [], []
    for family in config.families:
        name = family.architecture
        base = f"{name}-base"
        job = partial(_training_job, config, folder, name)
        checkpoints = {step: f"{name}-step{step}" for step in family.checkpoints}
        bases.append(job("base", own[name], checkpoints | {config.base_steps: base}))
        if family.heavy_corpus is not None:
            snapshots = {config.heavy_steps: f"{name}-heavy"}
            heavies.append(job("heavy fine-tune", own[family.heavy_corpus], snapshots, base))
        for mixture in (prose, code):
            snapshots = {config.fine_tune_steps: f"{name}-{mixture.name}"}
            fine_tunes.append(job("fine-tune", mixture, snapshots, base))
        if family.merged:
            merged = ZooModel(
                name=f"{name}-merge",
                path=folder / f"{name}-merge",
                family=name,
                architecture=name,
                relation="merge",
                parents=(f"{name}-prose", f"{name}-code"),
                run=f"{name}-merge",
                corpus="",
                steps=0,
            )
            merges.append(Job(models=(merged,), run=None))
    return [*bases, *heavies, *fine_tunes, *merges]


def _training_job(
    config: ZooConfig,
    folder: Path,
    family: str,
    relation: Relation,
    mixture: Mixture,
    snapshots: dict[int, str],
    start: str | None = None,
) -> Job:
    run = TrainingRun(
        name=snapshots[max(snapshots)],
        architecture=family,
        start=start,
        mixture=mixture,
        learning_rate={
            "base": config.base_learning_rate,
            "fine-tune": config.fine_tune_learning_rate,
            "heavy fine-tune": config.heavy_learning_rate,
        }[relation],
        snapshots=tuple(sorted(snapshots.items())),
        seed=config.seed,
    )
    models = tuple(
        ZooModel(
            name=name,
            path=folder / name,
            family=family,
            architecture=family,
            relation=relation if name == run.name else "checkpoint",
            parents=() if start is None else (start,),
            run=run.name,
            corpus=mixture.name,
            steps=step,
        )
        for step, name in run.snapshots
    )
    return Job(models=models, run=run)

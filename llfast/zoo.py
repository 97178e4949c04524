"""The demo's zoo: small language models whose descent is known.

    corpora ─▶ tokenizer ─▶ base of each family ─▶ light fine-tunes on prose and on code
                             │ checkpoints of one      └─▶ mean of two of one family's
                             └─▶ a heavy fine-tune on another family's corpus

Every family has its own architecture, seed and mixture of documents, as real families do: trained
on one mixture, models that were tuned on the same text are nearer to one another than to their
bases. The light fine-tunes are therefore light, and the heavy one is there to show the effect.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .files import atomic_write
from .zoo_corpora import Corpora, installed_corpora
from .zoo_plan import Job, ZooConfig, ZooModel, plan
from .zoo_training import (
    PROVENANCE,
    merge,
    publish,
    sample_batches,
    start_worker,
    tokenize_documents,
    train,
    train_tokenizer,
)

_VERSION = 1  # raised when a release trains other models from the same configuration
_MANIFEST = "zoo.json"
_TOKENIZER = "tokenizer"


def build_zoo(
    folder: str | os.PathLike[str],
    *,
    config: ZooConfig | None = None,
    corpora: Corpora | None = None,
    workers: int | None = None,
    progress: Callable[[ZooModel, int, int], None] | None = None,
) -> list[ZooModel]:
    """Train the models that are not there yet, each into a folder of its own under `folder`.

    A whole zoo of the same configuration and corpora is left untouched; of a half-built one, what
    is done stays. Models of another configuration are replaced. Weights may differ in their last
    bits between machines.

    Args:
        folder: where the zoo is, or will be.
        config: what to train; by default 17 models of four architectures.
        corpora: what to train on; by default the installation's, see `installed_corpora`.
        workers: processes of one thread each, at most one a core by default; 0 trains in this
            process, with its threads. Processes are spawned: a script that calls this needs the
            usual `if __name__ == "__main__":`.
        progress: called with each model as it is done, how many are, and how many there will be.

    Returns:
        All models, bases before their descendants.

    Raises:
        TextSetError: if the Python installation has no sources to train on.
        OSError: if the folder cannot be written.
        ValueError: if `workers` is negative.
    """
    folder = Path(folder)
    config = config or ZooConfig()
    if workers is None:
        workers = min(len(config.families), len(os.sched_getaffinity(0)))
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    corpora = corpora or installed_corpora()
    provenance = _provenance(config, corpora)
    jobs = plan(config, folder)
    models = [model for job in jobs for model in job.models]
    missing = {model.name for model in models if not _is_whole(model.path, provenance)}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).unlink(missing_ok=True)
        if not _is_whole(folder / _TOKENIZER, provenance):
            tokenizer = train_tokenizer(corpora.training, config.sizes.vocabulary)
            publish(folder / _TOKENIZER, provenance, tokenizer.save_pretrained)
        documents = tokenize_documents(folder, corpora.training)

        def task(job: Job) -> Callable[[], None]:
            if job.run is None:
                model = job.models[0]
                return partial(merge, model.name, model.parents, folder, provenance)
            batches = sample_batches(job.run, config.sizes, documents)
            return partial(
                train, job.run, config.sizes, batches, folder, provenance, frozenset(missing)
            )

        for model in _finished(jobs, task, set(missing), workers):
            missing.discard(model.name)
            if progress is not None:
                progress(model, len(models) - len(missing), len(models))
    _write_manifest(folder, models)
    return models


def _finished(
    jobs: Sequence[Job],
    task: Callable[[Job], Callable[[], None]],
    missing: set[str],
    workers: int,
) -> Iterator[ZooModel]:
    """Do the jobs that make a missing model, each after what it needs; yield each such model."""
    waiting = [job for job in jobs if any(model.name in missing for model in job.models)]

    def made_by(job: Job) -> list[ZooModel]:
        made = [model for model in job.models if model.name in missing]
        missing.difference_update(model.name for model in made)
        return made

    if not workers:
        for job in waiting:  # bases come before their descendants
            task(job)()
            yield from made_by(job)
        return
    executor = ProcessPoolExecutor(
        min(workers, len(waiting)),
        mp_context=multiprocessing.get_context("spawn"),  # forked threads of torch would hang
        initializer=start_worker,
    )
    running: dict[Future[None], Job] = {}
    try:
        while waiting or running:
            ready = [job for job in waiting if missing.isdisjoint(job.needs)]
            running.update((executor.submit(task(job)), job) for job in ready)
            waiting = [job for job in waiting if job not in ready]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield from made_by(running.pop(future))
    finally:
        executor.shutdown(cancel_futures=True)


def _provenance(config: ZooConfig, corpora: Corpora) -> bytes:
    """What a model of this zoo was made from; kept beside it, and compared before it is reused."""
    digest = hashlib.sha256()
    for side in (corpora.evaluation, corpora.training):
        for document in side:
            for part in (document.name, document.text):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
    made_from = {
        "zoo_version": _VERSION,
        "corpora_sha256": digest.hexdigest(),
        "config": asdict(config),
    }
    return (json.dumps(made_from, indent=1) + "\n").encode()


def _is_whole(path: Path, provenance: bytes) -> bool:
    try:
        return (path / PROVENANCE).read_bytes() == provenance and (
            path.name == _TOKENIZER or (path / "model.safetensors").is_file()
        )
    except OSError:
        return False


def _write_manifest(folder: Path, models: Sequence[ZooModel]) -> None:
    """List the models in zoo.json, for people; it is written last, and only if it changes."""
    rows: list[dict[str, Any]] = [asdict(model) | {"path": model.path.name} for model in models]
    listed = (json.dumps({"models": rows}, indent=1) + "\n").encode()
    path = folder / _MANIFEST
    if not (path.is_file() and path.read_bytes() == listed):
        with atomic_write(path) as file:
            file.write(listed)

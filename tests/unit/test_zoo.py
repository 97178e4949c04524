"""The demo's zoo: corpora that share nothing, a tokenizer, and models built, resumed and reused."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llfast.errors import TextSetError
from llfast.zoo import build_zoo
from llfast.zoo_corpora import Corpora, Document, installed_corpora
from llfast.zoo_plan import FAMILIES, Family, ZooConfig, plan
from llfast.zoo_training import (
    Mixture,
    Sizes,
    TrainingRun,
    sample_batches,
    tokenize_documents,
    train_tokenizer,
)

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron".split()


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def library(root: Path, modules: int = 60) -> Path:
    """A make-believe standard library: every module has a docstring, code, and a shared notice."""
    notice = "# This notice stands in every module of the library, word for word."
    for number in range(modules):
        folder = root / ("package" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        source = f'"""{words(number, 150)}\n\n{words(1000 + number, 50)}"""\n\n{notice}\n\n'
        source += "\n\n".join(
            f"x{line} = '{words(2000 + 99 * number + line, 20)}'" for line in range(9)
        )
        (folder / f"module{number}.py").write_text(source, encoding="utf-8")
    for skipped in ("test", "site-packages", "package/tests"):
        (root / skipped).mkdir()
        (root / skipped / "hidden.py").write_text("secret = '" + "unwanted " * 200 + "'")
    (root / "latin.py").write_bytes(b"# \xe9" + b" unwanted" * 200)
    return root


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = library(tmp_path / "lib")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


@pytest.fixture(scope="module")
def corpora() -> Corpora:
    documents = tuple(
        Document(
            name=f"{kind}:{number}", kind=kind, text=words(number + 500 * (kind == "code"), 60)
        )
        for kind in ("code", "prose")
        for number in range(12)
    )
    return Corpora(evaluation=documents[:1], training=documents[1:])


CONFIG = ZooConfig(
    families=(
        Family(architecture="qwen3", prose_share=0.2, heavy_corpus="llama"),
        Family(architecture="llama", prose_share=0.7, merged=True, checkpoints=(1, 2)),
    ),
    sizes=Sizes(vocabulary=280, width=16, layers=1, heads=2, window_tokens=24, batch_rows=2),
    base_steps=3,
    fine_tune_steps=1,
    heavy_steps=2,
)


def paragraphs(documents: tuple[Document, ...]) -> list[str]:
    found = (
        " ".join(part.split()) for document in documents for part in document.text.split("\n\n")
    )
    return [paragraph for paragraph in found if len(paragraph) >= 40]


def test_corpora_share_no_document_and_no_paragraph(installed: Path):
    corpora = installed_corpora()
    sides = (corpora.evaluation, corpora.training)
    assert all({document.kind for document in side} == {"prose", "code"} for side in sides)
    sources = [{document.name.partition(":")[2] for document in side} for side in sides]
    assert sources[0].isdisjoint(sources[1])  # a module's docstrings and code stay together
    everything = paragraphs(corpora.evaluation) + paragraphs(corpora.training)
    assert len(set(everything)) == len(everything)
    assert sum("This notice stands" in document.text for side in sides for document in side) == 1
    assert not any("unwanted" in document.text for side in sides for document in side)


def test_corpora_do_not_depend_on_the_order_of_files(
    installed: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = installed_corpora()
    walk = os.walk
    monkeypatch.setattr(
        os,
        "walk",
        lambda top: ((f, d, sorted(n, reverse=True)) for f, d, n in reversed([*walk(top)])),
    )
    (installed / "test").rename(installed / "idle_test")  # the reversed walk is not pruned
    for hidden in list(installed.rglob("hidden.py")):
        hidden.unlink()
    assert installed_corpora() == expected


def test_a_new_module_moves_no_other(installed: Path):
    before = installed_corpora()
    (installed / "newcomer.py").write_text(f"value = '{words(77777, 200)}'")
    after = installed_corpora()
    for side in ("evaluation", "training"):
        names = {document.name for document in getattr(after, side)} - {"code:newcomer.py"}
        assert names == {document.name for document in getattr(before, side)}


def test_this_installation_has_several_hundred_chunks_of_each_kind():
    corpora = installed_corpora()
    for kind in ("prose", "code"):
        texts = [document.text for document in corpora.evaluation if document.kind == kind]
        assert sum(len(text.encode()) // 1024 for text in texts) >= 200
        assert len(texts) >= 50  # documents are what intervals are computed over
        training = sum(len(doc.text) for doc in corpora.training if doc.kind == kind)
        assert training > 500_000


def test_an_installation_without_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(TextSetError, match=r"must be installed as \.py sources, got 0"):
        installed_corpora()


def test_tokenizer_gives_every_text_back(corpora: Corpora):
    tokenizer = train_tokenizer(corpora.training, 300)
    assert len(tokenizer) == 300
    for text in (
        "alpha beta",
        "  indented\n\ttabs\r\n",
        "naïve ∑ 漢字 🦜",
        "\x00\x0c",
        " <s> ",
        "a  ,  b .",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids  # nothing is added
    assert len(tokenizer("alpha beta gamma delta")["input_ids"]) < 22  # it has learnt its words


def test_batches_are_windows_of_the_right_kind(tmp_path: Path, corpora: Corpora):
    train_tokenizer(corpora.training, 300).save_pretrained(tmp_path / "tokenizer")
    documents = tokenize_documents(tmp_path, corpora.training)
    run = TrainingRun(
        name="run",
        architecture="llama",
        start=None,
        mixture=Mixture(name="mixture", prose_share=0.25, pool_share=1.0),
        learning_rate=1e-3,
        snapshots=((50, "run"),),
        seed=0,
    )
    sizes = Sizes(vocabulary=300, window_tokens=20, batch_rows=4)
    batches = sample_batches(run, sizes, documents)
    assert batches.shape == (50, 4, 20)
    windows = {"prose": set(), "code": set()}
    for kind, found in windows.items():
        # Neighbours in the stream are unknown here, so only windows inside one document count.
        for document, tokens in documents:
            if document.kind == kind:
                found.update(tuple(tokens[i : i + 20]) for i in range(len(tokens) - 19))
    rows = [tuple(row) for row in batches.reshape(-1, 20)]
    prose, code = (sum(row in windows[kind] for row in rows) for kind in ("prose", "code"))
    assert prose + code > 100
    assert 0.15 < prose / (prose + code) < 0.35
    with pytest.raises(ValueError, match="give more training documents"):
        sample_batches(run, sizes, documents[:1])


def test_the_default_zoo_is_what_the_demo_promises(tmp_path: Path):
    models = [model for job in plan(ZooConfig(), tmp_path) for model in job.models]
    relations = [model.relation for model in models]
    assert len(models) == len({model.name for model in models}) == 17
    assert len({model.architecture for model in models}) == len(FAMILIES) == 4
    assert [relations.count(kind) for kind in ("base", "fine-tune", "checkpoint")] == [4, 8, 3]
    assert [relations.count(kind) for kind in ("merge", "heavy fine-tune")] == [1, 1]
    made: set[str] = set()
    for model in models:
        assert made.issuperset(model.parents)
        made.add(model.name)


def test_a_zoo_is_built_resumed_and_left_alone(tmp_path: Path, corpora: Corpora):
    folder = tmp_path / "zoo"
    random_state = torch.get_rng_state()
    told: list[tuple[str, int, int]] = []
    models = build_zoo(
        folder,
        config=CONFIG,
        corpora=corpora,
        workers=0,
        progress=lambda model, done, total: told.append((model.name, done, total)),
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [name for name, _, _ in told] == [model.name for model in models]
    assert [done for _, done, _ in told] == list(range(1, len(models) + 1))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(model.name for model in models), "tokenizer", "zoo.json"]
    )
    weights = {model.name: load_file(model.path / "model.safetensors") for model in models}
    for model in models:
        loaded = AutoModelForCausalLM.from_pretrained(model.path)
        assert loaded.config.model_type == model.architecture
        ids = AutoTokenizer.from_pretrained(model.path)("  alpha\n漢")["input_ids"]
        assert (
            ids == AutoTokenizer.from_pretrained(folder / "tokenizer")("  alpha\n漢")["input_ids"]
        )
        for parent in model.parents:  # it has moved from its parent
            assert any(
                not torch.equal(weights[model.name][k], weights[parent][k]) for k in weights[parent]
            )
    for key, merged in weights["llama-merge"].items():
        mean = (weights["llama-prose"][key].double() + weights["llama-code"][key].double()) / 2
        torch.testing.assert_close(merged.double(), mean, rtol=0, atol=1e-7)

    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}

    whole = stamps()
    assert build_zoo(folder, config=CONFIG, corpora=corpora, workers=0) == models
    assert stamps() == whole

    bits = {name: (folder / name / "model.safetensors").read_bytes() for name in weights}
    lost = {"llama-step2", "qwen3-code", "llama-merge"}
    for name in lost:
        shutil.rmtree(folder / name)
    (folder / "qwen3-prose" / "model.safetensors").unlink()  # and one that is not whole
    told.clear()
    build_zoo(
        folder,
        config=CONFIG,
        corpora=corpora,
        workers=0,
        progress=lambda m, d, t: told.append((m.name, d, t)),
    )
    assert {name for name, _, _ in told} == lost | {"qwen3-prose"}
    assert told[-1][1:] == (len(models), len(models))
    assert {name: (folder / name / "model.safetensors").read_bytes() for name in bits} == bits
    kept = {path: stamp for path, stamp in stamps().items() if "/llama-base/" in path}
    assert kept.items() <= whole.items()


def test_a_failed_save_leaves_no_model(
    tmp_path: Path, corpora: Corpora, monkeypatch: pytest.MonkeyPatch
):
    config = ZooConfig(
        families=(Family(architecture="llama", prose_share=0.5),),
        sizes=CONFIG.sizes,
        base_steps=1,
        fine_tune_steps=1,
    )
    import llfast.zoo_training as training

    real = training.publish_model

    def fail(path: Path, *rest: object) -> None:
        if path.name == "llama-code":
            monkeypatch.setattr(
                training, "atomic_write", None
            )  # fails after the weights are written
        real(path, *rest)

    monkeypatch.setattr(training, "publish_model", fail)
    with pytest.raises(TypeError):
        build_zoo(tmp_path, config=config, corpora=corpora, workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "llama-base",
        "llama-prose",
        "tokenizer",
    ]
    monkeypatch.undo()
    assert len(build_zoo(tmp_path, config=config, corpora=corpora, workers=0)) == 3


def test_another_configuration_replaces_the_models(tmp_path: Path, corpora: Corpora):
    families = (Family(architecture="gpt_neox", prose_share=0.5),)
    sizes = CONFIG.sizes
    built = []
    for seed in (0, 1):
        config = ZooConfig(
            families=families, sizes=sizes, seed=seed, base_steps=1, fine_tune_steps=1
        )
        models = build_zoo(tmp_path, config=config, corpora=corpora, workers=0)
        built.append([(model.path / "model.safetensors").read_bytes() for model in models])
    assert all(one != other for one, other in zip(*built, strict=True))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path, corpora: Corpora):
    models = build_zoo(tmp_path / "one", config=CONFIG, corpora=corpora, workers=0)
    others = build_zoo(tmp_path / "two", config=CONFIG, corpora=corpora, workers=2)
    for model, other in zip(models, others, strict=True):
        expected = load_file(model.path / "model.safetensors")
        for key, value in load_file(other.path / "model.safetensors").items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ZooConfig(base_steps=0), "base_steps must be at least 1, got 0"),
        (lambda: ZooConfig(families=()), "one architecture each"),
        (lambda: ZooConfig(base_steps=100), r"checkpoints must rise .* got \(90, 180, 270\)"),
        (lambda: ZooConfig(families=FAMILIES[:1]), "heavy_corpus must name another family"),
        (lambda: Family(architecture="bert", prose_share=0.5), "architecture must be one of"),
        (lambda: Family(architecture="gpt2", prose_share=1.5), "prose_share must lie in 0 to 1"),
        (lambda: Sizes(width=100), "width must be a multiple of 8"),
        (lambda: Sizes(vocabulary=256), "vocabulary must lie in 257"),
        (lambda: Sizes(window_tokens=2000), "window_tokens must be at most 1024"),
        (lambda: Sizes(layers=0), "layers must be at least 1"),
        (lambda: build_zoo("never", workers=-1), "workers must be at least 0"),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Text sets made from files, and tables of numbers made elsewhere, on the command line."""

import numpy as np
import pytest

import llfast
from llfast import Store, TextSet


def test_texts_are_built_and_shown(command, tmp_path):
    (tmp_path / "doc.txt").write_text("Zwölf Boxkämpfer " * 200, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "%s"}\n' % ("a row " * 100))
    out = tmp_path / "t.jsonl"
    inputs = [tmp_path / "doc.txt", tmp_path / "rows.jsonl"]
    options = ("--n", 5, "--max-bytes", 300, "--min-bytes", 100, "--seed", 7)
    run = command("texts", "build", *inputs, "--out", out, *options)
    expected, report = llfast.build_texts(inputs, n=5, max_bytes=300, min_bytes=100, seed=7)
    assert run.code == 0, run.err
    assert TextSet.load(out).digest == expected.digest
    digest = expected.digest
    assert run.out == (
        f"5 of {report.chunks} chunks from 2 documents in {out}, digest {digest[:12]}\n"
    )
    summary = command("texts", "show", out, "--json").json
    assert summary == {
        "texts": 5,
        "digest": digest,
        "bytes": int(expected.text_bytes.sum()),
        "mean_bytes": float(expected.text_bytes.mean()),
        "groups": len(set(expected.groups)),
    }
    shown = command("texts", "show", out, "--rows", 2).out
    assert shown.startswith(f"5 texts from {summary['groups']} documents, 1.")
    assert f"digest {digest}\n" in shown
    assert [id_ in shown for id_ in expected.ids] == [True, True, False, False, False]
    more = command("texts", "build", *inputs, "--out", out, "--n", 500, "--json")
    assert more.json["texts"] == len(TextSet.load(out)) < 500
    assert f"only {more.json['texts']} chunks were long enough for the 500" in more.err


def test_texts_are_built_again_from_the_same_sources(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text("Zwölf Boxkämpfer " * 200, encoding="utf-8")
    runs = [command("texts", "build", ".", "--out", "texts.jsonl", "--json") for _ in range(2)]
    assert runs[1].json == runs[0].json
    run = command("texts", "build", "doc.txt", "texts.jsonl", "--out", "texts.jsonl")
    assert "inputs must not name the file" in run.error


def test_import_puts_a_table_into_the_store(command, tmp_path):
    (tmp_path / "m.csv").write_text("id,a,b\nx,1.0,1.1\ny,1.2,1.5\nz,2.0,1.0\n")
    (tmp_path / "sizes.txt").write_text("10 20 30")
    options = ("--unit", "bits_per_byte", "--text-bytes", tmp_path / "sizes.txt")
    store = tmp_path / "store"
    run = command("import", tmp_path / "m.csv", "--store", store, *options)
    matrix = Store(store).matrix()
    assert run.out == f"2 models on 3 texts in {store}, text set {matrix.textset_digest[:12]}\n"
    expected = -np.array([[1.0, 1.2, 2.0], [1.1, 1.5, 1.0]]) * [10, 20, 30] * np.log(2)
    np.testing.assert_allclose(matrix.values, expected, rtol=1e-12)
    kl = command("kl", "a", "b", "--store", store, "--unit", "nats_per_text", "--json").json["kl"]
    clip = np.quantile(expected, 0.02)
    truth = np.subtract(*np.maximum(expected, clip)).var() / 2
    assert kl["value"] == pytest.approx(truth, rel=1e-9)

"""The benchmark of throughput, on models of a few kilobytes; that its arithmetic is right."""

import json
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import llfast
from llfast import cache
from llfast.bench import phases, products, shapes, throughput, throughput_table
from llfast.checkpoint import Checkpoint
from llfast.zoo_corpora import Corpora, Document
from tests.conftest import ROOT
from tests.tiny import COMMON, WORDS, make_model, make_tokenizer, save

TINY = {"tiny": ("llama", {**COMMON, "vocab_size": 304}), "gpt": ("gpt2", {"n_embd": 32})}
PARTS = {"tokenise", "read", "body", "head", "store", "other"}


@pytest.fixture(scope="module")
def corpora():
    def documents(side):
        texts = (" ".join(WORDS[place:] + WORDS[:place]) * 4 for place in range(0, 28, 7))
        return tuple(
            Document(name=f"{side} {number}", kind="prose", text=text)
            for number, text in enumerate(texts)
        )

    return Corpora(evaluation=documents("a"), training=documents("b"))


@pytest.fixture(scope="module")
def small(corpora):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "installed_corpora", lambda: corpora)
        patch.setattr(throughput, "_VOCABULARY", 300)
        patch.setattr(shapes, "SHAPES", TINY)
        patch.setattr(products, "_LEAST_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput") / "mine"
    return save(make_model("gpt2"), make_tokenizer(adds_bos=True), folder)


@pytest.fixture(scope="module")
def found(small, folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    found = throughput.measure(
        ["tiny", "tiny"], models=[str(folder)], texts=3, device="cpu", repetitions=3, folder=made
    )
    assert list(made.iterdir()) == [], "what was made is removed"
    return found


def test_parts_sum_to_the_total(found):
    for model in found["models"]:
        assert len(model["runs"]) == 3
        for run in model["runs"]:
            assert run["parts"].keys() == PARTS
            assert min(run["parts"].values()) > 0, "every part is gone through"
            # What lies between two readings of the clock is all that the parts do not have.
            assert sum(run["parts"].values()) == pytest.approx(run["seconds"], abs=5e-3)


def test_rates_are_what_was_done_by_what_it_took(found, folder):
    assert [model["name"] for model in found["models"]] == [str(folder), "tiny"]
    assert found["texts"] == 3
    for model in found["models"]:
        seconds = sorted(run["seconds"] for run in model["runs"])
        assert model["tokens"] > 0
        assert model["padded_tokens"] >= model["tokens"]
        middle = model["tokens"] / seconds[1]
        assert model["tokens_a_second"]["median"] == pytest.approx(middle, rel=1e-3)
        assert model["models_an_hour"]["median"] == pytest.approx(3600 / seconds[1], rel=1e-3)
        for name, part in model["parts"].items():
            if name == "other":
                assert (part["unit"], part["rate"], part["ceiling"]) == (None, None, None)
                continue
            shares = part["share_of_ceiling"]
            assert 0 < shares["min"] <= shares["median"] <= shares["max"]
            assert part["work"] > 0
            busy = sorted(run["parts"][name] for run in model["runs"])[1]
            if name != "read":
                assert part["rate"]["median"] == pytest.approx(part["work"] / busy, rel=1e-3)
        assert model["parts"]["tokenise"]["work"] == 3
        assert model["bound"]["part"] in PARTS
    (mine, _) = found["models"]
    stored = sum(each.end - each.begin for each in Checkpoint.open(folder).tensors.values())
    # The small embedding is kept, and read again as the head.
    assert mine["parts"]["read"]["work"] == stored + 304 * 32 * 4
    assert mine["weights"] == "kept"


def test_it_is_json_with_all_that_was_measured(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = "commit hardware versions device kernel texts repetitions flop_formula models"
    assert found.keys() == {"benchmark", *names.split()}
    names = "name type parameters weight_bytes dtype weights tokens padded_tokens seconds "
    names += "models_an_hour tokens_a_second cached_share parts bound runs"
    fields = "seconds share_of_time busy_seconds unit work rate ceilings ceiling share_of_ceiling"
    for model in found["models"]:
        assert model.keys() == set(names.split())
        for part in model["parts"].values():
            assert part.keys() == set(fields.split())


def test_people_are_shown_every_part(found, capsys):
    throughput_table.show(found)
    printed = capsys.readouterr().out
    for word in (*PARTS, "encode_batch", "torch.mm", "write and fsync", "models an hour"):
        assert word in printed
    for model in found["models"]:
        assert model["bound"]["line"] in printed


def test_the_readmes_table_has_a_row_a_model(found, folder, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from readme_throughput import PARTS as COLUMNS
    from readme_throughput import throughput as table

    assert set(COLUMNS) == PARTS
    head, rule, *rows, empty, notes = table({**found, "command": "python b.py"})
    assert [row.split(" | ")[0] for row in rows] == [f"| {folder}, 0M", "| tiny, 0M"]
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
    assert empty == ""
    for word in (found["models"][0]["bound"]["line"], "Command: `python b.py`.", "2 T V D"):
        assert word in notes


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gpt_neox"])
def test_flops_are_those_that_torch_counts(kind):
    """torch counts attention without its causal mask: twice what a causal model needs."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "gpt2" else {**COMMON}
    if kind == "qwen3":
        sizes["head_dim"] = 24
    config = AutoConfig.for_model(kind, vocab_size=304, **sizes)
    rows, length = 3, 40
    flops = shapes.Flops.of(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(rows, length, dtype=torch.int64), use_cache=False)
    modules = counter.get_flop_counts()
    counted = {str(name): count for name, count in modules["Global"].items()}
    weights = counted.get("aten.mm", 0) + counted.get("aten.addmm", 0)
    angles = sum(sum(each.values()) for name, each in modules.items() if "rotary_emb" in name)
    attention = sum(counted.values()) - weights - angles
    assert attention > 0
    assert flops.head(rows * length) + flops.body([(rows, length)]) == weights + attention // 2
    assert flops.head(rows * length) == 2 * rows * length * 304 * 32


def test_what_an_expert_computes_is_not_counted():
    config = AutoConfig.for_model("mixtral", **COMMON, num_local_experts=4)
    with pytest.raises(ValueError, match="model must be dense, with a linear output head"):
        shapes.Flops.of(config)


def test_the_innermost_part_is_the_one_that_runs(monkeypatch):
    """With a clock that is moved by hand."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def pass_time(seconds, then=lambda: None):
        now[0] += seconds
        then()
        now[0] += seconds

    class Pages:
        def take(self):
            pass_time(1.0)

    class Forward:
        def resume(self):
            pass_time(10.0, lambda: Pages().take())

    monkeypatch.setattr("llfast.paging.pages.Pages", Pages)
    monkeypatch.setattr("llfast.paging.suspended.Forward", Forward)
    monkeypatch.setattr(
        phases,
        "_SEAMS",
        [each for each in phases._SEAMS if each[1] in ("Pages.take", "Forward.resume")],
    )
    before = vars(Pages)["take"], vars(Forward)["resume"]
    found = phases.Phases(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="midway"), found.watch():
        pass_time(100.0, lambda: Forward().resume())
        raise RuntimeError("midway")
    none = {"tokenise": 0.0, "head": 0.0, "store": 0.0}
    assert found.seconds == {"read": 2.0, "body": 20.0, "other": 200.0, **none}
    assert (vars(Pages)["take"], vars(Forward)["resume"]) == before, "all is as it was"


@pytest.mark.parametrize("weights", ["auto", "paged", "resident"])
def test_each_way_of_running_a_model_goes_through_the_seams(weights, folder, tmp_path):
    found = phases.Phases(torch.device("cpu"))
    with found.watch():
        result = llfast.score(str(folder), [" ".join(WORDS)], weights=weights, progress=False)
        llfast.Store(tmp_path / "s").add(result)
    assert all(found.seconds[part] > 0 for part in PARTS)
    whole = {"models.FolderSource.load", "batchwise.run_model", "head.Head.token_logprobs"}
    pages = {"paging.pages.Pages.take", "paging.suspended.Forward.resume", "paging.waves._add"}
    gone_through = {name for name, calls in found.calls.items() if calls}
    assert (whole if weights == "resident" else pages) <= gone_through
    assert not (pages if weights == "resident" else whole) & gone_through
    assert {"runs.tokenize", "store.Store.add"} <= gone_through


def test_every_repetition_tokenises_anew_and_leaves_the_cache_alone(small, folder, monkeypatch):
    saved, own = [], cache.save_arrays

    def save_arrays(name, **arrays):
        saved.append((os.environ["LLFAST_CACHE"], arrays.keys()))
        own(name, **arrays)

    monkeypatch.setattr(cache, "save_arrays", save_arrays)
    before = os.environ["LLFAST_CACHE"]
    throughput.measure(models=[str(folder)], texts=2, device="cpu", repetitions=2)
    tokens = [place for place, names in saved if "offsets" in names]
    assert len(tokens) == 4, "to know them, once to begin with, and in each repetition"
    assert before not in {place for place, _ in saved}
    assert os.environ["LLFAST_CACHE"] == before


def part(share, of_ceiling=None, ceiling=None):
    one = {"median": share, "min": share, "max": share}
    other = None if of_ceiling is None else {"median": of_ceiling}
    return {"share_of_time": one, "share_of_ceiling": other, "ceiling": ceiling}


@pytest.mark.parametrize(
    ("largest", "ceiling", "line"),
    [
        ("body", "torch.mm", "body bounds it: 71 % of the time, at 0.82 of the rate of torch.mm"),
        (
            "read",
            "one reader",
            "read bounds it: 71 % of the time is waiting for weights, which come at 0.82 of the",
        ),
        ("tokenise", None, "tokenise bounds it: 71 % of the time"),
        (
            "other",
            None,
            "no part bounds it: 71 % of the time goes to opening the model and placing its weights",
        ),
    ],
)
def test_what_takes_most_of_the_time_bounds_it(largest, ceiling, line):
    parts = {name: part(0.058, 0.5, "x") for name in PARTS}
    parts[largest] = part(0.71, None if ceiling is None else 0.82, ceiling)
    found = throughput.bound(parts)
    assert found["part"] == largest
    assert found["line"].startswith(line)
    assert found["share_of_time"] == 0.71


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["GPT-5"]}, "shape must be one of tiny, gpt, got 'GPT-5'"),
        ({"shapes": ["tiny"], "texts": 0}, "texts must be at least 1, got 0"),
        ({"shapes": ["tiny"], "repetitions": 0}, "repetitions must be at least 1, got 0"),
        ({"shapes": ["tiny"], "dtype": "int8"}, "dtype must be auto, float32"),
        ({"shapes": ["tiny"], "device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"models": ["/none"]}, "must be a checkpoint folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(small, options, message):
    with pytest.raises((ValueError, llfast.CheckpointError), match=message):
        throughput.measure(**options)


def test_a_device_is_refused_before_models_are_made_for_it(small, monkeypatch):
    monkeypatch.setattr(throughput, "make_checkpoint", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(ValueError, match="device must be there, got 'cuda:9'"):
        throughput.measure(["tiny"], device="cuda:9")


def test_products_of_every_layer_are_timed_as_often_as_it_is_there(monkeypatch):
    """With a clock that says one second a multiplication, whatever its size."""
    monkeypatch.setattr(
        products, "seconds_a_call", lambda call, calls, device: call() is None or 1.0
    )
    linear = {(8, 16): 3, (16, 8): 1}
    rates = products.product_rates(linear, 4, torch.float32, torch.device("cpu"), packed=False)
    assert rates == {"torch.mm": (3 + 1) * 2 * 4 * 8 * 16 / 4}
    monkeypatch.setattr(products, "_MOST_OUTPUT_BYTES", 2 * 16 * 4)
    rates = products.product_rates({(8, 16): 1}, 4, torch.float32, torch.device("cpu"), packed=True)
    assert rates == dict.fromkeys(("torch.mm", "packed products"), 2 * 2 * 8 * 16)

"""Linear layers with packed weights: fp64 truth, the same bits everywhere, and nothing left behind.

No table is asked here, except where it is tested: packed weights run on every x86 processor.
"""

import itertools
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers.pytorch_utils import Conv1D

import llfast
from llfast import batchwise, engines, linear, memory, partial
from llfast.errors import LlfastWarning, ScoringError
from llfast.linear import linear_layers, linear_path
from llfast.processor import Processor
from tests.tiny import TEXTS, make_model, make_tokenizer, plain_loglikelihood

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),
    reason="this torch was built without oneDNN; its x86 wheels have it",
)

CPU = torch.device("cpu")
ZEN5 = Processor("AuthenticAMD 26", "avx512_bf16")
SHAPES = [(768, 768), (768, 3072), (3072, 768), (131, 1000)]  # (in, out)
FLOOR = 1e-7  # relative to the largest output


def make_layer(shape, *, bias=True, kind=nn.Linear):
    torch.manual_seed(0)
    layer = Conv1D(shape[1], shape[0]) if kind is Conv1D else nn.Linear(*shape, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def on(processor, monkeypatch):
    """The table is asked for another processor than this machine's."""
    monkeypatch.setattr(linear, "this_processor", lambda: processor)


def run(layer, hidden, path="packed"):
    with torch.inference_mode(), linear_layers(layer, path, leave_out=None):
        return layer(hidden)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of all inputs that went through packed weights."""
    shapes = []
    compute = linear._packed_linear

    def spy(hidden, packed, bias):
        shapes.append(tuple(hidden.shape))
        return compute(hidden, packed, bias)

    monkeypatch.setattr(linear, "_packed_linear", spy)
    return shapes


@pytest.fixture
def untried():
    """torch's operators are tried out anew."""
    linear._packing_works.cache_clear()
    yield
    linear._packing_works.cache_clear()


@pytest.fixture
def forced(monkeypatch):
    """`score` takes the packed path, whatever the table says."""
    monkeypatch.setattr(engines, "linear_path", lambda *_, **__: "packed")


@pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_layer_against_fp64(shape, kind, bias, calls):
    layer = make_layer(shape, bias=bias, kind=kind)
    hidden = torch.randn(3, 48, shape[0])
    weight = layer.weight.detach().double()
    expected = hidden.double() @ (weight if kind is Conv1D else weight.T)
    if bias:
        expected += layer.bias.detach().double()
    own, packed = (run(layer, hidden, path).double() - expected for path in ("torch", "packed"))
    assert calls == [(3, 48, shape[0])]
    floor = FLOOR * expected.abs().max()
    assert packed.abs().max() <= 4 * own.abs().max() + floor
    assert packed.square().mean().sqrt() <= 4 * own.square().mean().sqrt() + floor


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_at_every_place_and_in_every_batch(shape, bias):
    rows = 512
    layer = make_layer(shape, bias=bias)
    hidden = torch.randn(rows, shape[0])
    with torch.inference_mode(), linear_layers(layer, "packed", leave_out=None):
        whole = layer(hidden)
        for count in range(16, rows + 1, 16):
            assert torch.equal(layer(hidden[:count]), whole[:count]), count
            assert torch.equal(layer(hidden[-count:]), whole[-count:]), count
        order = torch.randperm(rows)
        assert torch.equal(layer(hidden[order]), whole[order])
        same = layer(hidden[:1].expand(rows, -1))
        assert torch.equal(same, same[:1].expand(rows, -1))
        assert torch.equal(layer(hidden.view(4, 128, -1)), whole.view(4, 128, -1))
        assert torch.equal(layer(hidden.T.contiguous().T), whole)
        hidden[7] = torch.nan
        others = torch.arange(rows) != 7
        assert torch.equal(layer(hidden)[others], whole[others])
    assert torch.equal(run(layer, hidden[others]), whole[others]), "weights are packed anew"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.usefixtures("forced")
def test_a_model_with_packed_layers_scores_as_a_plain_forward(kind, calls):
    model, tokenizer = make_model(kind), make_tokenizer(adds_bos=True)
    result = llfast.score((model, tokenizer), TEXTS, token_budget=256)
    expected = [plain_loglikelihood(model, tokenizer(text)["input_ids"]) for text in TEXTS]
    assert np.std(expected) > 10, "the truth must tell texts apart"
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)
    assert result.provenance["linear"] == "packed"
    assert result.provenance["head"] == "fused"
    layers = {"llama": 7, "gpt2": 4}[kind] * 2
    assert len(calls) % layers == 0
    assert len(calls) >= layers
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.usefixtures("forced")
def test_a_head_that_is_not_fused_is_packed_with_the_rest(monkeypatch, calls):
    model, tokenizer = make_model("llama"), make_tokenizer(adds_bos=True)
    monkeypatch.setattr(engines, "find_head", lambda *_: None)
    result = llfast.score((model, tokenizer), TEXTS)
    expected = [plain_loglikelihood(model, tokenizer(text)["input_ids"]) for text in TEXTS]
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)
    assert len(calls) % 15 == 0


def test_what_was_kept_of_a_run_on_the_other_path_is_not_continued(monkeypatch, tmp_path):
    pair = make_model("llama"), make_tokenizer(adds_bos=True)
    options = {"revision": "one", "partial": tmp_path / "partial.npz"}
    monkeypatch.setattr(partial, "_SECONDS_BETWEEN_SAVES", -1)
    monkeypatch.setattr(engines, "linear_path", lambda *_, **__: "torch")
    assert llfast.score(pair, TEXTS, **options).provenance["linear"] == "torch"
    runs = []
    run_model = batchwise.run_model
    monkeypatch.setattr(batchwise, "run_model", lambda *a: runs.append(a) or run_model(*a))
    llfast.score(pair, TEXTS, **options)
    assert not runs
    monkeypatch.setattr(engines, "linear_path", lambda *_, **__: "packed")
    assert llfast.score(pair, TEXTS, **options).provenance["linear"] == "packed"
    assert runs


def test_everything_is_given_back_on_every_way_out(calls):
    model = make_model("gpt2")
    own = vars(model.transformer.h[0].mlp.c_fc)["forward"] = lambda hidden: hidden
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    packed = linear_layers(model, "packed", leave_out=model.lm_head)
    with pytest.raises(KeyboardInterrupt), packed:
        assert sum("forward" in vars(module) for module in model.modules()) == 8
        raise KeyboardInterrupt
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.transformer.h[0].mlp.c_fc.forward is own
    assert not calls


def test_memory_that_does_not_hold_packed_weights_is_named(monkeypatch):
    def fail(*_):
        raise RuntimeError("could not create a memory object")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fail)
    with pytest.raises(ScoringError, match="memory must hold the packed weights .* memory object"):
        run(make_layer((131, 1000)), torch.ones(2, 131))


def test_everything_is_given_back_if_packing_fails(monkeypatch):
    model = make_model("llama")
    pack, packed = linear._pack, []

    def fail_late(weight):
        packed.append(weight)
        if len(packed) == 5:
            raise RuntimeError("can't allocate memory")
        return pack(weight)

    monkeypatch.setattr(linear, "_pack", fail_late)
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(model, torch.ones(1, 2, dtype=torch.long))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


class _Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class _Named(nn.Linear):
    """A subclass that changes nothing."""


class _Quantised(nn.Parameter):
    """A parameter whose numbers are not what they seem."""


def _offloaded(layer):
    plain = layer.forward  # as accelerate does it
    layer.forward = lambda hidden: plain(hidden)
    return layer


def _with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, _: module.weight.data.mul_(1.0))
    return layer


def _quantised(layer):
    layer.weight = _Quantised(layer.weight.detach())
    return layer


def _with_half_bias(layer):
    layer.bias = nn.Parameter(layer.bias.detach().to(torch.bfloat16))
    return layer


LEFT_ALONE = {
    "parametrized": parametrizations.weight_norm,
    "computed by a hook": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "offloaded": _offloaded,
    "changed by a hook": _with_pre_hook,
    "quantised": _quantised,
    "bf16": lambda layer: layer.to(torch.bfloat16),
    "mixed": _with_half_bias,
    "meta": lambda layer: layer.to("meta"),
    "with a forward of its own": lambda _: _Doubled(32, 48),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_layers_with_weights_of_their_own_kind_are_left_alone(kind, calls):
    layer = LEFT_ALONE[kind](make_layer((32, 48))).eval()
    usual = _Named(32, 48)
    before = vars(layer).get("forward")
    hidden = torch.randn(4, 32)
    own = hidden.to(layer.weight.dtype)
    runs = kind not in ("meta", "mixed")
    with torch.inference_mode():
        expected = layer(own) if runs else None
        with linear_layers(nn.ModuleList([layer, usual]), "packed", leave_out=None):
            assert vars(layer).get("forward") is before
            if runs:
                assert torch.equal(layer(own), expected)
            assert not calls
            usual(hidden)
    assert len(calls) == 1


def test_a_shared_weight_is_packed_and_counted_once(monkeypatch):
    first, second, third = (make_layer((32, 48)) for _ in range(3))
    second.weight = first.weight
    model = nn.ModuleList([first, second, third, nn.Embedding(48, 32)])
    model[3].weight = first.weight
    pack, packed = linear._pack, []
    monkeypatch.setattr(linear, "_pack", lambda w: packed.append(w.shape) or pack(w))
    with torch.inference_mode():
        hidden = torch.randn(16, 32)
        expected = [layer(hidden) for layer in model[:3]]
        with linear_layers(model, "packed", leave_out=third):
            found = [layer(hidden) for layer in model[:3]]
            assert torch.equal(model[3](torch.tensor(3)), first.weight[3])
    assert packed == [(48, 32)]
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    monkeypatch.setattr(memory, "total_bytes", lambda: 4 * 48 * 32 * 4)
    on(ZEN5, monkeypatch)
    assert linear_path(CPU, torch.float32, model=model, leave_out=third) == "packed"
    assert linear_path(CPU, torch.float32, model=model) == "torch"


def test_unusual_calls_do_what_they_always_did(calls):
    layer, conv = make_layer((32, 48)), make_layer((32, 48), kind=Conv1D)
    hidden = torch.randn(4, 32)
    expected, expected_conv = layer(hidden).detach(), conv(hidden).detach()
    with linear_layers(nn.ModuleList([layer, conv]), "packed", leave_out=None):
        assert layer(hidden).requires_grad, "packed weights have no gradient"
        with torch.inference_mode():
            assert torch.equal(layer(input=hidden), expected)
            assert torch.equal(conv(x=hidden), expected_conv)
            for wrong in (hidden[:, 1:], hidden.to(torch.bfloat16), torch.tensor(1.0)):
                with pytest.raises(RuntimeError):
                    layer(wrong)
            with pytest.raises(TypeError):
                layer(hidden, wrong=hidden)
            assert not calls
            assert layer(hidden[:0]).shape == (0, 48)
            torch.testing.assert_close(layer(hidden[0]), expected[0])
    assert len(calls) == 2


@pytest.mark.usefixtures("forced")
def test_two_models_on_two_threads():
    pairs = [(make_model(kind), make_tokenizer(adds_bos=True)) for kind in ("llama", "gpt2")]
    expected = [llfast.score(pair, TEXTS).values for pair in pairs]
    found, barrier = [None, None], threading.Barrier(2)

    def work(row):
        barrier.wait()
        found[row] = [llfast.score(pairs[row], TEXTS).values for _ in range(3)]

    threads = [threading.Thread(target=work, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(2):
        for values in found[row]:
            assert values.tobytes() == expected[row].tobytes()


def test_the_table_is_all_that_decides(monkeypatch):
    model = make_model("llama")
    on(ZEN5, monkeypatch)
    assert linear_path(CPU, torch.float32, model=model) == "packed"
    assert linear_path(CPU, torch.bfloat16) == "torch"
    assert linear_path(torch.device("cuda"), torch.float32) == "torch"
    others = ("", ""), ("AuthenticAMD 25", "avx2"), ("GenuineIntel 6", "avx512_bf16")
    for processor in itertools.starmap(Processor, others):
        on(processor, monkeypatch)
        assert linear_path(CPU, torch.float32, model=model) == "torch"
    with linear_layers(model, "torch", leave_out=None):
        assert not [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("name", "replacement", "problem"),
    [
        ("_reorder_linear_weight", None, "no attribute"),
        ("_linear_pointwise", None, "no attribute"),
        ("_linear_pointwise", lambda *_: torch.zeros(16, 56), "something else"),
        ("_linear_pointwise", lambda *_: torch.zeros(16), "Type-check error"),
        ("_linear_pointwise", lambda *_: torch.full((16, 56), torch.nan), "something else"),
        ("_linear_pointwise", lambda _: None, "takes 1 positional"),
    ],
)
def test_torch_takes_over_where_its_operators_are_not_usable(
    monkeypatch, name, replacement, problem
):
    class Operators:
        def __getattr__(self, asked):
            if asked == name and replacement is None:
                raise AttributeError(f"'mkldnn' object has no attribute {asked!r}")
            return replacement if asked == name else getattr(own, asked)

    own = torch.ops.mkldnn
    monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    on(Processor("", ""), monkeypatch)
    assert linear_path(CPU, torch.float32) == "torch"  # no warning
    on(ZEN5, monkeypatch)
    with pytest.warns(LlfastWarning, match=f"not usable .*{problem}"):
        assert linear_path(CPU, torch.float32) == "torch"
    assert linear_path(CPU, torch.float32) == "torch"  # warned of once


def test_little_memory_leaves_the_layers_with_torch(monkeypatch):
    model = make_model("llama")
    on(ZEN5, monkeypatch)
    pair = model, make_tokenizer(adds_bos=True)
    assert llfast.score(pair, TEXTS).provenance["linear"] == "packed"
    monkeypatch.setattr(memory, "total_bytes", lambda: 10_000)
    assert llfast.score(pair, TEXTS).provenance["linear"] == "torch"

"""Operations that torch computes in another way at the end of a thread's piece of a tensor."""

import contextlib

import pytest
import torch
from torch.nn import functional

from llfast.pointwise import TextByText, _Mode

OPERATIONS = {
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "glu": functional.glu,
    "expit": torch.special.expit,
    "power": lambda x: torch.pow(x.abs(), 0.7),
    "power of a vector": lambda x: torch.pow(x.abs(), torch.full((x.shape[-1],), 0.7)),
    "power of a batch": lambda x: torch.pow(x.abs(), 0.3 + x.abs()),
    "scaled sum": lambda x: torch.add(x.bfloat16(), x.bfloat16(), alpha=0.3),
    "in place": lambda x: functional.silu(x.clone(), inplace=True),
    "into a tensor": lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
    "flattened": lambda x: functional.silu(x.view(-1, x.shape[-1])).view_as(x),
}
PLACED = {"into a tensor"}  # nothing is done about it, for no model does it


def batch(texts, *shape):
    """The same text again and again; of a size that leaves each of them another remainder."""
    torch.manual_seed(0)
    return torch.randn(1, *shape).expand(texts, *shape).contiguous()


def ids(texts):
    return torch.zeros(texts, 1, dtype=torch.int64)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_text_has_the_same_bits(name):
    x = batch(5, 333, 34)
    with torch.inference_mode():
        plain = OPERATIONS[name](x)
        with TextByText().during(ids(5)):
            found = OPERATIONS[name](x)
    torch.testing.assert_close(found, plain)
    assert (found == found[:1]).all() or name in PLACED


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="vectors may be computed as numbers are; runs on processors with AVX2",
)
def test_torch_still_needs_this():
    """If it does not, `pointwise.py` can go."""
    x = batch(5, 333, 34)
    assert any((OPERATIONS[name](x) != OPERATIONS[name](x)[:1]).any() for name in OPERATIONS)


def test_products_that_are_scaled_are_not_cut():
    torch.manual_seed(0)
    bias, left, right = torch.randn(32), torch.randn(16, 64), torch.randn(64, 32)
    mode = TextByText().during(ids(4))
    with torch.inference_mode(), mode:
        found = torch.addmm(bias, left, right, alpha=0.5)
    torch.testing.assert_close(found, bias + 0.5 * (left @ right))
    assert not mode.has_cut


def test_what_is_left_of_the_last_piece_counts():
    """Of 17 threads' pieces, all but the last are whole vectors."""
    mode = _Mode(4)
    mode._threads = 17
    assert mode._is_whole([torch.empty(544 * 2048)])
    assert not mode._is_whole([torch.empty(544 * 2048 - 16)])


def test_results_are_laid_out_as_those_of_torch():
    x = batch(4, 6, 8).transpose(1, 2)
    with torch.inference_mode(), TextByText().during(ids(4)):
        assert functional.silu(x).stride() == x.stride()
        assert functional.silu(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert torch.sigmoid(torch.ones(4, 3, dtype=torch.int32)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 7), (3, 7), (7,)])
def test_what_has_no_texts_is_left_alone(shape):
    x = torch.linspace(-2, 2, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
    x = x.view(shape)
    expected = torch.sigmoid(x)
    with torch.inference_mode(), TextByText().during(ids(4)):
        assert torch.equal(torch.sigmoid(x), expected)


def test_one_text_and_other_devices_are_left_alone():
    for each in (ids(1), ids(4).to("meta")):
        assert isinstance(TextByText().during(each), contextlib.nullcontext)


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["whole", "half of the columns", "turned"])
def test_shapes_whose_pieces_are_whole_vectors_are_learned_and_left_alone(threads, dtype, layout):
    """The width of Llama's layers; 4 texts of 32 tokens leave a remainder only for 3 threads."""
    by_text, input_ids = TextByText(), torch.zeros(4, 32, dtype=torch.int64)
    x = batch(4, 32, 11_008).to(dtype)
    if layout == "half of the columns":
        x = torch.cat((x, x), -1)[..., :11_008]
    elif layout == "turned":
        x = x.transpose(1, 2)
    for _ in range(2):
        mode = by_text.during(input_ids)
        with torch.inference_mode(), mode:
            found = [functional.silu(x), torch.rsqrt(x.abs())]
        by_text.learn(input_ids, mode)
        assert all((each == each[:1]).all() for each in found)
    is_learned = isinstance(by_text.during(input_ids), contextlib.nullcontext)
    assert is_learned == (layout != "turned" and threads != 3)
    assert not isinstance(by_text.during(torch.zeros(2, 48)), contextlib.nullcontext)

"""The fused output head against fp64, on every instruction set of this machine."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from llfast.kernels import reference as twin
from llfast.kernels import token_logprobs
from llfast.kernels.dispatch import folded_sums, statistics
from llfast.kernels.inputs import HeadInputs
from tests.heads import SETS, check_logprobs, make_case

SHAPES = (  # (T, V, D): aligned, ragged, odd, tiny; around each block of the kernel
    (1, 1, 1),
    (1, 5, 3),
    (2, 1, 7),
    (6, 4, 16),
    (3, 127, 15),
    (5, 128, 17),
    (7, 129, 33),
    (48, 1024, 64),
    (49, 1025, 65),
    (97, 2051, 31),
    (13, 301, 1024),
    (9, 300, 1025),
    (4, 131, 2100),
)


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def twin_logprobs(hidden, lm_head, targets, *, bias=None, scale=1.0, softcap=None):
    inputs = HeadInputs(
        hidden=hidden, lm_head=lm_head, targets=targets, bias=bias, scale=scale, softcap=softcap
    )
    return statistics(twin, folded_sums(twin, inputs)).logprobs


# ----------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_as_near_to_fp64_as_torch(shape, dtype, exact_kernels):
    check_logprobs(token_logprobs, *make_case(shape, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_twin_is_as_near_to_fp64_as_torch(shape, dtype, monkeypatch):
    monkeypatch.setattr(twin, "_CHUNK_BYTES", 60_000)  # several chunks of T and of V
    monkeypatch.setattr(twin, "_PARTIALS_BYTES", 200)  # several slices of T
    bias = torch.linspace(-1, 1, shape[1])
    check_logprobs(twin_logprobs, *make_case(shape, dtype))
    check_logprobs(twin_logprobs, *make_case(shape, dtype), bias=bias, scale=0.7, softcap=6.0)


OPTIONS = {
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "negative scale": {"scale": -1.5},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 0.3, "softcap": 30.0},
}


@pytest.mark.parametrize("shape", [(7, 129, 33), (50, 1100, 20), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_bias_scale_and_softcap(shape, name, dtype, exact_kernels):
    options = dict(OPTIONS[name])
    if options.pop("bias", False):
        options["bias"] = torch.randn(shape[1], generator=torch.Generator().manual_seed(5)) * 2
    check_logprobs(token_logprobs, *make_case(shape, dtype), **options)


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_bias_of_another_dtype(bias_dtype):
    bias = torch.linspace(-3, 3, 200).to(bias_dtype)
    case = make_case((5, 200, 12), torch.float32)
    expected = token_logprobs(*case, bias=bias.float())
    assert torch.equal(token_logprobs(*case, bias=bias), expected)


def test_peaked_flat_and_negative_rows(dtype, exact_kernels):
    hidden, lm_head, _ = make_case((6, 1500, 24), dtype, spread=60.0)
    best = (hidden.double() @ lm_head.double().T).argmax(1)
    check_logprobs(token_logprobs, hidden, lm_head, best)
    assert (token_logprobs(hidden, lm_head, best) <= 0).all()
    check_logprobs(token_logprobs, hidden, lm_head, torch.full((6,), 1499))
    flat = token_logprobs(torch.zeros_like(hidden), lm_head, best)
    torch.testing.assert_close(flat, torch.full((6,), -math.log(1500)), rtol=2e-7, atol=0)
    check_logprobs(token_logprobs, -hidden.abs(), lm_head.abs(), best)


def test_one_word_is_certain(dtype, exact_kernels):
    hidden, lm_head, targets = make_case((3, 1, 5), dtype)
    assert token_logprobs(hidden, lm_head, targets).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ruled_out", [(0, 1), (0, 128), (0, 1024), (100, 1300), (1, 1400)])
def test_words_ruled_out_by_the_bias(ruled_out, dtype, exact_kernels):
    hidden, lm_head, targets = make_case((8, 1400, 20), dtype)
    targets[0], targets[1] = 0, 1399
    bias = torch.zeros(1400)
    bias[slice(*ruled_out)] = -math.inf
    check_logprobs(token_logprobs, hidden, lm_head, targets, bias=bias)
    check_logprobs(token_logprobs, hidden, lm_head, targets, bias=bias, softcap=5.0)
    targets[:] = ruled_out[0]
    assert (token_logprobs(hidden, lm_head, targets, bias=bias) == -math.inf).all()


def test_all_words_but_one_or_all_ruled_out(dtype, exact_kernels):
    hidden, lm_head, targets = make_case((3, 1400, 20), dtype)
    bias = torch.full((1400,), -math.inf)
    assert token_logprobs(hidden, lm_head, targets, bias=bias).isnan().all()
    bias[1030] = 0.0
    targets[:] = 1030
    assert token_logprobs(hidden, lm_head, targets, bias=bias).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_nan_and_harms_no_other(value, dtype, exact_kernels):
    hidden, lm_head, targets = make_case((20, 300, 37), dtype)
    good = token_logprobs(hidden, lm_head, targets)
    hidden[7, 3] = value
    found = token_logprobs(hidden, lm_head, targets)
    assert found[7].isnan()
    others = torch.arange(20) != 7
    assert torch.equal(found[others], good[others])


# ------------------------------------------------------------------------- same bits every time


def test_bits_depend_neither_on_other_rows_nor_on_threads(dtype, forced_set):
    hidden, lm_head, targets = make_case((101, 4099, 96), dtype)
    bias = torch.linspace(-1, 1, 4099)
    options = {"bias": bias, "scale": 0.9, "softcap": 20.0}
    torch.set_num_threads(1)
    expected = token_logprobs(hidden, lm_head, targets, **options)
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        assert torch.equal(token_logprobs(hidden, lm_head, targets, **options), expected)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    shuffled = token_logprobs(hidden[order], lm_head, targets[order], **options)
    assert torch.equal(shuffled, expected[order])
    for begin, end in ((0, 1), (100, 101), (3, 5), (10, 13), (17, 21), (40, 45), (2, 8), (1, 100)):
        part = token_logprobs(hidden[begin:end], lm_head, targets[begin:end], **options)
        assert torch.equal(part, expected[begin:end])


@pytest.mark.parametrize("width", [768, 1100, 2100])
def test_bits_at_real_width(width, dtype, forced_set):
    hidden, lm_head, targets = make_case((300, 2051, width), dtype)  # more rows than a task has
    expected = token_logprobs(hidden, lm_head, targets)
    for row in (0, 31, 95, 96, 255, 256, 299):
        alone = token_logprobs(hidden[[row]], lm_head, targets[[row]])
        assert torch.equal(alone, expected[[row]])


def test_slices_of_t_change_no_bit():
    """T is cut when its partial sums outgrow 1 MiB a thread, which is 5,242 rows here."""
    hidden, lm_head, targets = make_case((30_000, 10 * 1024, 1), torch.float32)
    torch.set_num_threads(1)
    found = token_logprobs(hidden, lm_head, targets)
    parts = zip(hidden.split(9000), targets.split(9000), strict=True)
    assert torch.equal(found, torch.cat([token_logprobs(h, lm_head, t) for h, t in parts]))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torch_defaults_change_nothing(default):
    """from_pretrained sets the default dtype while it loads, for all threads."""
    case = make_case((7, 2100, 33), torch.float32)
    expected = token_logprobs(*case)
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found = token_logprobs(*case)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# -------------------------------------------------------------------------------------- layouts


def layouts(matrix):
    rows, width = matrix.shape
    wide = torch.full((rows + 1, width + 5), math.nan, dtype=matrix.dtype)
    wide[1:, 3 : width + 3] = matrix
    yield "slice of a wider matrix", wide[1:, 3 : width + 3]
    yield "columns first", matrix.T.contiguous().T
    spaced = torch.full((2 * rows, width), math.nan, dtype=matrix.dtype)
    spaced[::2] = matrix
    yield "every other row", spaced[::2]
    apart = torch.full((rows, 2 * width), math.nan, dtype=matrix.dtype)
    apart[:, ::2] = matrix
    yield "every other column", apart[:, ::2]
    memory = bytearray(matrix.numel() * matrix.element_size() + 1)
    odd = torch.frombuffer(memory, dtype=matrix.dtype, offset=1, count=matrix.numel())
    yield "an odd address", odd.view(rows, width).copy_(matrix)


@pytest.mark.parametrize("width", [1, 16, 37])
def test_layouts_change_no_bit(width, dtype, exact_kernels):
    hidden, lm_head, targets = make_case((11, 150, width), dtype)
    expected = token_logprobs(hidden, lm_head, targets)
    for name, other in layouts(hidden):
        assert torch.equal(token_logprobs(other, lm_head, targets), expected), name
    for name, other in layouts(lm_head):
        assert torch.equal(token_logprobs(hidden, other, targets), expected), name
    repeated = token_logprobs(hidden[:1].expand(11, -1), lm_head, targets[:1].expand(11))
    assert torch.equal(repeated, expected[:1].expand(11))
    bias = torch.stack([torch.linspace(0, 1, 150), torch.zeros(150)], dim=1)[:, 0]
    assert torch.equal(
        token_logprobs(hidden, lm_head, targets, bias=bias),
        token_logprobs(hidden, lm_head, targets, bias=bias.clone()),
    )


def test_offsets_past_2_to_the_31(tmp_path, exact_kernels):
    """Three rows 2**30 elements apart, in a file of holes."""
    rows = torch.tensor([[0.5, 1.0, -2.0], [1.0, 0.25, 3.0], [-1.0, 2.0, 0.5]]).half()
    path = str(tmp_path / "sparse")
    file = torch.from_file(path, shared=True, size=2**31 + 3, dtype=torch.float16)
    far = file.as_strided((3, 3), (2**30, 1))
    far.copy_(rows)
    targets = torch.tensor([0, 1, 2])
    assert torch.equal(token_logprobs(rows, far, targets), token_logprobs(rows, rows, targets))
    assert torch.equal(token_logprobs(far, rows, targets), token_logprobs(rows, rows, targets))


GUARDED = """
import ctypes, mmap, os, sys
import torch
from llfast.kernels import token_logprobs

def at_the_end_of_a_page(matrix):
    size = matrix.numel() * matrix.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    room = torch.frombuffer(
        memory, dtype=matrix.dtype, count=matrix.numel(), offset=pages * mmap.PAGESIZE - size
    )
    return room.view(matrix.shape).copy_(matrix)

for instructions in sys.argv[1:]:
    os.environ["LLFAST_ISA"] = instructions
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tokens, vocabulary, width in ((1, 5, 3), (3, 64, 33), (40, 70, 64), (150, 96, 1100)):
            hidden = torch.randn(tokens, width).to(dtype)
            lm_head = torch.randn(vocabulary, width).to(dtype)
            targets = torch.zeros(tokens, dtype=torch.int64)
            ends = [at_the_end_of_a_page(matrix) for matrix in (hidden, lm_head)]
            found = token_logprobs(*ends, targets)
            assert torch.equal(found, token_logprobs(hidden, lm_head, targets))
"""


def test_nothing_is_read_behind_the_last_row():
    """A head may end where a mapped file does; sanitisers do not see what loads of tiles read."""
    command = [sys.executable, "-c", GUARDED, *SETS]
    subprocess.run(command, check=True, timeout=120)


def test_int32_targets_parameters_and_no_tokens():
    hidden, lm_head, targets = make_case((4, 30, 8), torch.float32)
    expected = token_logprobs(hidden, lm_head, targets)
    parameter = torch.nn.Parameter(lm_head)
    found = token_logprobs(hidden.requires_grad_(), parameter, targets.int())
    assert torch.equal(found, expected)
    assert not found.requires_grad
    empty = token_logprobs(hidden[:0], lm_head, targets[:0])
    assert empty.shape == (0,)
    assert empty.dtype == torch.float32


# ------------------------------------------------------------------ what the caller must not feel


def long_call():
    """Minutes of work in a megabyte: one row of hidden and of head, repeated by a stride of 0."""
    hidden = torch.ones(1, 512).expand(200_000, -1)
    lm_head = torch.ones(1, 512).expand(200_000, -1)
    return token_logprobs(hidden, lm_head, torch.zeros(200_000, dtype=torch.int64))


def test_signals_end_a_long_call():
    class StoppedError(Exception):
        pass

    def stop(*_):
        raise StoppedError

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        begin = time.perf_counter()
        with pytest.raises(StoppedError):
            long_call()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.perf_counter() - begin < 2  # 0.3 s on an idle machine


def test_other_python_threads_run_meanwhile():
    hidden, lm_head, targets = make_case((256, 20_000, 64), torch.float32)
    torch.set_num_threads(1)
    begun = threading.Event()

    def call():
        begun.set()
        for _ in range(3):
            token_logprobs(hidden, lm_head, targets)

    thread = threading.Thread(target=call)
    thread.start()
    begun.wait()
    turns = 0
    while thread.is_alive():
        turns += 1
        time.sleep(1e-4)
    assert turns > 50


MEMORY = """
import torch
from llfast.kernels import reference, token_logprobs
from llfast.kernels.dispatch import folded_sums, statistics
from llfast.kernels.inputs import HeadInputs

def twin(hidden, lm_head, targets):
    inputs = HeadInputs(
        hidden=hidden, lm_head=lm_head, targets=targets, bias=None, scale=1.0, softcap=None
    )
    statistics(reference, folded_sums(reference, inputs))

def peak_mib():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

hidden, lm_head = torch.randn(4096, 8), torch.randn(50_000, 8)
targets = torch.zeros(4096, dtype=torch.int64)
for function, limit in ((token_logprobs, 16), (twin, 72)):
    function(hidden[:1], lm_head, targets[:1])
    open("/proc/self/clear_refs", "w").write("5")
    before = peak_mib()
    function(hidden, lm_head, targets)
    assert peak_mib() - before < limit, (function, peak_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_logits_are_never_whole():
    """They would take 781 MiB."""
    # glibc would keep what earlier calls freed, or not, as it sees fit.
    giving_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", MEMORY]
    subprocess.run(command, check=True, timeout=120, env=os.environ | giving_back)

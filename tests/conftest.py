"""Shared by all tests: types checked at run time, no network, a cache of their own."""

import importlib.util
import os
import secrets
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import greenlet
import jaxtyping
import pytest
import threadpoolctl
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Set before anything reads them, and inherited by the commands that tests run.
if "LLFAST_REQUIRE_GPU" not in os.environ:
    # Triton's kernels then run on the CPU, tile by tile, in numpy.
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several, which have a core each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)  # numpy, which torch has loaded, has its own
_CACHE = tempfile.TemporaryDirectory(prefix="llfast-tests-")  # gone when the tests are
os.environ["LLFAST_CACHE"] = _CACHE.name
os.environ["HF_MODULES_CACHE"] = str(Path(_CACHE.name, "modules"))  # code that checkpoints bring

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where arrays are; `texts` checks its arguments itself, and is tested to.
TYPED = "basis batches batchwise comparison dendrogram diffusion engines forward head".split()
TYPED += "importing intervals layers lens linear mapping neighbours page placing results".split()
TYPED += "scans scoring space trajectory weight_distances where".split()
TYPED += [f"paging.{name}" for name in "model units waves".split()]
TYPED += [
    f"search.{name}"
    for name in "added certified flat gpu index listing lists projection searched snapshot".split()
]
# All of the kernels but those that Triton reads as source.
TYPED += [
    f"kernels.{name}"
    for name in "cpu cuda dispatch inputs partial_logprobs reference sums torch_op".split()
]


class _ByGreenlet:
    """Attributes of every greenlet's own.

    jaxtyping keeps the axes of running calls by thread, in a stack; but calls in greenlets do not
    end in the order in which they began.
    """

    def __init__(self):
        vars(self)["own"] = WeakKeyDictionary()

    def __getattr__(self, name):
        return getattr(self.own.setdefault(greenlet.getcurrent(), SimpleNamespace()), name)

    def __setattr__(self, name, value):
        setattr(self.own.setdefault(greenlet.getcurrent(), SimpleNamespace()), name, value)


jaxtyping._storage._shape_storage = _ByGreenlet()
if importlib.util.find_spec("beartype"):  # a GPU machine may lack it
    jaxtyping.install_import_hook([f"llfast.{name}" for name in TYPED], "beartype.beartype")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_runtest_setup(item):
    if not item.get_closest_marker("gpu"):
        return
    if "LLFAST_REQUIRE_GPU" not in os.environ:
        pytest.skip("needs a CUDA device; benchmarks/on_gpu.py runs it with LLFAST_REQUIRE_GPU=1")
    if not torch.cuda.is_available():
        pytest.fail("LLFAST_REQUIRE_GPU is set, and torch sees no CUDA device")


@pytest.fixture
def untyped():
    """Without the run-time types of tests, which would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data():
    """A folder of real data that a checkout may have beside it."""
    if not SHARED.is_dir():
        pytest.skip(
            f"real data is not beside this checkout ({SHARED.name}/); a twin test runs here"
        )
    return SHARED


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with small checkpoints, made once; see `tiny.py`."""
    from tests.tiny import make_checkpoints

    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def _s3_server():
    pytest.importorskip("s3fs", reason="s3:// is an extra: pip install 'llfast[s3]'")
    from tests.s3 import s3_server

    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(_s3_server, monkeypatch):
    """`s3://...`, a bucket of the test's own, which is there for child processes, too."""
    from tests.s3 import call

    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC"))]:
        monkeypatch.delenv(name)
    for name, value in _s3_server.items():
        monkeypatch.setenv(name, value)
    name = f"test-{secrets.token_hex(6)}"
    call("create_bucket", Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    """(folder, report, lines, config) of a demo whose models have learned next to nothing."""
    from llfast.demo import run_demo
    from llfast.zoo_plan import Family, ZooConfig
    from llfast.zoo_training import Sizes

    folder = tmp_path_factory.mktemp("small") / "demo"
    config = ZooConfig(
        families=(
            Family(architecture="gpt2", prose_share=0.9, checkpoints=(10, 20)),
            Family(architecture="llama", prose_share=0.1, merged=True, heavy_corpus="gpt2"),
        ),
        sizes=Sizes(vocabulary=300, width=32, layers=1, heads=2, window_tokens=64, batch_rows=2),
        base_steps=30,
        fine_tune_steps=2,
        heavy_steps=3,
    )
    lines = []
    report = run_demo(folder, config=config, texts=40, say=lines.append)
    return folder, report, lines, config

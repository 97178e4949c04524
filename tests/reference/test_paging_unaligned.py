"""Files whose header is not padded: tensors begin between whole addresses, and are copied."""

import pytest

import llfast
from llfast.checkpoint import Checkpoint
from llfast.paging import model as paged_model
from llfast.paging import units
from tests.families import (
    FEW,
    OPTIONS,
    age,
    least_together,
    make_family,
    second_layer,
    together,
)
from tests.paging import LIMITS, check_same, least_budget, lengthen_header, score_paged
from tests.tiny import make_model, make_tokenizer, save

pytestmark = pytest.mark.usefixtures("on_one_thread")

BUDGET = {"token_budget": 64}


@pytest.fixture
def tokenizer():
    return make_tokenizer(adds_bos=False)


@pytest.fixture(autouse=True)
def everything_pages(monkeypatch):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_copies_are_promised_and_counted(kind, dtype, tmp_path, tokenizer):
    """One of each tensor of a layer, beside whatever else is made of it."""
    options = {"dtype": dtype, **BUDGET}
    folder = save(make_model(kind), tokenizer, tmp_path / "m")
    expected, before = score_paged(folder, FEW, **options)
    least = least_budget(folder, FEW, **options)
    lengthen_header(folder, 1)
    assert {each.begin % 4 for each in Checkpoint.open(folder).tensors.values()} == {1}
    layer = max(page.nbytes for page in before.pages if page.name in before.order)
    assert least_budget(folder, FEW, **options) == pytest.approx(least + layer, abs=8192)
    least = least_budget(folder, FEW, **options)
    result, statistics = score_paged(folder, FEW, memory_budget=least, **options)
    check_same(result, expected)
    check_same(result, llfast.score(folder, FEW, weights="resident", per_token=True, **options))
    assert statistics.slot_bytes >= before.slot_bytes + layer
    assert statistics.slot_bytes + statistics.kept_bytes < least


def test_no_copy_where_only_the_item_size_counts(tmp_path, tokenizer):
    options = {"dtype": "float32", **BUDGET}
    folder = save(make_model("llama"), tokenizer, tmp_path / "m")
    least = least_budget(folder, FEW, **options)
    lengthen_header(folder, 4)
    assert least_budget(folder, FEW, **options) == pytest.approx(least, abs=8192)


def test_small_tables_that_stay(tmp_path, tokenizer, monkeypatch):
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 1 << 30)
    options = {"dtype": "float32", **BUDGET}
    folder = save(make_model("llama", vocabulary=5000, tied=True), tokenizer, tmp_path / "m")
    lengthen_header(folder, 3)
    least = least_budget(folder, FEW, **options)
    result, statistics = score_paged(folder, FEW, memory_budget=least, **options)
    check_same(result, llfast.score(folder, FEW, weights="resident", per_token=True, **options))
    assert statistics.slot_bytes + statistics.kept_bytes < least


def test_relatives(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(paged_model, "refuse_if_alone_is_less", lambda *_: None)
    changes = [(seed, second_layer) for seed in range(3)]
    folders = make_family(tmp_path, "llama", tokenizer, changes)
    aligned, (_, before) = least_together(folders), together(folders)
    for folder in folders:
        lengthen_header(folder, 1)
        age(folder)
    least = least_together(folders)
    results, loading = together(folders, memory_budget=least)
    for folder, result in zip(folders, results, strict=True):
        check_same(result, llfast.score(folder, FEW, **{**OPTIONS, "weights": "resident"}))
    layer = max(page.nbytes for page in before.pages if page.name in before.order)
    assert least > aligned + 2 * layer, "of one that begins, and of one that adds its own"
    assert loading.slot_bytes + loading.kept_bytes < least

"""Relatives in one pass take the memory that was promised, and part where that does not pay."""

import gc

import pytest
import torch

import llfast
from llfast.errors import LlfastWarning
from llfast.paging import LoadingStatistics
from llfast.paging import model as paged_model
from llfast.paging import pages as pages_module
from llfast.paging import waves as waves_module
from llfast.paging.skeleton import Skeleton
from tests.families import (
    CHANGES,
    FEW,
    OPTIONS,
    alone,
    check_together,
    embedding,
    least_together,
    make_family,
    second_layer,
    together,
)
from tests.paging import check_same
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny


@pytest.fixture
def tokenizer():
    return make_tokenizer(adds_bos=False)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("mixtral", "bfloat16")])
def test_they_take_no_more_memory_than_was_promised(kind, dtype, tmp_path, tokenizer, monkeypatch):
    """What one brings for another one stays, beside two pages."""
    monkeypatch.setattr(paged_model, "refuse_if_alone_is_less", lambda *_: None)
    folders = make_family(tmp_path, kind, tokenizer, [*CHANGES, (2, second_layer)])
    least = least_together(folders, dtype=dtype)
    loading = check_together(folders, memory_budget=least, dtype=dtype)
    assert loading.waves > 6
    assert loading.slot_bytes + loading.kept_bytes < least


@pytest.mark.parametrize("done", [{0, 2}, {1, 3}])
def test_nor_do_those_that_are_left(done, tmp_path, tokenizer, monkeypatch):
    """Who begins brings all of a layer, and others what is not there then."""
    monkeypatch.setattr(paged_model, "refuse_if_alone_is_less", lambda *_: None)
    changes = [*CHANGES, (2, second_layer)]
    folders = make_family(tmp_path, "llama", tokenizer, changes)
    least = least_together(folders)
    partials = [tmp_path / f"{number}.npz" for number in range(len(folders))]
    for number in done:
        llfast.score(folders[number], FEW, partial=partials[number], **OPTIONS)
    results, loading = together(folders, memory_budget=least, partials=partials)
    for result, expected in zip(results, alone(folders), strict=True):
        assert result.values.tobytes() == expected.values.tobytes()
    assert loading.slot_bytes + loading.kept_bytes < least


@pytest.mark.slow
def test_what_stays_is_not_there_twice(tmp_path, tokenizer, monkeypatch):
    """Tables that are converted: as they are stored, one at a time."""
    changes = [(seed, embedding) for seed in range(6)]
    folders = make_family(tmp_path, "llama", tokenizer, changes, vocabulary=8_000)
    most, own = [], Skeleton.put

    def watch(self, names, tensors):
        gc.collect()
        raw = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if type(each) is torch.Tensor and each.dtype == torch.float32
        }
        most.append(sum(nbytes for nbytes in raw.values() if nbytes > 800_000))
        return own(self, names, tensors)

    monkeypatch.setattr(Skeleton, "put", watch)
    together(folders, dtype="bfloat16")
    table = 8_000 * 32 * 4
    assert table <= max(most) <= 2 * table


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["paged", "auto"])
@pytest.mark.filterwarnings("ignore:.*one after the other:llfast.LlfastWarning")
def test_together_they_never_read_much_more_than_alone(weights, tmp_path, tokenizer):
    changes = [(seed, second_layer) for seed in range(4)]
    folders = make_family(tmp_path, "llama", tokenizer, changes, num_hidden_layers=4)
    least = least_together(folders)
    for room in (1, 40_000, 1 << 30):
        options = {**OPTIONS, "weights": weights, "memory_budget": least + room}
        results, loading = together(folders, **options)
        separate = LoadingStatistics()
        expected = [llfast.score(each, FEW, loading=separate, **options) for each in folders]
        for result, each in zip(results, expected, strict=True):
            check_same(result, each)
        kept = 5 * 304 * 32 * 4  # which is there before anything is known of texts
        assert loading.nbytes <= 1.1 * separate.nbytes + kept
    assert loading.nbytes < 0.6 * separate.nbytes


@pytest.mark.parametrize("error", [RuntimeError("nobody thought of"), MemoryError()])
def test_what_goes_wrong_together_may_go_alone(error, tmp_path, tokenizer, monkeypatch):
    folders = make_family(tmp_path, "llama", tokenizer, CHANGES[:2])
    expected = alone(folders)
    own = waves_module.Waves._run_wave

    def fail(self, *arguments):
        if len(self.subjects) > 1:
            raise error
        return own(self, *arguments)

    monkeypatch.setattr(waves_module.Waves, "_run_wave", fail)
    for weights in ("auto", "paged"):
        with pytest.warns(LlfastWarning, match="3 relatives are scored one after the other, for"):
            results, _ = together(folders, weights=weights)
        for result, each in zip(results, expected, strict=True):
            check_same(result, each)


def test_every_file_is_open_once(tmp_path, tokenizer, monkeypatch):
    """A system lets a process open 1,024, and one model may have hundreds."""
    folders = make_family(tmp_path, "llama", tokenizer, CHANGES[:2])
    opened = []

    def count(paths, **options):
        opened.extend(paths)
        return own(paths, **options)

    own = pages_module.FileReader
    monkeypatch.setattr(pages_module, "FileReader", count)
    together(folders)
    assert sorted(opened) == [str(each / "model.safetensors") for each in sorted(folders)]


def test_too_little_memory_for_all_of_them(tmp_path, tokenizer):
    changes = [(seed, embedding) for seed in range(6)]
    folders = make_family(tmp_path, "llama", tokenizer, changes, vocabulary=3000)
    with pytest.warns(LlfastWarning, match="7 relatives are scored one after the other"):
        results, _ = together(folders, memory_budget="1500KiB")
    for result, expected in zip(results, alone(folders), strict=True):
        check_same(result, expected)

"""`score` with paged weights gives the bits that it gives with a model that is all there."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llfast
from llfast import batchwise, engines
from llfast.checkpoint import Checkpoint
from llfast.errors import LlfastWarning, UnsupportedModelError
from llfast.paging import model as paged_model
from llfast.paging import units
from llfast.paging.tables import Rows
from tests.paging import LIMITS, check_same, least_budget, score_paged
from tests.tiny import SIZES, TEXTS, make_model, make_tokenizer, quiet, save

pytestmark = pytest.mark.usefixtures("on_one_thread")  # models are tiny

OPTIONS = {"token_budget": 64}
FEW = TEXTS[1::2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every kind."""
    folder = tmp_path_factory.mktemp("paging")
    tokenizer = make_tokenizer(adds_bos=False)
    return {kind: save(make_model(kind), tokenizer, folder / kind) for kind in SIZES}


@pytest.fixture
def tokenizer():
    return make_tokenizer(adds_bos=False)


@pytest.fixture
def everything_pages(monkeypatch):
    """No table or layer is small enough to be kept."""
    for limit in LIMITS:
        monkeypatch.setattr(units, limit, 0)


def resident(folder, texts=FEW, **options):
    result = llfast.score(folder, texts, weights="resident", per_token=True, **OPTIONS, **options)
    assert result.provenance["weights"] == "resident"
    return result


def paged(folder, texts=FEW, **options):
    return score_paged(folder, texts, **OPTIONS, **options)


def check_waves(folder, **options):
    """In one wave, and with one batch a wave; what loading took then."""
    expected = resident(folder, **options)
    assert np.std(expected.values) > 10, "the truth must tell texts apart"
    result, statistics = paged(folder, **options)
    check_same(result, expected)
    assert statistics.waves == 1
    least = least_budget(folder, FEW, **OPTIONS, **options)
    result, statistics = paged(folder, memory_budget=least, **options)
    check_same(result, expected)
    assert statistics.waves > 2
    return statistics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SIZES)
def test_paged_is_resident_to_the_bit(kind, dtype, folders):
    statistics = check_waves(folders[kind], dtype=dtype)
    prefix = {"gpt2": "transformer.h"}.get(kind, "model.layers")
    assert statistics.order == [f"{prefix}.0", f"{prefix}.1"]
    first, *others = [page.name for page in statistics.pages]
    assert first == "what stays in memory"
    assert others == [*statistics.order, "rows 0 of the head"] * statistics.waves
    assert statistics.rows_bytes == 0


@pytest.mark.usefixtures("everything_pages")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi"])
def test_embeddings_by_rows(kind, dtype, folders):
    statistics = check_waves(folders[kind], dtype=dtype)
    assert statistics.rows_bytes > 0
    words = 32 * torch.finfo(getattr(torch, dtype)).bits // 8 * 304
    assert statistics.kept_bytes < words, "no table of words is kept"


@pytest.mark.usefixtures("everything_pages")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_table_that_is_read_at_once(stored, tied, tmp_path, tokenizer, monkeypatch):
    """As where memory_budget is not for the host's memory, if there are more tokens than words."""
    model = make_model("llama", tie_word_embeddings=tied).to(stored)
    folder = save(model, tokenizer, tmp_path / "m")
    table = model.get_input_embeddings().weight
    plain = check_waves(folder, dtype="float32")
    for rows, is_whole in ((len(table), True), (len(table) - 1, False)):
        monkeypatch.setattr(paged_model, "_most_table_rows", lambda *_, most=rows: most)
        statistics = check_waves(folder, dtype="float32")
        assert (statistics.rows_bytes == table.nbytes) == is_whole
        assert statistics.waves == plain.waves, "it takes nothing of the budget"


@pytest.mark.usefixtures("everything_pages")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_table_that_is_read_at_once_stays_where_the_model_is(
    stored, tied, tmp_path, tokenizer, monkeypatch
):
    """If it leaves room for texts: no batch then waits for the host to gather its rows."""
    model = make_model("llama", tie_word_embeddings=tied).to(stored)
    folder = save(model, tokenizer, tmp_path / "m")
    rows = len(model.get_input_embeddings().weight)
    options = {"dtype": "float32"}
    expected, plain = paged(folder, **options)
    monkeypatch.setattr(paged_model, "_most_table_rows", lambda *_: rows)
    gathered = []
    own = Rows.read
    monkeypatch.setattr(Rows, "read", lambda *given: gathered.append(1) or own(*given))
    table_bytes = 4 * rows * model.config.hidden_size
    least = least_budget(folder, FEW, **OPTIONS, **options)
    for room, stays in ((3 * table_bytes, True), (3 * table_bytes - 1, False)):
        gathered.clear()
        result, statistics = paged(folder, memory_budget=least - 1 + room, **options)
        check_same(result, expected)
        assert bool(gathered) != stays
        assert statistics.kept_bytes == plain.kept_bytes + stays * table_bytes
        assert statistics.rows_bytes == rows * model.config.hidden_size * stored.itemsize


@pytest.mark.usefixtures("everything_pages")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_head_in_several_tiles(kind, tied, tmp_path, tokenizer):
    model = make_model(kind, vocabulary=5000, tie_word_embeddings=tied)
    statistics = check_waves(save(model, tokenizer, tmp_path / "m"), dtype="float32")
    tiles = [page.name for page in statistics.pages if page.name.endswith("of the head")]
    assert tiles == [f"rows {1024 * n} of the head" for n in range(5)] * statistics.waves


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_small_table_is_kept_whether_tied_or_not(tied, tmp_path, tokenizer):
    model = make_model("llama", tie_word_embeddings=tied)
    statistics = check_waves(save(model, tokenizer, tmp_path / "m"), dtype="float32")
    norm, table = 32 * 4, 304 * 32 * 4
    assert statistics.kept_bytes == norm + table
    assert statistics.rows_bytes == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral"])
def test_shards(kind, tmp_path, tokenizer):
    with quiet():
        make_model(kind).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 5
    check_waves(tmp_path / "m", dtype="float32")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_weights_of_another_dtype_are_converted(kind, stored, tmp_path, tokenizer):
    folder = save(make_model(kind).to(stored), tokenizer, tmp_path / "m")
    dtype = "bfloat16" if stored == torch.float32 else "float32"
    check_waves(folder, dtype=dtype)


@pytest.mark.usefixtures("everything_pages")
def test_rows_and_tiles_of_another_dtype_are_converted(tmp_path, tokenizer):
    model = make_model("llama", vocabulary=3000, tie_word_embeddings=True).to(torch.bfloat16)
    check_waves(save(model, tokenizer, tmp_path / "m"), dtype="float32")


def rename_tensors(folder, rename):
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return set(tensors)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_keys_without_the_prefix_of_the_base_model(kind, folders, tmp_path):
    """As `openai-community/gpt2` has them."""
    folder = shutil.copytree(folders[kind], tmp_path / "m")
    prefix = {"gpt2": "transformer.", "llama": "model."}[kind]
    keys = rename_tensors(folder, lambda name: name.removeprefix(prefix))
    assert not any(key.startswith(prefix) for key in keys)
    # Only for gpt2 does the head come with the embedding.
    expected = resident(folders[kind])
    check_same(resident(folder), expected)
    check_same(paged(folder)[0], expected)


def test_experts_are_stored_one_by_one(folders):
    """What transformers merges into one parameter comes in many tensors, all in one page."""
    stored = Checkpoint.open(folders["mixtral"]).tensors
    experts = [name for name in stored if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    _, statistics = paged(folders["mixtral"])
    layers = {page.name: page.nbytes for page in statistics.pages if "layers" in page.name}
    for layer, nbytes in layers.items():
        own = [each for name, each in stored.items() if name.startswith(f"{layer}.")]
        assert nbytes == sum(each.end - each.begin for each in own)


def test_a_bias_in_the_head(folders):
    expected = resident(folders["phi"])
    assert "bias" in expected.provenance["head"]
    result, statistics = paged(folders["phi"])
    assert result.provenance["head"] == expected.provenance["head"]
    assert statistics.kept_bytes > 304 * 4, "it is kept"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("limit", [0, None], ids=["all", "as ever"])
def test_packed_linear_layers(kind, limit, tmp_path, tokenizer, monkeypatch):
    """Wide enough for packed weights to give other bits than torch's own."""
    for each in LIMITS if limit is not None else ():
        monkeypatch.setattr(units, each, limit)
    wide = {
        "gpt2": {"n_embd": 256},
        "llama": {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1000},
        # Two linear layers outside of the list of layers.
        "opt": {"hidden_size": 768, "word_embed_proj_dim": 1000, "ffn_dim": 64},
    }[kind]
    folder = save(make_model(kind, **wide), tokenizer, tmp_path / "m")
    plain = resident(folder, dtype="float32")
    for place in (engines, paged_model):
        monkeypatch.setattr(place, "linear_path", lambda *_, **__: "packed")
    expected = resident(folder, dtype="float32")
    assert expected.provenance["linear"] == "packed"
    if plain.provenance["linear"] == "torch":
        assert expected.values.tobytes() != plain.values.tobytes()
    least = least_budget(folder, FEW, dtype="float32", **OPTIONS)
    for budget in ("1GiB", least):
        check_same(paged(folder, dtype="float32", memory_budget=budget)[0], expected)


def test_every_byte_is_read_once_a_wave(folders):
    folder = folders["llama"]
    stored = Checkpoint.open(folder).tensors
    by_name = {name: each.end - each.begin for name, each in stored.items()}
    kept = by_name["model.embed_tokens.weight"] + by_name["model.norm.weight"]
    least = least_budget(folder, FEW, dtype="float32", **OPTIONS)
    _, statistics = paged(folder, dtype="float32", memory_budget=least)
    assert statistics.kept_bytes == statistics.pages[0].nbytes == kept
    for name in {page.name for page in statistics.pages[1:]}:
        assert sum(page.name == name for page in statistics.pages) == statistics.waves, name
    assert statistics.nbytes == kept + statistics.waves * (sum(by_name.values()) - kept)
    for page in statistics.pages:
        assert page.read_seconds > 0
        assert page.stall_seconds >= 0
        assert page.nbytes <= page.disk_bytes + page.cached_bytes
    assert statistics.read_seconds == sum(page.read_seconds for page in statistics.pages)
    assert statistics.stall_seconds == sum(page.stall_seconds for page in statistics.pages)
    assert statistics.state_bytes > 0


def test_more_memory_takes_fewer_waves(folders):
    folder = folders["llama"]
    least = least_budget(folder, TEXTS, dtype="float32", **OPTIONS)
    seen = []
    for room in (1, 250_000, 500_000, 1 << 30):
        budget = least + room
        _, statistics = paged(folder, TEXTS, dtype="float32", memory_budget=budget)
        seen.append((statistics.waves, statistics.wave_tokens))
        if statistics.waves > 1 and room > 1:
            assert statistics.state_bytes <= 1.1 * room
    waves, tokens = zip(*seen, strict=True)
    assert list(waves) == sorted(waves, reverse=True)
    assert list(tokens) == sorted(tokens)
    assert len(set(waves)) > 2
    assert waves[-1] == 1


@pytest.mark.parametrize("vocabulary", [304, 5000])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_slots_take_no_more_than_was_promised(kind, vocabulary, tmp_path, tokenizer):
    """What is refused as too little counts all that pages take."""
    folder = save(make_model(kind, vocabulary=vocabulary), tokenizer, tmp_path / "m")
    least = least_budget(folder, FEW, dtype="float32", **OPTIONS)
    _, statistics = paged(folder, dtype="float32", memory_budget=least)
    assert statistics.slot_bytes + statistics.kept_bytes < least


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_budget_that_is_too_small_is_told_the_largest_layer(kind, folders):
    _, statistics = paged(folders[kind], dtype="float32")
    (size,) = {page.nbytes for page in statistics.pages if page.name in statistics.order}
    name = "|".join(statistics.order)  # all are as large as any
    message = f"whose largest is ({name}) with {size:,} bytes, and what stays in memory, got 5,000"
    with pytest.raises(ValueError, match=message):
        llfast.score(folders[kind], FEW, weights="paged", memory_budget=5000, dtype="float32")


@pytest.mark.parametrize("budget", ["1GiB", "500 mb", "1e9", 2**30])
def test_budgets_in_words(budget, folders):
    _, statistics = paged(folders["gpt2"], memory_budget=budget)
    assert statistics.waves == 1


@pytest.mark.parametrize("budget", ["much", "-1GiB", 0, True])
def test_budgets_that_are_none(budget, folders):
    with pytest.raises(ValueError, match="memory_budget must be a size like '8GiB', got"):
        llfast.score(folders["gpt2"], FEW, memory_budget=budget)


def test_weights_that_are_no_way(folders):
    with pytest.raises(ValueError, match="weights must be auto, resident, paged, got 'lazy'"):
        llfast.score(folders["gpt2"], FEW, weights="lazy")


def test_auto_pages_what_does_not_fit(folders):
    expected = resident(folders["llama"], dtype="float32")
    least = least_budget(folders["llama"], FEW, dtype="float32", **OPTIONS)
    options = {"per_token": True, "dtype": "float32", **OPTIONS}
    found = {}
    for budget in (least, least + 50_000, "1GiB", None):
        result = llfast.score(folders["llama"], FEW, memory_budget=budget, **options)
        check_same(result, expected)
        found[budget] = result.provenance["weights"]
    assert found[least] == "paged"
    assert found["1GiB"] == found[None] == "kept"


@pytest.mark.parametrize("path", ["torch", "packed"])
def test_auto_takes_every_budget_that_holds_two_pages(path, folders, monkeypatch):
    """Also those between the weights alone, and all that keeping them takes."""
    for place in (engines, paged_model):
        monkeypatch.setattr(place, "linear_path", lambda *_, **__: path)
    folder = folders["llama"]
    least = least_budget(folder, FEW[:2], dtype="float32", **OPTIONS)
    weights = Checkpoint.open(folder).weight_bytes
    budgets = np.linspace(least, max(5 * weights, 2 * least), 12).astype(int).tolist()
    for budget in budgets:
        result = llfast.score(folder, FEW[:2], dtype="float32", memory_budget=budget, **OPTIONS)
        assert result.provenance["weights"] in ("paged", "kept", "resident")


def test_auto_where_nothing_says_how_much_memory_there_is(folders, monkeypatch):
    monkeypatch.setattr(engines.memory, "available_bytes", lambda _: 0)
    result = llfast.score(folders["llama"], FEW, **OPTIONS)
    assert result.values.tobytes() == resident(folders["llama"]).values.tobytes()


def test_a_loaded_model_is_not_paged(tokenizer):
    pair = make_model("llama"), tokenizer
    with pytest.raises(UnsupportedModelError, match="to be paged, got a loaded model"):
        llfast.score(pair, FEW, weights="paged")
    assert llfast.score(pair, FEW[:1], weights="auto").provenance["weights"] == "resident"


def test_what_was_finished_one_way_is_taken_up_the_other_way(folders, tmp_path, monkeypatch):
    """A number does not tell which way it was made."""
    options = {"partial": tmp_path / "partial.npz", "per_token": True, **OPTIONS}
    run_model, left = batchwise.run_model, iter(range(4))

    def run_some(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run_model(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batchwise, "run_model", run_some)
        llfast.score(folders["llama"], FEW, weights="resident", **options)
    with np.load(tmp_path / "partial.npz") as kept:
        done = int(np.isfinite(kept["loglikelihoods"]).sum())
    assert 1 <= done < len(FEW)
    result, statistics = paged(folders["llama"], partial=tmp_path / "partial.npz")
    assert statistics.wave_tokens < paged(folders["llama"])[1].wave_tokens
    check_same(result, resident(folders["llama"]))


def test_a_warning_names_what_is_loaded_whole_although_it_may_not_fit(folders, monkeypatch):
    def refuse(*_):
        raise UnsupportedModelError("model must have a reason, got none")

    monkeypatch.setattr(engines, "_skeleton", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(engines.memory, "available_bytes", lambda _: 1000)
        with pytest.warns(LlfastWarning, match="is loaded whole, for model must have a reason"):
            result = llfast.score(folders["gpt2"], FEW, **OPTIONS)
    assert result.provenance["weights"] == "resident"
    with pytest.raises(ValueError, match="got 1,000: model must have a reason, got none"):
        llfast.score(folders["gpt2"], FEW, memory_budget=1000, **OPTIONS)
    result = llfast.score(folders["gpt2"], FEW, memory_budget="1GiB", **OPTIONS)  # it fits
    assert result.provenance["weights"] == "resident"

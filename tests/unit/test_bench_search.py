"""The benchmark of search, on collections of some hundred models."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from llfast.search import KLIndex, listing
from llfast.search.segment import Segment
from tests.conftest import ROOT

pytest.importorskip("faiss", reason="faiss is an extra: pip install 'llfast[cpu]'")

MODELS, TEXTS = 60, 100
SPREADS = ("ms", "over_certified")


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(listing, "LEAST_ROWS", 50)  # lists also of few models
        patch.setattr(listing, "_HELD_OUT", 8)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("collections")


@pytest.fixture(scope="module")
def recipe():
    from synthetic import Recipe

    return Recipe(models=MODELS, texts=TEXTS, families="half")


@pytest.fixture(scope="module")
def built(recipe, folder):
    from search_collections import build

    return build(recipe, folder)


@pytest.fixture(scope="module")
def found(folder, recipe, built):
    """A report of one collection; of its peers, one is missing, and two take turns in memory."""
    import bench_search
    import search_cases
    import search_peers
    from search_adding import measure_adding
    from search_aims import aims_of

    def missing(shape, threads):
        raise ModuleNotFoundError("no module", name="elsewhere")

    class Limits:
        def read_seconds(self, array):
            return array.nbytes / 1e10

    budget = search_peers.Budget(1.5 * 4 * MODELS * TEXTS, 60.0)
    with pytest.MonkeyPatch.context() as patch:
        flat = search_peers.PEERS["faiss Flat"]
        peers = {"faiss Flat": flat, "elsewhere": missing, "later": flat}
        patch.setattr(search_peers, "PEERS", peers)
        plan = search_cases.Plan(4, budget, 1 << 16)
        case = search_cases.measure(recipe, folder, plan, Limits())
    adding = measure_adding(30, TEXTS, folder, 2)
    command = "python benchmarks/bench_search.py --folder DIR --quick"
    made = {**bench_search.described(command), "adding": adding}
    made["cases"] = [{**case, "commit": made["commit"]}]
    made["aims"] = aims_of(made)
    assert json.loads(json.dumps(made)) == made
    return made


def test_every_provider_is_right_and_timed(found):
    (case,) = found["cases"]
    assert case["left_out"] == {"elsewhere": "elsewhere is not installed"}
    assert case["raw_bytes"] == 4 * MODELS * TEXTS
    assert set(case["build"]) == {"llfast", "faiss Flat", "later"}
    assert set(case["questions"]) == {"held in", "outside"}
    for each in case["questions"].values():
        searches = {f"llfast {mode}" for mode in ("certified", "exact", "approximate")}
        assert set(each["providers"]) == searches | {"faiss Flat", "later"}
        assert set(each["batch"]) == set(each["providers"])
        for name, one in each["providers"].items():
            assert one["calls"] == 4
            assert one["recall"] == 1.0 or (name == "llfast approximate" and one["recall"] > 0.5)
            assert all(0 < one[name]["min"] <= one[name]["max"] for name in SPREADS)
        assert each["providers"]["llfast certified"]["over_certified"]["median"] == 1.0
        own = each["certified"]
        assert own["checked_with_exact"] == 4
        assert sum(own["closed_by"].values()) == 4
        assert 10 <= own["compared"]["min"] <= MODELS
        assert each["batch"]["faiss Flat"]["questions"] == 4
        assert each["cold_ms"]["median"] > 0
        assert each["rates"]["read_gb_a_second"]["median"] == pytest.approx(10)
    assert case["lists"]["count"] == round(4 * MODELS**0.5)
    assert 0.5 < case["lists"]["recall_when_built"] <= 1
    arrays = case["memory"]["arrays"]
    assert arrays["checks"] == 9 * MODELS
    assert arrays["first"] + arrays["rest"] == 4 * MODELS * (MODELS + 2), "directions are few here"


def test_a_folder_is_used_again_while_it_is_what_the_sources_make(
    recipe, folder, built, monkeypatch
):
    import search_collections

    path, facts = built
    assert {"fit", "place, project and write", "finish"} == set(facts["parts"])
    before = (path / "points.f32").stat().st_mtime_ns
    assert search_collections.build(recipe, folder) == (path, facts)
    assert (path / "points.f32").stat().st_mtime_ns == before
    monkeypatch.setattr(search_collections, "_digest", lambda: "other sources")
    again, _ = search_collections.build(recipe, folder.parent / folder.name)
    assert again == path
    assert (path / "points.f32").stat().st_mtime_ns != before
    assert not list(folder.glob(".*")), "nothing half-written is left"


def test_fine_tunes_from_outside_lie_beside_their_source(recipe, built):
    from search_collections import outside

    index = KLIndex.of_segment(Segment(built[0]))
    names = set(Segment(built[0]).table["name"].to_pylist())
    for question in outside(recipe, index.basis, 10):
        assert question.ask.model not in names
        nearest = index.search(question.ask, 1)[0]
        assert 0 < nearest.kl < 3, "no further than families are from each other"
        assert nearest.metadata["family"] == question.ask.model.partition("/")[2]


def test_what_takes_too_long_or_too_much_is_left_out(monkeypatch):
    import search_peers

    points = np.zeros((4096, 3), np.float32)
    ticks = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(search_peers, "time", clock)
    slow = search_peers.Peer(len, lambda points, k: points, "slow")
    whole = search_peers.Peer(len, lambda points, k: points, "whole", piece=None)
    few = search_peers.Peer(len, lambda points, k: points, "few", most_models=100)
    large = search_peers.Peer(len, lambda points, k: points, "large", copies=2)
    peers = {"slow": slow, "whole": whole, "few": few, "later": whole, "large": large}
    makers = {name: (lambda shape, threads, peer=peer: peer) for name, peer in peers.items()}
    monkeypatch.setattr(search_peers, "PEERS", makers)
    budget = search_peers.Budget(1.5 * points.nbytes, 7.5)
    found = search_peers.build_peers(points, 1, budget, list(peers))
    assert list(found.peers) == list(found.took) == ["whole"]
    assert found.waiting == ["later"]
    assert found.left_out["slow"].startswith(
        "building it takes more than 8 s, the limit was 8 s (512 rows"
    )
    assert found.left_out["few"] == "measured with up to 100 models only"
    assert found.left_out["large"] == "its 0.0 GB of vectors do not fit into memory"


def test_cases_are_replaced_and_aims_judged(found):
    import bench_search
    from search_aims import aims_of

    (case,) = found["cases"]
    large = {**case, "models": 100_000}
    cases = bench_search.replaced([case], large)
    assert [each["models"] for each in cases] == [MODELS, 100_000]
    again = bench_search.replaced(cases, {**case, "commit": "newer"})
    assert [each["commit"] for each in again] == ["newer", large["commit"]]
    by_name = {aim["aim"]: aim for aim in aims_of({**found, "cases": cases})}
    assert not by_name["half, 100,000: memory over vectors"]["met"], "it is as large as they are"
    assert not by_name["half, 100,000, outside: times as fast as faiss Flat"]["met"]
    assert by_name["half, 100,000, outside: compared in full"]["met"]
    assert by_name["half, 60, outside: recall"]["met"]
    assert not any("60" in name and "ms" in name for name in by_name if "adding" not in name)


def test_people_and_the_readme_are_told(found, capsys):
    import readme_search
    from search_aims import show

    show(found)
    printed = capsys.readouterr().out
    for word in ("half, 60 x 100", "closed by", "left out: elsewhere", "adding to 30", "met "):
        assert word in printed
    lines = readme_search.search(found)
    rows = [line for line in lines if line.startswith("| 60, half | ")]
    assert len(rows) == 2
    assert [line.count("|") for line in lines[:3]] == [7] * 3
    assert len({line.count("|") for line in lines[4:7]}) == 1
    assert lines[-1].endswith("Command: `python benchmarks/bench_search.py --folder DIR --quick`.")


def test_an_index_of_a_segment_is_as_wide_as_asked(built):
    segment = Segment(built[0])
    name = segment.table["name"][0].as_py()
    certified, exact = (KLIndex.of_segment(segment, mode) for mode in ("certified", "exact"))
    assert certified.search(name) == exact.search(name)
    assert exact.search(name).certificate.closed_by == "scan"
    with pytest.raises(ValueError, match="mode must be exact, certified, approximate, got 'auto'"):
        KLIndex.of_segment(segment, "auto")

"""What a space refuses and warns of, and its files, whole and damaged."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

from llfast import KLIndex, LlfastWarning, ModelSpace, SpaceError
from tests.spaces import IDS, make_matrix, make_result

# ------------------------------------------------------------------------------ refusals, warnings


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"textset_digest": "others"}, ["textset_digest", "'texts'", "'others'"]),
        ({"convention": "always-bos"}, ["convention", "'paper'", "'always-bos'"]),
        ({"ids": (*IDS[:-1], "other")}, ["ids", "59", "'text 59'", "'other'"]),
        ({"ids": IDS[::-1]}, ["ids", "'text 0'", "'text 59'"]),
    ],
)
def test_other_texts_and_conventions_are_refused(values, space, changes, messages):
    stranger = make_result(values[0], **changes)
    for call in (
        lambda: space.project(stranger),
        lambda: space.kl("model 0", stranger),
        lambda: space.kl(stranger, "model 0"),
    ):
        with pytest.raises(SpaceError) as caught:
            call()
        assert all(message in str(caught.value) for message in ["outsider", *messages])


def test_another_number_of_texts_is_refused(values):
    for ids in (IDS, None):
        space = ModelSpace.fit(make_matrix(values, ids=ids))
        with pytest.raises(SpaceError, match="60 texts"):
            space.project(make_result(values[0, :59]))


def test_a_reference_with_a_nan_is_refused(space):
    with pytest.raises(SpaceError, match=r"number a text \(60\), got a NaN or inf"):
        replace(space, reference=np.where(np.arange(60) == 7, np.nan, space.reference))


def test_unknown_models_are_refused_with_what_comes_close(space):
    with pytest.raises(SpaceError, match=r"'modell 3'.*model 3"):
        space.kl("modell 3", "model 0")
    with pytest.raises(TypeError, match="LogLikelihoods"):
        space.point(3)


def test_clipped_share_is_reported_and_a_large_one_warned_of(space):
    clipped = np.full(60, space.clip + 1.0)
    clipped[:6] = space.clip - 1.0
    assert space.clipped_share(make_result(clipped)) == pytest.approx(0.1)
    space.project(make_result(clipped))
    clipped[6] = space.clip - 1.0
    with pytest.warns(UserWarning, match=r"12% .*'outsider'"):
        space.project(make_result(clipped))
    unclipped = ModelSpace.fit(make_matrix(np.stack([clipped, clipped + 1])), clip_quantile=None)
    assert unclipped.clipped_share(make_result(clipped - 1e6)) == 0.0


def test_mixed_dtypes_are_warned_of_with_the_noise_floor(values):
    rounded = values[0] + 0.01 * np.random.default_rng(3).standard_normal(60)
    rows = np.stack([values[0], rounded, values[1]])
    dtypes = ["float32", "bfloat16", "bfloat16"]
    with pytest.warns(UserWarning, match="not known here") as caught:
        space = ModelSpace.fit(make_matrix(rows, dtypes=dtypes))
    assert len(caught) == 1
    assert space.noise_floor() is None
    with pytest.warns(UserWarning, match=r"bfloat16 and float32.*up to 5[\d.e-]+") as caught:
        space = ModelSpace.fit(make_matrix(rows, dtypes=dtypes, revisions=["a", "a", "b"]))
    assert len(caught) == 1
    assert space.noise_floor() == pytest.approx(space.kl("model 0", "model 1").value, rel=1e-12)
    layers = make_matrix(
        rows, models=["m@layer=1", "m@layer=2", "n"], dtypes=dtypes, revisions=["a", "a", "b"]
    )
    with pytest.warns(UserWarning, match="not known here"):
        ModelSpace.fit(layers)


def test_a_kl_that_the_dtypes_alone_could_make_is_flagged(values):
    noise = np.random.default_rng(3).standard_normal((3, 60))
    rows = np.stack([values[0], values[0] + noise[0], values[0] + 0.1 * noise[1], values[1]])
    dtypes = ["float32", "bfloat16", "bfloat16", "bfloat16"]
    with pytest.warns(LlfastWarning, match="up to"):
        space = ModelSpace.fit(make_matrix(rows, dtypes=dtypes, revisions=["a", "a", "b", "c"]))
    flagged = {
        (a, b): space.kl(f"model {a}", f"model {b}").below_noise_floor
        for a in range(4)
        for b in range(a)
    }
    # Model 2 is nearer to model 0 than this is to its own bfloat16 twin, model 1. That twin and
    # model 2 ran in one dtype, so the difference between them is their own; model 3 is far away.
    assert flagged == {pair: pair == (2, 0) for pair in flagged}
    assert "below the noise" in str(space.kl("model 0", "model 2"))
    result = make_result(rows[2], dtype="bfloat16")
    assert space.kl("model 0", result).below_noise_floor
    assert not space.kl("model 1", result).below_noise_floor
    hits = {hit.model: hit.estimate for hit in KLIndex.build(space).search("model 0", k=3)}
    assert hits["model 2"].below_noise_floor
    assert not hits["model 1"].below_noise_floor


def test_bos_of_only_some_is_warned_of_once_and_only_where_it_costs(values):
    mixed = [{"adds_bos": True}] * 2 + [{"adds_bos": False}] * 4 + [{}]
    with pytest.warns(UserWarning, match="2 of the tokenizers add BOS and 4 do not") as caught:
        space = ModelSpace.fit(make_matrix(values, metadata=mixed))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.project(make_result(values[0], provenance={"adds_bos": False}))
        space.project(make_result(values[0]))
        ModelSpace.fit(make_matrix(values, metadata=mixed, convention="always-bos"))
        ModelSpace.fit(make_matrix(values, metadata=[{"adds_bos": True}] * 7))


@pytest.mark.parametrize("place", ["provenance", "metadata"])
def test_an_outsider_of_another_kind_is_warned_of(values, place):
    space = ModelSpace.fit(
        make_matrix(values, metadata=[{"adds_bos": True}] * 7, dtypes=["float32"] * 7)
    )
    space.project(make_result(values[0], dtype="float32", **{place: {"adds_bos": True}}))
    with pytest.warns(UserWarning, match="7 of the tokenizers add BOS and 1 do not"):
        space.project(make_result(values[0], dtype="float32", **{place: {"adds_bos": False}}))
    with pytest.warns(UserWarning, match="bfloat16 and float32"):
        space.project(make_result(values[0], dtype="bfloat16"))


@pytest.mark.parametrize("unknown", ["", "unknown"])
def test_a_dtype_that_nobody_knows_is_no_other_one(values, unknown):
    """As imported models have it; a warning is an error here."""
    ModelSpace.fit(make_matrix(values, dtypes=[unknown] * 3 + ["float32"] * 4))
    space = ModelSpace.fit(make_matrix(values, dtypes=[unknown] * 7))
    space.project(make_result(values[0], dtype="float32"))


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("quantile", [0.02, None])
@pytest.mark.parametrize("known", [True, False])
def test_a_saved_space_comes_back_whole(tmp_path, values, quantile, known):
    names = ["org/modèle", *"bcdefg"]
    options = {"groups": [f"d{row // 5}" for row in range(60)], "revisions": names}
    matrix = make_matrix(
        values,
        models=names,
        metadata=[{"family": "a", "size": np.int64(7), "share": np.float32(0.5)}] * 7,
        dtypes=["float32"] * 7,
        **(options if known else {"ids": None}),
    )
    space = ModelSpace.fit(matrix, quantile)
    path = tmp_path / "space"  # numpy would add .npz to a name
    space.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["space"]
    again = ModelSpace.load(path)
    for name in ("coordinates", "reference", "text_bytes"):
        assert (getattr(again, name) == getattr(space, name)).all()
        assert getattr(again, name).dtype == np.float64
    for name in (
        *("models", "clip", "ids", "groups", "textset_digest", "convention"),
        *("dtypes", "revisions", "digest"),
    ):
        assert getattr(again, name) == getattr(space, name), name
    assert again.metadata[0] == {"family": "a", "size": 7, "share": 0.5}
    assert again.kl("b", "c") == space.kl("b", "c")
    result = make_result(values[3], dtype="float32")
    assert (again.project(result) == space.project(result)).all()


def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, values, space):
    path = tmp_path / "space.npz"
    space.save(path)
    before = path.read_bytes()
    strange = ModelSpace.fit(make_matrix(values, metadata=[{"x": object()}] * 7))
    with pytest.raises(TypeError, match="metadata"):
        strange.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_truncated_files_are_refused_with_their_path(tmp_path, space):
    path = tmp_path / "space.npz"
    space.save(path)
    whole = path.read_bytes()
    for size in (0, 1, 3, 4, 30, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SpaceError, match=r"space\.npz"):
            ModelSpace.load(path)


def test_flipped_bytes_are_refused_or_change_nothing(tmp_path, values, space):
    path = tmp_path / "space.npz"
    space.save(path)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 23):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            again = ModelSpace.load(path)
        except SpaceError:
            refused += 1
        else:  # zip keeps dates and such that nobody reads
            assert again.digest == space.digest
            assert (again.coordinates == space.coordinates).all()
            assert again.models == space.models
    assert refused > 200


def test_foreign_files_are_refused(tmp_path, space):
    path = tmp_path / "other"
    rows = np.ones((2, 2))
    with path.open("wb") as file:
        np.save(file, rows)
    with pytest.raises(SpaceError, match="other"):
        ModelSpace.load(path)
    with path.open("wb") as file:
        np.savez(file, coordinates=rows)
    with pytest.raises(SpaceError, match="header"):
        ModelSpace.load(path)
    with path.open("wb") as file:
        np.savez(file, header=np.array([{"format": 1}], dtype=object))
    with pytest.raises(SpaceError, match="other"):
        ModelSpace.load(path)
    path.write_text("not a space")
    with pytest.raises(SpaceError, match="other"):
        ModelSpace.load(path)
    with pytest.raises(OSError, match="missing"):
        ModelSpace.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 1, got 2"),
        ({"format": None}, "format 1, got None"),
        ({"digest": "0"}, "changed after"),
        ({"clip": -1.0}, "changed after"),
        ({"convention": "lm-eval"}, "changed after"),
        ({"models": ["a"]}, "whole file"),
        ({"models": ["a"] * 7}, "more than once"),
        ({"ids": ["a"]}, "whole file"),
        ({"extra": 1}, "extra"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, space, change, message):
    path = tmp_path / "space.npz"
    space.save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    header = json.loads(arrays.pop("header").tobytes()) | change
    encoded = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, header=encoded, **arrays)
    with pytest.raises(SpaceError, match=message) as caught:
        ModelSpace.load(path)
    assert str(path) in str(caught.value)

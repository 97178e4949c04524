"""Classical scaling against known places, and pictures of odd collections."""

import numpy as np
import pytest
from matplotlib.image import imread

from llfast.mapping import classical_mds, draw_map


def squared(places):
    return ((places[:, None] - places) ** 2).sum(axis=2)


def test_a_plane_is_found_again_up_to_turning():
    places = np.random.default_rng(0).standard_normal((9, 2)) * [3, 1]
    np.testing.assert_allclose(squared(classical_mds(squared(places))), squared(places), atol=1e-9)


def test_of_more_dimensions_the_widest_two_are_kept():
    places = np.random.default_rng(1).standard_normal((200, 5)) * [9, 5, 0.1, 0.1, 0.1]
    found = classical_mds(squared(places))
    assert np.ptp(found[:, 0]) > np.ptp(found[:, 1])
    np.testing.assert_allclose(squared(found), squared(places[:, :2]), atol=4)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures_of_one_model_and_of_models_without_family(tmp_path, ending):
    for count in (1, 2, 7):
        models = [f"model $a_{row}$" for row in range(count)]
        kl = squared(np.random.default_rng(count).standard_normal((count, 3)))
        path = tmp_path / f"{count}.{ending}"
        families = {models[0]: "a"} if count == 7 else {}
        draw_map(models, kl, path, families=families, parents={"gone": ["model $a_0$"]})
        start = path.read_bytes()[:5]
        assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]
    if ending == "png":
        colours = {tuple(c) for c in (imread(path)[..., :3].reshape(-1, 3) * 255).astype(int)}
        assert {(31, 119, 180), (127, 127, 127)} <= colours  # family a, and those without


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .png, .svg or .pdf, got .*map.gif"):
        draw_map(["a"], np.zeros((1, 1)), tmp_path / "map.gif", families={})
    assert not list(tmp_path.iterdir())

"""The page of a map as text: what a browser would read, without one."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from llfast import KLEstimate
from llfast.page import ModelMap, map_page

EVIL = "</script><script>alert(1)</script><!-- \u2028 \ud800 &amp; {{script}}"


def make(metadata, models=("a", EVIL)):
    kl = KLEstimate(value=0.123456, standard_error=float("inf"), interval=(0.0, float("inf")))
    return ModelMap(
        models=tuple(models),
        places=np.array([[0.0, 1.0], [2.0, 3.0]]),
        bits_per_byte=np.array([0.5, np.nan]),
        metadata=metadata,
        nearest=[[(1, kl)], [(0, kl)]],
        lines=[[0, 1]],
        unit="bits_per_byte",
        method="pca",
        perplexity=5.0,
        notes=EVIL,
    )


class Scripts(HTMLParser):
    """What a browser takes for scripts, and the policy that it is told of."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.policy, self.open = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "meta" and "http-equiv" in attributes:
            self.policy = attributes["content"]
        if tag == "script":
            assert "src" not in attributes
            self.scripts.append([attributes.get("type"), ""])
            self.open = True

    def handle_endtag(self, tag):
        self.open = self.open and tag != "script"

    def handle_data(self, data):
        if self.open:
            self.scripts[-1][1] += data


def test_what_models_say_of_themselves_is_data_and_ends_no_script():
    page = Scripts(map_page(make([{"family": EVIL, "b": 1}, {"b": float("nan")}]), title=EVIL))
    assert [kind for kind, _ in page.scripts] == ["application/json", None, None]
    data = json.loads(page.scripts[0][1])
    shown = EVIL.replace("\ud800", "\\ud800")
    assert data["models"][1].encode("utf-8", "backslashreplace").decode() == shown
    assert data["columns"]["family"][1] is None
    assert data["columns"]["b"] == [1, None]
    assert data["bits"] == [0.5, None]
    near = {"row": 1, "kl": 0.1235, "error": None, "low": 0, "high": None}
    assert data["nearest"][0] == [near]
    for _, script in page.scripts[1:]:  # only these run
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in re.search(r"script-src [^;]*", page.policy)[0]


def test_cells_of_all_kinds_become_columns_and_odd_ones_stay_words():
    rows = [
        {"n": True, "list": ["x", 2], "dict": {"a": 1}, "empty": [], "": 5, "none": None},
        {"n": 3, "long": "y" * 9999, "empty": ()},
    ]
    columns = json.loads(Scripts(map_page(make(rows), title="t")).scripts[0][1])["columns"]
    assert columns == {
        "n": ["yes", 3],
        "list": ["x, 2", None],
        "dict": ["{'a': 1}", None],
        "long": [None, "y" * 1000],
    }


def test_family_colours_the_map_or_another_column_or_none():
    def colour(metadata, **options):
        page = map_page(make(metadata), title="t", **options)
        return json.loads(Scripts(page).scripts[0][1])["colour"]

    rows = [{"size": 3, "family": "x", EVIL: "key"}, {}]
    assert colour(rows) == "family"
    assert colour(rows, colour="size") == "size"
    assert colour([{"size": 3}, {}]) == "size"
    assert colour([{}, {}]) == ""
    assert colour([{"y" * 9999: 3}, {}]) == "y" * 1000, "as its column is called"
    with pytest.raises(
        ValueError, match=r"must be a column of .* \(family, size, .*\), got 'parents'"
    ):
        colour(rows, colour="parents")

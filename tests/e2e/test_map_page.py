"""The map's page as people use it, in a real browser with the network off."""

import numpy as np
import pytest

from llfast.map_files import write_map
from llfast.mapping import make_map
from tests.browser import chromium, opened
from tests.spaces import make_matrix

N = 60
NASTY = [
    '<img src=x onerror="window.hacked = 1">',
    "</script><script>window.hacked = 2</script>",
    "<b>bold</b> &amp; \"quoted\" 'twice'",
    "javascript:window.hacked=3//${window.hacked=4}{{title}}",
    "emoji 🦙 שלום \u2028 \\u003c",
    "<a href='https://example.com'>a link</a>",
]


def make_page(path, count, *, method="pca", names=(), title="Models"):
    rng = np.random.default_rng(0)
    families = rng.standard_normal((9, N))
    family = np.arange(count) % 9
    values = -700 + 30 * families[family] + 9 * rng.standard_normal((count, N))
    models = [*names, *(f"org-{row % 7}/model-{row}" for row in range(len(names), count))]
    metadata = [
        {
            "family": NASTY[2] if row == 2 else f"family {family[row]}",
            "licence": "mit" if row % 3 else None,
            "parameters": float(row**2) if row % 4 else None,
            "run": "one run" if row < 6 else f"alone {row}",
            "step": row,
            "tags": ["a", NASTY[0]],
        }
        for row in range(count)
    ]
    found = make_map(make_matrix(values, models=models, metadata=metadata), method=method)
    write_map(found, path, title=title)
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "map.html"
    return path, make_page(path, 90, names=NASTY, title=f"Map of {NASTY[1]}")


@pytest.fixture
def page(browser, made):
    with opened(browser, made[0], viewport={"width": 1200, "height": 800}) as found:
        yield found
        assert not found.troubles
        assert found.page.evaluate("window.hacked") is None


def alone(found):
    """The model that lies farthest from all others."""
    squared = ((found.places[:, None] - found.places) ** 2).sum(axis=2)
    np.fill_diagonal(squared, np.inf)
    return int(squared.min(axis=1).argmax())


def test_a_tip_tells_of_the_model_under_the_mouse(page, made):
    row = alone(made[1])
    told = page.hover(row)
    assert made[1].models[row] in told
    assert made[1].metadata[row]["family"] in told
    assert f"{made[1].bits_per_byte[row]:.4f} bits per byte" in told
    places = [told.index(made[1].models[other]) for other, _ in made[1].nearest[row]]
    assert len(places) == 5
    assert places == sorted(places)
    kl = made[1].nearest[row][0][1]
    assert f"{kl.value:.4g} ± {kl.standard_error:.4g}" in told
    page.page.mouse.move(5, 5)
    page.page.wait_for_selector("#tip", state="hidden")


def test_names_are_shown_as_text_and_never_run(page):
    for row, name in enumerate(NASTY):
        page.page.fill("#query", name)
        assert page.page.text_content("#found li") == name
        page.find(name)
        assert page.page.text_content("#name") == name
        page.hover(row)
        assert page.page.text_content("#tip .name") == name
    tags = "#map img, #map a, #map b, aside img, aside a, aside b, #tip img, #tip a, #tip b"
    assert page.page.locator(tags).count() == 0


def test_the_title_and_metadata_are_text_too(page):
    assert page.page.title() == f"Map of {NASTY[1]}"
    assert page.page.text_content("h1") == f"Map of {NASTY[1]}"
    page.click(0)
    assert f"a, {NASTY[0]}" in page.page.locator("#facts dd").all_text_contents()
    assert NASTY[2] in page.page.locator("#legend .label").all_text_contents()


def test_a_search_flies_to_the_model(page, made):
    before = page.ranges()
    page.find("MODEL-77")
    assert page.page.text_content("#name") == "org-0/model-77"
    low, high, bottom, top = page.ranges()
    assert high - low < 0.5 * (before[1] - before[0])
    x, y = made[1].places[77]
    assert (low + high) / 2 == pytest.approx(x, abs=0.1 * (high - low))
    assert (bottom + top) / 2 == pytest.approx(y, abs=0.1 * (top - bottom))
    page.page.click("#reset")
    page.settle()
    np.testing.assert_allclose(page.ranges(), before, rtol=0.02)


def test_beside_a_model_that_is_looked_for_others_are_in_sight_on_a_small_map(browser, tmp_path):
    path = tmp_path / "small.html"
    found = make_page(path, 8)
    with opened(browser, path) as page:
        page.find("model-3")
        low, high, bottom, top = page.ranges()
    x, y = found.places.T
    assert ((low < x) & (x < high) & (bottom < y) & (y < top)).sum() >= 4


def test_two_models_are_apart_however_near_they_are(browser, tmp_path):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(N) - 700 + 1e-4 * rng.standard_normal((2, N))
    write_map(make_map(make_matrix(values), method="pca"), tmp_path / "two.html", title="Two")
    with opened(browser, tmp_path / "two.html", viewport={"width": 1200, "height": 800}) as page:
        (x, y), (other_x, other_y) = page.where(0), page.where(1)
        assert np.hypot(other_x - x, other_y - y) > 400
        assert not page.troubles


def test_the_wheel_zooms_and_a_drag_moves(page, made):
    row = alone(made[1])
    x, y = page.where(row)
    before = page.ranges()
    page.page.mouse.move(x, y)
    for _ in range(4):  # a turn of it is a tenth
        page.page.mouse.wheel(0, -100)
        page.settle()
    low, high, bottom, top = page.ranges()
    assert high - low < 0.8 * (before[1] - before[0])
    assert top - bottom < 0.8 * (before[3] - before[2])
    assert page.where(row) == pytest.approx((x, y), abs=3), "what is under the mouse stays there"
    start = page.where(row)
    page.page.mouse.move(500, 400)
    page.page.mouse.down()
    page.page.mouse.move(560, 370, steps=5)
    page.page.mouse.up()
    page.settle()
    assert page.where(row) == pytest.approx((start[0] + 60, start[1] - 30), abs=3)
    page.page.click("#reset")
    page.settle()
    np.testing.assert_allclose(page.ranges(), before, rtol=0.02)


def test_suggestions_can_be_walked_and_none_is_said(page):
    page.page.fill("#query", "model-8")
    items = page.page.locator("#found li")
    assert items.all_text_contents()[0].startswith("org-")
    assert all("model-8" in name for name in items.all_text_contents())
    page.page.fill("#query", "model")
    assert items.all_text_contents()[-1] == "and 54 more"
    page.page.fill("#query", "model-8")
    second = items.nth(1).text_content()
    page.page.press("#query", "ArrowDown")
    page.page.press("#query", "Enter")
    page.settle()
    assert page.page.text_content("#name") == second
    page.page.fill("#query", "no such thing")
    assert items.all_text_contents() == ["no such model"]
    page.page.press("#query", "Enter")
    assert page.page.text_content("#name") == second


def test_a_click_shows_the_neighbours_and_they_can_be_followed(page, made):
    row = alone(made[1])
    page.click(row)
    assert page.page.text_content("#name") == made[1].models[row]
    nearest = page.page.locator("#nearest button")
    names = [made[1].models[other] for other, _ in made[1].nearest[row]]
    assert nearest.all_text_contents() == names
    low, high = made[1].nearest[row][0][1].interval
    assert f"{low:.4g} to {high:.4g}" in page.page.locator("#nearest .kl").first.text_content()
    drawn = page.page.evaluate(
        "() => document.getElementById('map').data.at(-2).x.filter((x) => x !== null).length"
    )
    assert drawn == 10, "a line to each of five"
    nearest.first.click()
    page.settle()
    assert page.page.text_content("#name") == names[0]
    page.page.click("#close")
    assert page.page.is_hidden("#about")


def colours(page):
    return page.page.evaluate(
        "() => document.getElementById('map').data.filter((t) => t.customdata)"
        ".map((t) => [t.marker.color, t.customdata.length, t.visible])"
    )


def test_any_column_colours_the_map(page, made):
    assert page.page.input_value("#colour") == "family"
    assert len(colours(page)) == 10  # nine, and the one with an odd name
    page.page.select_option("#colour", "licence")
    assert page.page.locator("#legend .label").all_text_contents() == ["mit", "unknown"]
    assert [count for _, count, _ in colours(page)] == [60, 30]
    page.page.select_option("#colour", "parameters")
    unknown, known = colours(page)
    numbers = [each["parameters"] for each in made[1].metadata if each["parameters"]]
    np.testing.assert_allclose(known[0], np.log10(numbers), rtol=1e-5)
    assert unknown[1] == 23
    assert page.page.is_hidden("#legendBox")
    page.page.select_option("#colour", "")
    assert [count for _, count, _ in colours(page)] == [90]


def test_numbers_that_span_powers_of_ten_are_coloured_by_their_logarithms(browser, tmp_path):
    """Most sizes of models would have the colour of the least."""
    values = np.random.default_rng(0).standard_normal((30, N)) - 700
    metadata = [{"size": None if row == 9 else 7 * 10 ** (row / 6)} for row in range(30)]
    found = make_map(make_matrix(values, metadata=metadata), method="pca")
    write_map(found, tmp_path / "sizes.html", title="Sizes", colour="size")
    with opened(browser, tmp_path / "sizes.html") as page:
        marker = page.page.evaluate(
            """() => {
                const { marker } = document.getElementById("map")._fullData.find(
                    (each) => each.marker?.showscale
                );
                const { tickvals, ticktext } = marker.colorbar;
                return { color: [...marker.color], tickvals, ticktext };
            }"""
        )
        assert not page.troubles
    sizes = [each["size"] for each in metadata if each["size"] is not None]
    np.testing.assert_allclose(marker["color"], np.log10(sizes), rtol=1e-5)
    assert marker["tickvals"] == [1, 2, 3, 4, 5]
    assert marker["ticktext"] == ["10", "100", "1K", "10K", "100K"]


def test_groups_and_lines_can_be_hidden(page):
    page.page.locator("#legend button").first.click()
    assert [shown for _, _, shown in colours(page)][:2] == [False, True]
    page.page.locator("#legend button").first.click()
    assert all(shown for _, _, shown in colours(page))
    line = (
        "() => document.getElementById('map').data.slice(0, 1)"
        ".flatMap((t) => [t.mode, t.visible, t.x.length])"
    )
    assert page.page.evaluate(line) == ["lines", True, 7]
    page.page.uncheck("#lines")
    assert page.page.evaluate(line) == ["lines", False, 7]


def brightness(page):
    colour = page.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return sum(int(each) for each in colour[4:-1].split(",")) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_as_light_as_the_reader_likes(browser, made, scheme):
    with opened(browser, made[0], color_scheme=scheme) as page:
        assert (brightness(page) > 128) == (scheme == "light")
        page.page.click("#theme")
        assert (brightness(page) > 128) == (scheme == "dark")
        page.page.emulate_media(color_scheme={"light": "dark", "dark": "light"}[scheme])
        assert (brightness(page) > 128) == (scheme == "dark")
        assert not page.troubles


def test_it_can_be_read_on_a_phone(browser, made):
    with opened(
        browser, made[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    ) as page:
        width, height = page.page.evaluate(
            "() => [document.documentElement.scrollWidth,"
            " document.getElementById('map').getBoundingClientRect().height]"
        )
        assert width <= 390
        assert height > 400
        row = alone(made[1])
        page.page.touchscreen.tap(*page.where(row))
        page.page.wait_for_selector("#about:not([hidden])")
        assert page.page.text_content("#name") == made[1].models[row]
        size = page.page.evaluate(
            "() => parseFloat(getComputedStyle(document.getElementById('facts')).fontSize)"
        )
        assert size >= 14
        assert not page.troubles


def test_two_fingers_zoom_about_what_is_between_them(browser, made):
    with opened(
        browser, made[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    ) as page:
        before = page.ranges()
        x, y = page.where(alone(made[1]))
        session = page.page.context.new_cdp_session(page.page)

        def touch(kind, gap):
            points = [{"x": x - gap, "y": y}, {"x": x + gap, "y": y}] if gap else []
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        touch("touchStart", 20)
        for gap in (25, 30, 40):
            touch("touchMove", gap)
        touch("touchEnd", 0)
        page.settle()
        after = page.ranges()
        assert after[1] - after[0] == pytest.approx((before[1] - before[0]) / 2, rel=0.05)
        assert page.where(alone(made[1])) == pytest.approx((x, y), abs=3)


def test_the_map_gives_way_to_the_panel_on_a_phone(browser, made):
    size = """() => [document.getElementById("map").clientHeight,
        document.getElementById("map")._fullLayout.height]"""
    with opened(
        browser, made[0], viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True
    ) as page:
        page.page.touchscreen.tap(*page.where(alone(made[1])))
        page.page.wait_for_selector("#about:not([hidden])")
        page.page.wait_for_function(
            f"() => {{ const [a, b] = ({size})(); return Math.abs(a - b) < 2; }}"
        )


def test_a_model_of_a_hidden_group_is_shown_when_it_is_looked_for(page):
    page.page.locator("#legend button").first.click()
    assert not colours(page)[0][2]
    page.find("model-9")  # of the first family
    assert all(shown for _, _, shown in colours(page))


def test_the_focus_stays_where_people_are(page):
    page.page.locator("#legend button").nth(1).focus()
    page.page.keyboard.press("Enter")
    label = "() => document.activeElement.textContent"
    assert page.page.evaluate(label).startswith("family")
    page.find("model-20")
    page.page.locator("#nearest button").first.focus()
    page.page.keyboard.press("Enter")
    page.settle()
    assert page.page.evaluate("() => document.activeElement.id") == "name"
    page.page.fill("#query", "model-8")
    page.page.press("#query", "ArrowDown")
    assert page.page.get_attribute("#query", "aria-activedescendant") == "found-1"
    assert page.page.get_attribute("#found-1", "aria-selected") == "true"


def test_ten_thousand_models_are_found_and_coloured(browser, tmp_path):
    made = make_page(tmp_path / "large.html", 10_000)
    with opened(browser, tmp_path / "large.html", viewport={"width": 1200, "height": 800}) as page:
        kind = "() => document.getElementById('map').data[1].type"
        assert page.page.evaluate(kind) == "scattergl"
        page.find("model-4321")
        assert page.page.text_content("#name") == made.models[4321]
        assert made.models[4321] in page.hover(4321)
        page.page.select_option("#colour", "licence")
        assert sum(count for _, count, _ in colours(page)) == 10_000
        page.page.locator("#nearest button").first.click()
        page.settle()
        assert page.page.text_content("#name") == made.models[made.nearest[4321][0][0]]
        assert not page.troubles

"""A page in a headless Chromium: what it shows, and what it must not do."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Its sandbox takes rights that a container may not have; pages here are our own. Without a GPU,
# WebGL runs on the CPU.
ARGUMENTS = ("--no-sandbox", "--enable-unsafe-swiftshader", "--use-angle=swiftshader")
_WHERE = """row => {
    const map = document.getElementById("map");
    const data = JSON.parse(document.getElementById("data").textContent);
    const { xaxis, yaxis } = map._fullLayout;
    const box = map.getBoundingClientRect();
    return [
        box.left + xaxis._offset + xaxis.l2p(data.x[row]),
        box.top + yaxis._offset + yaxis.l2p(data.y[row]),
    ];
}"""
_RANGES = """() => {
    const { xaxis, yaxis } = document.getElementById("map")._fullLayout;
    return [...xaxis.range, ...yaxis.range];
}"""


@dataclass
class MapPage:
    """A map that is open in a browser.

    Attributes:
        page: Playwright's own.
        troubles: everything that went wrong on it, and every request to the network.
    """

    page: Any
    troubles: list[str] = field(default_factory=list)

    def where(self, row: int) -> tuple[float, float]:
        """The pixels of a model."""
        x, y = self.page.evaluate(_WHERE, row)
        return x, y

    def ranges(self) -> list[float]:
        """Of both axes: lower and upper end of each."""
        return self.page.evaluate(_RANGES)

    def hover(self, row: int) -> str:
        """The text of the tip beside a model."""
        x, y = self.where(row)
        self.page.mouse.move(x + 3, y + 1)
        self.page.mouse.move(x, y, steps=4)
        self.page.wait_for_selector("#tip:not([hidden])")
        return self.page.inner_text("#tip")

    def click(self, row: int) -> None:
        """Choose a model by its point."""
        self.page.mouse.click(*self.where(row))
        self.page.wait_for_selector("#about:not([hidden])")

    def find(self, text: str) -> None:
        """Search, take the first that is found, and wait until the map is there."""
        self.page.fill("#query", text)
        self.page.press("#query", "Enter")
        self.settle()

    def settle(self) -> None:
        """Wait until the map stands still."""
        self.page.evaluate(
            """() => new Promise((done) => {
                let last = "", same = 0;
                const look = () => {
                    const { xaxis, yaxis } = document.getElementById("map")._fullLayout;
                    const now = String([...xaxis.range, ...yaxis.range]);
                    same = now === last ? same + 1 : 0;
                    last = now;
                    if (same > 5) done(); else requestAnimationFrame(look);
                };
                look();
            })"""
        )


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips where there is none, unless LLFAST_REQUIRE_BROWSER is set.

    pip cannot bring one, and who works on a kernel need not install it: .ci/run does, and sets the
    variable, so that there the page's tests cannot be skipped.
    """
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        path = None
    if path is None:
        why = "needs Chromium and Playwright; .ci/run installs both"
        if "LLFAST_REQUIRE_BROWSER" in os.environ:
            pytest.fail(f"LLFAST_REQUIRE_BROWSER is set, and this {why}")
        pytest.skip(why)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[MapPage]:
    """A map's file, with the network off."""
    context = browser.new_context(offline=True, reduced_motion="no-preference", **options)
    page = context.new_page()
    found = MapPage(page)

    def on_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            found.troubles.append(f"request: {request.url}")

    page.on("request", on_request)
    page.on("pageerror", lambda error: found.troubles.append(f"error: {error}"))
    page.on("dialog", lambda dialog: found.troubles.append(f"dialog: {dialog.message}"))
    page.on("console", lambda message: found.troubles.append(f"{message.type}: {message.text}"))
    try:
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        yield found
    finally:
        context.close()

"""A browser for the checks of `make report-check`. What is missing is an error with its remedy, never a skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paper_figures.report.__main__ import Sources, build

if TYPE_CHECKING:  # pytest reads this file whenever it collects tests/, and the main suite needs no Playwright.
    from playwright.sync_api import Browser, Page

SHOTS = Path("out/report-shots")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 760}


@dataclass
class Visit:
    """An open page and what went wrong on it.

    Attributes:
        page: the page.
        faults: console errors, exceptions and failed requests.
        requests: addresses of all requests.
    """

    page: Page
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def show(self, pictures: str) -> None:
        """Scroll to a figure and wait until it is drawn."""
        self.page.locator(f"#{pictures}").scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#{pictures}[data-drawn] .main-svg", timeout=20_000)

    def shoot(self, name: str, whole: bool = False) -> None:
        """Save a screenshot."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=whole)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, whose path is in the environment variable CHROMIUM or found by name."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path or not Path(path).is_file():
        pytest.exit(f"CHROMIUM={path!r} is no browser: apt-get install chromium, or set CHROMIUM=/path/to/chromium", 1)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        pytest.exit("Playwright is missing: run `make report-check`, or pip install '.[browser]'", 1)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the committed results."""
    out = tmp_path_factory.mktemp("report")
    build(Sources(), out)
    return out


def visit(browser: Browser, index: Path, viewport: dict[str, int], scheme: str = "light") -> Visit:
    """Open a page from its file and watch it."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    found = Visit(context.new_page())
    found.page.on("console", lambda m: found.faults.append(m.text) if m.type in ("error", "warning") else None)
    found.page.on("pageerror", lambda error: found.faults.append(str(error)))
    found.page.on("requestfailed", lambda request: found.faults.append(f"failed: {request.url}"))
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.goto(index.resolve().as_uri())
    return found


@pytest.fixture(params=["desktop-light", "desktop-dark", "phone-light", "phone-dark"])
def any_visit(request: pytest.FixtureRequest, browser: Browser, site: Path) -> Iterator[tuple[str, Visit]]:
    """The site in every width and theme; faults of the page fail the check at its end."""
    width, scheme = request.param.split("-")
    found = visit(browser, site / "index.html", DESKTOP if width == "desktop" else PHONE, scheme)
    yield request.param, found
    found.page.context.close()
    assert found.faults == []


@pytest.fixture
def opened(browser: Browser, site: Path) -> Iterator[Visit]:
    """The site on a desktop; faults of the page fail the check at its end."""
    found = visit(browser, site / "index.html", DESKTOP)
    yield found
    found.page.context.close()
    assert found.faults == []
    assert all(address.startswith(("file://", "data:", "blob:")) for address in found.requests)

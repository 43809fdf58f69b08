"""Click through the site of `make report` in Chromium, opened from its file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.conftest import PHONE, Visit, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PICTURES = ("headline", "differences", "pareto", "curves", "maps", "rules")


def pictures_of(found: Visit) -> list[str]:
    return found.page.eval_on_selector_all(".pictures", "all => all.map(one => one.id)")


def index_of(found: Visit, pictures: str) -> list[dict[str, Any]]:
    return json.loads(found.page.locator(f"#{pictures} script").text_content() or "")["index"]


def drawn(found: Visit, pictures: str) -> str:
    return found.page.locator(f"#{pictures}").get_attribute("data-drawn") or ""


def column(found: Visit, table: str, place: int) -> list[str]:
    return found.page.eval_on_selector_all(
        f"#{table} tbody tr:not([hidden])", f"rows => rows.map(row => row.cells[{place}].dataset.value)"
    )


# --------------------------------------------------------------------------------------------- widths and themes


def check_every_section_in_every_width_and_theme(any_visit: tuple[str, Visit]) -> None:
    name, found = any_visit
    page = found.page
    found.show("headline")
    found.shoot(f"{name}-first")
    for link in page.locator("nav a").all():
        link.click()
        target = (link.get_attribute("href") or "")[1:]
        assert page.locator(f"#{target} h1, #{target} h2").first.is_visible()
        assert (page.locator(f"#{target}").bounding_box() or {"height": 0})["height"] > 150
    assert set(PICTURES) <= set(pictures_of(found))
    for pictures in pictures_of(found):
        found.show(pictures)
        box = page.locator(f"#{pictures} .plot").bounding_box()
        assert box is not None and box["height"] > 150 and box["width"] > 250
        assert page.locator(f"#{pictures} figcaption").text_content()
        found.shoot(f"{name}-{pictures}")
    page.locator("#rule-sets h2").scroll_into_view_if_needed()
    found.shoot(f"{name}-rule-sets")
    page.locator("#best-ablation_cpu").scroll_into_view_if_needed()
    found.shoot(f"{name}-table")
    page.locator("#reproduction").scroll_into_view_if_needed()
    found.shoot(f"{name}-reproduction")
    over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert over <= 0, f"the page is {over} pixels too wide"


def check_wide_tables_scroll_inside_themselves(browser: Browser, site: Path) -> None:
    found = visit(browser, site / "index.html", PHONE)
    wide = found.page.eval_on_selector_all(
        ".scroll", "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.tabIndex)"
    )
    assert len(wide) >= 3 and set(wide) == {0}
    found.page.context.close()


def check_text_can_be_read_in_both_themes(any_visit: tuple[str, Visit]) -> None:
    """Contrast of text, headings, links and cells against their ground: at least 4.5, as WCAG asks."""
    _, found = any_visit
    script = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")
    assert found.page.evaluate(script) == []


def check_the_theme_follows_the_system_while_the_page_is_open(opened: Visit) -> None:
    opened.show("headline")
    colour = "() => getComputedStyle(document.querySelector('#headline .xtick text')).fill"
    before = opened.page.evaluate(colour)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function(f"({colour})() !== {before!r}")


# -------------------------------------------------------------------------------------------------------- tables


def check_sorting_orders_numbers_and_says_so(opened: Visit) -> None:
    page, table = opened.page, "best-statistics_cpu"
    heads = page.locator(f"#{table} th")
    names = [head.strip() for head in heads.all_text_contents()]
    place = names.index("final loss (nats)")
    button = heads.nth(place).locator("button")
    for state, sign in (("ascending", 1), ("descending", -1), ("ascending", 1)):
        button.click()
        assert heads.nth(place).get_attribute("aria-sort") == state
        values = [float(value) for value in column(opened, table, place)]
        assert len(values) == 7 and values == sorted(values, key=lambda value: sign * value)
    opened.page.locator("#best-ablation_cpu th").nth(names.index("second moments")).locator("button").click()
    # As texts, 4,897 would come after 39 and before 6,016, and 10,249 first.
    scalars = [float(value) for value in column(opened, "best-ablation_cpu", names.index("second moments"))]
    assert scalars == sorted(scalars) and scalars[0] == 39 and scalars[-1] == 853120
    place = names.index("minus AdamW")
    for _ in range(2):  # AdamW has no difference to itself and stays last.
        heads.nth(place).locator("button").click()
        values = column(opened, table, place)
        assert values[-1] == "" and "" not in values[:-1]
    heads.nth(names.index("arm")).locator("button").click()
    arms = column(opened, table, names.index("arm"))
    assert arms == sorted(arms) and [heads.nth(i).get_attribute("aria-sort") for i in range(len(names))].count(
        "none"
    ) == (len(names) - 1)


def check_filters(opened: Visit) -> None:
    page = opened.page
    page.locator("summary").first.click()
    table = "every-ablation_cpu"
    everything = len(column(opened, table, 0))
    page.locator(f"#{table} select").nth(0).select_option("factored")
    assert set(column(opened, table, 0)) == {"factored"} and len(column(opened, table, 0)) == 3
    assert page.locator(f"#{table} .count").text_content() == f"3 of {everything} rows"
    page.locator(f"#{table} select").nth(1).select_option("0.003")
    assert len(column(opened, table, 0)) == 1
    page.locator(f"#{table} select").nth(0).select_option("")
    page.locator(f"#{table} select").nth(1).select_option("")
    page.locator(f"#{table} input").fill("adam 0.01")
    assert set(column(opened, table, 0)) == {"adam_mini", "slim_adam"}
    page.locator(f"#{table} input").fill("")
    assert len(column(opened, table, 0)) == everything


def check_every_table_can_be_sorted_by_every_column(opened: Visit) -> None:
    page = opened.page
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    for head in page.locator(".sortable th").all():
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("pictures", [*PICTURES[1:], "structure"])
def check_every_choice_draws_its_figure(opened: Visit, pictures: str) -> None:
    if pictures not in pictures_of(opened):
        assert pictures == "structure" and "Not measured yet" in (opened.page.text_content("#hessians") or "")
        return
    opened.show(pictures)
    selects = opened.page.locator(f"#{pictures} .selectors select")
    for entry in index_of(opened, pictures):
        for place, value in enumerate(entry["choice"]):
            # A selector with one option for all figures is hidden.
            if selects.nth(place).is_visible():
                selects.nth(place).select_option(value)
        wanted = entry["figure"]
        opened.page.wait_for_selector(f"#{pictures}[data-drawn='{wanted}']", timeout=20_000)
    marks = opened.page.locator(f"#{pictures} .main-svg .trace, #{pictures} .main-svg .hm")
    assert marks.count() > 0


def hover(found: Visit, pictures: str, x: float, y: float) -> str:
    """Move the pointer to a place inside a plot's axes, in shares of their size, and read what appears, if anything."""
    box = found.page.locator(f"#{pictures} .nsewdrag").first.bounding_box()
    assert box is not None
    found.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=2)
    found.page.wait_for_timeout(60)
    labels = found.page.locator(f"#{pictures} .hoverlayer .hovertext")
    return (labels.first.text_content() or "") if labels.count() else ""


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ("maps", ("element", "block", "|H| = ")),
        ("curves", ("n = ", "nats", "from")),
        ("pareto", ("n = ", "±", "bytes per parameter")),
        ("headline", ("n = ", "±", "second moments")),
        ("differences", ("n = ", "±", "learning rate")),
        ("rules", ("gap", "nats")),
    ],
)
def check_hover_shows_numbers(opened: Visit, pictures: str, words: tuple[str, ...]) -> None:
    opened.show(pictures)
    opened.page.eval_on_selector(f"#{pictures} .plot", "plot => plot.scrollIntoView({block: 'center'})")
    places = itertools.product([i / 32 for i in range(1, 32)], [j / 12 for j in range(1, 12)])
    found = next(filter(None, (hover(opened, pictures, x, y) for x, y in places)), "")
    assert [word for word in words if word not in found] == []
    opened.shoot(f"desktop-light-hover-{pictures}")


def check_no_button_sends_anything_away(opened: Visit) -> None:
    for pictures in PICTURES:
        opened.show(pictures)
    titles = opened.page.eval_on_selector_all(".modebar-btn", "all => all.map(one => one.dataset.title ?? '')")
    assert (
        "Zoom" in titles and [title for title in titles if "share" in title.lower() or "cloud" in title.lower()] == []
    )


def check_zoom_by_block_and_back(opened: Visit) -> None:
    opened.show("maps")
    zoom = opened.page.locator("#maps .selectors select").last
    ranges = "() => document.querySelector('#maps .plot')._fullLayout.xaxis.range"
    whole = opened.page.evaluate(ranges)
    names = zoom.locator("option").all_text_contents()
    assert names[0] == "whole matrix" and len(names) > 2
    zoom.select_option(names[2])
    opened.page.wait_for_function(f"({ranges})()[0] > 0")
    low, high = opened.page.evaluate(ranges)
    assert high - low < (whole[1] - whole[0]) / 2
    zoom.select_option(names[0])
    opened.page.wait_for_function(f"({ranges})()[0] === 0")


def check_a_choice_is_kept_where_it_exists(opened: Visit) -> None:
    opened.show("maps")
    selects = opened.page.locator("#maps .selectors select")
    checkpoint = selects.nth(1)
    checkpoint.select_option("100 % of training")
    other = selects.nth(0).locator("option").nth(1).text_content()
    selects.nth(0).select_option(other)
    assert checkpoint.input_value() == "100 % of training"


# ------------------------------------------------------------------------------------------------------- keyboard


def check_the_whole_page_by_keyboard(opened: Visit) -> None:
    """Tab reaches the skip link, the navigation, every selector, sort button and table; the focus can be seen."""
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    wanted = page.eval_on_selector_all(
        "nav a, select, th button, .scroll, summary, input",
        "all => all.filter(one => one.checkVisibility()).length",
    )
    reached, unseen = 0, []
    describe = """() => { const e = document.activeElement, s = getComputedStyle(e), width = s.outlineWidth;
      return [e.tagName, e.matches('nav a, select, th button, .scroll, summary, input'), s.outlineStyle, width] }"""
    for _ in range(wanted + 400):
        page.keyboard.press("Tab")
        tag, counts, style, width = page.evaluate(describe)
        if tag == "BODY":
            break
        if counts:
            reached += 1
            if style == "none" or width == "0px":
                unseen.append(tag)
    assert unseen == [] and reached >= wanted


def check_sort_and_select_by_keyboard(opened: Visit) -> None:
    page = opened.page
    head = page.locator("#best-ablation_cpu th").nth(2)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    opened.show("curves")
    before = drawn(opened, "curves")
    page.locator("#curves .selectors select").first.focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_function("before => document.querySelector('#curves').dataset.drawn !== before", arg=before)


# ---------------------------------------------------------------------------------------------------- other sites


def check_the_page_of_make_hessian_has_the_same_look(browser: Browser) -> None:
    index = Path("out/hessian/index.html")
    if not index.is_file():
        pytest.skip(f"{index} does not exist; run `make hessian` to check its page, too")
    for viewport, name in ((PHONE, "hessian-phone"), ({"width": 1280, "height": 800}, "hessian-desktop")):
        found = visit(browser, index, viewport)
        found.shoot(f"{name}-first")
        found.show("maps")
        found.shoot(name)
        over = found.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert over <= 0 and found.faults == []
        found.page.context.close()

"""The page in a real browser: it draws, sorts, filters and opens, on a phone as well, without a complaint."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pages import EVIL, Seen, browse, evidence, needs_chromium, screenshot, split_step
from PIL import Image

from ccompile.page import render

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_chromium
NAMES = [f"/block{n}/conv" for n in range(12)]
ROWS = "const rows = (table) => [...document.querySelectorAll(`#${table} tbody tr:not(.details)`)];\n"
TEXTS = ROWS + "const texts = (table) => rows(table).map((row) => row.querySelector('th')?.textContent);\n"
UNTIL = """
const until = async (holds) => {
  for (let tries = 0; tries < 40 && !holds(); tries++) await new Promise((done) => setTimeout(done, 50));
};
"""


@cache
def large() -> str:
    return render(evidence([f"/block{n}/conv" for n in range(2000)]))


def seen(folder: Path, script: str, page: str | None = None, width: int = 1200) -> Any:
    """Run a script in the page and return what it returned; nothing may have gone wrong."""
    found: Seen = browse(page or render(evidence(NAMES)), script, folder, width)
    assert found.problems == []
    assert found.log == []
    return found.found


def test_all_parts_are_drawn(tmp_path: Path) -> None:
    script = "return [document.documentElement.dataset.ready, document.querySelectorAll('svg.chart').length];"
    ready, charts = seen(tmp_path, script)
    assert ready == "yes"
    assert charts == 3  # cost and accuracy after each pass, and the layers


def test_a_column_sorts_both_ways(tmp_path: Path) -> None:
    script = """
    const error = [...document.querySelectorAll("#site-table thead button")].find((one) => one.textContent === "Error");
    const column = () => [...document.querySelectorAll("#site-table tbody tr")].map((row) => row.cells[3].textContent);
    const found = [];
    for (let click = 0; click < 2; click++) {
      error.click();
      found.push([error.parentNode.getAttribute("aria-sort"), column()]);
    }
    return found;
    """
    (first, down), (second, up) = seen(tmp_path, script)
    assert (first, second) == ("descending", "ascending")
    known = [float(text) for text in down]
    assert known == sorted(known, reverse=True)
    assert [float(text) for text in up] == sorted(known)
    assert len(set(known)) > 3


def test_text_and_choices_filter(tmp_path: Path) -> None:
    script = (
        TEXTS
        + """
    const query = document.querySelector("#site-table input");
    const tally = () => document.querySelector("#site-table .tally").textContent;
    const found = [];
    for (const text of ["block11", "RANK 2 block1", "nothing-like-it"]) {
      query.value = text;
      query.dispatchEvent(new Event("input"));
      found.push([texts("site-table").filter(Boolean).length, tally()]);
    }
    query.value = "";
    query.dispatchEvent(new Event("input"));
    const picker = document.querySelectorAll("#site-table select")[1];
    picker.value = "no";
    picker.dispatchEvent(new Event("change"));
    return [...found, [texts("site-table").length, tally()]];
    """
    )
    assert seen(tmp_path, script) == [[1, "1 of 12"], [1, "1 of 12"], [0, "0 of 12"], [6, "6 of 12"]]


def test_a_site_opens_to_its_curve_weight_and_graphs(tmp_path: Path) -> None:
    script = (
        UNTIL
        + """
    const button = document.querySelector("#site-table .open");
    button.click();
    const details = document.querySelector("#site-table tr.details");
    await until(() => details.querySelectorAll("svg.chart").length === 3);
    const found = [button.getAttribute("aria-expanded"), details.querySelectorAll("svg.chart").length,
      [...details.querySelectorAll("svg.graph")].map((one) => one.querySelectorAll("g.touched").length)];
    button.click();
    return [...found, document.querySelectorAll("#site-table tr.details").length];
    """
    )
    assert seen(tmp_path, script) == ["true", 3, [1, 2], 0]


def test_a_bar_of_the_chart_finds_its_layer(tmp_path: Path) -> None:
    script = (
        TEXTS
        + """
    const chart = document.querySelector("#layer-charts svg"), box = chart.getBoundingClientRect();
    const at = { clientX: box.left + 55, clientY: box.top + 60, bubbles: true };
    chart.dispatchEvent(new MouseEvent("mousemove", at));
    const said = document.getElementById("tip").textContent;
    chart.dispatchEvent(new MouseEvent("click", at));
    return [said.split("\\n")[0], texts("layer-table").length];
    """
    )
    assert seen(tmp_path, script) == ["/block0/conv", 1]


def test_of_two_thousand_sites_few_are_drawn_and_all_are_found(tmp_path: Path) -> None:
    script = (
        TEXTS
        + """
    const most = document.querySelectorAll("*").length;
    const first = rows("site-table").length;
    document.querySelector("#site-table .more").click();
    const query = document.querySelector("#site-table input");
    const second = rows("site-table").length;
    query.value = "block1999/";
    query.dispatchEvent(new Event("input"));
    return [first, second, texts("site-table")[0], most];
    """
    )
    first, second, found, most = seen(tmp_path, script, large())
    assert (first, second, found) == (25, 125, "/block1999/conv")
    assert most < 5000


@pytest.mark.parametrize("width", [375, 768, 1200])
def test_the_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    long = [f"/{'averyveryverylongmodulename' * 4}/{n}" for n in range(4)]
    reason = "argmax 0.5 < 0.9 at " + "x" * 200
    page = render(evidence(long, verdict="failed", reason=reason, steps=(split_step(long, reason=reason),)))
    script = """
    document.querySelector("#site-table .open").click();
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
    await new Promise((done) => setTimeout(done, 300));
    return [innerWidth, document.documentElement.scrollWidth];
    """
    assert seen(tmp_path, script, page, width) == [width, width]


def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    page = render(evidence([EVIL, "/b"], notes=(EVIL,)))
    script = """
    document.querySelector("#site-table .open").click();
    await new Promise((done) => setTimeout(done, 300));
    return [document.querySelectorAll("img").length, document.querySelector("#site-table th.name").textContent];
    """
    images, name = seen(tmp_path, script, page)
    assert images == 0
    assert EVIL in name


def test_the_theme_goes_round_and_colours_follow(tmp_path: Path) -> None:
    script = """
    const button = document.getElementById("theme"), found = [];
    for (let click = 0; click < 3; click++) {
      button.click();
      found.push([button.textContent, getComputedStyle(document.body).backgroundColor]);
    }
    return found;
    """
    (light, pale), (dark, deep), (auto, _) = seen(tmp_path, script)
    assert (light, dark, auto) == ("Theme: light", "Theme: dark", "Theme: auto")
    assert pale != deep


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(tmp_path: Path, theme: str) -> None:
    """WCAG 2.1 AA: 4.5 to 1 for text."""
    pairs = [("ink", "page"), ("soft", "page"), ("soft", "card"), ("accent", "card")]
    pairs += [(f"{tone}", f"{tone}-wash") for tone in ("good", "bad", "warn")]
    pairs += [(tone, "card") for tone in ("good", "bad", "warn")]
    script = f"""
    document.documentElement.dataset.theme = "{theme}";
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    return {[list(pair) for pair in pairs]}.map((pair) => pair.map(colour));
    """
    for front, behind in seen(tmp_path, script):
        one, two = sorted((luminance(front), luminance(behind)))
        assert (two + 0.05) / (one + 0.05) >= 4.5, (front, behind)


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.1)."""
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_all_that_can_be_clicked_can_be_reached_and_has_a_name(tmp_path: Path) -> None:
    script = """
    const all = [...document.querySelectorAll("button, a, input, select, summary, [tabindex]")];
    const name = (one) => one.textContent.trim() || one.ariaLabel || one.getAttribute("aria-labelledby");
    const active = [...document.querySelectorAll(".open, thead button, .segments > *")];
    return [all.length > 20, all.filter((one) => !name(one)).length, active.filter((one) => one.tabIndex < 0).length];
    """
    assert seen(tmp_path, script) == [True, 0, 0]


def test_a_screenshot_shows_the_verdict_in_its_colour(tmp_path: Path) -> None:
    washes = {}
    for verdict in ("ok", "failed"):
        with Image.open(screenshot(render(evidence(NAMES, verdict=verdict, reason="x")), tmp_path, 900, 500)) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        washes[verdict] = pixels[110, 600].astype(int)
    assert washes["ok"][1] > washes["ok"][0]  # green
    assert washes["failed"][0] > washes["failed"][1]  # red

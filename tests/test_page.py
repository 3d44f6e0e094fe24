"""The page as text: everything is in it, nothing is fetched, nothing that a model says becomes markup."""

from __future__ import annotations

import json
import math
import os
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from pages import CHROMIUM, EVIL, evidence, layer, split_step
from runs import Run

from ccompile.evidence import Evidence, GateRecord, SkipRecord
from ccompile.page import render

if TYPE_CHECKING:
    from pathlib import Path

FETCHING = {"src", "href", "srcset", "action", "data", "poster", "formaction", "background", "cite", "ping"}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, the text, and what each script or style holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.held: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, text: str) -> None:
        (self.held.append((self.inside, text)) if self.inside in ("script", "style") else self.words.append(text))

    @property
    def text(self) -> str:
        """Return what a reader sees, without runs of spaces."""
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> Any:
        """Return what the page's script draws."""
        return json.loads(next(text for tag, text in self.held if tag == "script"))


def page(**changes: Any) -> Page:
    return Page(render(evidence(["/a", "/b", "/c"], **changes)))


def names(count: int) -> list[str]:
    return [f"/block{n}/conv" for n in range(count)]


def test_the_browser_is_there_where_it_must_be() -> None:
    assert CHROMIUM or os.environ.get("CCOMPILE_BROWSER") != "required"


def test_equal_evidence_makes_equal_pages() -> None:
    assert render(evidence(names(9))) == render(evidence(names(9)))


def test_every_site_and_skip_of_2000_is_there_once() -> None:
    text = render(evidence(names(2000)))
    sites = Page(text).data["sites"]
    assert len(sites) == 2000
    assert {site["names"][0].removesuffix("/V") for site in sites} == set(names(2000))
    assert len(text) < 4 << 20


def test_nothing_is_fetched() -> None:
    found = page()
    used = [value for _, attributes in found.elements for name, value in attributes.items() if name in FETCHING]
    assert used
    assert all(value is not None and value.startswith(("#", "data:")) for value in used)
    for tag, text in found.held:
        assert "@import" not in text
        assert "url(" not in text
        assert tag == "style" or not any(word in text for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML"))


def test_the_policy_allows_nothing_but_its_own_script_and_style() -> None:
    (policy,) = [
        a["content"] for tag, a in page().elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_names_never_become_markup() -> None:
    gate = GateRecord(name=EVIL, limit=1, value=2, holds=False, detail=EVIL)
    step = split_step([EVIL, "/b"], reason=EVIL, options={EVIL: EVIL}, skipped=(SkipRecord(node=EVIL, reason=EVIL),))
    hostile = evidence([EVIL, "/b"], steps=(step,), verdict="failed", reason=EVIL, gates=(gate,), notes=(EVIL,))
    found = Page(render(hostile))
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in Page(render(like(hostile))).elements]
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert found.data["sites"][0]["names"][0] == f"{EVIL}/V"
    assert found.text.count("<script>boom()</script>") >= 6


def like(hostile: Evidence) -> Evidence:
    """The same evidence with a harmless name in each place."""
    return Evidence.model_validate_json(hostile.text().replace(json.dumps(EVIL)[1:-1], "plain"))


@pytest.mark.parametrize(("verdict", "word"), [("ok", "Passed"), ("failed", "Failed")])
def test_the_verdict_is_the_headline_and_the_title(verdict: str, word: str) -> None:
    found = page(verdict=verdict, reason="gate macs: too many")
    assert f"{word} net.onnx" in found.text
    assert found.text.startswith(f"{word}: net.onnx")
    assert ("gate macs: too many" in found.text) is (verdict == "failed")


def test_a_failed_compile_says_that_nothing_was_written() -> None:
    assert "nothing was written" in page(verdict="failed", reason="x", output=None).text
    assert "nothing was written" not in page().text


def test_gains_and_losses_are_in_words() -> None:
    text = page().text
    for said in ("\N{MINUS SIGN}50.0 %", "4 kB → 2 kB", "0.8700", "0.9000 before, \N{MINUS SIGN}0.0300"):
        assert said in text


def test_a_gate_shows_how_much_of_its_limit_is_used() -> None:
    assert "83 %" in page().text


def test_without_gates_the_page_says_what_they_would_be_good_for() -> None:
    assert "The spec asks for no gates" in page(gates=()).text
    assert "before the gates were judged" in page(gates=(), verdict="failed", reason="x").text


def test_no_passes_no_sites_no_layers_is_a_page_as_well() -> None:
    found = page(steps=(), graph=(), layers=(), source_layers=())
    assert "The spec has no passes" in found.text
    assert "No pass left a node alone" in found.text
    assert (found.data["sites"], found.data["layers"]) == ([], [])


def test_skips_stand_under_their_reason_with_their_number() -> None:
    assert "2 8 x 8 is too small /b /d" in Page(render(evidence(["/a", "/b", "/c", "/d"]))).text


def test_the_row_of_a_source_layer_holds_what_came_of_it() -> None:
    first, second, _ = page().data["layers"]
    assert (first["name"], first["now"]) == ("/a", [["/a/V", "Gemm"], ["/a/U", "Gemm"]])
    assert (first["before"][1], first["after"][1], first["steps"]) == (100, 50, [0])
    assert (second["name"], second["after"][1], second["steps"]) == ("/b", 25, [])


def test_a_site_has_the_graph_before_and_after_it() -> None:
    found = page().data
    before, after = ([(found["nodes"][n][0], touched) for n, touched in side] for side in found["sites"][0]["graphs"])
    assert before == [("/a", 1), ("/b", 0)]
    assert after == [("/a/V", 1), ("/a/U", 1), ("/b", 0)]


def test_neighbouring_sites_are_drawn_apart() -> None:
    chain = ["/a", "/b", "/c"]
    every = split_step(chain, applied=split_step([chain[0], "", chain[2]]).applied)
    found = Page(render(evidence(chain, steps=(every,)))).data
    _, after = found["sites"][1]["graphs"]
    assert [found["nodes"][n][0] for n, touched in after if touched] == ["/c/V", "/c/U"]


def test_a_reverted_step_leaves_no_trace_in_what_follows() -> None:
    steps = (split_step(["/a", "/b"], verdict="reverted", reason="too far"), split_step(["/a", "/b"], index=2))
    found = Page(render(evidence(["/a", "/b"], steps=steps)))
    assert "too far" in found.text
    assert found.data["undone"] == [True, False]
    assert found.data["progress"]["cost"][0][1] == [1, 1, 0.5]
    first, second = (site["graphs"] for site in found.data["sites"] if site["acted"])
    assert first == second


def test_layers_of_an_older_evidence_are_simply_not_there() -> None:
    old = json.loads(evidence(["/a"]).text())
    for name in ("graph", "layers", "source_layers"):
        del old[name]
    del old["steps"][0]["change"], old["steps"][0]["applied"][0]["weight"], old["steps"][0]["applied"][0]["output"]
    found = Page(render(Evidence.model_validate(old)))
    assert found.data["layers"] == []
    assert found.data["sites"][0]["graphs"] == [[], []]


def test_a_layer_that_came_of_none_has_a_row_of_its_own() -> None:
    found = page(layers=(layer("/new"),)).data["layers"]
    assert found[-1]["name"] == "/new"
    assert found[-1]["before"] == [0, 0, 0, 0]


def test_what_is_not_finite_is_not_in_the_page() -> None:
    found = page(source_metrics={"top1": math.nan}, timing={"total": math.inf})
    assert "NaN" not in json.dumps(found.data)


def test_the_command_writes_the_page_of_a_real_compile(run: Run, digits: Path) -> None:
    spec, out, html = digits / "spec.yaml", digits / "out.onnx", digits / "r.html"
    assert run(digits / "digits.onnx", "-s", spec, "-o", out, "--report", html, "-q", "--threads", 1).code == 0
    again = digits / "again.html"
    assert run("report", digits / "out.onnx.evidence.json", "-o", again).code == 0
    found = Page(again.read_text())
    steps = Evidence.read(digits / "out.onnx.evidence.json").steps
    assert len(found.data["sites"]) == sum(len(step.applied) + len(step.skipped) for step in steps)
    for step in steps:
        assert f"{step.index} {step.name}" in found.text
    assert Page(html.read_text()).data == found.data
    assert any(
        site["curve"] and site["weight"] and all(site["graphs"]) for site in found.data["sites"] if site["acted"]
    )


@pytest.mark.parametrize("name", ["e.json", "missing.json"])
def test_a_page_over_its_evidence_and_one_of_nothing_are_refused(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "e.json").write_text(evidence(["/a"]).text())
    ended = run("report", tmp_path / name, "-o", tmp_path / "e.json")
    assert ended.code == 2
    assert ("would overwrite" if name == "e.json" else "cannot read the evidence") in ended.err
    assert Evidence.read(tmp_path / "e.json") == evidence(["/a"])


def test_a_report_over_the_model_is_refused_before_any_work(run: Run, digits: Path) -> None:
    model = digits / "digits.onnx"
    ended = run(model, "-s", digits / "tidy.yaml", "-o", digits / "out.onnx", "--report", model)
    assert ended.code == 2
    assert "the report would overwrite the model" in ended.err
    assert not (digits / "out.onnx").exists()

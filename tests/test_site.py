"""The documentation site: it builds, its links lead somewhere, it asks no other host, and every key has an entry."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import blocks
import jsonschema
import pytest
import site_options
import site_source
from runs import ROOT

from ccompile import registry, target

SCHEMA = json.loads((ROOT / "specs" / "schema.json").read_text(encoding="utf-8"))
DEFS = SCHEMA["$defs"]
PASSES = {kind.__name__: name for name, kind in registry.passes().items()}
LOADS = {  # (tag, attribute) that make a browser fetch something; links that a reader follows do not
    *(("script", "src"), ("img", "src"), ("img", "srcset"), ("source", "src"), ("source", "srcset"), ("video", "src")),
    *(("audio", "src"), ("iframe", "src"), ("embed", "src"), ("object", "data"), ("link", "href")),
}


class Page(HTMLParser):
    """What a built page links to, what it loads, and what may be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif tag == "a" and name == "href" and value:
                self.links.append(value)
            elif (tag, name) in LOADS and value:
                self.loads.append(value)


def is_elsewhere(url: str) -> bool:
    return bool(re.match(r"(?:[a-z][a-z+.-]*:)?//", url)) and not url.startswith("data:")


def dead_links(site: Path) -> list[str]:
    """Return the links within a built site that lead to no file, or to no place in one."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            to, _, anchor = link.partition("#")
            aim = (path.parent / to).resolve() if to else path
            if is_elsewhere(link) or link.startswith(("mailto:", "data:")) or path.name == "404.html":
                continue
            if not aim.exists() or (anchor and aim in pages and anchor not in pages[aim].ids):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning fails it."""
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


# ---------------------------------------------------------------------------------------------- the built site


def test_every_page_is_built(site: Path) -> None:
    wanted = {Path(uri).with_suffix(".html").as_posix() for uri in site_source.pages()}
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.html")} == {*wanted, "404.html"}


def test_no_link_is_dead(site: Path) -> None:
    assert sum(len(Page(path.read_text(encoding="utf-8")).links) for path in site.rglob("*.html")) > 1000
    assert dead_links(site) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#there">1</a> <a href="b.html#not">2</a> <a href="c.html">3</a>')
    (tmp_path / "b.html").write_text('<p id="there"></p> <a href="#not">4</a> <img src="no.png">')
    assert [found.split("/")[-1] for found in dead_links(tmp_path)] == [
        "a.html: b.html#not",
        "a.html: c.html",
        "b.html: #not",
        "b.html: no.png",
    ]


def test_no_page_loads_from_another_host(site: Path) -> None:
    loads = {load for path in site.rglob("*.html") for load in Page(path.read_text(encoding="utf-8")).loads}
    assert len(loads) > 3
    assert not {load for load in loads if is_elsewhere(load)}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert len(styles) > 1
    assert not [url for style in styles for url in re.findall(r"url\(\s*['\"]?([^'\")]+)", style) if is_elsewhere(url)]
    assert is_elsewhere("//host/x.js")
    assert is_elsewhere("https://host/x.js")


@pytest.mark.parametrize("name", sorted(DEFS))
def test_every_key_of_a_declaration_has_an_entry(site: Path, name: str) -> None:
    uri = f"reference/passes/{PASSES[name]}.html" if name in PASSES else "reference/spec.html"
    uri = "reference/targets.html" if name in site_options.target_parts() else uri
    page = Page((site / uri).read_text(encoding="utf-8"))
    assert {key if name in PASSES else f"{name.lower()}-{key}" for key in DEFS[name]["properties"]} <= page.ids


def test_every_key_of_a_spec_has_an_entry(site: Path) -> None:
    page = Page((site / "reference/spec.html").read_text(encoding="utf-8"))
    assert {f"spec-{key}" for key in SCHEMA["properties"]} <= page.ids


def test_descriptions_arrive_whole(site: Path) -> None:
    page = (site / "reference/passes/split-svd.html").read_text(encoding="utf-8")
    assert "globs on names, or {name, op, where}" in page


def test_every_pass_and_target_has_an_entry(site: Path) -> None:
    index = (site / "reference/passes/index.html").read_text(encoding="utf-8")
    for name, kind in registry.passes().items():
        assert f'href="{name}.html"' in index
        page = (site / "reference/passes" / f"{name}.html").read_text(encoding="utf-8")
        assert registry.doc_of(kind).splitlines()[0].split("'")[0] in page
    assert set(target.target_names()) <= Page((site / "reference/targets.html").read_text(encoding="utf-8")).ids


# ---------------------------------------------------------------------------------------------- its sources


@pytest.mark.parametrize("name", sorted(DEFS))
def test_examples_are_what_the_schema_takes(name: str) -> None:
    for key, entry in DEFS[name]["properties"].items():
        value = site_options.example(key, entry, DEFS)
        jsonschema.Draft202012Validator({**entry, "$defs": DEFS}).validate(value)


def test_a_key_without_an_example_is_an_error() -> None:
    with pytest.raises(LookupError, match="no example fits `odd`"):
        site_options.example("odd", {"type": "unheard of"}, {})


@pytest.mark.parametrize("module", [site_options, site_source, blocks], ids=lambda module: str(module.__name__))
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 0) == (0, True)


def test_sections_end_where_the_next_begins(tmp_path: Path) -> None:
    text = "# Top\n\nlead\n\n## One\n\n    code\n\n```sh\n# no heading\n```\n\n### Part\n\nof it\n\n## Two\n\nother\n"
    (tmp_path / "a.md").write_text(text)
    assert site_source.section(tmp_path / "a.md", "Top") == "lead"
    one = site_source.section(tmp_path / "a.md", "One")
    assert one.startswith("    code")
    assert one.endswith("of it")
    assert site_source.section(tmp_path / "a.md", None).endswith("other")
    with pytest.raises(LookupError, match="has no heading `Three`"):
        site_source.section(tmp_path / "a.md", "Three")


def test_included_links_lead_to_pages_of_the_site() -> None:
    page = site_source.expanded("<!-- include README.md: Fewer weights, fewer bits -->", "guides/weights.md")
    assert "](../reference/recipes.md#deep-compression)" in page
    with pytest.raises(LookupError, match="no page of the site shows ccompile/cli"):
        site_source.home("ccompile/cli.py", "", "index.md")

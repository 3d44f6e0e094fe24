"""Markdown of the documentation site: pages under docs/, with sections of other files in them, and generated pages.

A page takes a section from where it stands with a line of its own:

    <!-- include README.md: Exit codes -->      what is under that heading, without the heading
    <!-- include CONTRIBUTING.md -->            all of the file but its first heading
    <!-- file specs/deep-compression.yaml -->   the file as a block of code, its name above it

Links in what is included are relative to its own folder, and lead to the pages of the site.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import site_reference

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_INCLUDE = re.compile(r"^<!-- include (?P<path>[\w./-]+)(?:: (?P<heading>.+?))? -->$", re.MULTILINE)
_FILE = re.compile(r"^<!-- file (?P<path>[\w./-]+) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?P<to>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_LANGUAGES = {".yaml": "yaml", ".yml": "yaml", ".cmake": "cmake", ".txt": "cmake", ".mk": "make", "": "make"}
_HOMES = {  # which page shows a file of the repository
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "bench/README.md": "benchmarks.md",
    "docs/decisions.md": "decisions.md",
    "integrations": "reference/integrations.md",
    "integrations/README.md": "reference/integrations.md",
    "passes/README.md": "reference/passes/index.md",
}


def pages() -> dict[str, str]:
    """Return the Markdown of every page of the site by its path in it, all included and generated."""
    written = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
    return {uri: expanded(text, uri) for uri, text in (written | dict(generated())).items()}


@functools.cache
def generated() -> dict[str, str]:
    """Return the Markdown of the pages that are made from declarations and from files outside docs/."""
    found = {
        "contributing.md": "# Contributing\n\n<!-- include CONTRIBUTING.md -->\n",
        "changelog.md": "# Changelog\n\n<!-- include CHANGELOG.md -->\n",
        "benchmarks.md": "# Benchmarks\n\n<!-- include bench/README.md -->\n",
        "reference/integrations.md": integrations_page(),
    }
    for readme in sorted((ROOT / "examples").glob("*/README.md")):
        path = readme.relative_to(ROOT).as_posix()
        title = readme.read_text(encoding="utf-8").splitlines()[0]
        found[f"examples/{readme.parent.name}.md"] = f"{title}\n\n<!-- include {path} -->\n"
    guides = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "guides").glob("*.md"))}
    return found | site_reference.pages(guides)


def expanded(text: str, uri: str) -> str:
    """Return a page with what it includes, links leading from the page at `uri`. Raises ValueError, LookupError."""

    def included(match: re.Match[str]) -> str:
        path = match["path"]
        return _relinked(section(ROOT / path, match["heading"]), path, uri)

    return _FILE.sub(_shown, _INCLUDE.sub(included, text))


def _shown(match: re.Match[str]) -> str:
    text = (ROOT / match["path"]).read_text(encoding="utf-8").rstrip("\n")
    return f'```{_LANGUAGES[Path(match["path"]).suffix]} title="{match["path"]}"\n{text}\n```'


def integrations_page() -> str:
    """Return what integrations/ is for, and its files, each under an anchor of its own."""
    shown = [f'<a id="{_slug(path)}"></a>\n\n<!-- file {path} -->' for path in integration_files()]
    head = "# Integrations\n\n<!-- include integrations/README.md -->\n\n## The files\n\n"
    return head + "\n\n".join(shown) + "\n"


def integration_files() -> list[str]:
    """Return the files of integrations/ and the hooks of pre-commit, sorted."""
    found = [path for path in (ROOT / "integrations").rglob("*") if path.is_file() and path.suffix in _LANGUAGES]
    paths = [path.relative_to(ROOT).as_posix() for path in found if "build" not in path.parts]
    return [*sorted(paths), ".pre-commit-hooks.yaml"]


def _slug(path: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.lower()).strip("-")


def section(path: Path, heading: str | None) -> str:
    """Return what is under a heading of a Markdown file, up to the next as high or `##`; else all but the title.

    Raises LookupError when there is no such heading.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = list(_headings(lines))
    if heading is None:
        return "\n".join(lines[found[0][0] + 1 :]).strip("\n")
    for at, level, title in found:
        if title == heading:
            ends = (line for line, other, _ in found if line > at and other <= max(level, 2))
            return "\n".join(lines[at + 1 : next(ends, len(lines))]).strip("\n")
    raise LookupError(f"{path.name} has no heading `{heading}`")


def _headings(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """Yield (line, level, title) of each heading; `#` inside fenced code is none."""
    fenced = False
    for at, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (match := re.fullmatch(r"(#+) (.+)", line)):
            yield at, len(match[1]), match[2]


def _relinked(text: str, path: str, uri: str) -> str:
    def to_page(match: re.Match[str]) -> str:
        if "://" in match["to"]:
            return match[0]
        return home(
            posixpath.normpath(posixpath.join(posixpath.dirname(path), match["to"])), match["anchor"] or "", uri
        )

    return _LINK.sub(to_page, text)


def home(path: str, anchor: str, uri: str) -> str:
    """Return the link from the page at `uri` to what shows a file of the repository. Raises LookupError.

    >>> home("passes/README.md", "#split-svd", "guides/low-rank.md")
    '../reference/passes/split-svd.md'
    """
    if path == "passes/README.md" and anchor:
        page, anchor = f"reference/passes/{anchor[1:]}.md", ""
    elif path in _HOMES:
        page = _HOMES[path]
    elif match := re.fullmatch(r"examples/([^/]+)(/README.md)?", path):
        page = f"examples/{match[1]}.md"
    elif found := [file for file in integration_files() if file == path or file.startswith(f"{path}/")]:
        page, anchor = "reference/integrations.md", f"#{_slug(found[0])}"
    elif match := re.fullmatch(r"specs/([^/]+)\.yaml", path):
        page, anchor = "reference/recipes.md", f"#{match[1]}"
    else:
        raise LookupError(f"no page of the site shows {path}")
    return posixpath.relpath(page, posixpath.dirname(uri) or ".") + anchor

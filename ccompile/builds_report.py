"""The differences of two builds, as a table, as Markdown for pull requests, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ccompile.builds import KINDS, Change, Kind
from ccompile.report import table

_SHOWN = 40  # rows of one kind; a pull request is read by people
_TITLES: dict[Kind, str] = {
    "origin": "Built from",
    "accuracy": "Accuracy",
    "cost": "Cost",
    "gates": "Gates",
    "steps": "Steps",
    "choices": "Choices",
}
_EQUAL = "The builds are equal: accuracy, cost, gates and choices."


def _by_kind(found: Sequence[Change]) -> Iterator[tuple[Kind, list[Change], str]]:
    """Yield each kind with its first changes, and a line on those that are left out."""
    for kind in KINDS:
        if listed := [change for change in found if change.kind == kind]:
            more = len(listed) - _SHOWN
            yield kind, listed[:_SHOWN], f"... and {more} more; `--format json` has all" if more > 0 else ""


def text(found: Sequence[Change], failed: Sequence[Change]) -> RenderableType:
    """Return one table per kind."""
    parts: list[RenderableType] = []
    for kind, listed, more in _by_kind(found):
        rows = [(_mark(change, failed), change.what, change.before, change.after) for change in listed]
        parts += [Text(_TITLES[kind], "bold"), table(["", "what", "before", "after"], rows, left=4), Text(more)]
    return Group(*parts) if parts else Text(_EQUAL)


def _mark(change: Change, failed: Sequence[Change]) -> str:
    return "fails" if change in failed else "worse" if change.worse and change.kind in ("accuracy", "cost") else ""


def markdown(found: Sequence[Change], failed: Sequence[Change], names: tuple[str, str]) -> str:
    """Return the differences as GitHub-flavoured Markdown; `names` are those of the builds."""
    before, after = (_plain(name) for name in names)
    lines = [f"### ccompile: {before} → {after}", ""]
    if failed:
        lines += [f"**{len(failed)} {'change is' if len(failed) == 1 else 'changes are'} not allowed.**", ""]
    if not found:
        return "\n".join([*lines, _EQUAL]) + "\n"
    for kind, listed, more in _by_kind(found):
        folded = kind in ("origin", "steps", "choices")
        title = f"{_TITLES[kind]} ({len([change for change in found if change.kind == kind])})"
        lines += [f"<details><summary>{title}</summary>", ""] if folded else [f"**{_TITLES[kind]}**", ""]
        lines += ["| | what | before | after |", "| --- | --- | --- | --- |"]
        for change in listed:
            cells = (_mark(change, failed), *(map(_plain, (change.what, change.before, change.after))))
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"\n{more}"] if more else []
        lines += ["", "</details>", ""] if folded else [""]
    return "\n".join(lines)


def _plain(said: str) -> str:
    r"""Return a text that Markdown shows as it is, in one line: names of nodes may hold anything.

    >>> _plain("a|b <i>*x*</i>")
    'a\\|b &lt;i&gt;\\*x\\*&lt;/i&gt;'
    """
    shown = " ".join(said.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|~#@!" else letter for letter in shown)


def as_data(found: Sequence[Change], failed: Sequence[Change]) -> dict[str, Any]:
    """Return the differences as plain data."""
    rows = [{**asdict(change), "by": change.by if change.by < float("inf") else None} for change in found]
    return {"holds": not failed, "changes": rows, "failed": [change.what for change in failed]}

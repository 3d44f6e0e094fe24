"""Every case of tests/passes/<pass>.txt: the graph comes out as written, and computes what it did.

A case is

    === A sentence that says what happens
    {option: value}
    graph before, in ONNX text
    ---
    skip NODE: reason                    (every Skip, in order; a line each)
    graph after, or the word `unchanged`

Weights may be given by type alone among the values in <...>: then they are drawn (before), or only their type is
compared (after). A graph has opset 18 unless a <ir_version ..., opset_import ...> stands before it. Symbols of input
shapes are bound to several sizes; both graphs run on seeded inputs, and the step must keep its contract.

To write the part after `---` of all cases, look at the difference, and commit it: python tests/test_golden.py --write
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

import driver
import numpy as np
import onnx
import pytest
import yaml

from ccompile import onnx_io, registry
from ccompile.errors import CcompileError

FOLDER = Path(__file__).parent / "passes"


@dataclass(frozen=True)
class Case:
    """One case of a file."""

    step: str
    title: str
    options: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.step}: {self.title}"


def cases(path: Path) -> tuple[str, list[Case]]:
    """Return what stands above the first case, and the cases."""
    preamble, *parts = path.read_text(encoding="utf-8").split("\n=== ")
    found = []
    for part in parts:
        given, _, after = part.partition("\n---")
        title, options, before = given.split("\n", 2)
        found.append(Case(path.stem.replace("_", "-"), title.strip(), options, before.strip(), after.strip()))
    return preamble, found


def all_cases() -> list[Case]:
    return [case for path in sorted(FOLDER.glob("*.txt")) for case in cases(path)[1]]


def outcome(case: Case) -> str:
    """Run a case; return what should stand after `---`. Fails when the step broke its contract."""
    model, drawn = driver.model_of(case.before)
    assert not (complaint := onnx_io.check(model)), f"ONNX's checker refuses the graph before: {complaint}"
    step = registry.find(case.step).model_validate(yaml.safe_load(case.options) or {})
    run = driver.run_step(step, model)
    assert run.record.verdict == "kept", run.record.reason
    assert run.result is not None
    lines = [f"skip {skip.node}: {skip.reason}" for skip in run.result.skipped]
    before, after = (driver.write_text(m, floats=not drawn) for m in (model, run.model))
    assert bool(run.result.applied) == (before != after), "a pass reports what it changes, and nothing else"
    return "\n".join([*lines, after if before != after else "unchanged"])


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_case(case: Case) -> None:
    found = outcome(case)
    skips, graph_found = _split(found)
    wanted_skips, graph_wanted = _split(case.after)
    assert skips == wanted_skips
    assert (graph_found == "unchanged") == (graph_wanted == "unchanged"), found
    if graph_found != "unchanged":
        _assert_same(graph_found, graph_wanted)


def _split(after: str) -> tuple[list[str], str]:
    lines = after.splitlines()
    skips = [line for line in lines if line.startswith("skip ")]
    return skips, "\n".join(lines[len(skips) :]).strip()


def _assert_same(found: str, wanted: str) -> None:
    mine, theirs = (driver.comparable(driver.read_text(text)[0].graph) for text in (found, wanted))
    delta = difflib.unified_diff(theirs.structure.splitlines(), mine.structure.splitlines(), "wanted", "found", n=99)
    assert mine.structure == theirs.structure, "\n".join(delta)
    assert mine.kinds == theirs.kinds
    assert theirs.values.keys() <= mine.values.keys(), "a value is written that is too long to compare: give its type"
    for name, value in theirs.values.items():
        np.testing.assert_allclose(mine.values[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_every_pass_has_cases_and_every_file_a_pass() -> None:
    assert {path.stem.replace("_", "-") for path in FOLDER.glob("*.txt")} == set(registry.passes())


def test_titles_are_unique() -> None:
    titles = [str(case) for case in all_cases()]
    assert len(titles) > 50
    assert len(set(titles)) == len(titles)


def write(path: Path) -> None:
    """Write the outcome of every case into its file."""
    preamble, found = cases(path)
    parts = [preamble]
    for case in found:
        try:
            after = outcome(case)
        except (AssertionError, CcompileError, onnx.parser.ParseError) as error:
            raise SystemExit(f"{case}: {error}") from error
        parts.append(f"{case.title}\n{case.options}\n{case.before}\n---\n{after}\n")
    path.write_text("\n=== ".join(parts), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        raise SystemExit(__doc__)
    for file in [Path(name) for name in sys.argv[2:]] or sorted(FOLDER.glob("*.txt")):
        write(file)

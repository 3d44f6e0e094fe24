"""Code blocks of Markdown pages: which there are, and how each is run in a folder.

    ```sh       run; each `ccompile ...` must end with exit code 0, or with the one in `# exits N` behind it
    ```text     right behind a sh block: lines that it printed, in this order; numbers may differ a little, `...` is any
    ```yaml     a spec, its steps, any part of one, or a target; `# NAME.yaml` in its first line writes that file
    ```python   run, in one namespace per page; `# NAME.py` in its first line writes that file
    ```make     `# Makefile` in its first line writes that file

A block with `title="PATH"` is that file of the tree, which other tests run. A YAML file whose first line says
`(wrong on purpose)` must be refused. A block whose first line is `# Not run here: REASON` is only parsed: readers see
the reason, too.
"""

from __future__ import annotations

import ast
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT, Run, environment

from ccompile import spec
from ccompile.errors import CcompileError

RUN = ("sh", "yaml", "python", "make", "cmake")
_FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"# Not run here: (\S.{5,})")
_WRONG = "(wrong on purpose)"
_FILE = re.compile(r"# ([\w.-]+\.(?:yaml|py)|Makefile)\b")
_EXITS = re.compile(r"\s+# exits (\d+)$")
_SHELL = re.compile(r"[|<>;&$*]|^\w+=")
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
_CLOSE = 0.1  # other processors round differently; a fit may then take a neighbouring rank
_NOISE = 1e-4  # differences of floats mean nothing below this, beyond being small


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, where it stands in the page, and the file of the tree that it shows."""

    language: str
    text: str
    start: int
    end: int
    shows: str = ""

    @property
    def first(self) -> str:
        """Return its first line."""
        return self.text.partition("\n")[0]

    @property
    def reason(self) -> str:
        """Return why it is not run; empty when it is."""
        found = _NOT_RUN.fullmatch(self.first)
        return found[1] if found else ""


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, without the indent that they stand at."""
    return [
        Block(match[2], re.sub(rf"^{match[1]}", "", match[4], flags=re.M), match.start(), match.end(), match[3] or "")
        for match in _FENCE.finditer(page)
    ]


@dataclass
class Player:
    """Runs the blocks of one page, in order, in a folder; `run` is the command line in this process."""

    folder: Path
    run: Run
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    printed: str = ""

    def play(self, page: str) -> dict[str, int]:
        """Run all blocks; return how many of each language were."""
        done: dict[str, int] = {}
        before: Block | None = None
        for block in blocks(page):
            if block.language in RUN:
                self.block(block)
                done[block.language] = done.get(block.language, 0) + 1
            elif block.language == "text" and before is not None and not page[before.end : block.start].strip():
                assert_printed(block.text, self.printed)
                done["text"] = done.get("text", 0) + 1
            before = block if block.language == "sh" and not block.reason else None
        return done

    def block(self, block: Block) -> None:
        """Run one block, or only parse it."""
        if block.shows:
            assert (ROOT / block.shows).read_text(encoding="utf-8").rstrip() == block.text.rstrip()
            return
        if (named := _FILE.match(block.first)) and not block.reason:
            (self.folder / named[1]).write_text(block.text, encoding="utf-8")
        match block.language:
            case "sh":
                self._shell(block)
            case "yaml":
                data = yaml.safe_load(block.text)
                assert data, "an empty block"
                if _WRONG in block.first:
                    with pytest.raises(CcompileError):
                        assert_spec(data, block.text, self.folder)
                elif not block.reason:
                    assert_spec(data, block.text, self.folder)
            case "python":
                tree = ast.parse(block.text)
                if not block.reason:
                    exec(compile(tree, "<page>", "exec"), self.names)
            case _:
                assert named or block.reason, "the first line names the file, or says why it is not run"

    def _shell(self, block: Block) -> None:
        self.printed = ""
        if block.reason:
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            return
        for line in _lines(block.text):
            wanted = int(found[1]) if (found := _EXITS.search(line)) else 0
            code = self._command(_EXITS.sub("", line))
            assert code == wanted, f"{line}\nexit code {code}, not {wanted}:\n{self.printed}"

    def _command(self, line: str) -> int:
        plain, _, file = line.partition(" > ")
        if line.startswith("ccompile ") and not _SHELL.search(plain + file):  # here, which saves a start of Python
            ended = self.run(*shlex.split(plain, comments=True)[1:])
            if file:
                (self.folder / file).write_text(ended.out, encoding="utf-8")
            self.printed += ended.err if file else ended.out + ended.err
            return ended.code
        shell = environment(CCOMPILE=str(ROOT), PATH=f"{program(self.folder)}{os.pathsep}{os.environ['PATH']}")
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=self.folder,
            env=shell,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        self.printed += done.stdout
        return done.returncode


def program(folder: Path) -> Path:
    """Return a folder beside `folder` with a program `ccompile` that runs this tree's."""
    found = folder.parent / "bin"
    found.mkdir(exist_ok=True)
    (found / "ccompile").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ccompile "$@"\n')
    (found / "ccompile").chmod(0o755)
    return found


def _lines(text: str) -> Iterator[str]:
    """Yield the commands of a block: lines, those that end in a backslash with the next."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


def assert_spec(data: Any, text: str, folder: Path) -> None:
    """Fail unless YAML is a spec, a list of its steps, a part of one, or a target."""
    whole: dict[str, Any] = {"version": 1, "passes": ["tidy-graph"], "gates": {"argmax": 0.5}}
    if isinstance(data, list):
        whole["passes"] = data
    elif "dtypes" in data:
        whole["target"] = data
    elif "version" not in data:
        whole |= data
    else:
        spec.parse(text, base=folder)
        return
    spec.parse(yaml.safe_dump(whole, sort_keys=False), base=folder)


def assert_printed(shown: str, printed: str) -> None:
    """Fail unless all lines shown were printed, in this order; a line `...` stands for any."""
    assert shown.replace("...", "").strip(), "nothing is shown"
    rest = iter([line.split() for line in printed.splitlines()])
    for line in shown.splitlines():
        words = line.split()
        if words and words != ["..."]:
            assert any(same(words, other) for other in rest), f"not printed, or not in this order: {line}\n{printed}"


def same(shown: Sequence[str], printed: Sequence[str]) -> bool:
    """Return whether words are equal, numbers in them within a few percent; `...` at the end stands for any.

    >>> same(["1.1e-07", "431.7", "kB"], ["2.0e-07", "433.0", "kB"]), same(["kept"], ["failed"])
    (True, False)
    """
    if shown[-1:] == ["..."]:
        shown, printed = shown[:-1], printed[: len(shown) - 1]
    if len(shown) != len(printed):
        return False
    return all(_same_word(a, b) for a, b in zip(shown, printed, strict=True))


def _same_word(a: str, b: str) -> bool:
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True)
    return all(_same_number(float(x.replace(",", "")), float(y.replace(",", ""))) for x, y in pairs)


def _same_number(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_CLOSE) or max(abs(a), abs(b)) < _NOISE

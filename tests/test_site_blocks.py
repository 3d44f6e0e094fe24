"""Every code block of the site runs: commands, specs and their parts, Python; what is shown is what they print."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import site_source
from blocks import RUN, Player, assert_printed, blocks, same
from runs import ROOT, Run

PAGES = site_source.pages()
WITH_BLOCKS = sorted(uri for uri, text in PAGES.items() if any(block.language in RUN for block in blocks(text)))
EMPTY = ("tutorial.md",)  # start in an empty folder; the others beside the example's model and data
KNOWN = {*RUN, "text", "toml"}


@pytest.mark.parametrize("uri", WITH_BLOCKS)
def test_all_blocks_run(uri: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    if uri in EMPTY:
        folder.mkdir()
    else:
        shutil.copytree(ROOT / "examples" / "01_digits", folder)
    monkeypatch.chdir(folder)
    assert sum(Player(folder, run).play(PAGES[uri]).values()) > 0


def test_most_blocks_run() -> None:
    found = [block for text in PAGES.values() for block in blocks(text) if block.language in RUN]
    assert len(found) > 50
    assert sum(bool(block.reason) for block in found) * 5 < len(found)


@pytest.mark.parametrize("uri", sorted(PAGES))
def test_every_block_names_its_language(uri: str) -> None:
    assert {block.language for block in blocks(PAGES[uri])} <= KNOWN
    assert PAGES[uri].count("```") == 2 * len(blocks(PAGES[uri]))


def player(tmp_path: Path, run: Run) -> Player:
    (tmp_path / "work").mkdir()
    return Player(tmp_path / "work", run)


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nccompile insepct\n```\n",  # exits 2
        "```sh\ntrue  # exits 3\n```\n",
        "```sh\necho one\n```\n\n```text\ntwo\n```\n",
        "```yaml\n- no-such-pass\n```\n",
        "```yaml\n# a.yaml (wrong on purpose)\nversion: 1\npasses: [tidy-graph]\n```\n",
        "```sh\necho one\n```\n\n```text\n...\n```\n",
        "```python\n1 / 0\n```\n",
        "```python\n# Not run here: it needs two machines\n1 +\n```\n",
        "```sh\n# Not run here: it needs two machines\nif\n```\n",
    ],
)
def test_a_block_that_does_not_hold_fails(page: str, tmp_path: Path, run: Run) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011  (whatever the block raises)
        player(tmp_path, run).play(page)


def test_a_block_that_says_why_is_not_run(tmp_path: Path, run: Run) -> None:
    page = "```sh\n# Not run here: it needs two machines\nfalse\n```\n\n```text\nnever printed\n```\n"
    assert player(tmp_path, run).play(page) == {"sh": 1}


def test_a_file_is_written_and_can_be_run(tmp_path: Path, run: Run) -> None:
    page = "```python\n# say.py\nprint('said 10')\n```\n```sh\npython3 say.py\n```\n```text\nsaid 10\n```\n"
    assert player(tmp_path, run).play(page) == {"python": 1, "sh": 1, "text": 1}


def test_a_block_that_shows_a_file_must_be_it(tmp_path: Path, run: Run) -> None:
    text = (ROOT / ".gitignore").read_text()
    assert player(tmp_path, run).play(f'```make title=".gitignore"\n{text}```\n') == {"make": 1}
    with pytest.raises(AssertionError):
        Player(tmp_path, run).play('```make title=".gitignore"\nother\n```\n')


def test_shown_lines_may_leave_others_out_but_not_change_places() -> None:
    assert_printed("a 1.00\n...\nc", "a 1.01\nb\nc\n")
    for shown in ("c\na 1.00", "a 1.5", "a 1.00 c"):
        with pytest.raises(AssertionError):
            assert_printed(shown, "a 1.01\nb\nc\n")
    assert not same(["12"], ["kept"])
    assert same(["a", "..."], ["a", "b", "c"])
    assert not same(["a", "..."], ["b", "c"])

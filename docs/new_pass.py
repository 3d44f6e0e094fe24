"""Start a new pass: `new_pass.py verb-object` writes passes/verb_object.py and tests/passes/verb_object.txt."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = '''"""Say in one line what it does.

The algebra: y = f(x)  becomes  y = g(x).

Fires:  on which nodes, under which conditions.
Error:  what bounds the change of the output.
Cost:   what it saves.
Source: paper, section.
"""

from __future__ import annotations

from typing import ClassVar

from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, View


class {name}(Rewrite):
    """Options of {kebab}."""

    kind: ClassVar[Kind] = "exact"

    def run(self, view: View) -> PassResult:
        """Rewrite what fires; every other candidate is a Skip with its reason."""
        applied: list[Site] = []
        skipped: list[Skip] = []
        for node in view.graph:
            if excluded := view.excluded(node):
                skipped.append(excluded)
        return PassResult(tuple(applied), tuple(skipped))
'''


def main() -> None:
    """Write the two files; refuse names that are taken or not verb-object."""
    kebab = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", kebab):
        sys.exit("usage: make pass NAME=verb-object")
    snake = kebab.replace("-", "_")
    code, cases = ROOT / f"passes/{snake}.py", ROOT / f"tests/passes/{snake}.txt"
    if code.exists() or cases.exists():
        sys.exit(f"{kebab} exists already")
    code.write_text(CODE.format(name="".join(part.capitalize() for part in kebab.split("-")), kebab=kebab))
    cases.write_text("")
    print(
        f"wrote {code.relative_to(ROOT)} and {cases.relative_to(ROOT)}; the format of cases is in tests/test_golden.py"
    )


if __name__ == "__main__":
    main()

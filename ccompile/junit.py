"""Cases as JUnit XML, which CI systems show: one test case each, a failure where it broke, skipped where not judged.

Format: the `testsuite` of the Jenkins xUnit schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree

from ccompile.cases import Case

_FOREIGN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2: what it cannot hold


def text(suite: str, cases: Iterable[Case]) -> str:
    """Return the XML of a suite of cases; characters that XML cannot hold become U+FFFD.

    >>> "<skipped" in text("s", [Case("gate", "argmax", "not judged", "no source")])
    True
    """
    listed = list(cases)
    counts = {
        "tests": len(listed),
        "failures": sum(case.verdict == "broken" for case in listed),
        "errors": 0,
        "skipped": sum(case.verdict == "not judged" for case in listed),
    }
    root = ElementTree.Element("testsuite", {"name": _held(suite), **{name: str(n) for name, n in counts.items()}})
    for case in listed:
        element = ElementTree.SubElement(root, "testcase", {"classname": case.group, "name": _held(case.name)})
        if case.verdict == "broken":
            failure = ElementTree.SubElement(element, "failure", {"message": _held(case.detail), "type": case.group})
            failure.text = _held(str(case))
        elif case.verdict == "not judged":
            ElementTree.SubElement(element, "skipped", {"message": _held(case.detail)})
        else:
            ElementTree.SubElement(element, "system-out").text = _held(case.detail)
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _held(said: str) -> str:
    return _FOREIGN.sub("\ufffd", said)

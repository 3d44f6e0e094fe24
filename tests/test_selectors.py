from __future__ import annotations

import pytest

from ccompile.selectors import Selector


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        ("groups > 1", True),
        ("groups == 1", False),
        ("1 < groups <= 4 < kernel", True),
        ("1 < groups < 4", False),
        ("groups > 8 or kernel >= 5", True),
        ("groups > 1 and not kernel == 5", False),
        ("not (groups > 8 or params != 100)", True),
        ("stride > 0", False),  # the node has no such fact
    ],
)
def test_where_compares_facts(where: str, meant: bool) -> None:
    facts: dict[str, float | str] = {"name": "/a", "op": "Conv", "groups": 4.0, "kernel": 5.0, "params": 100.0}
    assert Selector(where=where).matches(facts) is meant


@pytest.mark.parametrize(
    ("name", "op", "meant"), [("/a*", "Conv", True), ("/b*", "Conv", False), ("/a*", "Gemm", False)]
)
def test_selector_needs_all_that_it_names(name: str, op: str, meant: bool) -> None:
    assert Selector(name=name, op=op).matches({"name": "/a/conv", "op": "Conv"}) is meant

"""Fixtures for pytest, there wherever ccompile is installed: `assert_onnx_close` and `ccompile_check`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ccompile.cases import Case

Check = Callable[..., "list[Case]"]


@pytest.fixture
def assert_onnx_close() -> Callable[..., None]:
    """Return `ccompile.assert_onnx_close`, which fails the test when outputs of two models differ."""
    import ccompile

    return ccompile.assert_onnx_close


@pytest.fixture
def ccompile_check() -> Check:
    """Return a function that judges a compiled model by its evidence, as `ccompile check OUT --evidence` does.

    ccompile_check(output, evidence=None, *, against=None, spec=None, data=None, other_data=False, **limits) returns the
    cases, and fails the test with those that broke. evidence: [OUT.evidence.json]. data: a path, where the evidence
    does not say where the data are. limits: relative_l2, argmax against the recorded outputs.
    """
    return _check


def _check(
    output: Path | str,
    evidence: Path | str | None = None,
    *,
    against: Path | str | None = None,
    spec: Path | str | None = None,
    data: Path | str | None = None,
    other_data: bool = False,
    threads: int = 0,
    **limits: float,
) -> list[Case]:
    __tracebackhide__ = True
    from ccompile import spec as specs
    from ccompile.checks.today import Check as Asked
    from ccompile.checks.today import check_build
    from ccompile.evidence import Evidence
    from ccompile.tolerance import Tolerance
    from ccompile.validation import from_options

    path = Path(output)
    recorded = path.with_name(path.name + ".evidence.json") if evidence is None else Path(evidence)
    options: dict[str, Any] = {"threads": threads, "other_data": other_data}
    if limits:
        options["drift"] = from_options(Tolerance, limits)
    found = check_build(
        Asked(
            path,
            Evidence.read(recorded),
            recorded.parent,
            None if against is None else Path(against),
            None if spec is None else specs.load(spec),
            None if data is None else Path(data),
            **options,
        )
    )
    if found.broken:
        pytest.fail("\n".join(f"{path.name}: {case}" for case in found.broken), pytrace=False)
    return list(found.cases)

"""Targets made on the machine itself: what each probe runs, what is kept of the base, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from runs import Run

from ccompile import benchmarks, measuring
from ccompile.probes import Series
from ccompile.target import load_target

BASE = "x86-64-avx512-vnni"


def bench() -> measuring.Bench:
    return measuring.Bench(threads=1, stop=0.0)


@pytest.mark.parametrize("series", benchmarks.all_series(), ids=lambda series: series.name)
def test_what_a_probe_times_is_what_runs(series: Series) -> None:
    probe = series.probes()[0]
    assert set(bench().ops_of(probe.build())) & set(probe.runs_as)


@pytest.mark.parametrize("is_integer", [False, True])
def test_more_copies_of_a_product_add_nothing_else(is_integer: bool) -> None:
    probe = benchmarks.product(1, 64, 16, is_integer)
    assert probe.times is not None
    few, many = (Counter(bench().ops_of(probe.times(copies))) for copies in (2, 5))
    (added,) = (many - few).items()
    assert added[0] in probe.runs_as
    assert added[1] == 3


def test_a_short_node_is_timed_by_whole_inferences_and_a_long_one_by_its_profile() -> None:
    probe, running = benchmarks.product(1, 64, 16), bench()
    assert running.counted(probe, 1.0) == 1.0
    assert 0 < running.counted(probe, 0.5e-6) != 0.5e-6


def test_a_target_of_one_table_keeps_the_rest_of_its_base(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "here.yaml"
    result = run("target", "measure", "--only", "transpose", "--time", "0.1s", "-o", out)
    assert result.code == 0
    assert "target `here`" in result.out
    base, found = load_target(BASE, Path()), load_target(str(out), Path())
    assert found.name == "here"
    assert found.rates == base.rates
    assert found.tables.conv == base.tables.conv
    (grid,) = found.tables.transpose["float32"]
    assert len(grid.rates) == 9
    assert min(grid.rates) > 0


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--only", "convs", "there is no table `convs`"), ("--time", "soon", "60s"), ("--like", "z80", "z80")],
)
def test_what_cannot_be_measured_is_refused_with_what_can(
    option: str, value: str, said: str, tmp_path: Path, run: Run
) -> None:
    result = run("target", "measure", option, value, "-o", tmp_path / "here.yaml")
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "here.yaml").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "none" / "here.yaml"
    result = run("target", "measure", "--only", "transpose", "--time", "0.1s", "-o", out)
    assert result.code == 2
    assert str(out) in result.err

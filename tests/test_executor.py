"""Mapped work: the same bits wherever it ran, errors as themselves, nothing left running."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from runs import Run, environment

from ccompile.errors import CcompileError
from ccompile.executor import InProcess, Processes, executor
from ccompile.numerics import obs, svd
from ccompile.numerics.obs import Consumer

SPEC = """
version: 1
data: {calibration: {synthetic: {}}, verification: {npz: verification.npz, samples: 8}}
passes:
  - fold-batchnorm
  - prune-channels: {keep: 0.7}
  - split-svd: {energy: 0.9}
gates: {relative_l2: 100}
"""
# Maps what never ends, and tells when both processes are at it.
BUSY = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, ".")
    import busy
    from ccompile import cli, pipeline
    from ccompile.executor import executor

    def run(*arguments):
        with executor(2) as found:
            found.map(busy.work, ["one", "two", "three"])

    if __name__ == "__main__":
        pipeline.compile_model = run
        cli.main(sys.argv[1:])
"""
WORK = """
    import os, time
    from pathlib import Path

    def work(name):
        Path(name).write_text(str(os.getpid()))
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with executor(2) as found:
        assert isinstance(found, Processes)
        yield found


def test_factors_have_the_same_bits_in_any_process(processes: Processes) -> None:
    matrices = [np.random.default_rng(size).standard_normal((size, size + 30)) for size in (4, 150, 90, 33, 8)]
    here, there = (where.map(svd.decompose, matrices) for where in (InProcess(), processes))
    for mine, theirs in zip(here, there, strict=True):
        assert [array.tobytes() for array in mine] == [array.tobytes() for array in theirs]


def test_removal_orders_have_the_same_bits_in_any_process(processes: Processes) -> None:
    groups = []
    for size in (8, 120, 40):
        rng = np.random.default_rng(size)
        x = rng.standard_normal((2 * size, size))
        groups.append([Consumer(rng.standard_normal((size // 2, size)), x.T @ x, np.arange(size))])
    remove = partial(obs.remove_units, ridge=0.0)
    here, there = (where.map(remove, groups) for where in (InProcess(), processes))
    for mine, theirs in zip(here, there, strict=True):
        assert (mine.order.tobytes(), mine.loss.tobytes()) == (theirs.order.tobytes(), theirs.loss.tobytes())


def test_few_items_are_held_at_a_time(processes: Processes) -> None:
    read: list[float] = []

    def items() -> Iterator[float]:
        for number in (1.0, 4.0, -1.0, *[9.0] * 50):
            read.append(number)
            yield number

    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        processes.map(math.sqrt, items())
    assert len(read) <= 7  # the third one fails; four are on their way


@pytest.mark.parametrize("kind", ["here", "there"])
def test_an_error_comes_out_as_itself(kind: str, processes: Processes) -> None:
    where = InProcess() if kind == "here" else processes
    with pytest.raises(np.linalg.LinAlgError, match="the matrix is not finite"):
        where.map(svd.decompose, [np.eye(2), np.full((2, 2), np.nan), np.eye(2)])


def test_a_process_that_died_is_told_with_a_remedy() -> None:
    with executor(2) as found, pytest.raises(CcompileError, match="one of the processes died") as caught:
        found.map(os._exit, [3])
    assert "Give fewer" in str(caught.value)


def test_one_job_is_this_process() -> None:
    with executor(1) as found:
        assert isinstance(found, InProcess)


def test_no_process_is_started_without_work() -> None:
    with executor(2) as found:
        assert found.map(math.sqrt, []) == []
        assert isinstance(found, Processes)
        assert found._pool is None


def test_any_number_of_jobs_gives_the_same_bytes(digits: Path, run: Run) -> None:
    (digits / "spec.yaml").write_text(SPEC)
    written = []
    for jobs in (1, 2):
        out = digits / f"{jobs}" / "out.onnx"
        out.parent.mkdir()
        ended = run(digits / "digits.onnx", "-s", digits / "spec.yaml", "-o", out, "--threads", 1, "--jobs", jobs)
        assert ended.code == 0, ended.err
        evidence = json.loads(Path(f"{out}.evidence.json").read_text())
        assert all(step["applied"] for step in evidence["steps"])
        del evidence["timing"]
        written.append((out.read_bytes(), evidence))
    assert written[0] == written[1]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupt_ends_every_process(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    (tmp_path / "busy.py").write_text(textwrap.dedent(WORK))
    (tmp_path / "main.py").write_text(textwrap.dedent(BUSY))
    (tmp_path / "spec.yaml").write_text("version: 1\npasses: [tidy-graph]\n")
    command = [sys.executable, "main.py", "model.onnx", "-s", "spec.yaml", "-o", "out.onnx"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in ("one", "two")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert "Traceback" not in err
    for name in ("one", "two"):
        assert is_gone(int((tmp_path / name).read_text()))


def is_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False

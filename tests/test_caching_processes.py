"""The cache among processes: killed at any moment, many at a time; the bytes are those of a compile alone.

The compiles are forks of one process that has imported everything, so that most of their time is the compile's.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import builders
import pytest
from runs import environment, scratch_files

from ccompile import onnx_io
from ccompile.evidence import Evidence
from ccompile.store import Store, digest_of

KILLS, AT_ONCE = 20, 8
SPEC = """
version: 1
data: {verification: {synthetic: {}, samples: 8}}
passes: [tidy-graph, {split-svd: {rank: RANK, only: [fc2], statistics: weights, tolerance: {relative_l2: 99}}}]
"""

# Reads [arguments, seconds after which it is killed, writes after which it kills itself], a line each, or a list of
# such at once; tells how each ended, and how long it took.
FORKS = """
import json, os, pathlib, signal, sys, threading, time
import onnx, scipy.linalg  # not onnxruntime: its threads would not be there in a fork
from ccompile import caching, cli, pipeline, registry, report

registry.passes()

def counted(real, left):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

def fork(arguments, delay, writes):
    pid = os.fork()
    if pid:
        if delay is not None:
            threading.Timer(delay, os.kill, (pid, signal.SIGKILL)).start()
        return pid
    if writes is not None:
        left = [writes]
        for owner, name in ((pathlib.Path, "replace"), (os, "fdopen"), (os, "fsync"), (pathlib.Path, "mkdir")):
            setattr(owner, name, counted(getattr(owner, name), left))
    cli.main(arguments)

for line in sys.stdin:
    jobs, start = json.loads(line), time.perf_counter()
    pids = [fork(*job) for job in jobs]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    while threading.active_count() > 1:  # a timer must not meet another process of that number
        time.sleep(0.001)
    print(json.dumps([codes, time.perf_counter() - start]), flush=True)
"""


class Forks:
    """Compiles in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            cwd=folder,
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *jobs: tuple[list[str], float | None, int | None]) -> tuple[list[int], float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        codes, seconds = json.loads(self.process.stdout.readline())
        return codes, seconds

    def one(self, arguments: list[str], delay: float | None = None, writes: int | None = None) -> int:
        return self.run((arguments, delay, writes))[0][0]

    def alone(self, spec: str, model: str = "model.onnx") -> bytes:
        """Return what a compile without a cache writes."""
        assert self.one([*arguments_of(spec, "alone.onnx", model)[:-2], "--no-cache"]) == 0
        return (self.folder / "alone.onnx").read_bytes()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture
def forks(tmp_path: Path) -> Any:
    onnx_io.save(builders.mlp(0), tmp_path / "model.onnx")
    made = Forks(tmp_path)
    yield made
    made.close()


def arguments_of(spec: str, output: str, model: str = "model.onnx") -> list[str]:
    return [model, "-s", spec, "-o", output, "--threads", "1", "-q", "--cache", "cache"]


def write_specs(folder: Path, count: int) -> list[str]:
    for index in range(count):
        (folder / f"{index}.yaml").write_text(SPEC.replace("RANK", str(index + 1)))
    return [f"{index}.yaml" for index in range(count)]


def assert_sound(folder: Path) -> None:
    """Everything in place in the cache is whole, and the output that stands has its evidence."""
    store = Store(folder / "cache")
    for path in (folder / "cache").glob("objects/??/*"):
        assert digest_of(path.read_bytes()) == path.parent.name + path.name
    for path in (folder / "cache").glob("records/??/*"):
        assert store.read(path.parent.name + path.name) is not None
    assert store.notes == []
    output = folder / "out.onnx"
    if output.exists():
        evidence = Evidence.read(folder / "out.onnx.evidence.json")
        assert evidence.output is not None
        assert evidence.output.digest == digest_of(output.read_bytes())


def test_killed_at_any_write_neither_cache_nor_output_is_damaged(forks: Forks) -> None:
    folder = forks.folder
    (spec,) = write_specs(folder, 1)
    expected, codes = forks.alone(spec), []
    for count in range(KILLS):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        (folder / "out.onnx").unlink(missing_ok=True)
        codes.append(forks.one(arguments_of(spec, "out.onnx"), writes=3 * count))
        assert_sound(folder)
        if count % 5 == 4:  # what is left serves the next
            assert forks.one(arguments_of(spec, "out.onnx")) == 0
            assert (folder / "out.onnx").read_bytes() == expected
    assert codes.count(-signal.SIGKILL) >= KILLS // 2


def test_killed_at_random_moments_neither_cache_nor_output_is_damaged(forks: Forks) -> None:
    """The cache grows from run to run, so that later ones are killed while they read it."""
    folder, delays = forks.folder, random.Random(0)
    (spec,) = write_specs(folder, 1)
    expected = forks.alone(spec)
    seconds = forks.run((arguments_of(spec, "out.onnx"), None, None))[1]
    for count in range(KILLS):
        if count % 5 == 0:
            shutil.rmtree(folder / "cache")
        (folder / "out.onnx").unlink(missing_ok=True)
        code = forks.one(arguments_of(spec, "out.onnx"), delay=delays.uniform(0, seconds))
        assert code in (0, -signal.SIGKILL)
        assert_sound(folder)
    assert forks.one(arguments_of(spec, "out.onnx")) == 0
    assert (folder / "out.onnx").read_bytes() == expected
    assert scratch_files(folder) == []


@pytest.mark.parametrize(("specs", "models"), [(1, 1), (AT_ONCE, 1), (1, AT_ONCE)])
def test_many_compiles_at_once_give_the_bytes_that_each_gives_alone(forks: Forks, specs: int, models: int) -> None:
    folder = forks.folder
    files = [f"{index}.onnx" for index in range(models)]
    for index, name in enumerate(files):
        onnx_io.save(builders.mlp(index), folder / name)
    jobs = list(zip(write_specs(folder, specs) * (AT_ONCE // specs), files * (AT_ONCE // models), strict=True))
    outputs = [f"out{index}.onnx" for index in range(AT_ONCE)]
    runs = [(arguments_of(spec, out, model), None, None) for (spec, model), out in zip(jobs, outputs, strict=True)]
    assert forks.run(*runs)[0] == [0] * AT_ONCE
    expected = {job: forks.alone(*job) for job in dict.fromkeys(jobs)}
    assert [(folder / output).read_bytes() for output in outputs] == [expected[job] for job in jobs]
    assert len(set(expected.values())) == max(specs, models)
    assert_sound(folder)
    assert list((folder / "cache" / "scratch").iterdir()) == []

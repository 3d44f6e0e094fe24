"""Signals and neighbours: whatever happens, the output file is the previous one or the new one, whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import onnx
import pytest
from runs import Run, command, environment, scratch_files, spawn

from ccompile import cli

OLD = b"the previous output"
ARGUMENTS = ("digits.onnx", "-s", "tidy.yaml", "-o", "out.onnx", "--threads", 1)

# A compile that tells when it has come to `place` and waits there: `place` is called once and then sleeps.
STALLED = """
    import sys, time
    from pathlib import Path
    from ccompile import cli, disk, files, running

    def stall(*arguments, **options):
        Path("reached").touch()
        time.sleep(60)

    {place} = stall
    cli.main(sys.argv[1:])
"""


def started(folder: Path, place: str, stalled: str = STALLED) -> subprocess.Popen[str]:
    """Start a compile over a previous output, wait until it has come to `place`, and return it."""
    (folder / "out.onnx").write_bytes(OLD)
    (folder / "reached").unlink(missing_ok=True)
    program = textwrap.dedent(stalled).format(place=place)
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, ARGUMENTS)],
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "reached").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    err = process.communicate(timeout=60)[1]
    return process.returncode, err


@pytest.mark.parametrize("place", ["running.Run._act", "files._write_inline", "disk.os.fsync", "disk.write_text"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_compile_leaves_the_previous_output(
    digits: Path, place: str, sent: signal.Signals, code: int
) -> None:
    process = started(digits, place)
    process.send_signal(sent)
    found, err = ended(process)
    assert (found, "Traceback" in err) == (code, False), err
    assert (digits / "out.onnx").read_bytes() == OLD
    assert scratch_files(digits) == []
    assert not (digits / "out.onnx.evidence.json").exists()


def test_interrupt_at_any_moment_ends_with_its_code(digits: Path) -> None:
    for delay in (0.6, 1.0, 1.4):
        (digits / "out.onnx").write_bytes(OLD)
        process = subprocess.Popen(
            command(*ARGUMENTS),
            cwd=digits,
            env=environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        code, err = ended(process)
        assert code in (0, 130, -signal.SIGINT), (delay, err)
        if (digits / "out.onnx").read_bytes() != OLD:  # the signal came after the new file had its name
            onnx.checker.check_model(onnx.load(digits / "out.onnx"))
        assert scratch_files(digits) == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_a_library_makes_an_error_of_its_own_of_is_one(
    monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, code: int
) -> None:
    def library(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        except (KeyboardInterrupt, SystemExit):
            raise RuntimeError("while a schema was built") from None

    monkeypatch.setattr(cli.cli, "main", library)
    for _ in range(2):  # the second time as well: the handlers of before are back
        with pytest.raises(SystemExit) as found:
            cli.main([])
        assert found.value.code == code


def test_main_leaves_the_handlers_of_signals_as_it_found_them(run: Run) -> None:
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    assert run("--version").code == 0
    assert [signal.getsignal(number) for number in signals] == before


def test_the_command_line_runs_in_a_thread_too() -> None:
    codes: list[object] = []

    def version() -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["--version"])
        codes.append(ended.value.code)

    thread = threading.Thread(target=version)
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("place", ["files._write_inline", "disk.os.fsync", "disk.write_text"])
def test_killed_compile_leaves_the_previous_output_and_the_next_one_cleans_up(digits: Path, place: str) -> None:
    process = started(digits, place)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    assert (digits / "out.onnx").read_bytes() == OLD
    assert len(scratch_files(digits)) == 1
    assert spawn(*ARGUMENTS, cwd=digits).code == 0
    assert scratch_files(digits) == []
    onnx.checker.check_model(onnx.load(digits / "out.onnx"))


def test_scratch_files_of_the_living_and_of_other_machines_stay(digits: Path) -> None:
    from ccompile import disk

    mine = disk.scratch_of(digits / "out.onnx")
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive, gone, elsewhere = (
        mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{pid}.")) for pid in (os.getpid(), dead.pid, 1)
    )
    elsewhere = gone.with_name(gone.name.replace(disk._machine(), "another"))
    for path in (alive, gone, elsewhere):
        path.touch()
    disk.remove_stale(digits / "out.onnx")
    assert [path.exists() for path in (alive, gone, elsewhere)] == [True, False, True]


def test_names_that_look_like_patterns_are_cleaned_up_too(digits: Path) -> None:
    out = digits / "out[1]**.onnx"
    process = subprocess.Popen(["true"])
    process.wait()
    from ccompile import disk

    left = disk.scratch_of(out)
    left = left.with_name(left.name.replace(f"-{os.getpid()}.", f"-{process.pid}."))
    left.touch()
    disk.remove_stale(out)
    assert not left.exists()


def test_two_compiles_to_one_output_both_succeed(digits: Path) -> None:
    both = [
        subprocess.Popen(
            command(*ARGUMENTS),
            cwd=digits,
            env=environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        code, err = ended(process)
        assert code == 0, err
    onnx.checker.check_model(onnx.load(digits / "out.onnx"))
    assert scratch_files(digits) == []


# What no signal ends: a lock of the system's that is never opened, as a long factorisation would be. The word that it
# is there comes from a thread that runs only when the main one, gone into the lock, lets go of the interpreter.
DEAF = """
    import ctypes, sys, threading
    from pathlib import Path
    from ccompile import cli, running

    def stall(*arguments, **options):
        lock, mutex, ready = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(256), threading.Event()
        threading.Thread(target=lambda: ready.wait() and Path("reached").touch(), daemon=True).start()
        lock(mutex)
        sys.setswitchinterval(1000)
        ready.set()
        lock(mutex)

    {place} = stall
    cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_within_a_second_what_python_cannot_interrupt(
    digits: Path, sent: signal.Signals, code: int
) -> None:
    process = started(digits, "running.Run._act", DEAF)
    start = time.monotonic()
    process.send_signal(sent)
    found, err = ended(process)
    assert time.monotonic() - start < 20  # one on a machine that has nothing else to do
    assert (found, err) == (code, "interrupted: the output is the previous one, or whole\n")
    assert (digits / "out.onnx").read_bytes() == OLD
    assert scratch_files(digits) == []

"""What several test files share: the digits example in a folder of its own, and the command line in this process."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy: workers share the cores
    os.environ.setdefault(_name, "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start background jobs, and the tests' compiles
    signal.signal(signal.SIGINT, signal.default_int_handler)

from runs import ROOT, TIDY, Ended, Run  # noqa: E402

from ccompile import cli  # noqa: E402


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one test, in this process and in those that it starts: nothing is found that it did not make."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CCOMPILE_CACHE", str(folder))
    return folder


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A copy of examples/01_digits, and `tidy.yaml`, which is quick."""
    shutil.copytree(ROOT / "examples" / "01_digits", tmp_path / "digits")
    (tmp_path / "digits" / "tidy.yaml").write_text(TIDY)
    return tmp_path / "digits"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run_here(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run_here

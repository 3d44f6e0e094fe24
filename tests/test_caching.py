"""Compiles with a cache: the same bytes, no work that was done before, and nothing of another compile's."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import numpy as np
import pytest
import yaml
from runs import Ended, Run

from ccompile import caching, onnx_io, provenance, spec
from ccompile.acting import act
from ccompile.caching import Cache
from ccompile.pipeline import compile_model
from ccompile.request import Request
from ccompile.store import Store

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.evidence import Evidence

TIDY, FOLD = "tidy-graph", "fold-batchnorm"
SVD: dict[str, Any] = {"split-svd": {"keep": {"macs": 0.8}, "tolerance": {"relative_l2": 2}}}
SHARP: dict[str, Any] = {"split-svd": {"rank": 1, "only": ["fc1"], "tolerance": {"relative_l2": 1e-6}}}
STEPS: list[Any] = [TIDY, SVD, {"cluster-weights": {"bits": 3, "tolerance": {"relative_l2": 2}}}]


@dataclass
class Workshop:
    """A folder with a model, data and a spec, a cache, and how often each pass was run."""

    folder: Path
    ran: Counter[str]

    def write(self, passes: list[Any], model: ir.Model | None = None, seed: int = 0, **more: Any) -> None:
        if model is not None:
            onnx_io.save(model, self.folder / "model.onnx")
        rng = np.random.default_rng(seed)
        for name in ("calibration", "verification"):
            np.savez(self.folder / f"{name}.npz", x=rng.standard_normal((64, 12)).astype(np.float32))
        data = {name: {"npz": f"{name}.npz"} for name in ("calibration", "verification")}
        text = yaml.safe_dump({"version": 1, "passes": passes, "data": data, **more})
        (self.folder / "spec.yaml").write_text(text)

    def request(self, **options: Any) -> Request:
        made = Request(self.folder / "model.onnx", spec.load(self.folder / "spec.yaml"), self.folder / "out.onnx")
        return replace(made, **{"threads": 1, **options})

    def compile(self, cached: bool = True, **options: Any) -> tuple[Evidence, bytes, list[str]]:
        """Return the evidence, the bytes of the result (none: b""), and the passes that were run."""
        self.ran.clear()
        (self.folder / "out.onnx").unlink(missing_ok=True)
        cache = Cache(Store(self.folder / "cache")) if cached else None
        evidence = compile_model(self.request(**options), cache=cache)
        written = Path(self.folder / "out.onnx.evidence.json").read_text()
        assert written == evidence.text()
        output = self.folder / "out.onnx"
        return evidence, output.read_bytes() if output.exists() else b"", sorted(self.ran.elements())

    def objects(self) -> list[Path]:
        return sorted(self.folder.glob("cache/objects/??/*"))

    def records(self) -> list[Path]:
        return sorted(self.folder.glob("cache/records/??/*"))


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    ran: Counter[str] = Counter()

    def counted(step: Any, view: Any, *more: Any) -> Any:
        ran[step.pass_name()] += 1
        return act(step, view, *more)

    monkeypatch.setattr("ccompile.running.act", counted)
    made = Workshop(tmp_path, ran)
    made.write(STEPS, builders.mlp(0))
    return made


def timeless(evidence: Evidence) -> str:
    return evidence.model_copy(update={"timing": {}}).text()


# ---------------------------------------------------------------------------------------------- hits


def test_an_unchanged_compile_does_no_work_and_writes_the_same_bytes(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, uncached, _ = shop.compile(cached=False)
    cold, first, ran = shop.compile()
    assert ran == ["cluster-weights", "split-svd", "tidy-graph"]
    monkeypatch.setattr("ccompile.runtime.Session", None)  # not one inference
    warm, second, ran = shop.compile()
    assert ran == []
    assert first == second == uncached
    assert warm.text() == cold.text()
    assert timeless(cold) == timeless(plain)


@pytest.mark.parametrize(("changed", "run"), [(0, 3), (1, 2), (2, 1)])
def test_a_change_in_step_k_runs_from_k(shop: Workshop, changed: int, run: int) -> None:
    shop.compile()
    options: list[Any] = [
        {TIDY: {"compact": True}},
        {"split-svd": {"keep": {"macs": 0.7}, "tolerance": {"relative_l2": 2}}},
        {"cluster-weights": {"bits": 2, "tolerance": {"relative_l2": 2}}},
    ]
    shop.write([*STEPS[:changed], options[changed], *STEPS[changed + 1 :]])
    warm, output, ran = shop.compile()
    least = 1 if changed == 0 else run  # where the graphs agree again, nothing more is run
    assert least <= len(ran) <= run
    cold, alone, _ = shop.compile(cached=False)
    assert (output, timeless(warm)) == (alone, timeless(cold))


def test_a_step_that_changes_nothing_more_leaves_the_later_ones_known(shop: Workshop) -> None:
    shop.compile()
    shop.write([{TIDY: {"skip": ["fc1"]}}, *STEPS[1:]])  # there is nothing to tidy
    assert shop.compile()[2] == ["tidy-graph"]


def test_a_changed_gate_runs_no_step(shop: Workshop) -> None:
    shop.compile()
    shop.write(STEPS, gates={"macs": 0.9})
    warm, output, ran = shop.compile()
    cold, alone, _ = shop.compile(cached=False)
    assert (ran, output, timeless(warm)) == ([], alone, timeless(cold))


def test_a_reverted_step_is_known(shop: Workshop) -> None:
    reverted = {"split-svd": {**SHARP["split-svd"], "on_violation": "revert"}}
    shop.write([reverted, STEPS[2]])
    cold, output, _ = shop.compile()
    assert [step.verdict for step in cold.steps] == ["reverted", "kept"]
    shop.write([reverted, STEPS[2]], gates={"macs": 1})
    assert shop.compile()[1:] != (b"", ["split-svd"])
    assert shop.compile()[2] == []
    assert len(output) > 0


@pytest.mark.parametrize("more", [{}, {"gates": {"macs": 0.1}}])
def test_a_compile_that_failed_fails_again_without_work(shop: Workshop, more: dict[str, Any]) -> None:
    shop.write(STEPS if more else [TIDY, SHARP], **more)
    cold, output, _ = shop.compile()
    warm, again, ran = shop.compile()
    assert (cold.verdict, output, again, ran) == ("failed", b"", b"", [])
    assert warm.text() == cold.text()


def test_evidence_tells_the_names_of_this_compile(shop: Workshop) -> None:
    shop.compile()
    shutil.copy(shop.folder / "model.onnx", shop.folder / "other.onnx")
    text = (shop.folder / "spec.yaml").read_text() + "# a comment\n"
    (shop.folder / "spec.yaml").write_text(text)
    evidence, _, ran = shop.compile(model=shop.folder / "other.onnx")
    assert (evidence.source.name, evidence.spec.bytes, ran) == ("other.onnx", len(text), [])


def test_dumps_are_written_from_the_cache(shop: Workshop) -> None:
    shop.compile(dump=shop.folder / "cold")
    ran = shop.compile(dump=shop.folder / "warm")[2]
    cold, warm = ({path.name: path.read_bytes() for path in (shop.folder / n).iterdir()} for n in ("cold", "warm"))
    assert (ran, len(cold), cold) == ([], 3, warm)


def test_the_dump_of_a_step_that_was_reverted_is_made_again(shop: Workshop) -> None:
    shop.write([{"split-svd": {**SHARP["split-svd"], "on_violation": "revert"}}])
    shop.compile()
    assert shop.compile(dump=shop.folder / "dump")[2] == ["split-svd"]
    assert (shop.folder / "dump" / "01-split-svd.onnx").exists()


def test_a_race_is_run_again_but_no_step(shop: Workshop) -> None:
    shop.compile(measure=True)
    evidence, _, ran = shop.compile(measure=True)
    assert (ran, "measured" in evidence.timing) == ([], True)


# ---------------------------------------------------------------------------------------------- misses


def test_another_model_data_seed_or_thread_count_shares_nothing(shop: Workshop) -> None:
    shop.compile()
    everything = sorted(["cluster-weights", "split-svd", "tidy-graph"])
    assert shop.compile(seed=1)[2] == everything
    assert shop.compile(threads=2)[2] == everything
    shop.write(STEPS, seed=1)
    assert shop.compile()[2] == everything
    shop.write(STEPS, builders.mlp(2))
    assert shop.compile()[2] == everything
    shop.write(STEPS, target="arm-cortex-a76")
    assert shop.compile()[2] == everything


@pytest.mark.parametrize("what", ["tool_digest", "versions", "_processor"])
def test_another_tool_library_or_processor_shares_nothing(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    shop.compile()
    monkeypatch.setattr(provenance, what, lambda: "another")
    assert len(shop.compile()[2]) == 3


def test_a_metric_of_ones_own_is_part_of_the_key(shop: Workshop) -> None:
    (shop.folder / "mine.py").write_text("def score(outputs, labels): return 1.0\n")
    shop.write([TIDY])
    with np.load(shop.folder / "verification.npz") as held:
        np.savez(shop.folder / "verification.npz", x=held["x"], label=np.zeros(64, np.int64))
    text = yaml.safe_load((shop.folder / "spec.yaml").read_text())
    text["data"]["verification"]["labels"] = "label"
    text["gates"] = {"metric": {"mine:score": {"drop": 0.1}}}
    (shop.folder / "spec.yaml").write_text(yaml.safe_dump(text))
    assert shop.compile()[0].source_metrics == {"mine:score": 1.0}
    assert shop.compile()[2] == []
    (shop.folder / "mine.py").write_text("def score(outputs, labels): return 2.0\n")
    evidence, _, ran = shop.compile()
    assert (evidence.source_metrics, ran) == ({"mine:score": 2.0}, [TIDY])


def test_without_a_store_nothing_is_kept(shop: Workshop) -> None:
    shop.compile(cached=False)
    shop.compile(cached=False)
    assert shop.records() == shop.objects() == []


# ---------------------------------------------------------------------------------------------- damage


def test_damaged_entries_are_dropped_with_a_note_and_made_again(shop: Workshop) -> None:
    _, cold, _ = shop.compile()
    for path in shop.objects():
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    for path in shop.records()[::2]:
        path.write_bytes(b"{}")
    cache = Cache(Store(shop.folder / "cache"))
    compile_model(shop.request(), cache=cache)
    assert (shop.folder / "out.onnx").read_bytes() == cold
    assert cache.notes
    assert all("dropped a damaged entry" in note for note in cache.notes)
    assert shop.compile()[2] == []


@pytest.mark.parametrize("more", [{}, {"gates": {"macs": 0.95}}])
def test_contents_that_vanish_are_made_again(shop: Workshop, more: dict[str, Any]) -> None:
    """With another gate the steps are found, and their last graph is wanted; without, the whole compile is."""
    shop.compile()
    shop.write(STEPS, **more)
    for path in shop.objects():
        path.unlink()
    _, output, ran = shop.compile()
    assert len(ran) == 3
    assert output == shop.compile(cached=False)[1]


def test_a_graph_that_is_lost_after_its_steps_were_found_is_made_again(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.compile()
    shop.write(STEPS, gates={"macs": 0.95})
    real = caching._get
    monkeypatch.setattr(caching, "_get", lambda store, ref: None)
    monkeypatch.setattr(caching, "_put", lambda store, model: None)
    assert len(shop.compile()[2]) == 3
    monkeypatch.setattr(caching, "_get", real)
    assert shop.compile()[2] == []


def test_a_record_of_another_schema_is_a_miss(shop: Workshop) -> None:
    shop.compile()
    store = Store(shop.folder / "cache")
    for path in shop.records():
        store.write(path.parent.name + path.name, {"record": {}, "evidence": {}, "model": None})
    assert len(shop.compile()[2]) == 3


def test_a_graph_that_does_not_read_back_is_not_kept(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = shop.compile(cached=False)[1]
    other = builders.mlp(5)
    monkeypatch.setattr(caching, "_get", lambda store, ref: other)
    assert shop.compile()[1] == plain
    assert shop.records() == []


# ---------------------------------------------------------------------------------------------- the command line


def compile_digits(run: Run, folder: Path, *extra: object) -> Ended:
    return run(folder / "digits.onnx", "-s", folder / "tidy.yaml", "-o", folder / "out.onnx", "--threads", 1, *extra)


def test_the_users_cache_is_used_unless_told(digits: Path, run: Run, cache_folder: Path) -> None:
    first = compile_digits(run, digits)
    assert (first.code, "cache:" in first.out) == (0, False)
    before = (digits / "out.onnx").read_bytes(), (digits / "out.onnx.evidence.json").read_text()
    assert "cache: nothing has changed, nothing was run" in compile_digits(run, digits).out
    assert before == ((digits / "out.onnx").read_bytes(), (digits / "out.onnx.evidence.json").read_text())
    assert "cache:" not in compile_digits(run, digits, "--no-cache").out
    assert "cache:" not in compile_digits(run, digits, "--cache", digits / "other").out
    assert (digits / "other" / "records").exists()
    assert json.loads(run("cache", "info", "--json").out)["folder"] == str(cache_folder)


def test_what_is_known_of_steps_is_told(digits: Path, run: Run) -> None:
    compile_digits(run, digits)
    assert "cache: 1 of 1 steps were known" in compile_digits(run, digits, "--measure").out


def test_cache_and_no_cache_exclude_each_other(digits: Path, run: Run) -> None:
    ended = compile_digits(run, digits, "--no-cache", "--cache", digits / "other")
    assert (ended.code, "exclude each other" in ended.err) == (2, True)


def test_a_damaged_entry_is_told_on_the_standard_error(digits: Path, run: Run, cache_folder: Path) -> None:
    compile_digits(run, digits)
    for path in cache_folder.glob("records/??/*"):
        path.write_bytes(b"{}")
    assert "cache: dropped a damaged entry" in compile_digits(run, digits).err
    for path in cache_folder.glob("records/??/*"):
        path.write_bytes(b"{}")
    assert compile_digits(run, digits, "-q") == Ended(0, "", "")


def test_cache_clear_removes_what_info_shows(digits: Path, run: Run) -> None:
    compile_digits(run, digits)
    assert json.loads(run("cache", "info", "--json").out)["records"] == 2
    assert "removed" in run("cache", "clear").out
    assert json.loads(run("cache", "info", "--json").out)["nbytes"] == 0
    assert "0 B of at most 4 GB, 0 results, 0 contents" in run("cache", "info").out


@pytest.mark.parametrize("limit", ["many", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("CCOMPILE_CACHE_GB", limit)
    ended = run("cache", "info")
    assert (ended.code, "is no number of gigabytes" in ended.err) == (2, True)


def test_the_limit_is_kept(digits: Path, run: Run, cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCOMPILE_CACHE_GB", "0")
    compile_digits(run, digits)
    assert [path for path in cache_folder.rglob("*") if path.is_file()] == []

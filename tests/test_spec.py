"""Specs: every mistake has its place and a remedy, all at once; what is accepted means what it says."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ccompile import registry, spec
from ccompile.core import Pass
from ccompile.errors import CcompileError, SpecError
from ccompile.passes.fold_batchnorm import FoldBatchnorm
from ccompile.passes.split_svd import SplitSvd
from ccompile.passes.tidy_graph import TidyGraph
from ccompile.selectors import Selector
from ccompile.tolerance import Tolerance

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "01_digits" / "spec.yaml"
HEAD = "version: 1\npasses: [tidy-graph]\n"
SVD = "version: 1\npasses:\n  - split-svd: {%s, tolerance: {atol: 1}}\n"


def errors(text: str, *sets: str) -> list[str]:
    """Return each problem's first line and its hint, in order."""
    with pytest.raises(SpecError) as caught:
        spec.parse(text, "s", sets=sets)
    return [str(problem) for problem in caught.value.problems]


def only_error(text: str, *sets: str) -> str:
    found = errors(text, *sets)
    assert len(found) == 1, found
    return found[0]


def first_pass(text: str, *sets: str) -> Pass:
    return spec.parse(text, sets=sets).passes[0]


# ---------------------------------------------------------------------------------------------- places and names


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_lines() -> None:
    found = errors(
        "version: 1\n"
        "targt: generic-cpu\n"
        "data: {verification: {npzz: a.npz, synthetic: {}}}\n"
        "passes:\n"
        "  - tidy-grph\n"
        "  - split-svd: {enrgy: 0.9, tolerance: {atoll: 1}}\n"
        "gates: {stored_byte: 0.5}\n"
    )
    places = [text.partition(" ")[0] for text in found]
    assert places == ["s:2:1:", "s:3:23:", "s:5:5:", "s:6:17:", "s:6:41:", "s:7:9:"]


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        (HEAD + "gate: {argmax: 1}\n", "s:3:1", "gates"),
        (HEAD + "data:\n  verification:\n    npzz: a\n    synthetic: {}\n", "s:5:5", "npz"),
        (HEAD + "gates:\n  stored_byte: 1\n", "s:4:3", "stored_bytes"),
        (HEAD + "gates: {metric: {top1: {dropp: 1, min: 0}}}\n", "s:3:25", "drop"),
        ("version: 1\npasses: [tidy_grap]\n", "s:2:10", "tidy-graph"),
        ("version: 1\npasses:\n- split-svdd: {rank: 1}\n", "s:3:3", "split-svd"),
        ("version: 1\npasses:\n- tidy-graph: {GROWTH: 1}\n", "s:3:16", "growth"),
        ("version: 1\npasses:\n- tidy-graph:\n    tolerance: {atoll: 1, rtol: 1}\n", "s:4:17", "atol"),
        ("version: 1\npasses:\n- tidy-graph: {skip: [{wher: x}]}\n", "s:3:24", "where"),
        (HEAD + "target: genric-cpu\n", "s:3:9", "generic-cpu"),
    ],
)
def test_unknown_name_is_marked_and_the_nearest_one_named(text: str, place: str, name: str) -> None:
    found = [text for text in errors(text) if "Did you mean" in text]
    assert len(found) == 1
    assert found[0].startswith(place + ": ")
    assert f"Did you mean `{name}`?" in found[0]


def test_the_line_is_shown_with_the_key_underlined() -> None:
    shown = only_error(HEAD + "gates: {stored_byte: 1}\n").splitlines()[1:3]
    assert shown == ["      gates: {stored_byte: 1}", "              ^^^^^^^^^^^"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_places_are_right_with_any_line_end_and_behind_a_byte_order_mark(tmp_path: Path, newline: str) -> None:
    path = tmp_path / "s.yaml"
    text = newline.join(["version: 1", "passes: [tidy-graph]", "gatez: {}", ""])
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    with pytest.raises(SpecError, match=re.escape(f"{path}:3:1: ")):
        spec.load(path)


def test_windows_line_ends_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode())
    assert spec.load(path).passes == (TidyGraph(),)


def test_letters_of_any_script_keep_their_places() -> None:
    assert only_error("version: 1\npasses: [{tidy-graph: {only: ['/größe/層'], grwth: 1}}]\n").startswith("s:2:44: ")


def test_names_of_any_script_are_accepted() -> None:
    step = first_pass("version: 1\npasses: [{tidy-graph: {only: ['/größe/層*']}}]\n")
    assert step.only == (Selector(name="/größe/層*"),)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("option", "place", "limits", "meaning"),
    [
        ("energy: 3", "s:3:25", "> 0 and <= 1", "share of the output's power kept"),
        ("energy: 0", "s:3:25", "> 0 and <= 1", "share of the output's power kept"),
        ("rank: 0", "s:3:23", ">= 1", "rank kept at every site"),
        ("error: 1", "s:3:24", ">= 0 and < 1", "share of a layer's output power"),
        ("energy: .nan", "s:3:25", "finite", "share of the output's power kept"),
        ("error: -.inf", "s:3:24", "finite", "share of a layer's output power"),
        ("energy: x", "s:3:25", "valid number", "share of the output's power kept"),
        ("rank: 1.5", "s:3:23", "valid integer", "rank kept at every site"),
        ("rank: yes", "s:3:23", "unless they are quoted", "rank kept at every site"),
        ("rank: [1]", "s:3:23", "got a list", "rank kept at every site"),
        (f"rank: {'9' * 400}", "s:3:23", "<= 1000000", "rank kept at every site"),
    ],
)
def test_bad_value_is_told_with_its_limits_and_its_meaning(option: str, place: str, limits: str, meaning: str) -> None:
    found = only_error(SVD % option)
    assert found.startswith(f"{place}: passes[0].split-svd.{option.partition(':')[0]}: ")
    assert limits in found
    assert meaning in found
    assert len(found) < 1500


@pytest.mark.parametrize(
    ("option", "step"),
    [
        ("energy: 1", SplitSvd(energy=1, tolerance=Tolerance(atol=1))),
        ("energy: 1e-3", SplitSvd(energy=0.001, tolerance=Tolerance(atol=1))),  # text in YAML 1.1
        ("rank: 1", SplitSvd(rank=1, tolerance=Tolerance(atol=1))),
        ("error: 0", SplitSvd(error=0, tolerance=Tolerance(atol=1))),
    ],
)
def test_value_at_its_limit_is_accepted(option: str, step: Pass) -> None:
    assert first_pass(SVD % option) == step


@pytest.mark.parametrize("limit", [".inf", ".nan", "1e999", "-1", "true"])
def test_tolerance_that_is_no_limit_is_refused(limit: str) -> None:
    found = only_error(f"version: 1\npasses: [{{tidy-graph: {{tolerance: {{atol: {limit}}}}}}}]\n")
    assert found.startswith("s:2:42: passes[0].tidy-graph.tolerance.atol: ")


def test_empty_tolerance_is_refused() -> None:
    assert "promises nothing" in only_error("version: 1\npasses: [{tidy-graph: {tolerance: {}}}]\n")


@pytest.mark.parametrize("value", ["[1, 2]", "3", "x"])
def test_options_that_are_no_mapping_are_refused(value: str) -> None:
    assert only_error(f"version: 1\npasses:\n- tidy-graph: {value}\n").startswith("s:3:15: passes[0].tidy-graph: ")


def test_options_may_be_left_out() -> None:
    assert first_pass("version: 1\npasses:\n- tidy-graph:\n") == TidyGraph()


@pytest.mark.parametrize("value", ["tidy-graph", "5", "{tidy-graph: {}}", "", "[]"])
def test_passes_that_are_no_list_of_steps_are_refused(value: str) -> None:
    assert only_error(f"version: 1\npasses: {value}\n").startswith("s:2:")


@pytest.mark.parametrize("step", ["5", "{tidy-graph: {}, split-svd: {}}", "{}", "[tidy-graph]", "null"])
def test_step_that_is_not_one_name_is_refused(step: str) -> None:
    assert "a step is a pass's name" in only_error(f"version: 1\npasses:\n- {step}\n")


@pytest.mark.parametrize("version", ["2", "'1'", "true", "[1]", "one"])
def test_other_version_is_refused(version: str) -> None:
    assert only_error(f"version: {version}\npasses: [tidy-graph]\n").startswith("s:1:10: version: ")


def test_missing_version_is_refused() -> None:
    assert "`version` is missing" in only_error("passes: [tidy-graph]\n")


def test_gates_with_everything_commented_out_are_no_gates() -> None:
    assert spec.parse(HEAD + "gates:\n  # argmax: 1\n").gates == spec.Gates()


def test_contradictory_options_are_refused() -> None:
    found = only_error(SVD % "rank: 2, energy: 0.5")
    assert found.startswith("s:3:16: passes[0].split-svd: give exactly one of `keep`, `error`, `rank` and `energy`")


def test_missing_key_of_an_inline_target_is_named() -> None:
    found = errors(HEAD + "target: {name: mine, opst: {min: 1, max: 2}}\n")
    assert any(text.startswith("s:3:22: target.opst: ") and "Did you mean `opset`?" in text for text in found)
    assert any("`rates` is missing" in text for text in found)


# ---------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the spec is empty"),
        ("# nothing\n", "the spec is empty"),
        ("hello\n", "a spec is a mapping, not `hello`"),
        ("- tidy-graph\n", "a spec is a mapping, not a list"),
        ("version: 1\npasses:\n\t- tidy-graph\n", "with spaces, not with tabs"),
        (HEAD + "---\n" + HEAD, "remove the second `---`"),
        (HEAD + "  gates: {}\n", "Is this line indented as far"),
        (HEAD + "gates: {argmax: 1\n", "Is a bracket, brace or comma missing"),
        (HEAD + "gates: *all\n", "s:3:8: not YAML: found undefined alias"),
        (HEAD + "gates: {\x07}\n", "s:3:9: the character U+0007"),
        (HEAD + '"\\ud800": 1\ntarget: "\\0"\n', "U+0000 is no character"),
        (HEAD + "? [a]\n: 1\n", "s:3:3: a key is a word"),
    ],
)
def test_text_that_is_no_spec_is_refused_with_a_remedy(text: str, said: str) -> None:
    assert said in "\n".join(errors(text))


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\npasses:\n  - a\n - b\n",
        "version: 1\n- a\n",
        "version: 1\npasses: [a]\n  gates: {}\n",
        "passes:\n  - a\n  gates: {}\n",
        "gates:\n  atol: 1\n rtol: 2\n",
        "  version: 1\npasses: [a]\n",
    ],
)
def test_line_that_does_not_fit_the_indentation_is_called_so(text: str) -> None:
    found = only_error(text)
    assert f"s:{len(text.splitlines())}:" in found
    assert "not YAML: this line does not fit the indentation above it" in found
    assert "Is this line indented as far" in found


@pytest.mark.parametrize(
    ("line", "place", "said"),
    [
        ('target: "x" y', "s:3:13", "the value ends before this"),
        ("passes: [a]]", "s:3:12", "this `]` belongs to no bracket or brace"),
        ("gates: {}, {}", "s:3:10", "this `,` belongs to no bracket or brace"),
    ],
)
def test_what_follows_a_whole_value_is_refused(line: str, place: str, said: str) -> None:
    assert only_error(HEAD + line + "\n").startswith(f"{place}: not YAML: {said}")


def test_duplicate_key_is_refused_and_the_first_line_named() -> None:
    found = only_error(HEAD + "gates: {argmax: 1}\ngates: {argmax: 0}\n")
    assert found.startswith("s:4:1: gates: given twice, first in line 3")


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.system [ls]", "!!python/name:os.system x", "!mine {a: 1}", "!!set {a}", "!!binary eA=="],
)
def test_tags_are_refused(value: str) -> None:
    with pytest.raises(SpecError):
        spec.parse(HEAD + f"target: {value}\n")


def test_nothing_that_a_tag_names_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = HEAD + f'target: !!python/object/apply:os.mkdir ["{made}"]\n'
    assert "the tag `python/object/apply:os.mkdir` is not allowed" in only_error(text)
    assert not made.exists()


def _laughs() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_laughs(), "after expanding aliases"),
        (HEAD + "data: &x [*x]\n", "deep"),
        (HEAD + "data: " + "[" * 50 + "]" * 50, "nested more than 32 deep"),
        (HEAD + "data: " + "[" * 100_000, "nested too deeply"),
        (HEAD + "#" * (2 << 20), "larger than 1024 KiB"),
        (SVD % f"rank: {'9' * 5000}", "cannot be read"),
    ],
    ids=["laughs", "self", "deep", "very deep", "large", "digits"],
)
def test_text_made_to_exhaust_the_reader_is_refused_quickly(text: str, said: str) -> None:
    start = time.perf_counter()
    assert said in only_error(text)
    assert time.perf_counter() - start < 10


def test_alias_is_accepted() -> None:
    steps = spec.parse("version: 1\npasses:\n- tidy-graph: &o {only: ['/a*']}\n- fold-batchnorm: *o\n", "s").passes
    assert [step.only for step in steps] == [(Selector(name="/a*"),)] * 2


def test_endless_file_is_refused() -> None:
    with pytest.raises(SpecError):
        spec.load("/dev/zero")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_spec_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="cannot read the spec"):
        spec.load(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"version: \xff\n")
    with pytest.raises(SpecError, match="not UTF-8"):
        spec.load(tmp_path / "s.yaml")


# ---------------------------------------------------------------------------------------------- promises and order


def test_lossy_step_without_a_promise_is_refused() -> None:
    found = only_error("version: 1\npasses:\n- split-svd: {rank: 1}\n")
    assert found.startswith("s:3:3: passes[0]: `split-svd` changes outputs")
    assert "tolerance: {relative_l2: 0.05}" in found


@pytest.mark.parametrize("gates", ["{argmax: 0.9}", "{atol: 0}", "{relative_l2: 1e-3}"])
def test_gate_on_outputs_is_promise_enough(gates: str) -> None:
    assert first_pass(f"version: 1\npasses:\n- split-svd: {{rank: 1}}\ngates: {gates}\n") == SplitSvd(rank=1)


@pytest.mark.parametrize("gates", ["{stored_bytes: 0.5}", "{metric: {}}", "{argmax: null}"])
def test_gate_on_cost_is_no_promise(gates: str) -> None:
    assert "changes outputs" in only_error(f"version: 1\npasses:\n- split-svd: {{rank: 1}}\ngates: {gates}\n")


def test_metric_without_labels_is_refused() -> None:
    found = only_error(HEAD + "data: {verification: {npz: a.npz}}\ngates: {metric: {top1: {drop: 0.1}}}\n")
    assert found.startswith("s:4:9: gates.metric: a metric needs labels")


def test_metric_with_labels_is_accepted() -> None:
    text = HEAD + "data: {verification: {npz: a.npz, labels: y}}\ngates: {metric: {top1: {drop: 0.1}}}\n"
    assert spec.parse(text).gates.metric == {"top1": spec.MetricGate(drop=0.1)}


def test_metric_gate_without_a_limit_is_refused() -> None:
    text = HEAD + "data: {verification: {npz: a.npz, labels: y}}\ngates: {metric: {top1: {}}}\n"
    assert "give `drop`, `min` or both" in only_error(text)


def test_wrong_order_is_refused() -> None:
    steps = "- split-svd: {rank: 1}\n- tidy-graph\n- fold-batchnorm\n"
    found = only_error(f"version: 1\npasses:\n{steps}gates: {{argmax: 1}}\n")
    assert found.startswith("s:3:3: passes[0]: `split-svd` must come after `fold-batchnorm`")
    assert found.endswith("Move `fold-batchnorm` (step 3) before it.")


def test_pass_may_come_twice_when_one_is_in_order() -> None:
    text = "version: 1\npasses: [fold-batchnorm, split-svd: {rank: 1}, fold-batchnorm]\ngates: {argmax: 1}\n"
    assert [step.pass_name() for step in spec.parse(text).passes] == ["fold-batchnorm", "split-svd", "fold-batchnorm"]


# ---------------------------------------------------------------------------------------------- --set

TWO = "version: 1\npasses:\n- tidy-graph\n- split-svd: {energy: 0.5, tolerance: {atol: 1}}\n"


@pytest.mark.parametrize(
    ("key", "option", "value"),
    [
        ("passes.split-svd.energy=0.9", "energy", 0.9),
        ("passes.1.split-svd.energy=0.9", "energy", 0.9),
        ("passes[1].split-svd.energy=1e-3", "energy", 0.001),
        ("passes.split-svd.on_violation=revert", "on_violation", "revert"),
        ("passes.split-svd.tolerance.argmax=0.5", "tolerance", Tolerance(atol=1, argmax=0.5)),
        ("passes.split-svd.only=['/a']", "only", (Selector(name="/a"),)),
    ],
)
def test_set_changes_a_value(key: str, option: str, value: object) -> None:
    assert getattr(spec.parse(TWO, sets=[key]).passes[1], option) == value


def test_set_gives_an_option_to_a_bare_step() -> None:
    assert first_pass(TWO, "passes.tidy-graph.growth=7") == TidyGraph(growth=7)


def test_set_makes_what_is_missing_on_the_way() -> None:
    data = spec.parse(TWO, sets=["data.verification.synthetic={}", "data.verification.samples=4"]).data
    assert data is not None
    assert data.verification is not None
    assert data.verification.samples == 4


def test_set_replaces_a_step() -> None:
    assert first_pass(TWO, "passes.0=fold-batchnorm") == FoldBatchnorm()


def test_the_last_set_wins() -> None:
    assert first_pass(TWO, "passes.tidy-graph.growth=7", "passes.tidy-graph.growth=8") == TidyGraph(growth=8)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("passes.split-svd.energy=3", "less than or equal to 1, got `3`"),
        ("passes.split-svd.enrgy=1", "Did you mean `energy`?"),
        ("passes.tidy-graph.growth=yes", "should not be `true`"),
        ("passes.tidy-graph=5", "the options of `tidy-graph` are a mapping"),
        ("passes.1.energy=1", "Write passes.1.split-svd.energy=..."),
        ("passes.0.growth=1", "inside the plain value `tidy-graph`"),
        ("passes.9=tidy-graph", "The list has 2 items"),
        ("passes.nope.a=1", "`nope` is not in the list"),
        ("version.a=1", "inside the plain value `1`"),
        ("data.verification.samples=4", "give exactly one of"),
        ("gate.argmax=1", "Did you mean `gates`?"),
        ("gates.argmax=[1", "not YAML"),
        ("gates.argmax=!!python/name:os.system x", "is not allowed"),
        ("gates", "write it as key=value"),
        ("=1", "write it as key=value"),
        ("..=1", "write it as key=value"),
    ],
)
def test_bad_set_is_refused_by_its_own_text(key: str, said: str) -> None:
    found = only_error(TWO, key)
    assert found.startswith(f"--set {key}: ")
    assert said in found


def test_ambiguous_name_in_a_set_is_refused() -> None:
    text = "version: 1\npasses: [tidy-graph, fold-batchnorm, tidy-graph]\n"
    assert "is there 2 times: use its index" in only_error(text, "passes.tidy-graph.growth=1")
    assert first_pass(text, "passes.0={tidy-graph: {growth: 1}}") == TidyGraph(growth=1)


def test_mistakes_of_sets_and_of_the_file_are_reported_together() -> None:
    assert len(errors(HEAD + "gatez: {}\n", "nothing", "gates.argmax=2")) == 3


# ---------------------------------------------------------------------------------------------- only, skip, where


@pytest.mark.parametrize(
    "where",
    [
        "group > 1",
        "len(groups) > 1",
        "groups.real > 1",
        "groups > x[0]",
        "groups + 1 > 2",
        "lambda: groups > 1",
        "groups",
    ]
    + [
        "groups >",
        "",
        "groups > 'a'",
        "groups > True",
        "groups is 1",
        "1",
        "groups and kernel > 1",
        "(" * 150,
        "a" * 201,
    ],
)
def test_where_that_is_no_comparison_of_facts_is_refused(where: str) -> None:
    text = yaml.safe_dump({"version": 1, "passes": [{"tidy-graph": {"skip": [{"op": "Conv", "where": where}]}}]})
    assert "passes[0].tidy-graph.skip[0].where" in only_error(text)


def test_selectors_are_globs_or_mappings() -> None:
    step = first_pass("version: 1\npasses: [{tidy-graph: {only: ['/a*', {op: Conv, where: groups > 1}]}}]\n")
    assert step.only == (Selector(name="/a*"), Selector(op="Conv", where="groups > 1"))


@pytest.mark.parametrize("value", ["/a*", "[]", "[3]", "[[a]]", "[{op: 3}]"])
def test_selectors_of_another_kind_are_refused(value: str) -> None:
    assert "passes[0].tidy-graph.only" in only_error(f"version: 1\npasses: [{{tidy-graph: {{only: {value}}}}}]\n")


# ---------------------------------------------------------------------------------------------- round trip and schema

_share = st.floats(1e-6, 1, allow_nan=False)
_names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_selectors = st.lists(
    st.builds(
        Selector, name=_names, op=_names, where=st.sampled_from([None, "groups > 1", "kernel == 1 or params < 9"])
    ),
    min_size=1,
    max_size=3,
).map(tuple)
_common: dict[str, Any] = {
    "only": st.none() | _selectors,
    "skip": st.just(()) | _selectors,
    "tolerance": st.builds(Tolerance, atol=_share, argmax=st.none() | _share, cosine=st.none() | _share),
    "on_violation": st.sampled_from(["fail", "revert"]),
}
_steps = st.one_of(
    st.builds(FoldBatchnorm, **_common),
    st.builds(TidyGraph, growth=st.integers(0, 10**9), fold_constants=st.booleans(), **_common),
    st.builds(SplitSvd, energy=_share, **_common),
    st.builds(SplitSvd, rank=st.integers(1, 10**6), **_common),
)


@given(_steps)
def test_written_step_reads_back_as_itself(step: Pass) -> None:
    text = "version: 1\npasses:\n" + spec.dump_step(step)
    assert first_pass(text) == step


def test_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(spec.schema())


def test_schema_accepts_the_example() -> None:
    jsonschema.validate(yaml.safe_load(EXAMPLE.read_text()), spec.schema())


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "gate: {}\n",
        HEAD + "data: {verification: {npzz: a}}\n",
        HEAD + "gates: {stored_byte: 1}\n",
        HEAD + "gates: {stored_bytes: x}\n",
        "version: 1\npasses: [tidy-grap]\n",
        "version: 1\npasses: tidy-graph\n",
        "version: 2\npasses: [tidy-graph]\n",
        "passes: [tidy-graph]\n",
        "version: 1\npasses: []\n",
        "version: 1\npasses: [{split-svd: {enrgy: 1}}]\n",
        "version: 1\npasses: [{split-svd: {energy: 3}}]\n",
        "version: 1\npasses: [{split-svd: {tolerance: {atoll: 1}}}]\n",
        "version: 1\npasses: [{tidy-graph: {}, split-svd: {}}]\n",
        "version: 1\npasses: [{tidy-graph: [1]}]\n",
    ],
)
def test_schema_and_parser_refuse_the_same(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), spec.schema())
    with pytest.raises(CcompileError):
        spec.parse(text)


def test_schema_describes_every_option() -> None:
    schema = spec.schema()
    silent = [
        f"{kind}.{name}"
        for kind, part in [("spec", schema), *schema["$defs"].items()]
        for name, entry in part.get("properties", {}).items()
        if not entry.get("description")
    ]
    assert silent == []


def test_schema_offers_every_pass() -> None:
    offered = {entry["const"] for entry in spec.schema()["properties"]["passes"]["items"]["anyOf"] if "const" in entry}
    assert offered == set(registry.passes())

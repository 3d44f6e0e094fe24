from __future__ import annotations

import gc
import math
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ccompile import graph, runtime, verify
from ccompile.contracts import passing_tolerance
from ccompile.core import Comparison, OutputComparison, Site, Tolerance, round_up
from ccompile.errors import DataError, SpecError
from ccompile.runtime import Settings
from ccompile.verify import Recording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array

ONE = Settings(threads=1)
ANYTHING = Tolerance(atol=1e30, rtol=1e30, relative_l2=1e30, cosine=-1, argmax=0)


def f32(*values: Any) -> Array:
    return np.array(values, np.float32)


def compared(candidate: Any, reference: Any, rtol: float = 0.0) -> OutputComparison:
    (output,) = verify.compare([{"y": candidate}], [{"y": reference}], 1, rtol).outputs
    return output


def verdict(candidate: Any, reference: Any, **limits: float) -> list[str]:
    tolerance = Tolerance(**limits)
    return compared(candidate, reference, tolerance.rtol or 0.0).violations(tolerance)


# ---------------------------------------------------------------------------------------------- numbers by hand


def test_max_abs_is_the_largest_difference() -> None:
    assert compared(f32(1, 2, 3), f32(1, 2.5, 1)).max_abs == 2


def test_relative_l2_is_of_the_reference() -> None:
    assert compared(f32(3, 5), f32(3, 4)).relative_l2 == pytest.approx(0.2)
    assert compared(f32(3, 4), f32(3, 5)).relative_l2 == pytest.approx(1 / math.sqrt(34))


def test_sqnr_is_twenty_decibels_for_a_tenth() -> None:
    assert compared(f32(11, 0), f32(10, 0)).sqnr_db == pytest.approx(20)


def test_equal_outputs_have_infinite_sqnr() -> None:
    assert compared(f32(1), f32(1)).sqnr_db == math.inf


@pytest.mark.parametrize(("candidate", "cosine"), [((2, 0), 1), ((0, 1), 0), ((1, 1), math.sqrt(0.5)), ((-3, 0), -1)])
def test_cosine_by_hand(candidate: tuple[float, float], cosine: float) -> None:
    assert compared(f32(*candidate), f32(1, 0)).cosine == pytest.approx(cosine)


def test_anything_against_zero_is_infinitely_far() -> None:
    found = compared(f32(1e-3, 0), f32(0, 0))
    assert (found.relative_l2, found.sqnr_db, found.cosine) == (math.inf, -math.inf, 0)


def test_zero_against_zero_is_equal() -> None:
    found = compared(f32(0, 0), f32(0, 0))
    assert (found.relative_l2, found.cosine, found.violations(Tolerance(relative_l2=0, cosine=1))) == (0, 1, [])


def test_differences_that_vanish_when_squared_still_count() -> None:
    assert compared(np.array([2e-200]), np.array([1e-200])).relative_l2 == math.inf


def test_values_too_large_to_square_are_named_not_passed() -> None:
    assert verdict(np.array([1e200]), np.array([2e200]), relative_l2=1e30) == ["its values are too large to compare"]


def test_atol_needed_leaves_out_the_relative_part() -> None:
    assert compared(np.array([11.0, 0.5]), np.array([10.0, 0.0]), rtol=0.05).atol_needed == 0.5


@settings(max_examples=100, deadline=None)
@given(
    a=hnp.arrays(np.float64, 4, elements=st.integers(-64, 64).map(float)),
    b=hnp.arrays(np.float64, 4, elements=st.integers(-64, 64).map(float)),
    atol=st.integers(0, 40).map(lambda n: n / 8),
    rtol=st.integers(0, 16).map(lambda n: n / 8),
)
def test_atol_and_rtol_mean_what_numpy_means_at_the_boundary_too(a: Array, b: Array, atol: float, rtol: float) -> None:
    passes = not verdict(a, b, atol=atol, rtol=rtol)
    assert passes == np.allclose(a, b, atol=atol, rtol=rtol)


def test_rtol_alone_allows_nothing_at_zero() -> None:
    assert verdict(f32(1e-9), f32(0), rtol=0.5)
    assert not verdict(f32(1.5), f32(1), rtol=0.5)


# ---------------------------------------------------------------------------------------------- classes


def test_argmax_counts_rows_that_keep_their_largest() -> None:
    assert compared(f32([0, 1], [0, 1], [3, 2]), f32([0, 1], [1, 0.9], [9, 0])).argmax == pytest.approx(2 / 3)


def test_a_tie_of_the_reference_may_be_broken_anyhow() -> None:
    assert compared(f32([0, 2, 1]), f32([1, 1, 0])).argmax == 1
    assert compared(f32([0, 1, 2]), f32([1, 1, 0])).argmax == 0


def test_a_constant_candidate_does_not_agree_by_tying() -> None:
    reference = np.eye(10, dtype=np.float32)
    assert compared(np.zeros_like(reference), reference).argmax == pytest.approx(0.1)


def test_argmax_takes_axis_one_of_an_image() -> None:
    a, b = np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2), np.float32)
    a[:, 1], b[:, 1] = 1, 1
    a[0, 1, 0, 0] = -1
    assert compared(a, b).argmax == 0.75


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5,), None),
        ((4, 5), 1),
        ((4, 1), None),
        ((2, 4, 5), 2),
        ((2, 5, 3, 3), 1),
        ((2, 1, 3, 3), None),
        ((2,) * 5, None),
    ],
)
def test_class_axis_by_rank(shape: tuple[int, ...], axis: int | None) -> None:
    assert verify.class_axis(np.zeros(shape, np.float32)) == axis


def test_integers_have_no_class_axis() -> None:
    assert verify.class_axis(np.zeros((4, 5), np.int64)) is None


def test_kl_of_probabilities_by_hand() -> None:
    p, q = f32([0.5, 0.5]), f32([0.25, 0.75])
    assert compared(q, p).kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_kl_is_the_mean_over_rows() -> None:
    p, q = f32([0.5, 0.5], [1, 0]), f32([0.25, 0.75], [1, 0])
    assert compared(q, p).kl == pytest.approx(0.25 * math.log(4 / 3), abs=1e-6)


def test_logits_have_no_kl() -> None:
    assert compared(f32([3, -1]), f32([3, -2])).kl is None


def test_an_argmax_limit_alone_refuses_an_output_without_classes() -> None:
    scores, single = f32([0, 1]), f32(1)
    assert not verdict(scores, scores, argmax=1)
    assert "no class axis" in verdict(single, single, argmax=0)[0]
    assert not verdict(single, single, argmax=0, relative_l2=0)


def test_an_argmax_limit_alone_accepts_equal_integers() -> None:
    assert not verdict(np.array([1, 2]), np.array([1, 2]), argmax=1)


# ---------------------------------------------------------------------------------------------- NaN, infinity, zero

SAME = [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [math.nan, math.nan]]
OTHER = [
    ([math.nan, 1.0], [0.0, 1.0]),
    ([0.0, 1.0], [math.nan, 1.0]),
    ([math.inf, 1.0], [0.0, 1.0]),
    ([0.0, 1.0], [math.inf, 1.0]),
    ([math.inf, 1.0], [-math.inf, 1.0]),
    ([math.inf, 1.0], [math.nan, 1.0]),
]


@pytest.mark.parametrize("values", SAME)
def test_the_same_nan_and_infinity_in_both_passes(values: list[float]) -> None:
    assert compared(f32(*values), f32(*values)).violations(Tolerance(atol=0, relative_l2=0, cosine=1)) == []


@pytest.mark.parametrize(("candidate", "reference"), OTHER)
def test_new_or_vanished_nan_and_infinity_fail_whatever_the_tolerance(
    candidate: list[float], reference: list[float]
) -> None:
    found = compared(f32(*candidate), f32(*reference))
    assert found.violations(ANYTHING) == ["1 of 2 elements: NaN or infinity on one side only"]
    assert Comparison((found,), 1).needed is None


def test_finite_neighbours_of_a_shared_nan_are_compared() -> None:
    assert compared(f32(math.nan, 1), f32(math.nan, 3)).max_abs == 2


def test_negative_zero_equals_zero() -> None:
    assert compared(f32(-0.0), f32(0.0)).violations(Tolerance(atol=0, relative_l2=0)) == []


# ---------------------------------------------------------------------------------------------- types and containers


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_float_type_is_measured(dtype: Any) -> None:
    found = compared(np.array([3, 5], dtype), np.array([3, 4], dtype))
    assert (found.max_abs, found.mismatches) == (1, 0)
    assert found.relative_l2 == pytest.approx(0.2)


def test_what_is_exact_depends_on_the_type() -> None:
    def exact(dtype: Any) -> bool:
        found = compared(np.array([1.0078125], dtype), np.array([1], dtype))
        return not Comparison((found,), 1).exact_violations()

    assert [exact(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([2**53 + 1]), np.array([2**53])),
        (np.array([True]), np.array([False])),
        (np.array(["a"], object), np.array(["b"], object)),
        (np.array([0], np.uint8), np.array([255], np.uint8)),
    ],
)
def test_integers_bools_and_strings_are_exact(candidate: Array, reference: Array) -> None:
    assert "exact values that differ" in compared(candidate, reference).violations(ANYTHING)[0]
    assert compared(reference, reference).violations(Tolerance(atol=0)) == []


def test_sequences_are_compared_element_by_element() -> None:
    found = compared([f32(1), f32(2, 3)], [f32(1), f32(2, 5)])
    assert (found.elements, found.max_abs) == (3, 2)


def test_a_shorter_sequence_is_named() -> None:
    assert compared([f32(1)], [f32(1), f32(2)]).problem == "1 elements instead of 2"


def test_maps_are_compared_by_key() -> None:
    found = compared([{"a": 0.5, "b": 0.25}], [{"b": 0.25, "a": 0.5}])
    assert (found.elements, found.dtype, found.max_abs) == (2, "float32", 0)


def test_maps_with_other_keys_fail() -> None:
    assert compared([{0: 0.5, 1: 0.5}], [{0: 0.5, 2: 0.5}]).problem == "a map has other keys"


def test_two_empty_optionals_are_equal_and_one_is_not() -> None:
    assert compared(None, None).violations(Tolerance(atol=0)) == []
    assert compared(None, f32(1)).violations(ANYTHING)
    assert compared(f32(1), None).violations(ANYTHING)


def test_a_sequence_instead_of_a_tensor_is_named() -> None:
    assert compared([f32(1)], f32(1)).problem == "a sequence instead of a tensor"


def test_another_shape_is_named() -> None:
    assert compared(f32([1, 2]), f32(1, 2)).violations(ANYTHING) == ["shape [1, 2] instead of [2]"]


def test_another_type_is_named() -> None:
    assert compared(np.ones(2), f32(1, 1)).violations(ANYTHING) == ["type float64 instead of float32"]


def test_a_missing_and_an_extra_output_are_named() -> None:
    found = verify.compare([{"b": f32(1)}], [{"a": f32(1)}], 1).violations(ANYTHING)
    assert found == {"a": ["missing"], "b": ["not in the reference"]}


def test_an_output_without_elements_fails() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert compared(empty, empty).violations(ANYTHING) == ["nothing was compared"]


def test_comparing_nothing_fails() -> None:
    nothing = verify.compare([], [], 0)
    assert nothing.violations(ANYTHING) == nothing.exact_violations() == {"": ["nothing was compared"]}
    assert nothing.needed is None


def test_batches_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        verify.compare([{"y": f32(1)}], [{"y": f32(1)}, {"y": f32(1)}], 2)


# ---------------------------------------------------------------------------------------------- properties

MATRICES = hnp.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=32))


@settings(max_examples=60, deadline=None)
@given(a=MATRICES, b=MATRICES, cuts=st.lists(st.integers(1, 5), max_size=3, unique=True))
def test_streaming_in_batches_gives_what_one_batch_gives(a: Array, b: Array, cuts: list[int]) -> None:
    whole = compared(a, b)
    mine, theirs = ([{"y": piece} for piece in np.split(x, sorted(cuts))] for x in (a, b))
    (streamed,) = verify.compare(mine, theirs, 1).outputs
    for name, value in vars(whole).items():
        expected = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert getattr(streamed, name) == expected, name


@settings(max_examples=150, deadline=None)
@given(a=MATRICES, b=MATRICES)
def test_each_needed_limit_passes_and_a_stricter_one_does_not(a: Array, b: Array) -> None:
    comparison = verify.compare([{"y": a}], [{"y": b}], 6)
    needed = comparison.needed
    assert needed is not None
    for name, limit in needed.limits().items():
        assert not comparison.violations(Tolerance(**{name: limit})), name
        upwards = name in ("cosine", "argmax")
        stricter = limit + 2e-6 if upwards else 0.99 * limit
        if stricter != limit and stricter <= 1 + (not upwards) * 1e9:
            assert comparison.violations(Tolerance(**{name: stricter})), name


@given(st.floats(1e-290, 1e290))
def test_rounding_up_never_rounds_down_and_stays_within_a_percent(value: float) -> None:
    assert value <= round_up(value) <= value * 1.0101


def test_a_value_a_hair_above_a_short_number_is_still_rounded_up() -> None:
    assert round_up(0.0313 * (1 + 1e-13)) == 0.0314


@pytest.mark.parametrize("value", [5e-324, 1e-310, math.inf])
def test_rounding_up_survives_the_ends_of_the_scale(value: float) -> None:
    assert round_up(value) == value


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_sign_needs_cosine_minus_one(seed: int) -> None:
    reference = np.random.default_rng(seed).standard_normal(9)
    needed = verify.compare([{"y": -reference}], [{"y": reference}], 1).needed
    assert needed is not None
    assert needed.cosine == -1


@settings(max_examples=50, deadline=None)
@given(a=MATRICES, b=MATRICES, rtol=st.sampled_from([0.0, 0.25, 1.0]))
def test_the_tolerance_offered_in_place_of_the_asked_one_passes(a: Array, b: Array, rtol: float) -> None:
    asked = Tolerance(rtol=rtol, relative_l2=0)
    comparison = verify.compare([{"y": a}], [{"y": b}], 6, rtol)
    assume(bool(b.any()))
    offered = passing_tolerance(asked, comparison)
    assert offered is not None
    assert offered.limits().keys() == {"atol", "rtol", "relative_l2"}
    assert not comparison.violations(offered)


def test_a_tolerance_is_offered_where_the_asked_limit_means_nothing() -> None:
    comparison = verify.compare([{"y": f32(1, 2)}], [{"y": f32(1, 3)}], 2)
    offered = passing_tolerance(Tolerance(argmax=0.9), comparison)
    assert offered is not None
    assert not comparison.violations(offered)


@pytest.mark.parametrize("limit", [math.inf, math.nan, -1.0])
def test_a_limit_that_promises_nothing_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="atol"):
        Tolerance(atol=limit)
    with pytest.raises(ValueError, match="promises nothing"):
        Tolerance()


# ---------------------------------------------------------------------------------------------- recording


def spilled_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("ccompile-*"))


BATCHES: list[dict[str, Any]] = [
    {
        "y": np.arange(100, dtype=np.float32) * k,
        "n": np.array([k]),
        "s": np.array(["a"], object),
        "l": [f32(*range(50))],
    }
    for k in range(4)
]


def assert_same(recording: Recording, batches: Sequence[dict[str, Any]]) -> None:
    found = list(recording)
    assert len(found) == len(recording) == len(batches) > 0
    for mine, theirs in zip(found, batches, strict=True):
        assert list(mine) == list(theirs)
        assert verify.compare([mine], [theirs], 1).violations(Tolerance(atol=0)) == {}


@pytest.mark.parametrize("limit", [0, 500, 10**6])
def test_a_recording_gives_back_what_it_was_given(limit: int) -> None:
    recording = Recording(limit)
    for batch in BATCHES:
        recording.append(batch)
    assert_same(recording, BATCHES)
    assert_same(recording, BATCHES)


def test_a_recording_goes_to_disk_only_beyond_its_limit_and_leaves_nothing() -> None:
    before = spilled_folders()
    small, large = Recording(10**6), Recording(0)
    for recording in (small, large):
        recording.append(BATCHES[0])
    made = spilled_folders() - before
    assert len(made) == 1
    assert len(list(next(iter(made)).iterdir())) == 3
    del small, large, recording
    gc.collect()
    assert not spilled_folders() & made


def test_what_is_on_disk_is_not_in_memory() -> None:
    recording, array = Recording(0), f32(*range(9))
    gone = weakref.ref(array)
    recording.append({"y": array})
    del array
    assert gone() is None
    assert len(recording) == 1


def test_a_recording_on_disk_holds_no_file_open() -> None:
    recording = Recording(0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        recording.append({"y": f32(1, 2)})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---------------------------------------------------------------------------------------------- metrics


def test_top1_and_top5_by_hand() -> None:
    scores = {"y": np.array([[9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9]], np.float32)}
    assert verify.top1(scores, np.array([0, 0])) == 0.5
    assert verify.top5(scores, np.array([4, 0])) == 0.5


def test_top5_of_three_classes_is_always_right() -> None:
    assert verify.top5({"y": f32([1, 2, 3])}, np.array([0])) == 1


def test_top1_reads_the_first_output_that_has_scores() -> None:
    outputs = {"features": np.zeros((2, 3, 4, 4), np.float32), "y": f32([0, 1], [1, 0])}
    assert verify.top1(outputs, np.array([1, 0])) == 1


def test_top1_without_scores_is_refused() -> None:
    with pytest.raises(DataError, match="samples, classes"):
        verify.top1({"y": f32(1, 2)}, np.array([0, 1]))


def test_labels_that_are_not_one_class_per_sample_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels of shape \[2, 1\]"):
        verify.top1({"y": f32([0, 1], [1, 0])}, np.array([[1], [0]]))


def test_a_metric_beside_the_spec_is_found(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def error(outputs, labels):\n    return -abs(outputs['y'] - labels).mean()\n")
    metric = verify.find_metric("task:error", tmp_path)
    batches = [{"y": f32(1, 2)}, {"y": f32(5)}]
    assert verify.measure({"e": metric}, batches, [f32(1, 1), f32(3)]) == {"e": -1.0}


def test_each_spec_folder_has_its_own_metric_of_a_name(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "task.py").write_text(f"def f(outputs, labels):\n    return {number}\n")
    found = [verify.find_metric("task:f", tmp_path / str(number))({}, f32()) for number in (1, 2)]
    assert found == [1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top2", "Did you mean `top1`|Did you mean `top5`"),
        ("nowhere_to_be_found:f", "No module named"),
        ("task:g", "has no attribute 'g'"),
        ("task:number", "not a function"),
        ("broken:f", "invalid syntax"),
        ("raises:f", "boom"),
        (":f", "unknown metric"),
        ("task:", "unknown metric"),
    ],
)
def test_a_wrong_metric_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "task.py").write_text("number = 1\ndef f(outputs, labels): return 1\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('boom')\n")
    with pytest.raises(SpecError, match=message):
        verify.find_metric(name, tmp_path)
    assert verify.find_metric("task:f", tmp_path)


@pytest.mark.parametrize("body", ["return None", "return 'high'", "return outputs['z']", "assert False", "return x.y"])
def test_a_metric_that_fails_is_named(tmp_path: Path, body: str) -> None:
    (tmp_path / "task.py").write_text(f"def f(outputs, labels):\n    {body}\n")
    with pytest.raises(DataError, match="metric `mine` fails"):
        verify.measure({"mine": verify.find_metric("task:f", tmp_path)}, [{"y": f32(1)}], [f32(1)])


def test_an_output_whose_batches_do_not_stack_does_not_stop_a_metric() -> None:
    batches = [{"y": f32([0, 1]), "t": np.zeros((1, n), np.float32), "s": [f32(1)]} for n in (2, 3)]
    assert verify.measure({"top1": verify.top1}, batches, [np.array([1]), np.array([0])]) == {"top1": 0.5}


# ---------------------------------------------------------------------------------------------- sites and blame


def chain(layers: int, width: int = 6, seed: int = 0) -> ir.Model:
    net = builders.Net(seed)
    x = net.input("x", ["N", width])
    for index in range(layers):
        x = net.node("Tanh", net.dense(x, f"fc{index}", width, width), name=f"act{index}")
    return net.model(x)


def shifted(model: ir.Model, layer: int, amount: float) -> ir.Model:
    twin = graph.copy(model)
    node = graph.node_named(twin.graph, f"fc{layer}")
    bias = graph.constant(node.inputs[2])
    assert bias is not None
    graph.replace_constant(node, 2, (bias + np.float32(amount)).astype(np.float32))
    return twin


SITES = [Site((f"act{index}",), output=f"act{index}_out") for index in range(8)]
FEEDS: list[dict[str, Any]] = [
    {"x": np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)} for seed in range(2)
]


def far(output: OutputComparison) -> bool:
    return bool(output.violations(Tolerance(relative_l2=1e-4)))


@pytest.mark.parametrize("guilty", range(8))
def test_blame_finds_the_first_layer_that_moves(guilty: int) -> None:
    model = chain(8)
    found = verify.blame(model, shifted(model, guilty, 0.5), SITES[::-1], lambda: FEEDS, far, ONE)
    assert found is not None
    assert found.site.nodes == (f"act{guilty}",)
    assert found.searched == guilty + 1


def test_blame_finds_nobody_where_nothing_moved() -> None:
    model = chain(8)
    assert verify.blame(model, graph.copy(model), SITES, lambda: FEEDS, far, ONE) is None


def test_blame_without_inputs_finds_nobody() -> None:
    model = chain(8)
    assert verify.blame(model, shifted(model, 0, 0.5), SITES, lambda: [], far, ONE) is None


def test_blame_sees_a_fault_in_a_later_batch() -> None:
    model = chain(8)
    quiet = {"x": np.full((4, 6), np.nan, np.float32)}
    found = verify.blame(model, shifted(model, 3, 0.5), SITES, lambda: [quiet, FEEDS[0]], far, ONE)
    assert found is not None
    assert found.site.nodes == ("act3",)


def test_blame_holds_a_bounded_group_at_a_time_and_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opened = chain(8), []

    class Counted(runtime.Session):
        def __init__(self, model: ir.Model, settings: Settings, observed: Sequence[str] = ()) -> None:
            opened.append(list(observed))
            super().__init__(model, settings, observed)

    monkeypatch.setattr(runtime, "Session", Counted)
    monkeypatch.setattr(verify, "HELD_BYTES", 2 * 4 * 6 * 4)
    found = verify.blame(model, shifted(model, 3, 0.5), SITES, lambda: FEEDS, far, ONE)
    assert found is not None
    assert found.searched == 4
    groups = [names for names in opened if names]
    assert groups == [["act0_out", "act1_out"]] * 2 + [["act2_out", "act3_out"]] * 2


def test_blame_passes_over_values_that_one_graph_lacks() -> None:
    model = chain(3)
    sites = [Site(("gone",), output="gone_out"), Site(("act1",), output="act1_out")]
    found = verify.blame(model, shifted(model, 0, 0.5), sites, lambda: FEEDS, far, ONE)
    assert found is not None
    assert found.site.nodes == ("act1",)


def bfloat16_inside() -> ir.Model:
    net = builders.Net(0)
    x = net.node("Cast", net.input("x", ["N", 6]), name="narrow", to=ir.DataType.BFLOAT16)
    return net.model(net.node("Cast", x, name="wide", to=ir.DataType.FLOAT))


def test_blame_passes_over_values_that_numpy_cannot_hold() -> None:
    model = bfloat16_inside()
    sites = [Site(("narrow",), output="narrow_out"), Site(("wide",), output="wide_out")]
    found = verify.blame(model, model, sites, lambda: FEEDS, lambda output: True, ONE)
    assert found is not None
    assert found.site.nodes == ("wide",)


def gemm_site(amount: float, bound: float) -> verify.SiteError:
    """fc1 of two layers, its bias shifted: |dy| = amount * sqrt(elements)."""
    model = chain(2)
    site = Site(("fc1",), input="act0_out", output="fc1_out", bound=bound)
    (found,) = verify.site_errors(model, shifted(model, 1, amount), [site], FEEDS[0], ONE)
    return found


def test_the_error_of_a_site_is_what_the_hand_computes() -> None:
    model = chain(2)
    seen = runtime.Session(model, ONE, ["act0_out", "fc1_out"]).run(FEEDS[0])
    found = gemm_site(0.5, 1)
    assert found.gain == pytest.approx(0.5 * math.sqrt(24) / np.linalg.norm(seen["act0_out"]), rel=1e-4)
    assert found.relative == pytest.approx(0.5 * math.sqrt(24) / np.linalg.norm(seen["fc1_out"]), rel=1e-4)


def test_a_site_is_measured_on_the_previous_input() -> None:
    model = chain(2)
    both = shifted(shifted(model, 0, 3.0), 1, 0.5)
    site = Site(("fc1",), input="act0_out", output="fc1_out", bound=1)
    (found,) = verify.site_errors(model, both, [site], FEEDS[0], ONE)
    assert found.gain == pytest.approx(gemm_site(0.5, 1).gain, rel=1e-6)


def test_a_bound_that_is_too_small_is_broken() -> None:
    gain = gemm_site(0.5, 1).gain
    assert gemm_site(0.5, 1.01 * gain).holds
    assert not gemm_site(0.5, 0.99 * gain).holds


def test_an_unchanged_site_holds_a_bound_of_zero() -> None:
    assert gemm_site(0.0, 0.0).holds


def test_rounding_of_large_weights_is_no_broken_bound() -> None:
    large = verify.SiteError(Site(("a",), bound=0.0), gain=1e-3, relative=2e-7)
    assert large.holds
    assert not replace(large, relative=1e-3).holds


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_low_rank_layer_in_two_factors_holds_its_bound_at_any_scale(scale: float) -> None:
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 2), (2, 32)))
    A *= np.float32(scale)

    def product(*factors: Array) -> ir.Model:
        net = builders.Net()
        y = net.input("x", ["N", 32])
        for index, factor in enumerate(factors, start=3 - len(factors)):
            y = net.node("MatMul", y, net.constant(factor), name=f"m{index}")
        return net.model(y)

    feeds = {"x": rng.standard_normal((4, 32)).astype(np.float32)}
    site = Site(("m1", "m2"), input="x", output="m2_out", bound=0.0)
    (found,) = verify.site_errors(product(A @ B), product(A, B), [site], feeds, ONE)
    assert found.gain > 0
    assert found.holds


def test_something_out_of_nothing_is_infinitely_far() -> None:
    model = chain(2)
    site = Site(("fc0",), input="x", output="fc0_out", bound=5.0)
    silent = {"x": np.zeros((4, 6), np.float32)}
    (found,) = verify.site_errors(model, shifted(model, 0, 0.5), [site], silent, ONE)
    assert found.gain == math.inf
    assert not found.holds


def test_sites_that_read_other_variables_or_name_no_values_are_left_out() -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", 6])
    a, b = net.node("Relu", x, name="a"), net.node("Neg", x, name="b")
    model = net.model(net.node("Add", a, b, name="sum"))
    measured = [Site(("b",), input="x", output="b_out")]
    left_out = [
        Site(("sum",), input="a_out", output="sum_out"),
        Site(("a",), output="a_out"),
        Site(("a",), input="x"),
        Site(("a",), input="elsewhere", output="a_out"),
        Site(("gone",), input="x", output="a_out"),
    ]
    found = verify.site_errors(model, model, [*left_out, *measured], FEEDS[0], ONE)
    assert [error.site for error in found] == measured


def test_sites_are_measured_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(4)
    sites = [Site((f"act{k}",), input=f"fc{k}_out", output=f"act{k}_out", bound=0.0) for k in range(4)]
    monkeypatch.setattr(verify, "HELD_BYTES", 1)
    found = verify.site_errors(model, model, sites, FEEDS[0], ONE)
    assert [error.site for error in found] == sites
    assert all(error.holds for error in found)

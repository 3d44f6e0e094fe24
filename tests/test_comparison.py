from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ccompile.comparison import class_axis, compare
from ccompile.contracts import passing_tolerance
from ccompile.tolerance import Comparison, OutputComparison, Tolerance, round_up

if TYPE_CHECKING:
    from ccompile.core import Array

ANYTHING = Tolerance(atol=1e30, rtol=1e30, relative_l2=1e30, cosine=-1, argmax=0)


def f32(*values: Any) -> Array:
    return np.array(values, np.float32)


def compared(candidate: Any, reference: Any, rtol: float = 0.0) -> OutputComparison:
    (output,) = compare([{"y": candidate}], [{"y": reference}], 1, rtol).outputs
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
    assert class_axis(np.zeros(shape, np.float32)) == axis


def test_integers_have_no_class_axis() -> None:
    assert class_axis(np.zeros((4, 5), np.int64)) is None


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

SAME = [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0]]
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


@pytest.mark.parametrize("values", [(math.nan, math.nan), (math.inf, -math.inf)])
def test_outputs_without_a_finite_element_verify_nothing(values: tuple[float, ...]) -> None:
    found = compare([{"y": f32(*values)}], [{"y": f32(*values)}], 2)
    said = {"y": ["nothing finite was compared"]}
    assert found.violations(ANYTHING) == found.exact_violations() == found.unjudged == said
    assert found.needed is None
    assert not compare([{"y": f32(*values, 1)}], [{"y": f32(*values, 1)}], 2).exact_violations()


def test_nan_on_one_side_is_a_difference_and_not_merely_unjudged() -> None:
    found = compare([{"y": f32(math.nan)}], [{"y": f32(math.inf)}], 1)
    assert not found.unjudged
    assert "on one side only" in found.exact_violations()["y"][0]


def test_finite_neighbours_of_a_shared_nan_are_compared() -> None:
    assert compared(f32(math.nan, 1), f32(math.nan, 3)).max_abs == 2


def test_negative_zero_equals_zero() -> None:
    assert compared(f32(-0.0), f32(0.0)).violations(Tolerance(atol=0, relative_l2=0)) == []


# ---------------------------------------------------------------------------------------------- small beside large


def detections(rng: np.random.Generator, axis: int) -> tuple[Array, Array]:
    """Return boxes of hundreds and scores of hundredths in one output, and the same with all scores zero."""
    parts = [640 * rng.uniform(0.1, 1, (8, 4, 6)), 0.01 * rng.uniform(0, 1, (8, 80, 6))]
    found = [np.moveaxis(np.concatenate([parts[0], k * parts[1]], 1), 1, axis).astype(np.float32) for k in (1, 0)]
    return found[0], found[1]


@pytest.mark.parametrize("axis", [1, 2])
def test_large_channels_do_not_hide_small_ones_that_broke(axis: int) -> None:
    reference, candidate = detections(np.random.default_rng(0), axis)
    found = compare([{"y": candidate}], [{"y": reference}], 8)
    assert found.outputs[0].relative_l2 < 1e-4
    (said,) = found.exact_violations()["y"]
    assert re.fullmatch(rf"relative_l2 1 > 0\.01 at index \d+ of axis {axis}", said)
    assert not found.violations(Tolerance(relative_l2=1e-3))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_lost_small_entry_is_found_in_every_type(dtype: Any) -> None:
    reference = np.array([[1, 0.01]] * 4, dtype)
    candidate = np.array([[1, 0]] * 4, dtype)
    assert compared(candidate, reference).exact_violations()
    assert not compared(reference, reference).exact_violations()


def test_rounding_of_the_large_is_no_error_of_an_entry_that_is_nearly_zero() -> None:
    reference = f32(*[[1, 1e-7]] * 4)
    assert not compared(reference + f32(0, 3e-7), reference).exact_violations()


def test_an_entry_is_judged_over_all_batches_whatever_their_length() -> None:
    big, small = f32([100, 0.01, 0.01]), f32([100, 0.01])
    found = compare([{"y": f32([100, 0.01, 0])}, {"y": small}], [{"y": big}, {"y": small}], 2)
    assert found.outputs[0].entry == "index 2 of axis 1"
    assert found.outputs[0].entry_l2 == 1


def test_a_very_long_axis_is_judged_by_neighbours() -> None:
    reference = np.full((1, 10_000), 1e-3, np.float32)
    reference[0, 0] = 1e3
    candidate = reference.copy()
    candidate[0, 9_000:9_003] = 0
    assert compared(candidate, reference).entry == "index 9000..9002 of axis 1"


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
    anything = ANYTHING.model_copy(update={"argmax": None})
    assert "exact values that differ" in compared(candidate, reference).violations(anything)[0]
    assert "exact values that differ" in compared(candidate, reference).exact_violations()[0]
    assert compared(reference, reference).violations(Tolerance(atol=0)) == []


def test_an_argmax_limit_bounds_the_share_of_integers_that_differ() -> None:
    mine, theirs = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])
    assert not verdict(mine, theirs, argmax=0.75)
    assert not verdict(mine, theirs, argmax=0.75, atol=0)
    assert verdict(mine, theirs, argmax=0.76) == ["argmax 0.75 < 0.76"]


def test_what_integers_needed_is_reported_and_passes() -> None:
    classes = compare([{"y": np.array([1, 2])}], [{"y": np.array([1, 3])}], 2)
    assert classes.needed == Tolerance(argmax=0.5)
    both = compare([{"y": np.array([1, 2]), "x": f32(3, 4)}], [{"y": np.array([1, 3]), "x": f32(3, 5)}], 2)
    offered = passing_tolerance(Tolerance(relative_l2=0.1), both)
    assert offered is not None
    assert offered.limits().keys() == {"relative_l2", "argmax"}
    assert not both.violations(offered)


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
    found = compare([{"b": f32(1)}], [{"a": f32(1)}], 1).violations(ANYTHING)
    assert found == {"a": ["missing"], "b": ["not in the reference"]}


def test_an_output_without_elements_fails() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert compared(empty, empty).violations(ANYTHING) == ["nothing was compared"]


def test_an_output_that_is_empty_on_every_sample_is_told_so() -> None:
    empty, some = np.zeros((0, 3), np.float32), f32([1, 2, 3])
    batches = [{"boxes": empty, "y": some}] * 2
    said = "it is empty on all 8 samples; real verification data may fill it"
    found = compare(batches, batches, 8)
    assert found.violations(ANYTHING) == found.exact_violations() == {"boxes": [said]}
    assert compare([{"y": empty}, {"y": some}], [{"y": empty}, {"y": some}], 2).exact_violations() == {}


def test_comparing_nothing_fails() -> None:
    nothing = compare([], [], 0)
    assert nothing.violations(ANYTHING) == nothing.exact_violations() == {"": ["nothing was compared"]}
    assert nothing.needed is None


def test_batches_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([{"y": f32(1)}], [{"y": f32(1)}, {"y": f32(1)}], 2)


# ---------------------------------------------------------------------------------------------- properties

MATRICES = hnp.arrays(np.float32, (6, 3), elements=st.floats(-100, 100, width=32))


@settings(max_examples=60, deadline=None)
@given(a=MATRICES, b=MATRICES, cuts=st.lists(st.integers(1, 5), max_size=3, unique=True))
def test_streaming_in_batches_gives_what_one_batch_gives(a: Array, b: Array, cuts: list[int]) -> None:
    whole = compared(a, b)
    mine, theirs = ([{"y": piece} for piece in np.split(x, sorted(cuts))] for x in (a, b))
    (streamed,) = compare(mine, theirs, 1).outputs
    for name, value in vars(whole).items():
        expected = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert getattr(streamed, name) == expected, name


@settings(max_examples=150, deadline=None)
@given(a=MATRICES, b=MATRICES)
def test_each_needed_limit_passes_and_a_stricter_one_does_not(a: Array, b: Array) -> None:
    comparison = compare([{"y": a}], [{"y": b}], 6)
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
    needed = compare([{"y": -reference}], [{"y": reference}], 1).needed
    assert needed is not None
    assert needed.cosine == -1


@settings(max_examples=50, deadline=None)
@given(a=MATRICES, b=MATRICES, rtol=st.sampled_from([0.0, 0.25, 1.0]))
def test_the_tolerance_offered_in_place_of_the_asked_one_passes(a: Array, b: Array, rtol: float) -> None:
    asked = Tolerance(rtol=rtol, relative_l2=0)
    comparison = compare([{"y": a}], [{"y": b}], 6, rtol)
    assume(bool(b.any()))
    offered = passing_tolerance(asked, comparison)
    assert offered is not None
    assert offered.limits().keys() == {"atol", "rtol", "relative_l2"}
    assert not comparison.violations(offered)


def test_a_tolerance_is_offered_where_the_asked_limit_means_nothing() -> None:
    comparison = compare([{"y": f32(1, 2)}], [{"y": f32(1, 3)}], 2)
    offered = passing_tolerance(Tolerance(argmax=0.9), comparison)
    assert offered is not None
    assert not comparison.violations(offered)


@pytest.mark.parametrize("limit", [math.inf, math.nan, -1.0])
def test_a_limit_that_promises_nothing_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="atol"):
        Tolerance(atol=limit)
    with pytest.raises(ValueError, match="promises nothing"):
        Tolerance()

"""Views of bytes as streams: every view gives back what it took, and the streams are what they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile import decoding
from ccompile.views import PLANES, WIDTHS, View, candidates, join, separate

VIEWS = [
    view
    for width in WIDTHS
    for sparse in (False, True)
    for spread in (False, True)
    for turned in (False, True)
    if (view := View(width, sparse, spread, turned)).is_sensible
]


def there_and_back(data: bytes, view: View) -> bytes:
    filler, streams = separate(np.frombuffer(data, np.uint8), view)
    assert len(streams) == view.streams
    for stream in streams:
        assert stream.dtype == np.uint8

    def read(index: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        assert streams[index].size == length
        return streams[index]

    return join(filler, len(data), view, read).tobytes()


@pytest.mark.parametrize("view", VIEWS, ids=str)
@given(data=st.binary(max_size=12) | st.lists(st.sampled_from([0, 0, 0, 7, 0x30]), max_size=12).map(bytes))
def test_every_view_gives_back_the_bytes(view: View, data: bytes) -> None:
    whole = data * (view.width // 8 if view.width > 8 else view.width if view.width in PLANES else 1)
    assert there_and_back(whole, view) == whole


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_view_is_known_by_its_number(view: View) -> None:
    assert View.of(view.number) == view


def test_other_numbers_are_refused() -> None:
    refused = set(range(256)) - {view.number for view in VIEWS}
    assert len(refused) == 256 - len(VIEWS) > 200
    for number in refused:
        with pytest.raises(ValueError, match=f"no view {number}"):
            View.of(number)


def test_the_low_nibble_comes_first() -> None:
    _, (symbols,) = separate(np.array([0x21, 0x43], np.uint8), View(4, spread=True))
    assert symbols.tolist() == [1, 2, 3, 4]


def test_a_sparse_view_takes_the_commonest_element_out() -> None:
    filler, (mask, kept) = separate(np.array([0x55, 0x57, 0x35], np.uint8), View(4, sparse=True, spread=True))
    assert filler == 5
    assert np.unpackbits(mask, bitorder="little")[:6].tolist() == [0, 0, 1, 0, 0, 1]
    assert kept.tolist() == [7, 3]


def test_a_turned_view_puts_the_exponent_into_one_plane() -> None:
    weights = np.array([1.0, -1.5, 1.25], np.float32)
    _, planes = separate(weights.view(np.uint8), View(32, spread=True, turned=True))
    assert planes[3].tolist() == [127, 127, 127]


def test_planes_are_tried_only_where_elements_are_whole() -> None:
    assert {view.width for view in candidates(32, 10, True)} == {8}
    assert {view.width for view in candidates(32, 12, True)} == {8, 32}


def test_integers_are_not_turned() -> None:
    assert not any(view.turned for view in candidates(32, 12, False))
    assert any(view.turned for view in candidates(32, 12, True))


def test_bytes_are_tried_as_packed_indices_too() -> None:
    assert {view.width for view in candidates(8, 100, False)} == {1, 2, 4, 8}


@pytest.mark.parametrize(("size", "filler"), [(3, 0), (4, 256)])
def test_impossible_sizes_and_fillers_are_refused(size: int, filler: int) -> None:
    with pytest.raises(ValueError, match="are no 32-bit"):
        join(filler, size, View(32, sparse=True), lambda index, length: np.zeros(length, np.uint8))


def test_an_impossible_nibble_is_refused() -> None:
    with pytest.raises(ValueError, match="filler 16"):
        join(16, 1, View(4, sparse=True), lambda index, length: np.zeros(length, np.uint8))


@pytest.mark.parametrize("bits", PLANES)
def test_planes_are_those_that_codes_are_stored_in(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 80).astype(np.uint8)
    data = decoding.pack(codes, bits)
    _, (found,) = separate(data.reshape(-1), View(bits, spread=bits == 3))
    np.testing.assert_array_equal(found, codes)


def test_planes_are_tried_where_there_may_be_some() -> None:
    assert 3 in {view.width for view in candidates(8, 300, False, planes=3)}
    assert not {3, 5} & {view.width for view in candidates(8, 301, False, planes=3)}


def test_planes_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="are no 6-bit"):
        join(0, 3, View(6), lambda index, length: np.zeros(length, np.uint8))

"""Positions of kept elements: every mask comes back, structure is found, and damaged data are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile import positions
from ccompile.coders import HUFFMAN, encode, smallest
from ccompile.wire import encode_varint

Mask = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
SHAPES = st.sampled_from([(), (7,), (6, 9), (4, 3, 3, 3), (1, 64), (300, 2), (5, 0)])


def packed(mask: Mask) -> bytes:
    return np.packbits(mask.reshape(-1), bitorder="little").tobytes()


def size_of(mask: Mask) -> int:
    """Encode, assert that it decodes, and return the bytes."""
    data = packed(mask)
    coded = positions.encode(data, mask.shape)
    assert positions.decode(coded, len(data)) == data
    return len(coded)


def entropy_bytes(mask: Mask) -> float:
    share = mask.mean()
    return float(-(share * np.log2(share) + (1 - share) * np.log2(1 - share))) * mask.size / 8


@given(shape=SHAPES, density=st.sampled_from([0, 0.01, 0.2, 0.9, 1]), seed=st.integers(0, 9))
def test_every_mask_comes_back(shape: tuple[int, ...], density: float, seed: int) -> None:
    size_of(np.random.default_rng(seed).random(shape) < density)


@given(st.binary(max_size=200), SHAPES)
def test_a_mask_of_another_shape_comes_back(data: bytes, shape: tuple[int, ...]) -> None:
    assert positions.decode(positions.encode(data, shape), len(data)) == data


@pytest.mark.parametrize("gap", [254, 255, 256, 510, 511, 5000])
def test_long_gaps_come_back(gap: int) -> None:
    mask = np.zeros(6000, bool)
    mask[[3, 3 + gap]] = True
    assert size_of(mask) < 40


@pytest.mark.parametrize("density", [0.02, 0.08, 0.2])
def test_random_positions_take_their_entropy(density: float) -> None:
    mask = np.random.default_rng(0).random((300, 784)) < density
    assert 0.98 * entropy_bytes(mask) < size_of(mask) < 1.025 * entropy_bytes(mask)


def uneven(seed: int = 0) -> Mask:
    """Return a mask [outputs, inputs] with a third of the inputs dead, the others of two densities."""
    rng = np.random.default_rng(seed)
    return rng.random((200, 300)) < rng.permutation(np.repeat([0, 0.05, 0.4], 100))


def test_uneven_columns_are_coded_by_class() -> None:
    mask = uneven()
    bound = sum(
        entropy_bytes(mask[:, part]) for part in (mask.mean(0) > 0.2, (mask.mean(0) > 0) & (mask.mean(0) < 0.2))
    )
    labels = 300 * np.log2(3) / 8
    assert size_of(mask) < 1.05 * (bound + labels) < 0.85 * entropy_bytes(mask)


def test_storage_does_not_matter() -> None:
    mask = np.repeat(uneven(), 2, axis=1)  # neighbours along one axis are alike
    assert abs(size_of(mask) - size_of(np.ascontiguousarray(mask.T))) < 40
    assert size_of(mask) < 0.8 * smallest(packed(mask), [HUFFMAN]).cost


def test_input_channels_of_convolutions_are_lines() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 30, 3, 3)) < np.repeat([0.01, 0.5, 0.1], 10)[:, None, None]
    assert size_of(mask) < 0.85 * entropy_bytes(mask)


def stream(data: bytes) -> bytes:
    return bytes([0]) + encode_varint(len(data)) + data


ONE = b"\x01\x01\x02" + stream(b"\0")  # one line, one class
WRONG = {
    "nothing": b"",
    "no lines": b"\0\x01\x02" + stream(b"") + b"\0",
    "too many lines": b"\x41\x01\x02" + stream(bytes(65)) + b"\0",
    "too long lines": b"\x01\x41\x02" + stream(b"\0") + b"\0",
    "no class": b"\x01\x01\0" + stream(b"\0"),
    "a class that is not there": b"\x01\x01\x02" + stream(b"\x01") + b"\0",
    "no entries told": ONE,
    "more entries than bits": ONE + encode_varint(1 << 40) + stream(b""),
    "gaps beyond the end": ONE + b"\x04" + stream(b"\x20\x20"),
    "a filler beyond the end": ONE + b"\x02" + stream(b"\xff"),
    "fewer entries than told": ONE + b"\x06" + stream(b"\0\0"),
    "fewer bits than told": ONE + b"\x01" + stream(bytes(7)),
    "gaps and bits": ONE + b"\x03" + stream(bytes(8)),
    "a coder that is not for this": ONE + b"\x02\x04\x01\0",
    "a tail": ONE + b"\x02" + stream(b"\0") + b"\0",
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_damaged_data_are_refused(data: bytes) -> None:
    assert positions.decode(ONE + b"\x04" + stream(b"\0\x3e"), 8) == b"\x01" + bytes(6) + b"\x80"
    assert positions.decode(ONE + b"\x01" + stream(b"abcdefgh"), 8) == b"abcdefgh"
    with pytest.raises(ValueError, match=r"."):
        positions.decode(data, 8)


@given(st.binary(max_size=40), st.integers(0, 64))
def test_any_bytes_decode_to_the_size_asked_or_are_refused(data: bytes, size: int) -> None:
    try:
        assert len(positions.decode(data, size)) == size
    except ValueError:
        assert data != positions.encode(bytes(size), ())


def test_a_bomb_is_refused() -> None:
    bomb = ONE + encode_varint(1 << 31) + bytes([HUFFMAN]) + encode_varint(1 << 16) + encode(bytes(1 << 20), HUFFMAN)
    with pytest.raises(ValueError, match="gaps in 64 bits"):
        positions.decode(bomb, 8)

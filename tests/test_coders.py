"""Coders give back what they took, and refuse streams that are not of the size announced."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ccompile.coders import FIRST_LZMA, GENERAL, HUFFMAN, NUMBER, STORED, ZSTD, Coded, decode, encode, name_of, smallest

CODERS = GENERAL
TEXT = b"y = W x + b; " * 40


@pytest.mark.parametrize("coder", CODERS, ids=name_of)
@given(data=st.binary(max_size=300) | st.binary(min_size=1, max_size=4).map(lambda part: part * 700))
def test_every_coder_gives_back_the_bytes(coder: int, data: bytes) -> None:
    assert decode(encode(data, coder), coder, len(data)) == data


@pytest.mark.parametrize("coder", CODERS, ids=name_of)
@pytest.mark.parametrize("wrong", [-1, 1, -len(TEXT)])
def test_another_size_than_announced_is_refused(coder: int, wrong: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(encode(TEXT, coder), coder, len(TEXT) + wrong)


@pytest.mark.parametrize("coder", CODERS, ids=name_of)
def test_truncated_streams_and_tails_are_refused(coder: int) -> None:
    coded = encode(TEXT, coder)
    for damaged in (coded[:-1], coded[: len(coded) // 2], b"", coded + b"\0", coded + coded):
        with pytest.raises(ValueError, match=r"."):
            decode(damaged, coder, len(TEXT))


@pytest.mark.parametrize("coder", [HUFFMAN, ZSTD, *range(FIRST_LZMA, NUMBER)], ids=name_of)
def test_a_bomb_is_stopped_at_the_size_announced(coder: int) -> None:
    bomb = encode(bytes(4 << 20), coder)
    assert len(bomb) < 1 << 20
    with pytest.raises(ValueError, match=r"."):
        decode(bomb, coder, 1000)


def test_a_frame_that_announces_a_size_is_refused_before_it_is_allocated() -> None:
    data = zstandard.ZstdCompressor(level=1).compress(bytes(1000))[4:]  # without its magic number
    with pytest.raises(ValueError, match="says it holds 1000 bytes"):
        decode(data, ZSTD, 1000)


def test_noise_is_stored_but_not_what_repeats() -> None:
    noise = np.random.default_rng(0).bytes(10_000)
    assert smallest(noise, CODERS) == Coded(STORED, noise)
    assert smallest(noise * 2, CODERS).cost < 10_100


def test_the_smallest_wins_and_ties_go_to_the_simplest() -> None:
    noise = np.random.default_rng(0).bytes(500)
    assert smallest(noise, CODERS).coder == STORED
    assert smallest(TEXT, CODERS).coder >= ZSTD
    assert smallest(b"", CODERS).coder == STORED
    few = np.random.default_rng(0).integers(0, 3, 5000).astype(np.uint8).tobytes()
    assert smallest(few, (STORED, HUFFMAN)).coder == HUFFMAN


def test_huffman_is_huffman_only() -> None:
    repeated = b"abcdefgh" * 1000
    assert len(encode(repeated, ZSTD)) < 60
    assert len(encode(repeated, HUFFMAN)) > 8000 * 3 / 8

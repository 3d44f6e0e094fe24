"""Packed files: what was written comes back, and whatever is changed is refused before anything is made of it."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ccompile import container
from ccompile.coders import HUFFMAN, NUMBER, STORED, ZSTD, Coded, encode, name_of
from ccompile.container import Digest, Index, Writer, pieces, read_index
from ccompile.errors import ModelError
from ccompile.views import View
from ccompile.wire import encode_varint

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = b"graph\xc8\x01more"  # 200 bytes are announced at 7
WEIGHTS = bytes(range(200))
MODEL = GRAPH[:7] + WEIGHTS + GRAPH[7:]
DENSE = View()


def digest_of(model: bytes) -> Digest:
    digest = Digest()
    digest.add(model)
    return digest


def coded(data: bytes, coder: int = STORED) -> list[Coded]:
    return [Coded(coder, encode(data, coder))]


def written(fill: Callable[[Writer], None] | None = None, model: bytes = MODEL) -> bytes:
    out = io.BytesIO()
    writer = Writer(out)
    if fill is None:
        writer.add(0, len(GRAPH), DENSE, 0, coded(GRAPH))
        writer.add(7, 200, DENSE, 0, coded(WEIGHTS))
    else:
        fill(writer)
    writer.finish(digest_of(model))
    return out.getvalue()


def read(data: bytes, limit: int | None = None) -> bytes:
    file = io.BytesIO(data)
    return b"".join(bytes(piece) for piece in pieces(file, read_index(file, "m.ccz", limit), "m.ccz"))


def refusal(data: bytes, limit: int | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        read(data, limit)
    assert str(caught.value).startswith("m.ccz: ")
    return str(caught.value)


def with_index(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Change the index and give it the checksum and the length that it then has: as an attacker would."""
    length = struct.unpack("<I", data[-4:])[0]
    index = change(data[-8 - length : -8])
    return data[: -8 - length] + index + struct.pack("<II", zlib.crc32(data[:5] + index), len(index))


def test_what_was_written_comes_back() -> None:
    assert read(written()) == MODEL


def test_the_same_parts_make_the_same_file() -> None:
    assert written() == written()


def test_the_overhead_of_a_part_is_told() -> None:
    told: list[int] = []

    def fill(writer: Writer) -> None:
        told.append(writer.add(0, len(GRAPH), DENSE, 0, coded(GRAPH)))
        told.append(writer.add(7, 200, View(4, sparse=True), 3, sparse(WEIGHTS)))

    data = written(fill)
    assert len(data) == sum(told) + 5 + 2 + 16 + 8
    assert read(data) == MODEL


def sparse(data: bytes) -> list[Coded]:
    """Return the streams of a sparse view of nibbles whose filler is 3."""
    nibbles = np.stack([np.frombuffer(data, np.uint8) & 15, np.frombuffer(data, np.uint8) >> 4], 1).reshape(-1)
    kept = nibbles[nibbles != 3]
    values = np.append(kept, np.zeros(kept.size % 2, np.uint8)).reshape(-1, 2)
    mask = np.packbits(nibbles != 3, bitorder="little").tobytes()
    return [*coded(mask, ZSTD), *coded((values[:, 0] | values[:, 1] << 4).tobytes(), HUFFMAN)]


@pytest.mark.parametrize("at", range(len(written())))
def test_every_flipped_byte_is_refused(at: int) -> None:
    data = bytearray(written())
    for flip in (1, 0x80, 0xFF):
        damaged = bytes([*data[:at], data[at] ^ flip, *data[at + 1 :]])
        assert refusal(damaged)


@pytest.mark.parametrize("length", range(len(written())))
def test_every_truncation_is_refused(length: int) -> None:
    assert refusal(written()[:length])


@pytest.mark.parametrize("tail", [b"\0", bytes(8), b"x" * 100])
def test_trailing_bytes_are_refused(tail: bytes) -> None:
    assert "damaged" in refusal(written() + tail)


def test_other_files_are_told_from_damaged_ones() -> None:
    assert "not a packed model" in refusal(b"")
    assert "not a packed model" in refusal(b"\x08\x08:\x10 an onnx file")


def test_a_version_to_come_is_named() -> None:
    newer = written().replace(b"\x89CCZ\x01", b"\x89CCZ\x02")
    assert "version 2 of the format is not known" in refusal(newer)


def test_a_part_that_does_not_decode_is_refused() -> None:
    def fill(writer: Writer) -> None:
        writer.add(0, len(GRAPH), DENSE, 0, coded(GRAPH))
        writer.add(7, 200, DENSE, 0, [Coded(ZSTD, b"no zstandard frame")])

    assert "tensor 1 of 1 cannot be decoded" in refusal(written(fill))


@pytest.mark.parametrize("coder", [STORED, HUFFMAN, ZSTD])
@pytest.mark.parametrize("more", [-1, 1, 1 << 24])
def test_a_stream_of_another_length_is_refused(coder: int, more: int) -> None:
    def fill(writer: Writer) -> None:
        writer.add(0, len(GRAPH), DENSE, 0, coded(GRAPH))
        writer.add(7, 200, DENSE, 0, coded(bytes(200 + more), coder))

    assert "cannot be decoded" in refusal(written(fill))


@pytest.mark.parametrize("size", [199, 201, 200 + (1 << 28)])
def test_a_size_that_the_graph_does_not_announce_is_refused_before_it_is_decoded(size: int) -> None:
    def fill(writer: Writer) -> None:
        writer.add(0, len(GRAPH), DENSE, 0, coded(GRAPH))
        writer.add(7, size, DENSE, 0, [Coded(ZSTD, b"")])

    def longer(index: bytes) -> bytes:
        return encode_varint(len(GRAPH) + size) + index[2:]

    assert "not of the size that the graph says" in refusal(with_index(written(fill), longer))


def test_another_model_than_announced_is_refused() -> None:
    assert "the checksum of the model does not hold" in refusal(written(model=MODEL[:-1] + b"!"))


def test_a_model_beyond_the_limit_is_refused_with_its_size() -> None:
    assert len(read(written(), limit=len(MODEL))) == len(MODEL)
    assert f"unpacks to {len(MODEL)} bytes, more than {len(MODEL) - 1}" in refusal(written(), len(MODEL) - 1)


def test_a_bomb_is_refused_without_a_limit_given() -> None:
    def fill(writer: Writer) -> None:
        writer.add(0, 1 << 40, DENSE, 0, coded(b"", ZSTD))

    def huge(index: bytes) -> bytes:
        return encode_varint(1 << 40) + index[2:]

    assert "unpacks to 1,099,511,627,776 bytes" in refusal(with_index(written(fill), huge))


WRONG = {
    "no parts": lambda index: index[:18],
    "half a part": lambda index: index[:-3],
    "a number without end": lambda index: b"\xff" * 30,
    "nothing": lambda index: b"",
    "an unknown view": lambda index: index[:20] + b"\x0f" + index[21:],
    "an unknown coder": lambda index: index[:21] + b"\x63" + index[22:],
    "a shorter stream": lambda index: index[:22] + b"\x0a" + index[23:],
    "a shorter model": lambda index: b"\xd2\x01" + index[2:],
    "a part outside": lambda index: index[:27] + b"\x40" + index[28:],
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_index_that_contradicts_itself_is_refused(change: Callable[[bytes], bytes]) -> None:
    assert with_index(written(), bytes) == written()
    assert "its index is wrong" in refusal(with_index(written(), change))


@pytest.mark.parametrize("seed", range(20))
def test_random_indices_under_a_right_checksum_are_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def change(index: bytes) -> bytes:
        array = np.frombuffer(index, np.uint8).copy()
        places = rng.choice(array.size, 3, replace=False)
        array[places] ^= rng.integers(1, 256, 3).astype(np.uint8)
        return array.tobytes()

    for _ in range(50):
        assert refusal(with_index(written(), change))


def test_parts_are_read_one_at_a_time() -> None:
    file = io.BytesIO(written())
    index: Index = read_index(file, "m.ccz")
    iterator = pieces(file, index, "m.ccz")
    assert bytes(next(iterator)) == GRAPH[:7]
    assert file.tell() < len(file.getvalue()) - 8 - struct.unpack("<I", file.getvalue()[-4:])[0] + 1
    assert bytes(next(iterator)) == WEIGHTS


def test_the_default_limit_grows_with_the_file() -> None:
    assert container.default_limit(1) == 1 << 30
    assert container.default_limit(1 << 30) > 1 << 39


@pytest.mark.parametrize("coder", range(NUMBER), ids=name_of)
@pytest.mark.parametrize("view", [DENSE, View(4, sparse=True), View(32, spread=True)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_streams_of_noise_under_right_checksums_are_refused(coder: int, view: View, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def fill(writer: Writer) -> None:
        writer.add(0, len(GRAPH), DENSE, 0, coded(GRAPH))
        writer.add(7, 200, view, 0, [Coded(coder, rng.bytes(int(rng.integers(0, 60)))) for _ in range(view.streams)])

    for _ in range(20):
        assert "damaged" in refusal(written(fill))

"""Entropy coders of byte streams. Each decodes to a length that is known beforehand, and to nothing else.

| number | coder |
|---|---|
| 0 | the bytes themselves |
| 1 | Huffman codes only: a raw DEFLATE stream of zlib's Huffman-only strategy, as Deep Compression codes indices |
| 2 | zstandard, the highest level; no magic number, size or checksum, which the container has |
| 3 | positions: not of any bytes, see positions.py |
| 4.. | LZMA2, raw, with the literal contexts, literal positions and positions of `_LZMA` |

Source: Han et al. 2016, arXiv:1510.00149, section 4; RFC 1951; RFC 8878.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import zstandard

STORED, HUFFMAN, ZSTD, POSITIONS, FIRST_LZMA = range(5)
_LZMA = ((3, 0, 2), (0, 0, 0), (4, 0, 0), (0, 2, 2))  # lc, lp, pb: text, few symbols, nibbles, words of four bytes
_LZMA_WINDOW = (1 << 12, 1 << 26)  # bytes
_ZSTD_LEVEL = 22
_NOISE = 1 << 12  # bytes
_ZSTD_WINDOW = 1 << 27  # bytes: what the highest level asks for at most
NUMBER = FIRST_LZMA + len(_LZMA)
GENERAL = (STORED, HUFFMAN, ZSTD, *range(FIRST_LZMA, NUMBER))  # what codes any bytes


@dataclass(frozen=True)
class Coded:
    """A stream in its coded form."""

    coder: int
    data: bytes

    @property
    def cost(self) -> int:
        """Return the bytes that it takes."""
        return len(self.data)


def name_of(coder: int) -> str:
    """Return a coder's name.

    >>> [name_of(coder) for coder in range(FIRST_LZMA + 1)]
    ['stored', 'huffman', 'zstd', 'positions', 'lzma lc3 lp0 pb2']
    """
    if coder < FIRST_LZMA:
        return ("stored", "huffman", "zstd", "positions")[coder]
    return "lzma lc{} lp{} pb{}".format(*_LZMA[coder - FIRST_LZMA])


def encode(data: bytes, coder: int) -> bytes:
    """Return `data` in a coder's form; the same bytes for the same versions of the libraries."""
    if coder == STORED:
        return data
    if coder == HUFFMAN:
        stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        return stream.compress(data) + stream.flush()
    if coder == ZSTD:
        given = zstandard.ZstdCompressionParameters.from_level(
            _ZSTD_LEVEL,
            source_size=len(data),
            format=zstandard.FORMAT_ZSTD1_MAGICLESS,
            write_content_size=False,
            write_checksum=False,
        )
        return zstandard.ZstdCompressor(compression_params=given).compress(data)
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=[_filter(coder, len(data))])


def _filter(coder: int, size: int) -> dict[str, int]:
    lc, lp, pb = _LZMA[coder - FIRST_LZMA]
    least, most = _LZMA_WINDOW
    window = min(max(1 << max(size - 1, 0).bit_length(), least), most)
    preset = 9 | lzma.PRESET_EXTREME
    return {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window, "lc": lc, "lp": lp, "pb": pb}


def decode(data: bytes, coder: int, size: int) -> bytes:
    """Return the `size` bytes that `data` stands for; never builds more than one byte beyond them.

    Raises ValueError when the stream is damaged, ends early, holds more, or goes on behind its end.
    """
    if coder == STORED:
        found, whole = data, True
    elif coder == HUFFMAN:
        found, whole = _inflate(data, size)
    elif coder == ZSTD:
        found, whole = _unzstd(data, size), True
    else:
        found, whole = _unlzma(data, coder, size)
    if len(found) != size or not whole:
        raise ValueError(f"a stream of {size} bytes has {'more' if len(found) > size else 'less or a tail'}")
    return found


def _inflate(data: bytes, size: int) -> tuple[bytes, bool]:
    stream = zlib.decompressobj(-15)
    try:
        found = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return found, stream.eof and not stream.unused_data


def _unzstd(data: bytes, size: int) -> bytes:
    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW, format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    try:
        announced = zstandard.get_frame_parameters(data, zstandard.FORMAT_ZSTD1_MAGICLESS).content_size
        if announced != zstandard.CONTENTSIZE_UNKNOWN:  # it would be allocated before anything is decoded
            raise ValueError(f"a frame that says it holds {announced} bytes")
        return decoder.decompress(data, max_output_size=max(size, 1), allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _unlzma(data: bytes, coder: int, size: int) -> tuple[bytes, bool]:
    stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[_filter(coder, size)])
    try:
        found = stream.decompress(data, size + 1)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error
    return found, stream.eof and not stream.unused_data


def _is_noise(data: bytes) -> bool:
    """Return whether a quick look for repetitions and uncommon bytes finds none: others will not, and take long."""
    return len(data) > _NOISE and len(zstandard.ZstdCompressor(level=1).compress(data)) >= len(data)


def smallest(data: bytes, coders: Iterable[int]) -> Coded:
    """Return the shortest form; of equal ones the first. Large data that nothing shortens stay as they are."""
    if _is_noise(data):
        return Coded(STORED, data)
    return min((Coded(coder, encode(data, coder)) for coder in coders), key=lambda coded: coded.cost)

"""A weight that is generated: few values, and a hash that says which entry is which (see numerics.hashing)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile.core import Array
from ccompile.decoding import Place, overhead
from ccompile.numerics import hashing
from ccompile.numerics.hashing import Hash

GENERATOR = overhead(13, 13)  # bytes


@dataclass(frozen=True, eq=False)
class Generated:
    """levels[k] of an array's type, the hash, and the array's shape."""

    levels: Array
    of: Hash
    shape: tuple[int, ...]

    @property
    def ops(self) -> frozenset[str]:
        """Return the generator's ops."""
        return frozenset({"Range", "Mul", "Add", "Mod", "Gather", "Cast", "Reshape"})

    @property
    def name(self) -> str:
        """Return the number of values."""
        return f"{len(self.levels)} hashed values"

    @property
    def nbytes(self) -> int:
        """Return the bytes of the values and the generator."""
        return int(self.levels.nbytes) + GENERATOR

    def put(self, at: Place) -> ir.Value:
        """Add the values and what picks and signs them."""
        count = math.prod(self.shape)

        def number(value: int) -> ir.Value:
            return at.shared(f"n{value}", np.array(value, np.int64))

        index = at.node("Range", [number(0), number(count), number(1)])

        def mixed(constants: tuple[int, int], modulus: int) -> ir.Value:
            scaled = at.node("Add", [at.node("Mul", [index, number(constants[0])]), number(constants[1])])
            return at.node("Mod", [at.node("Mod", [scaled, number(hashing.PRIME)]), number(modulus)])

        picked = at.node("Gather", [at.constant("hashed", self.levels), mixed(self.of.bucket, self.of.k)])
        signs = at.constant("signs", np.array([1, -1], self.levels.dtype))
        signed = at.node("Mul", [picked, at.node("Gather", [signs, mixed(self.of.sign, 2)])])
        return at.node(
            "Reshape", [signed, at.shared("d" + "x".join(map(str, self.shape)), np.array(self.shape, np.int64))]
        )

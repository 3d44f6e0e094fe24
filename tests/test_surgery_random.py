"""Random graphs of ops that move, join and share channels: every free group can be cut, and means what it must."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from coupled import ints, split, vector
from cuts import assert_close, cut, feeds, outputs, random_cuts, with_zeroed_readers

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 4
State = list[tuple[ir.Value, int]]  # pictures [N, channels, SIZE, SIZE]


class Growing:
    """A net that grows by random steps on a pool of pictures."""

    def __init__(self, seed: int) -> None:
        self.net, self.rng = Net(seed), np.random.default_rng(seed)
        channels = int(self.rng.choice([3, 4, 8]))
        x = self.net.input("x", ["N" if seed % 3 else 2, channels, SIZE, SIZE])
        self.pool: State = [self.conv(x, channels, 8)]
        if seed % 4 == 0:
            self.pool.append((x, channels))

    def conv(self, x: ir.Value, ins: int, outs: int, groups: int = 1, kernel: int = 1) -> tuple[ir.Value, int]:
        shape = (outs, ins // groups, kernel, kernel)
        name = f"conv{len(self.net.nodes)}"
        return self.net.conv(x, name, shape, pad=kernel // 2, groups=groups), outs

    def pick(self) -> tuple[ir.Value, int]:
        return self.pool[int(self.rng.integers(len(self.pool)))]

    def step(self) -> None:
        options: list[Callable[[ir.Value, int], tuple[ir.Value, int]]] = [
            self.make, self.make, self.unary, self.join, self.join, self.concat, self.part, self.split, self.gather,
            self.pad, self.shuffle, self.depthwise, self.grouped, self.norm, self.gate, self.attend, self.last,
            self.constant, self.flatten, self.spread, self.mix, self.tile, self.transposed, self.generate,
        ]  # fmt: skip
        x, channels = self.pick()
        self.pool.append(options[int(self.rng.integers(len(options)))](x, channels))

    def make(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        return self.conv(x, c, int(self.rng.choice([3, 4, 6, 8])), kernel=int(self.rng.choice([1, 3])))

    def unary(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        return self.net.node(str(self.rng.choice(["Relu", "Sigmoid", "Tanh", "Exp"])), self.small(x)), c

    def small(self, x: ir.Value) -> ir.Value:
        return self.net.node(
            "Clip", x, self.net.constant(np.array(-2, np.float32)), self.net.constant(np.array(2, np.float32))
        )

    def join(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        fitting = [value for value, channels in self.pool if channels in (c, 1)]
        other = fitting[int(self.rng.integers(len(fitting)))]
        return self.net.node(str(self.rng.choice(["Add", "Mul", "Sub", "Max"])), self.small(other), self.small(x)), c

    def concat(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        y, d = self.pick()
        return (self.net.node("Concat", y, x, axis=1), c + d) if c + d < 25 else (x, c)

    def part(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        start, end = sorted(self.rng.integers(0, c + 1, 2).tolist())
        if end - start < 1:
            return x, c
        return self.net.node("Slice", x, ints(self.net, start), ints(self.net, end), ints(self.net, 1)), end - start

    def split(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        if c < 2:
            return x, c
        at = int(self.rng.integers(1, c))
        left, right = split(self.net, x, 2, 1, (at, c - at))
        self.pool.append((left, at))
        return right, c - at

    def gather(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        chosen = self.rng.integers(-c, c, int(self.rng.integers(1, 9))).tolist()
        return self.net.node("Gather", x, ints(self.net, *chosen), axis=1), len(chosen)

    def pad(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        begin, end = self.rng.integers(0, 3, 2).tolist()
        return self.net.node("Pad", x, ints(self.net, 0, begin, 0, 0, 0, end, 0, 0)), c + begin + end

    def shuffle(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        groups = int(self.rng.choice([n for n in (1, 2, 3, 4) if c % n == 0]))
        y = self.net.node("Reshape", x, ints(self.net, 0, groups, c // groups, SIZE, SIZE))
        y = self.net.node("Transpose", y, perm=[0, 2, 1, 3, 4])
        return self.net.node("Reshape", y, ints(self.net, 0, -1, SIZE, SIZE)), c

    def depthwise(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        times = int(self.rng.choice([1, 1, 2])) if c < 12 else 1
        return self.conv(x, c, c * times, groups=c, kernel=3)

    def grouped(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        groups = int(self.rng.choice([n for n in (1, 2, 3, 4) if c % n == 0]))
        return self.conv(x, c, groups * int(self.rng.choice([1, 2, 3])), groups=groups)

    def norm(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        kind = int(self.rng.integers(4))
        if kind == 0:
            return self.net.batchnorm(x, f"bn{len(self.net.nodes)}", c), c
        if kind == 1:
            return self.net.node("InstanceNormalization", x, vector(self.net, c), vector(self.net, c)), c
        if kind == 2:
            return self.net.node("Softmax", self.small(x), axis=int(self.rng.choice([1, 2, 3]))), c
        return self.net.node("PRelu", x, vector(self.net, c, 1, 1)), c

    def gate(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        s = self.net.node("GlobalAveragePool", x)
        s, d = self.conv(s, c, 3)
        s, _ = self.conv(self.net.relu(s), d, c)
        return self.net.node("Mul", x, self.net.node("Sigmoid", s)), c

    def attend(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        heads = int(self.rng.choice([n for n in (1, 2, 3, 4) if c % n == 0]))
        flat = ints(self.net, 0, heads, c // heads, SIZE * SIZE)
        q, k, v = (
            self.net.node("Reshape", self.conv(x, c, c)[0] if self.rng.integers(3) else x, flat) for _ in range(3)
        )
        scores = self.net.node("MatMul", self.net.node("Transpose", q, perm=[0, 1, 3, 2]), self.small(k))
        scores = self.net.node("Softmax", self.small(scores), axis=-1)
        y = self.net.node("MatMul", v, self.net.node("Transpose", scores, perm=[0, 1, 3, 2]))
        return self.net.node("Reshape", y, ints(self.net, -1, c, SIZE, SIZE)), c

    def last(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        """Channels last, through a dense layer, and back."""
        d = int(self.rng.choice([4, 6]))
        y = self.net.node("Transpose", x, perm=[0, 2, 3, 1])
        name = f"dense{len(self.net.nodes)}"
        y = self.net.node("MatMul", y, self.net.weight(name, (c, d)), name=name)
        y = self.net.node("Add", y, vector(self.net, d)) if self.rng.integers(2) else y
        return self.net.node("Transpose", y, perm=[0, 3, 1, 2]), d

    def constant(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        shapes = [(c, 1, 1), (1, c, 1, 1), (), (SIZE,), (1, c, SIZE, SIZE), (1, 1, SIZE, 1)]
        operands = [self.small(x), vector(self.net, *shapes[int(self.rng.integers(len(shapes)))])]
        order = operands[::-1] if self.rng.integers(2) else operands
        return self.net.node(str(self.rng.choice(["Add", "Mul", "Sub"])), *order), c

    def flatten(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        """Flatten to positions of channels and back, or let a dense layer do it."""
        y = self.net.node("Flatten", x)
        if self.rng.integers(2):
            return self.net.node("Reshape", self.net.relu(y), ints(self.net, -1, c, SIZE, SIZE)), c
        return self.rows(self.net.dense(y, f"fc{len(self.net.nodes)}", c * SIZE * SIZE, 5), 5)

    def generate(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        return self.rows(self.net.node("Flatten", self.net.node("GlobalMaxPool", x)), c)

    def rows(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        """Rows of a dense layer become channels and positions."""
        d = int(self.rng.choice([3, 4, 6]))
        y = self.net.dense(x, f"fc{len(self.net.nodes)}", c, d * SIZE * SIZE)
        return self.net.node("Reshape", y, ints(self.net, -1, d, SIZE, SIZE)), d

    def spread(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        y = self.net.node("SpaceToDepth", x, blocksize=2)
        y = self.net.node("Relu", y)
        return self.net.node("DepthToSpace", y, blocksize=2, mode=str(self.rng.choice(["DCR", "CRD"]))), c

    def mix(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        y = self.net.node("ReduceMean", x, ints(self.net, int(self.rng.choice([1, 2, 3]))), keepdims=1)
        return self.net.node("Sub", x, y), c

    def tile(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        return (self.net.node("Tile", x, ints(self.net, 1, 2, 1, 1)), 2 * c) if c < 9 else (x, c)

    def transposed(self, x: ir.Value, c: int) -> tuple[ir.Value, int]:
        name, groups = f"up{len(self.net.nodes)}", int(self.rng.choice([n for n in (1, 2, 4) if c % n == 0]))
        weight, bias = self.net.weight(f"{name}.w", (c, 2, 1, 1)), self.net.weight(f"{name}.b", (2 * groups,))
        return self.net.node("ConvTranspose", x, weight, bias, name=name, group=groups), 2 * groups

    def model(self) -> ir.Model:
        read = {id(value) for node in self.net.nodes for value in node.inputs}
        ends = [self.conv(value, c, 3)[0] for value, c in self.pool[1:] if id(value) not in read]
        return self.net.model(*(ends or [self.conv(*self.pool[0], 3)[0]]))


def grown(seed: int, steps: int) -> ir.Model:
    growing = Growing(seed)
    for _ in range(steps):
        growing.step()
    return growing.model()


@pytest.mark.parametrize("seed", range(60))
def test_a_random_graph_is_cut_consistently(seed: int) -> None:
    model, rng = grown(seed, 2 + seed % 12), np.random.default_rng(seed)
    cuts = random_cuts(model, rng, (0.2, 0.5)[seed % 2])
    inputs = feeds(model, rng)
    assert_close(outputs(cut(model, cuts), inputs), outputs(with_zeroed_readers(model, cuts), inputs), 1e-5)

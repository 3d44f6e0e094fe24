"""Generate the weights of a layer from few values by a hash, and store only the values.

y = W x + b  becomes  y = What x + b',  What[i] = xi(i) c[h(i)], h a hash of the entry's number, xi its sign. On
calibration data c[k] is the least-squares solution in the metric of the inputs; the mean goes into the bias. The
generator folds when the runtime opens a session. Without training in that form a network loses much: name the layers
with `only`, bound them with `error`, and look at what each loses.

Fires:  Conv, ConvTranspose, Gemm, MatMul with one constant float weight.
Error:  E|dy|^2 = tr((What - W) H (What - W)^T), measured on calibration data, H the inputs' covariance.
Cost:   k values, whatever the layer's size; multiply-adds as before.
Source: Chen et al. 2015, arXiv:1504.04788 (HashedNets).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from ccompile.analysis import linear
from ccompile.coding import Coding, Fitted
from ccompile.core import Array, Budget, Share
from ccompile.decoding import Form, Means
from ccompile.fitting import Metric
from ccompile.hashed import GENERATOR, Generated
from ccompile.moments import Layer
from ccompile.numerics import codebooks, hashing

KEPT = (0.5, 0.25, 0.125, 0.0625, 0.03125)  # values per weight that a curve tells


class ShareHashed(Coding):
    """Options of share-hashed: keep or error."""

    keep: Share | None = Field(None, description="values per weight of a layer")
    seed: int = Field(0, ge=0, le=2**32, description="seed of the hash")

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if (self.keep is None) == (self.error is None):
            raise ValueError("give exactly one of `keep` and `error`")
        return self

    @property
    def budget(self) -> Budget | None:
        """Return nothing: layers are taken one by one."""
        return None

    def strengths(self, form: Layer) -> list[float]:
        """Return values per weight, as what is gone."""
        return [1 - kept for kept in KEPT]

    def wanted(self, name: str) -> float | None:
        """Return what the options ask for."""
        return None if self.keep is None else 1 - self.keep

    def label(self, strength: float) -> str:
        """Return the values per weight."""
        return f"{1 - strength:.3g} values per weight"

    def fit(
        self, metrics: Sequence[Metric], form: Layer, strength: float, held: Array | None, rough: bool = False
    ) -> Fitted:
        """Return the weight that the best values generate."""
        of, count = self._hash(form, strength), form.groups * form.out * form.columns
        stored = linear.arranged(form, np.arange(count).reshape(form.groups, form.out, form.columns))
        place = np.empty(count, np.int64)
        place[stored.ravel()] = np.arange(count)  # the number in stored order of each entry
        shape = (form.groups, form.out, form.columns)
        code = hashing.buckets(of, count)[place].reshape(shape)
        sign = hashing.signs(of, count)[place].reshape(shape)
        W, H = [metric.W for metric in metrics], [metric.H for metric in metrics]
        parts = hashing.fit(W, H, list(code), list(sign), of.k)
        return Fitted(np.stack([part.values for part in parts]), codebooks.lost(parts, W, H))

    def _hash(self, form: Layer, strength: float) -> hashing.Hash:
        count = form.groups * form.out * form.columns
        return hashing.draw(max(1, round(count * (1 - strength))), self.seed)

    def form_of(self, form: Layer, strength: float, plain: Array, means: Means) -> Form | None:
        """Return the weight as its values and the hash; None unless every bit comes back."""
        of, flat = self._hash(form, strength), plain.ravel()
        code, sign = hashing.buckets(of, flat.size), hashing.signs(of, flat.size)
        levels = np.zeros(of.k, plain.dtype)
        levels[code] = flat * sign.astype(plain.dtype)
        same = np.array_equal(levels[code] * sign.astype(plain.dtype), flat)
        return Generated(levels, of, plain.shape) if same else None

    def stored(self, form: Layer, strength: float, itemsize: int, zeros: float) -> float:
        """Return the bytes of the values and the generator."""
        return self._hash(form, strength).k * itemsize + GENERATOR

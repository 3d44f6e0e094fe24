"""Compressions compute on one thread, whatever the machine has."""

import numpy as np
import pytest
import threadpoolctl
from builders import mlp
from calibrated import prune

from ccompile import blas
from ccompile.passes.prune_channels import PruneChannels


def threads() -> set[int]:
    return {int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


def test_inside_every_blas_has_one_thread_and_afterwards_what_it_had() -> None:
    np.ones((2, 2)) @ np.ones((2, 2))
    before = threads()
    with blas.one_thread():
        assert threads() == {1}
    assert threads() == before


def test_a_compression_computes_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    real = PruneChannels.choices

    def choices(self: PruneChannels, *rest: object) -> object:
        seen.append(threads())
        return real(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PruneChannels, "choices", choices)
    prune(mlp(0), keep=0.5)
    assert seen
    assert all(found == {1} for found in seen)

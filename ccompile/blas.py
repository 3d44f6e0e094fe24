"""How linear algebra uses the cores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the matrix products and factorisations inside on the calling thread alone.

    The last bits of what they compute then do not depend on how many cores a machine has; and thousands of small
    calls do not wait for threads: on two cores shared with other work, pruning a small convolutional network took
    thirteen times as long with two threads per call as with one.
    """
    import scipy.linalg  # noqa: F401  (has a BLAS of its own, which must be loaded to be limited)
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield

"""Python's garbage collector, out of the way of work that makes a million objects which all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Turn the garbage collector off within the ``with``. It would look through the new objects again
    and again: with ten thousand VMs that takes half of the time. May be nested."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

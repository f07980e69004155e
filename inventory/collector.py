"""Python's garbage collector, out of the way of work that makes a million objects which all stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """It would look through them again and again: with ten thousand VMs half of the time. May be
    nested."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

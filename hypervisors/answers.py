"""What tools and daemons answer, when it isn't what they are known to answer."""

from __future__ import annotations

import contextlib
import socket
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from host.printable import one_line
from inventory.errors import DriverFailed

_WRONG = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, ET.ParseError,
)  # fmt: skip


@contextlib.contextmanager
def answer_of(tool: str, at: str = "") -> Iterator[None]:
    """Around the reading of a tool's answer, and nothing else: DriverFailed, which names the tool and
    its machine (``at``; else the one that this runs on), where the answer has another shape than it
    should."""
    try:
        yield
    except _WRONG as error:
        why = one_line(str(error) or "no reason given", 200)
        raise DriverFailed(
            f"{tool} on {at or socket.gethostname()} gave an answer that can't be read: "
            f"{type(error).__name__}: {why}",
            remedy=f"see what {tool} answers there by hand, and which version it is",
        ) from error

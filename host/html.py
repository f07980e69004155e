"""Our pages: templates in ``templates/pages``, whose every value is made safe to show. No script, no
request to anywhere; readable in light and dark, on paper and on a telephone."""

from __future__ import annotations

import os
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from host.printable import one_line, printable
from inventory.sizes import format_duration, format_size, rounded

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_TEMPLATES = Path(__file__).resolve().parent.parent / "templates" / "pages"
_OPENED_LINES = 25
"""Of a long text, shown unasked."""
_LONGEST = 2000
"""Characters of a line."""


def page_template(name: str) -> Template:
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = format_duration
    environment.filters["size"] = format_size
    environment.filters["rounded"] = rounded
    environment.filters["moment"] = _moment
    environment.filters["place"] = lambda path: quote(os.fsencode(path))  # names may be no text
    environment.filters["last"] = lambda text, lines=_OPENED_LINES: "\n".join(
        one if len(one) <= _LONGEST else f"{one[:_LONGEST]}…" for one in text.splitlines()[-lines:]
    )
    environment.filters["cut"] = one_line
    return environment


def _moment(when: str | datetime) -> str:
    """``2026-11-21 00:30:05`` UTC."""
    if not when:
        return ""
    found = datetime.fromisoformat(when) if isinstance(when, str) else when
    return found.strftime("%Y-%m-%d %H:%M:%S")

"""Templates for the services' files, and the values they may write.

Nothing reaches a file as text by trust. A template writes words, which every format takes as they are;
anything else is refused, with the template's line, unless it went through the format's own filter:

    {{ vm.address }}                        a word
    {{ vm.description | string }}           quoted as the format quotes
    # {{ vm.description | comment }}        on one line

How a format quotes is known to the service. A file of the same name in the admin's own directory
(``services.templates``) is used instead of ours; it can begin with ``{% extends "farmhand/NAME" %}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inventory.errors import TemplateFailed

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parents[2] / "templates" / "network"

_WORD = re.compile(r"[A-Za-z0-9_./:@+-]*")
_MARK = re.compile("(?:BEGIN|END) farmhand")
_MISTAKES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_AROUND = 2  # lines before and after the one that is wrong


class Word(str):
    """Text that every format takes as it is, without quotes: a name, an address, a number, a path."""

    __slots__ = ()


class Unwritable(ValueError):
    """A value that a format can't hold, in words."""


def finalize(value: object) -> object:
    """What ``{{ ... }}`` may write."""
    kind = type(value)
    if kind is Word or kind is int:
        return value
    if isinstance(value, str) and _WORD.fullmatch(value):
        return value
    if kind.__name__ == "StrictUndefined":
        return value  # says so itself, better
    if isinstance(value, str):
        raise Unwritable(f"{value[:60]!r} is not a plain word: write it with | string or | comment")
    raise Unwritable(
        f"a {kind.__name__} can't be written as it is: name one of its parts, or use a filter"
    )


def backslashed(text: str) -> Word:
    return Word('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')


def never(_text: str) -> Word:
    raise Unwritable("this format has no quoted strings")


def as_json(value: object) -> Word:
    return Word(json.dumps(value, ensure_ascii=False))


def _hex(mac: str) -> Word:
    """Without its colons."""
    return Word(mac.replace(":", ""))


def _listed(words: Iterable[str], between: str = ", ") -> Word:
    """Words with something between them; each has to be one."""
    return Word(between.join(str(finalize(word)) for word in words))


def _comment(text: str) -> Word:
    """On one line, and nothing that could end the comment, go on behind it, or be taken for a mark of
    ours (provision.network.document)."""
    plain = "".join(c if c.isprintable() else " " for c in text).replace("\\", "/")
    plain = _MARK.sub(lambda match: match[0].lower(), plain)
    return Word(plain.replace("--", "- -").replace("--", "- -"))


class Templates:
    """The templates, the admin's own before ours."""

    def __init__(self, own: Path | None = None) -> None:
        if own is not None and not own.is_dir():
            raise TemplateFailed(
                f"there is no directory {own}, named as 'services.templates'",
                remedy="make it, or take it out of the farm file",
            )
        self._own = own
        # An admin's own may change between one farm's rendering and the next; ours don't.
        self._environment = _environment if own is None else cache(_environment.__wrapped__)

    def render(
        self, name: str, values: Mapping[str, object], string: Callable[[str], Word] = never
    ) -> str:
        """The text of templates/network/NAME.j2. ``string``: how its format quotes a text.
        TemplateFailed with its name, line and lines around."""
        import jinja2

        file = f"{name}.j2"
        try:
            return self._environment(self._own, string).get_template(file).render(values)
        except jinja2.TemplateNotFound as error:
            raise TemplateFailed(f"there is no template {error.name}") from error
        except jinja2.TemplateSyntaxError as error:
            message = error.message or ""
            raise self._failed(error.name or file, error.lineno, message, error.source) from error
        except (jinja2.TemplateError, *_MISTAKES) as error:
            raise self._failed(*self._place(error, file), _words(error)) from error

    def names(self) -> Iterator[str]:
        for path in sorted(TEMPLATES.glob("*.j2")):
            yield path.stem

    def _place(self, error: BaseException, file: str) -> tuple[str, int]:
        """jinja2 has put the template's lines into the traceback."""
        import traceback

        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = Path(frame.filename)
            if path.suffix == ".j2":
                return str(path), frame.lineno or 1
        return file, 1

    def _failed(self, name: str, line: int, message: str, source: str | None = None) -> TemplateFailed:
        path = Path(name)
        if not path.is_absolute():
            path = next(
                (d / path.name for d in (self._own, TEMPLATES) if d and (d / path.name).is_file()),
                TEMPLATES / path.name,
            )
        if source is None:
            try:
                source = path.read_text(errors="replace")
            except OSError:
                source = ""
        lines = source.splitlines()
        first = max(line - _AROUND, 1)
        shown = [
            f"{'>' if number == line else ' '} {number:4} | {text}"
            for number, text in enumerate(lines[first - 1 : line + _AROUND], first)
        ]
        return TemplateFailed(
            f"{path}:{line}: {message}",
            remedy="correct the template; nothing was changed",
            detail="\n".join(shown),
        )


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


@cache
def _environment(own: Path | None, string: Callable[[str], Word]) -> Environment:
    import jinja2

    ours = jinja2.FileSystemLoader(TEMPLATES)
    loaders: list[jinja2.BaseLoader] = [jinja2.FileSystemLoader(own)] if own else []
    loader = jinja2.ChoiceLoader([*loaders, ours, jinja2.PrefixLoader({"farmhand": ours})])
    environment = jinja2.Environment(  # noqa: S701 - not HTML: see finalize
        loader=loader,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
        cache_size=-1,
    )
    # A million look-ups: the builtin is three times as fast, and says itself what isn't there.
    environment.getattr = getattr  # type: ignore[assignment,method-assign]
    environment.filters["string"] = string
    environment.filters["json"] = as_json
    environment.filters["comment"] = _comment
    environment.filters["listed"] = _listed
    environment.filters["hex"] = _hex
    filters: dict[str, Any] = environment.filters
    for gone in ("safe", "escape", "e", "forceescape", "tojson", "pprint"):
        filters.pop(gone, None)  # they quote for HTML: nobody here wants that
    return environment

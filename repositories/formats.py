"""The package formats, each in a file of its own."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from repositories.format import PackageFormat

FORMATS = {"deb": "repositories.deb.format:DebFormat", "rpm": "repositories.rpm.format:RpmFormat"}
"""By name, its class."""


@cache
def package_format(name: str) -> PackageFormat:
    module, _, attribute = FORMATS[name].partition(":")
    found: PackageFormat = getattr(import_module(module), attribute)()
    assert name == found.NAME
    return found

"""How packages are built in a builder VM: each format in a file of its own.

``deb``, ``rpm``: the formats (``builds.packages.order.BuildFormat``). ``guest``: what is done for all of
them. ``isolation``: how a build is kept apart from the VM, and within its limits."""

from __future__ import annotations

from importlib import import_module

from builds.packages.order import BuildFormat

BUILD_FORMATS = {
    "deb": "builds.packages.formats.deb:DebBuilds",
    "rpm": "builds.packages.formats.rpm:RpmBuilds",
}
"""By name, its class."""


def build_format(name: str) -> BuildFormat:
    module, _, attribute = BUILD_FORMATS[name].partition(":")
    found: BuildFormat = getattr(import_module(module), attribute)()
    assert name == found.NAME
    return found

"""Farm files have the kinds of sections here that they have on the command line."""

import cli.composition  # noqa: F401

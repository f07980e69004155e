"""git on a repository of this machine that the admin named, whoever owns its files."""

from __future__ import annotations

import os
from collections.abc import Mapping


def reading(more: Mapping[str, str], *, protocols: str | None = "none") -> dict[str, str]:
    """The environment for reading a repository: it is trusted, but no program that its configuration
    names is run (its owner may be somebody else), and nothing is written where somebody works. ``more``:
    further settings of git-config(1), as strong as ``-c``. ``protocols``: those that git may fetch by,
    with colons between them; None: any. By none a partial clone fetches nothing that it lacks, by
    whatever program it is said to be fetched with.

    safe.directory is "*", because what git compares it with has changed between versions: to some,
    git-daemon's repository is called "."."""
    settings = {
        "safe.directory": "*",
        "safe.bareRepository": "all",
        "core.fsmonitor": "false",
        "core.hooksPath": os.devnull,
    }
    allowed = {"GIT_ALLOW_PROTOCOL": protocols} if protocols is not None else {}
    return {**git_config({**settings, **more}), **allowed, "GIT_OPTIONAL_LOCKS": "0"}


def git_config(values: Mapping[str, str]) -> dict[str, str]:
    """Variables of the environment with these settings, for one git command: git-config(1),
    ENVIRONMENT."""
    env = {"GIT_CONFIG_COUNT": str(len(values))}
    for index, (key, value) in enumerate(values.items()):
        env[f"GIT_CONFIG_KEY_{index}"] = key
        env[f"GIT_CONFIG_VALUE_{index}"] = value
    return env

"""Why a step failed, judged by what it printed: whose turn it is now.

source          the authors of what is built: it does not compile, its tests fail
dependencies    packages it needs are missing or don't fit
environment     the VM as it is: full disk, no memory, a tool missing
network         it wanted something from a network that it doesn't reach, or that gave no answer
infrastructure  the farm: a VM or connection was lost, a machine or its disk isn't as it must be
time-out        the step's own limit
"""

from __future__ import annotations

import re
from typing import Final

from inventory.model import FailureClass

# What a guest without a network meets, whatever it wanted from there.
_UNREACHED: Final = (
    r"Temporary failure (?:in name resolution|resolving)|Could not resolve|Name or service not known"
    r"|Network is unreachable|No route to host"
)
# In order: what explains the lines that follow it comes first (a full disk makes compilers fail too).
_PATTERNS: Final[tuple[tuple[FailureClass, str], ...]] = (
    ("infrastructure", r"fatal: unable to connect to 127\.0\.0\.1"),  # the offered source is gone
    ("infrastructure", r"blk_update_request: I/O error|Input/output error|EXT4-fs error"),
    ("environment", r"No space left on device|Disk quota exceeded"),
    ("environment", r"installing package \S+ needs \d+\w+ (?:more )?(?:space )?on the"),
    ("environment", r"Cannot allocate memory|[Oo]ut of memory|virtual memory exhausted|std::bad_alloc"),
    ("environment", r"internal compiler error: Killed|fatal error: Killed signal|^Killed$|oom-kill"),
    ("environment", r"Read-only file system|Too many open files|Resource temporarily unavailable"),
    ("dependencies", r"Failed build dependencies|Unmet build dependencies|unmet dependencies"),
    ("dependencies", r"error: Failed dependencies|nothing provides|conflicts with file from package"),
    ("dependencies", r"\bis needed by \S+|Unable to locate package|Unable to find a match"),
    ("dependencies", r"No match for argument|held broken packages|Depends: .* but it is not"),
    ("dependencies", r"dpkg-checkbuilddeps: error|No package '[^']+' found|Could NOT find \w+"),
    ("dependencies", r"ld: cannot find -l\S+"),
    ("dependencies", r"fatal error: \S+: No such file or directory\n[^\n]*#\s*include\s*<"),
    ("dependencies", r"^Can't locate \S+\.pm in @INC|^dh: error: unable to load addon"),
    ("dependencies", r"ModuleNotFoundError: No module named|Cannot find module '"),
    ("network", _UNREACHED),
    ("network", r"Connection timed out|Connection refused|Could not connect to|Failed to connect to"),
    ("network", r"certificate verify failed"),
    ("environment", r"Permission denied|Operation not permitted|dubious ownership"),
    ("environment", r"dpkg-buildpackage: error: fakeroot not found"),
    ("environment", r"command not found|: not found$|env: .*: No such file or directory"),
    ("environment", r"make(?:\[\d+\])?: [\w.+-]+: No such file or directory$|Error 127$"),
    ("source", r"^.*:\d+(?::\d+)?: (?:fatal )?error: .*$|undefined reference to"),
    ("source", r"fatal: (?:reference is not a tree|couldn't find remote ref|bad revision)"),
    ("source", r"fatal: (?:invalid reference|ambiguous argument)|error: pathspec|not our ref"),
    ("source", r"patch does not apply|Hunk #\d+ FAILED"),
    ("source", r"AssertionError|Traceback \(most recent call last\)|\bFAILED\b|^not ok \d"),
    ("source", r"^(?:dh_\w+|dh|dpkg-(?!buildpackage)\w+): error: (?!.*returned exit (?:code|status))"),
    ("source", r"^(?!dpkg-buildpackage|dh_|rpmbuild)[\w.+-]+: (?:fatal )?error: \S"),
    ("source", r"^error: (?!Bad exit status)\S.*$"),
    ("source", r"^(?!make|dh_|dpkg-)[\w./+-]+: \S.*$(?=\n(?:make(?:\[\d+\])?: \*\*\*|error: Bad exit))"),
    ("source", r"make(?:\[\d+\])?: \*\*\*"),
    ("source", r"^dh_\w+: error: .* returned exit (?:code|status)"),
    ("source", r"error: Bad exit status from"),
    ("source", r"^dpkg-buildpackage: error: "),
)
# apt-get(8), dnf(8) and pip(1) with no repository that they reach.
_NOT_BROUGHT: Final = (
    r"|^E: Unable to (?:locate package|fetch some archives)|has no installation candidate"
    r"|Unable to find a match|No match for argument|Failed to download metadata"
    r"|No matching distribution found"
)
_WANTED = re.compile(_UNREACHED + _NOT_BROUGHT, re.MULTILINE)
_OUTWEIGHS: Final = ("infrastructure", "environment")  # a full disk is full without a network, too
_COMPILED = tuple((kind, re.compile(pattern, re.MULTILINE)) for kind, pattern in _PATTERNS)


def classify(
    output: str,
    *,
    status: int,
    timed_out: bool = False,
    declared: FailureClass | None = None,
    offline: bool = False,
) -> tuple[FailureClass, str]:
    """The class, and the line of the output that tells it ("" if none does). ``declared``: the step's
    own ``failure``. ``offline``: the VM has no network and no package repository, so that whatever is
    missing after it was wanted from there is missing for that, and not for its authors. A lost
    connection never comes here: that is infrastructure."""
    if timed_out:
        return "time-out", ""
    for kind, pattern in _COMPILED:
        if match := pattern.search(output):
            wanted = _WANTED.search(output) if offline and kind not in _OUTWEIGHS else None
            if wanted and not declared:
                return "network", _line(output, wanted.start())
            return declared or kind, _line(output, match.start())
    if declared:
        return declared, ""
    if status in (126, 127, 137):  # can't execute, not found (sh(1)); killed, so most likely for memory
        return "environment", ""
    return "source", ""


def _line(output: str, at: int) -> str:
    """The line at that place. If it only announces ("Failed build dependencies:"), the next line,
    too."""
    lines = output[output.rfind("\n", 0, at) + 1 :].splitlines()
    first = lines[0].strip()
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1].strip()}"
    return first[:300]

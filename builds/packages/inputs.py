"""All that a package's build is made from, and its digest. Equal digest: nothing is to be built.

What is installed for a build is known when it has run. So the digest has two parts: what is asked for
(known before), and what was installed (compared, as far as it is from the farm's own repository, with
what that would give now)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledPackage:
    """A package that was installed in the builder when the build began. ``sha256``: of its file, where
    it came from the farm's repository; "": it was in the template, or came from elsewhere. ``listed``:
    the sha256 that the package manager's lists had of it, where it was installed for this build; "": it
    was there before; None: nobody knows which of the two."""

    name: str
    version: str
    architecture: str
    sha256: str = ""
    listed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInputs:
    """``tree``: the source's (``SourceState.tree``). ``version``: that it is built as. ``recipe``:
    sha256 of what is done in the builder. ``template``: the builder's disk: its generation and the
    sha256 of that, and the checkpoint. ``revision``: the name that GIT_REVISION was, where that has
    cleared the graph, with the number of times that it has been cleared; "": it doesn't count.
    ``options``: ``PackageSource``'s own, as text. ``downloads``: sha256 by name."""

    format: str
    tree: str
    version: str
    recipe: str
    template: str
    architecture: str
    revision: str = ""
    bootstrap: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    downloads: Mapping[str, str] = field(default_factory=dict)
    installed: tuple[InstalledPackage, ...] = ()

    @property
    def asked(self) -> str:
        """Digest of all that is known before the build: 64 hexadecimal digits."""
        values = asdict(self)
        del values["installed"]
        return _digest(values)

    @property
    def digest(self) -> str:
        """Digest of everything."""
        return _digest(asdict(self))

    @property
    def ours(self) -> Mapping[str, str]:
        """What was installed from the farm's repository: sha256 by name."""
        return {one.name: one.sha256 for one in self.installed if one.sha256}


_WORDS = {
    "format": "its format", "tree": "the source", "version": "the version",
    "recipe": "what is done to build",
    "template": "the builder's template", "architecture": "the architecture", "revision": "GIT_REVISION",
    "bootstrap": "the bootstrap profiles", "profiles": "the build profiles", "options": "the options",
    "downloads": "the downloads",
}  # fmt: skip


def differences(before: BuildInputs, now: BuildInputs) -> Iterator[str]:
    """What differs of that which is asked for, in words, one line each."""
    for key, words in _WORDS.items():
        one, other = getattr(before, key), getattr(now, key)
        if one == other:
            continue
        if key == "revision":
            yield f"{words} is another, which has cleared the graph since"
        else:
            yield f"{words}: {_shown(key, one)} before, {_shown(key, other)} now"


def _shown(key: str, value: object) -> str:
    if key in ("tree", "recipe"):
        return str(value)[:12]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {sum_[:12]}" for name, sum_ in sorted(value.items())) or "none"
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return str(value) or "none"


def _digest(values: Mapping[str, object]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

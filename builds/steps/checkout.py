"""checkout: the source at the commit that is built, in a directory of a VM."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from builds.step_kind import StepKind
from inventory.base import at_key
from inventory.sizes import format_duration

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.fields import Label, Line
    from inventory.model import Farm

# The repository there mirrors the source's branches and tags, so that a revision means there what it
# means in the source; only HEAD, which says here what was built last, must be looked up under another
# name. It works on the first run and on later ones, after branches or tags were moved or removed, and
# for a commit that no branch holds, if the source gives it away. Submodules are cloned anew: where they
# came from the last time may be gone. The guests may be emulated, where starting a process costs tens
# of milliseconds: few are started.
_CHECKOUT = """\
git init -q -- "$into"
cd -- "$into"
git fetch -q -f -p -u --update-shallow --no-auto-maintenance "$SOURCE_URL" \\
    '+HEAD:refs/source/HEAD' '+refs/heads/*:refs/heads/*' '+refs/tags/*:refs/tags/*'
case $GIT_REVISION in
    HEAD | HEAD[~^@]*) revision=refs/source/$GIT_REVISION ;;
    *) revision=$GIT_REVISION ;;
esac
git checkout -q -f --detach "$revision" -- 2>/dev/null || {
    git fetch -q --update-shallow --no-auto-maintenance "$SOURCE_URL" "$GIT_REVISION"
    git checkout -q -f --detach FETCH_HEAD --
}
if [ -f .gitmodules ]; then
    git submodule --quiet deinit -f --all
    rm -rf .git/modules
    git submodule --quiet update --init --recursive
fi
git --no-pager log -1 --format='source: %H %s'
"""


@dataclass(frozen=True, kw_only=True)
class CheckoutStep(StepKind):
    """Bring the source, at the commit that is built, to a VM: a git repository with its branches and
    tags, and submodules. Nothing else of the directory is removed."""

    KIND: ClassVar = "checkout"
    VMS: ClassVar = ("checkout",)

    checkout: Label
    """The VM."""
    into: Line = "src"
    """The directory, made if it is missing; relative to the login's home, or absolute."""

    def __post_init__(self) -> None:
        if self.into.strip("/.") == "" or ".." in self.into.split("/"):
            raise at_key("into", "a directory of its own is expected, such as src")

    @property
    def limit(self) -> float | None:
        return None  # what runs there is ended there

    @property
    def scripts(self) -> tuple[str, ...]:
        return (f"into={shlex.quote(self.into)}\n{_CHECKOUT}",)

    def refusal(self, farm: Farm) -> tuple[str, str] | None:
        return None if farm.source else ("checkout", "the farm file has no 'source' to check out")

    def does(self) -> str:
        return f"check the source out into {self.into}, at most {format_duration(self.timeout)}"

    def details(self) -> Mapping[str, str]:
        return {"into": self.into}

    async def carry_out(self, work: StepRun) -> None:
        from builds.scripts import run_scripts

        await run_scripts(work, self.checkout, self.scripts, timeout=self.timeout)

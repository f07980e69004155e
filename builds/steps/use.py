"""use: a VM is pointed to a generation of a package repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from builds.repository_place import RepositoryPlace
from builds.step_kind import StepKind
from inventory.base import at_key
from inventory.sizes import format_duration

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.errors import FarmhandError
    from inventory.fields import Label
    from inventory.model import FailureClass, Farm
    from repositories.repository import Repository

# Run by root. $NAME: the file's; $MARK: a line of those that this build wrote, all others of ours go.
_WRITE = r"""
umask 022
mkdir -p "$parts"
for f in "$parts"/farmhand-*"$END"; do
  [ ! -e "$f" ] || grep -qxF "$MARK" "$f" || rm -f -- "$f"
done
printf '%s\n%s\n' "$MARK" "$STANZA" >"$parts/.$NAME"
mv -f -- "$parts/.$NAME" "$parts/$NAME$END"
"""
# apt.conf(5): where its files are is a setting. Only this list is read anew, and all others stay.
_APT = r"""
command -v apt-get >/dev/null || { echo "there is no apt-get here"; exit 127; }
eval "$(apt-config shell parts Dir::Etc::sourceparts/d)"
END=.sources
WRITE
apt-get update -q -o Dir::Etc::sourcelist="$parts/$NAME$END" -o Dir::Etc::sourceparts=/dev/null \
  -o APT::Get::List-Cleanup=0 -o APT::Update::Error-Mode=any
"""
_DNF = r"""
tool=$(command -v dnf || command -v yum) || { echo "there is no dnf or yum here"; exit 127; }
parts=/etc/yum.repos.d
END=.repo
WRITE
id="$REPOSITORY-$CHANNEL"
"$tool" -q makecache --disablerepo='*' --enablerepo="$id" --setopt="$id.skip_if_unavailable=False"
"""
_SCRIPTS = {"deb": _APT.replace("WRITE", _WRITE), "rpm": _DNF.replace("WRITE", _WRITE)}


@dataclass(frozen=True, kw_only=True)
class UseStep(StepKind):
    """Point a VM to the generation of a package repository that a channel or a flow has when the build
    begins, or that an earlier step of the build published to it. All its steps get the same one; the
    record says which."""

    KIND: ClassVar = "use"
    VMS: ClassVar = ("vm",)

    use: Label
    """The repository."""
    vm: Label
    """The VM."""
    channel: Label | None = None
    """The channel."""
    flow: Label | None = None
    """In place of a channel: the flow."""

    def __post_init__(self) -> None:
        if (self.channel is None) == (self.flow is None):
            raise at_key("", "a step uses a 'channel' or a 'flow', one of them", "channel", "flow")

    @property
    def uses(self) -> RepositoryPlace:
        return RepositoryPlace(self.use, self.channel or "", self.flow or "")

    @property
    def needs_root(self) -> bool:
        return True

    def refusal(self, farm: Farm) -> tuple[str, str] | None:
        if self.use not in farm.repositories:
            return "use", f"no repository is called {self.use}"
        if self.channel and self.channel not in farm.repositories[self.use].channels:
            return "channel", f"repository {self.use} has no channel {self.channel}"
        return None

    def does(self) -> str:
        limit = format_duration(self.timeout)
        return f"packages of {self.uses}, as it is when the build begins, at most {limit}"

    def details(self) -> Mapping[str, str]:
        return {"repository": str(self.uses)}

    async def carry_out(self, work: StepRun) -> None:
        from dataclasses import replace

        from builds.record import UsedGeneration
        from builds.step_run import StepFailed
        from host.printable import last_line
        from provision.guest.ssh_connection import in_thread
        from provision.package_repositories import client_source
        from repositories.repository import Repository

        repository, generation = await in_thread(lambda: work.repositories.generation(self))
        url = repository.settings.url
        if not url:
            url = await work.machines.offer(self.vm, repository.layout.top)
        reached = Repository(replace(repository.settings, url=url))
        source = client_source(reached, generation.channel, generation, plain=True)
        work.repositories.note(
            UsedGeneration(
                repository=repository.name, channel=generation.channel, generation=generation.sequence,
                url=source.url if repository.settings.url else "", vm=self.vm, step=self.name,
            )
        )  # fmt: skip
        work.details["generation"] = f"{generation.sequence} of {generation.channel}"
        work.log.say(
            f"{self.vm} gets generation {generation.sequence} of {repository.name}: {source.url}"
        )
        connection = await work.machines.connection(self.vm)
        said: list[bytes] = []

        def keep(data: bytes) -> None:
            said.append(data)
            work.log.write(data)

        with work.meter.guest():
            done = await connection.run(
                _SCRIPTS[repository.settings.format],
                env={
                    "NAME": f"farmhand-{repository.name}", "REPOSITORY": repository.name,
                    "CHANNEL": generation.channel, "STANZA": repository.format.stanza(source).rstrip(),
                    "MARK": f"# farmhand: build {work.artifacts.parent.name}", "LC_ALL": "C.UTF-8",
                },
                timeout=max(self.timeout - work.seconds, 0.001),
                log=keep,
                most=work.log.room,
                root=True,
            )  # fmt: skip
        work.exit = done.status
        if done.status:
            why = last_line(b"".join(said).decode(errors="replace"), 300) or f"status {done.status}"
            raise StepFailed(
                "time-out" if done.timed_out else "infrastructure",
                f"{self.vm} does not take {source.url}: {why}",
                exit=done.status,
                remedy=_remedy(repository),
            )

    def class_of(self, error: FarmhandError) -> FailureClass:
        from inventory.errors import NotFound

        return "source" if isinstance(error, NotFound) else super().class_of(error)


def _remedy(repository: Repository) -> str:
    if repository.settings.url:
        return f"see whether the VM reaches {repository.settings.url}, and who serves it"
    return ""

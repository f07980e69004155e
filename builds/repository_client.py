"""A VM, pointed to a generation of a package repository: its apt or dnf reads that one's list."""

from __future__ import annotations

from dataclasses import replace

from builds.machines import Machines
from builds.step_run import StepFailed, StepLog
from host.printable import last_line
from provision.package_repositories import client_source
from repositories.format import ClientSource
from repositories.generation import Generation
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


def list_name(repository: Repository) -> str:
    """What the VM's list of it is called: its file, without the end."""
    return f"farmhand-{repository.name}"


async def reached_by(
    machines: Machines, vm: str, repository: Repository, at: Generation
) -> ClientSource:
    """What the VM is told of that generation. Where nobody said the repository's URL, it is offered
    through the VM's connection. Unsupported: its sshd forwards no ports."""
    url = repository.settings.url or await machines.offer(vm, repository.layout.top)
    reached = Repository(replace(repository.settings, url=url))
    return client_source(reached, at.channel, at, plain=True)


async def point_to(
    machines: Machines, vm: str, repository: Repository, source: ClientSource, *, build: str,
    log: StepLog, seconds: float,
) -> None:  # fmt: skip
    """Have the VM's package manager read that source, and no other one of ours that another build than
    ``build`` told it. StepFailed."""
    connection = await machines.connection(vm)
    said: list[bytes] = []

    def keep(data: bytes) -> None:
        said.append(data)
        log.write(data)

    with machines.meter.guest():
        done = await connection.run(
            _SCRIPTS[repository.settings.format],
            env={
                "NAME": list_name(repository), "REPOSITORY": repository.name,
                "CHANNEL": source.channel, "STANZA": repository.format.stanza(source).rstrip(),
                "MARK": f"# farmhand: build {build}", "LC_ALL": "C.UTF-8",
            },
            timeout=max(seconds, 0.001),
            log=keep,
            most=log.room,
            root=True,
        )  # fmt: skip
    if done.status:
        why = last_line(b"".join(said).decode(errors="replace"), 300) or f"status {done.status}"
        url = repository.settings.url
        raise StepFailed(
            "time-out" if done.timed_out else "infrastructure",
            f"{vm} does not take {source.url}: {why}",
            exit=done.status,
            remedy=f"see whether the VM reaches {url}, and who serves it" if url else "",
        )

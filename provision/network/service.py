"""What farmhand knows of a network service: one class for each, whose fields are its section of the farm
file, in one file of ``provision.network.services``.

What renders, applies, undoes, verifies and diagnoses asks the services that a farm uses, and knows none
by its name. A new one: its file, its templates, a line in the registry. Each command on a farm imports
the files of its services, so what is at their top is light.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from inventory.services import ServiceSection
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.model import Farm
    from provision.network.changes import FileChange
    from provision.network.document import Document
    from provision.network.records import RecordServer, Zones
    from provision.network.render import Renderer
    from provision.network.view import View, VmRow


@dataclass(frozen=True, slots=True)
class Checker:
    """A command that succeeds where a daemon's configuration is right. ``shadow``: directories that it
    writes in."""

    argv: tuple[str, ...]
    shadow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApplyStep:
    """Something a daemon is told; raises if it refuses or dies. ``text``: what is done, for plan,
    journal and screen."""

    service: str
    text: str
    run: Callable[[Runner], None]


class Silent(Exception):
    """Nobody answered."""

    def __init__(self, why: object = "") -> None:
        super().__init__(f"no answer ({why})" if why else "no answer")


class NotAsked(Exception):
    """It can't be asked from here: why."""


@dataclass(frozen=True, slots=True)
class Question:
    """``ask`` gives what is seen; ``expected`` what should be, told beforehand or asked for as well.
    Either may raise Silent; ``ask`` NotAsked."""

    service: str
    vm: str
    text: str
    expected: Callable[[], str]
    ask: Callable[[], str]


@dataclass(frozen=True, slots=True)
class ZoneFile:
    """A zone of ours, and its file: what its templates see as ``zone``."""

    name: Word
    path: Word
    serial: int
    template: str
    records: tuple[tuple[Word, Word], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Service(ServiceSection, ABC):
    """One network service, with its section's values."""

    TOOLS: ClassVar[Mapping[str, str]] = {}
    """Commands that check it or tell it, each with its Debian package."""
    STRINGS: ClassVar[Mapping[str, Callable[[str], Word]]] = {}
    """How its formats quote a text, by the template; others have no quoted strings."""
    CAN_SHARE: ClassVar[tuple[str, ...]] = ()
    """Keys of files that may be the admin's, with a block of ours in each (`own: block`)."""
    ANSWERS_DHCP: ClassVar[bool] = False
    """It answers on the network's bridge."""
    TOLD_LAST: ClassVar[bool] = False
    """What it was told can't be taken back wholly: nothing may fail after it."""

    @abstractmethod
    def documents(self, r: Renderer) -> Iterator[Document]:
        """Its files, in the order they are written."""

    def zones(self, _r: Renderer) -> Sequence[ZoneFile]:
        """Those that have serial numbers, forward first."""
        return ()

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        """``documents``: those that are to be looked at."""
        yield from ()

    def steps(self, _farm: Farm, _changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        """What to tell it after these changes of its files, live where that can be. Of the changes'
        inverse: what puts it back."""
        yield from ()

    def put_back(self, _runner: Runner, back: FileChange) -> FileChange:
        """An old file as it is to come back, once the daemon was told of the new one. ``back``: as it
        was."""
        return back

    def questions(self, _farm: Farm, _view: View, _rows: Mapping[str, VmRow]) -> Iterator[Question]:
        """For network-verify, as its clients ask. ``rows``: of the VMs meant, by their names."""
        yield from ()

    def not_live(self) -> Iterator[str]:
        """Why it can't take one VM more without a reload or restart, for doctor."""
        yield from ()

    # ---- Services that keep VMs apart, so that a few are brought in step without a look at the others

    def host_files(self, _farm: Farm) -> tuple[tuple[str, str], ...]:
        """What the paths of files begin and end with that its hosts are spread over, a number between
        (``provision.network.render.sharded``)."""
        return ()

    @property
    def including(self) -> tuple[str, ...]:
        """Paths of files that name those."""
        return ()

    def refuses_by_itself(self, _farm: Farm) -> bool:
        """Whether its checker has nothing to say of those files that the daemon won't, which then keeps
        what it has."""
        return False

    @property
    def live_records(self) -> bool:
        """Whether records are changed one by one in the server, which has the files. Of a farm's
        services one may be so."""
        return False

    def record_server(self, _farm: Farm) -> RecordServer:
        """Where ``live_records`` are changed. WrongState: there is no key to it."""
        raise NotImplementedError

    def records(self, _view: View) -> Zones:
        """Those that the server should have."""
        raise NotImplementedError


def services(farm: Farm) -> tuple[Service, ...]:
    """Those that the farm uses, in the order they are applied."""
    return cast("tuple[Service, ...]", farm.services.sections)

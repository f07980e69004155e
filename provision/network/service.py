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
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from inventory.model import ServiceSection
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError
    from inventory.model import Farm
    from provision.network.document import Document
    from provision.network.file_change import FileChange
    from provision.network.records import RecordServer, Zones
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow


@dataclass(frozen=True, slots=True)
class Checker:
    """A command that succeeds if a daemon's configuration is right. ``shadow``: directories that it
    writes to."""

    argv: tuple[str, ...]
    shadow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inclusion:
    """How a daemon comes to read ``path``, a file of ours: ``main``, its own configuration, includes it.
    ``checker``: a command that reads ``main``. ``remedy``: what makes it include the file. ``at_boot``:
    only a boot needs it, and a command that succeeds if ``main`` is read then."""

    path: str
    main: str
    checker: Checker
    remedy: str
    at_boot: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApplyStep:
    """Something a daemon is told. ``run`` raises if it refuses or dies. ``text``: what is done, for
    plan, journal and screen; it begins with the service's name. ``restarts``: the daemon ends and begins
    again, so it may stay dead: such a step comes last."""

    service: str
    text: str
    run: Callable[[Runner], None]
    restarts: bool = False
    alive: tuple[str, ...] = ()
    """The command that succeeds while the daemon runs."""


@dataclass(frozen=True, slots=True)
class Unserved:
    """Something that a file of ours says and its daemon hasn't: ``text``. ``step``: what gives it
    that."""

    text: str
    step: ApplyStep


class Silent(Exception):
    """Nobody answered."""

    def __init__(self, why: object = "") -> None:
        super().__init__(f"no answer ({why})" if why else "no answer")


class NotAsked(Exception):
    """The question can't be asked from here; the text says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of network-verify. ``ask`` returns what a client sees; it may raise Silent or NotAsked.
    ``expected`` returns what it should see; it may raise Silent."""

    service: str
    vm: str
    text: str
    expected: Callable[[], str]
    ask: Callable[[], str]


@dataclass(frozen=True, slots=True)
class ZoneFile:
    """One of our zones and its file. Templates see it as ``zone``."""

    name: Word
    path: Word
    serial: int
    template: str
    records: tuple[tuple[Word, Word], ...] = ()


class OtherNames(Protocol):
    """What a second farm on this machine is called, and what it has in place of the first one's."""

    @property
    def domain(self) -> str:
        """The network's; "": it has none."""

    @property
    def same_subnet(self) -> bool:
        """Whether its addresses are in the first one's subnet."""

    def path(self, path: str) -> str: ...

    def link(self, name: str) -> str:
        """In place of a network interface."""

    def port(self, port: int) -> str:
        """In place of a port of this machine: one that nobody has."""


@dataclass(frozen=True, slots=True)
class Apart:
    """What the section of a second farm on this machine has in place of the first one's: values, as
    text, by their keys. ``note``: what else it takes that both are served; "": nothing."""

    keys: Mapping[str, str]
    note: str = ""


def one_file(path: str) -> str:
    """The note of a service that serves two farms by one file alone."""
    return (
        f"{path} is its daemon's one file: make it a file of yours, with 'own: block' here and in the "
        "first farm's file, which then share it"
    )


class RecordKeeper(Protocol):
    """A service whose server owns the zones' files, and takes records one by one."""

    NAME: ClassVar[str]

    def record_server(self, farm: Farm) -> RecordServer:
        """The server. WrongState if there is no key to it."""

    def records(self, view: View) -> Zones:
        """The records that the server should have."""


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
    DROP_INS: ClassVar[tuple[str, ...]] = ()
    """Keys of files in directories that its daemon reads wholly: nothing can be kept beside them."""
    MAKES_NETWORK: ClassVar[bool] = False
    """The network is the farm's own: no other farm is in it, or has its subnet."""
    APART: ClassVar[tuple[str, ...]] = ("config", "own")
    """Keys that may differ between two farms that are otherwise alike, for each is to have its own."""
    READS_BY_ITSELF: ClassVar[bool] = False
    """It takes a file as soon as that is written, before it is told."""
    TOLD_LAST: ClassVar[bool] = False
    """What it was told can't be taken back wholly: as little as can be may fail after it."""

    @abstractmethod
    def documents(self, r: Renderer) -> Iterator[Document]:
        """The service's files, in the order they are written."""

    def zones(self, _r: Renderer) -> Sequence[ZoneFile]:
        """Those that have serial numbers, forward first."""
        return ()

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        """The commands that check these documents."""
        yield from ()

    def steps(self, _farm: Farm, _changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        """What to tell the daemon after these changes of its files; live where it can. Given the inverse
        of the changes, what takes them back."""
        yield from ()

    # ---- Two farms on one machine

    @property
    def whole(self) -> tuple[str, ...]:
        """Keys of what another farm can't have, too: files that are all ours, a daemon's sockets."""
        shared = self.CAN_SHARE if self.own_block else ()
        return tuple(key for key in self.FILES if key not in shared)

    @property
    def own_block(self) -> bool:
        """Whether its files are the admin's, with a block of ours in each."""
        return getattr(self, "own", "file") == "block"

    def apart(self, other: OtherNames) -> Apart:
        """What a second farm has, so that the two don't meet."""
        return Apart({key: other.path(getattr(self, key)) for key in self.whole})

    def variables(self, _farm: Farm) -> Iterator[tuple[str, str]]:
        """VMs, and what each is called in a file that farms share."""
        yield from ()

    # ---- What doctor, a plan and an apply look at before anything is touched, and network-verify too

    def inclusion(self) -> Inclusion | None:
        """How its daemon comes to read a file of ours that isn't its own configuration."""
        return None

    def missing(
        self, _farm: Farm, _files: Sequence[FileChange], _runner: Runner
    ) -> Iterator[FarmhandError]:
        """All that would keep it from taking its files, and that no step of ours puts right: its daemon
        is stopped, a port is another's. ``files``: those looked at, changed or not. What it raises
        counts, too."""
        yield from ()

    def stopped(self, _farm: Farm, _runner: Runner) -> Iterator[Unserved]:
        """If its daemon is stopped, and a step of ours starts it."""
        yield from ()

    def unserved(self, _farm: Farm, _files: Sequence[FileChange], _runner: Runner) -> Iterator[Unserved]:
        """What its daemon, which isn't stopped, hasn't of these files, which are as they should be."""
        yield from ()

    def is_live(self, _farm: Farm, _runner: Runner) -> bool:
        """Where it couldn't be told that something of ours goes: whether that may still be in use. Not
        so if its daemon is dead, which then finds its files without it. An error: that can't be
        told."""
        return True

    def put_back(self, _runner: Runner, back: FileChange) -> FileChange:
        """What to write when ``back``, an old file, is put back after the daemon was told of the new
        one."""
        return back

    def questions(self, _farm: Farm, _view: View, _rows: Mapping[str, VmRow]) -> Iterator[Question]:
        """Questions for network-verify, asked as the service's clients ask. ``rows``: the VMs meant, by
        name."""
        yield from ()

    def not_live(self) -> Iterator[str]:
        """Reasons, for doctor, why one VM more takes a reload or restart; none: it doesn't."""
        yield from ()

    # ---- Services that keep VMs apart, so that a few are brought in step without a look at the others

    def host_files(self, _farm: Farm) -> tuple[tuple[str, str], ...]:
        """The beginning and end of each path that its hosts are spread over; between them stands a
        number (``provision.network.render.sharded``)."""
        return ()

    @property
    def including(self) -> tuple[str, ...]:
        """Paths of the files that include those of ``host_files``."""
        return ()

    def refuses_by_itself(self, _farm: Farm) -> bool:
        """True if the daemon itself finds all that its checker would find in those files, and then keeps
        what it has."""
        return False

    @property
    def live_records(self) -> RecordKeeper | None:
        """Where its records are changed one by one; None: in its files. At most one service of a farm
        does that."""
        return None


def services(farm: Farm) -> tuple[Service, ...]:
    """The services that the farm uses, in the order they are applied."""
    return cast("tuple[Service, ...]", farm.services.sections)

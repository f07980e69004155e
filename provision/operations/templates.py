"""Golden disks: built from a recipe or imported, sealed as a new generation, listed, removed.

A built image is kept in the cache by the hash of all that made it. So building the same template again,
for another farm or after a destroy, only makes a link. A sealed generation never changes, and its number
is never used again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from host.documents import damaged, json_object, made, read_file
from host.file_lock import FileLock
from host.files import make_directory, make_file, own_directory, write_atomic
from host.paths import cache_dir
from hypervisors.api import Template, check_template
from hypervisors.ownership import FarmIdentity
from inventory.errors import (
    Call,
    NoSpace,
    NotFound,
    UnknownName,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.model import TemplateSource
from inventory.sizes import about
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.plan import Job, Plan, alone
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.leftovers import discard_unowned
from provision.template_recipe import content_of, hosts_of, origin, recipe_of, storing_hosts

if TYPE_CHECKING:
    from hypervisors.disks.contents import Contents
    from provision.guest.debian import Recipe
    from provision.site import Site

CACHE_LIFE = 30 * 24 * 3600
"""Seconds that a built image is used again; after that its packages have aged enough to build anew."""
_SPARE = 2**26
"""Bytes that an import may take besides the content."""


@dataclass(frozen=True, slots=True)
class BuildFacts(Facts):
    """``key``: the hash of all that makes the image."""

    recipe: str
    key: str


@dataclass(frozen=True, slots=True)
class LabelFacts(Facts):
    """``label``: of a generation, such as base@2."""

    label: str


class _BuildActivity(Activity[BuildFacts]):
    """The making of an image for the cache. Without its note it isn't one, and the next build clears it
    away."""

    name = "template-build"
    facts = BuildFacts

    def recover(self, _site: Site, _record: Record, _facts: BuildFacts) -> Recovery[BuildFacts]:
        return Recovery("noted")


class _LabelActivity(Activity[LabelFacts]):
    facts = LabelFacts

    def recover(self, site: Site, _record: Record, _facts: LabelFacts) -> Recovery[LabelFacts]:
        return Recovery("what was left of it is removed", lambda _: discard_unowned(site))


class _SealActivity(_LabelActivity):
    """On each host the generation is sealed or it isn't. Its number is never used again."""

    name = "template-seal"


class _RemoveActivity(_LabelActivity):
    """On each host the generation is there or it is gone."""

    name = "template-remove"


BUILD = _BuildActivity()
SEAL = _SealActivity()
REMOVE = _RemoveActivity()


@dataclass(frozen=True, slots=True)
class SealResult:
    """``template``: the new generation, such as base@2, on ``hosts``. ``sha256`` of the disk, and
    ``ref`` as its store calls it: None before it is sealed. ``same``: it is no new one, but the newest,
    which has the very same content."""

    template: str
    hosts: tuple[str, ...]
    sha256: str | None = None
    ref: str | None = None
    same: bool = False


@dataclass(frozen=True, slots=True)
class RemoveResult:
    """``template``: the generation that goes."""

    template: str


@dataclass(frozen=True, slots=True)
class TemplateBuild(Operation[SealResult]):
    """Build a template of the farm and seal it as a new generation on each host that has VMs of it. A
    disk of the same recipe is taken from the cache, unless ``fresh``: then its packages are the newest
    there are. Where the newest generation is of the same recipe and the same packages, version by
    version, nothing is sealed.

    Errors: NotFound, UsageError (it is an imported one), Busy, NoSpace, Unsupported, CommandFailed."""

    name = "template-build"
    template: str
    fresh: bool = False

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (_lock_of(self.template),)

    def doing(self, _vms: Sequence[str]) -> str:
        return f"{self.name} {self.template}"

    def plan(self, run: Run) -> Plan[SealResult]:
        return _plan(_building(run.site, self.template, fresh=self.fresh))


@dataclass(frozen=True, slots=True)
class TemplateImport(Operation[SealResult]):
    """Seal an existing disk image (``image``; the farm file's if that is not given) as a new generation
    of the template: raw, qcow2, vmdk, vdi, vhd or vhdx. The image itself is left as it is. Where the
    newest generation is of the same image, nothing is sealed.

    Errors: NotFound, UsageError (it is a built one; no disk image, or none with a system; it refers to
    other files), Unsupported (nothing here could start it), WrongState (it was replaced or written to
    meanwhile), Busy (it is in use, too), NoSpace."""

    name = "template-import"
    template: str
    image: Path | None = None

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (_lock_of(self.template),)

    def doing(self, _vms: Sequence[str]) -> str:
        return f"{self.name} {self.template}"

    def plan(self, run: Run) -> Plan[SealResult]:
        return _plan(_importing(run.site, self.template, self.image))


@dataclass(frozen=True, slots=True)
class TemplateRemove(Operation[RemoveResult]):
    """Remove one generation, such as base@2, from every host. Errors: WrongState while disks depend on
    it (it names them), NotOurs (it is another farm's), NotFound."""

    name = "template-remove"
    label: str

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (_lock_of(self.label.partition("@")[0]),)

    def doing(self, _vms: Sequence[str]) -> str:
        return f"{self.name} {self.label}"

    def plan(self, run: Run) -> Plan[RemoveResult]:
        site, label = run.site, self.label
        there = {host: site.disks(host).templates() for host in storing_hosts(site)}
        sealed = {
            host: [template.label for template in found if template.farm == site.identity]
            for host, found in there.items()
        }
        hosts = [host for host, labels in sealed.items() if label in labels]
        if not hosts:
            for template in (template for found in there.values() for template in found):
                if template.label == label:
                    check_template(label, template.farm, site.identity)
            known = list(dict.fromkeys(known for labels in sealed.values() for known in labels))
            near = get_close_matches(label, known, 3, 0.4) or known
            names = {*site.farm.templates, *(one.rpartition("@")[0] for one in known)}
            kind = NotFound if label.partition("@")[0] in names else UnknownName
            raise kind(
                f"no template {label}",
                remedy=f"there are: {', '.join(near)}"
                if near
                else ("make one: ", Call("template-build")),
            )
        lines = (Action("remove", "", f"remove template {label} from host {host}") for host in hosts)
        remove = Job(tuple(lines), partial(_remove, site, label, hosts))
        return Plan([alone(remove)], partial(RemoveResult, label))


def template_list(site: Site) -> tuple[Template, ...]:
    """All sealed generations on all the farm's hosts, other farms' too, by name, the oldest first."""
    found: dict[tuple[str, FarmIdentity | None], Template] = {}
    for host in storing_hosts(site):
        for template in site.disks(host).templates():
            found.setdefault((template.label, template.farm), template)
    return tuple(sorted(found.values(), key=lambda t: (t.name, t.generation, t.farm != site.identity)))


def newest_template(site: Site, name: str, host: str | None = None) -> Template | None:
    """The farm's newest generation on ``host``; without ``host``: on the first host that has VMs of
    it."""
    own = [t for t in site.templates(host or hosts_of(site, name)[0]) if t.name == name]
    return max(own, key=lambda t: t.generation, default=None)


def ensure_template(site: Site, name: str, host: str | None = None) -> Template:
    """The newest generation on ``host``. If there is none, it is built or imported first, within the
    operation under way. Not for a plan: use ``newest_template`` there."""
    found = newest_template(site, name, host)
    if found is None:
        site.prepare()
        built = _source(site, name).build is not None
        doing = f"template-{'build' if built else 'import'} {name}"
        with site.locks.hold(_lock_of(name), doing=doing):
            (_building(site, name) if built else _importing(site, name)).make()
        found = newest_template(site, name, host)
    assert found is not None, "sealing on every host leaves one on each"
    return found


# Making one


@dataclass(frozen=True, slots=True)
class _Image:
    """A finished disk, to be sealed."""

    path: Path
    size: int
    sha256: str
    origin: str


@dataclass(frozen=True, slots=True)
class _Making:
    """A new generation to be made. ``first``: what is done before it is sealed on its hosts. ``image``:
    a context that does so; within it the disk is there to be sealed, or None if it is a pretended
    one. ``firstboot``: see ``Template``."""

    site: Site
    name: str
    generation: int
    hosts: Sequence[str]
    source: TemplateSource
    first: Action
    image: Callable[[], AbstractContextManager[_Image | None]]
    firstboot: str
    same: Template | None = None  # the newest, known beforehand to be what would be sealed

    @property
    def label(self) -> str:
        return f"{self.name}@{self.generation}"

    def actions(self) -> tuple[Action, ...]:
        if self.same:
            return (_same(self.same, cached=True),)
        sealed = (Action("seal", "", f"seal it as {self.label} on host {host}") for host in self.hosts)
        return (self.first, *sealed)

    def make(self) -> tuple[Template, tuple[Action, ...]]:
        """The new generation, or the newest one, which is the same; and what was done."""
        if self.same:
            return self.same, self.actions()
        with self.image() as image:
            sealed = self.as_sealed(image)
            # pretended disks all look alike: each stands for newer packages
            same = _newest_if(self.site, self.name, self.hosts, sealed) if image else None
            if same:
                self.site.reporter.say(_same(same).text)
                return same, (self.first, _same(same))
            return _seal(self, sealed, image), self.actions()

    def as_sealed(self, image: _Image | None) -> Template:
        return Template(
            name=self.name,
            generation=self.generation,
            ref="",
            size=image.size if image else self.source.size,
            sha256=image.sha256 if image else "",
            created=datetime.now(UTC),
            origin=image.origin if image else self.pretended,
            firstboot=self.firstboot,
        )

    @property
    def pretended(self) -> str:
        """``Template.origin`` on hosts that are fake."""
        if self.source.build is None:
            return str(self.source.image)
        key = recipe_of(self.site, self.name).digest(self.source.size)
        return origin(self.source.build, key)


def _newest_if(site: Site, name: str, hosts: Sequence[str], like: Template) -> Template | None:
    """The newest generation, if it is on all the hosts and has the same content."""
    newest = [newest_template(site, name, host) for host in hosts]
    first = newest[0]
    if first is None or any(one is None or one.label != first.label for one in newest):
        return None
    return first if content_of(first) == content_of(like) else None


def _same(template: Template, *, cached: bool = False) -> Action:
    """Why nothing is sealed. ``cached``: nothing was built either."""
    if cached:
        since = f"{template.label} is of the same recipe, and of the disk in the cache"
        anew = Call("template-build", name=template.name, fresh=True)
        return Action("keep", "", (f"{since}: nothing to seal; for today's packages: ", anew))
    what = "image" if "sha256:" in template.origin else "recipe and the same packages"
    return Action("keep", "", f"nothing is sealed: {template.label} is of the same {what}")


def _plan(making: _Making) -> Plan[SealResult]:
    ended: list[Template] = []
    farm = making.site.farm
    if making.name in farm.locked_templates:
        from provision.guest.identity import no_key

        locked = no_key(farm, making.name)
        making.site.reporter.warn((locked.message, "; before they are cloned, ", locked.remedy))

    def result() -> SealResult:
        there = ended[0] if ended else making.same
        if there is None:
            return SealResult(making.label, tuple(making.hosts))
        return SealResult(
            there.label, tuple(making.hosts), there.sha256, there.ref, same=there.label != making.label
        )

    def make() -> Sequence[Action]:
        template, done = making.make()
        ended.append(template)
        return done

    return Plan([alone(Job(making.actions(), make))], result)


def _building(site: Site, name: str, *, fresh: bool = False) -> _Making:
    source = _source(site, name)
    if source.build is None:
        raise UsageError(
            f"template {name} is imported, not built", remedy=Call("template-import", name=name)
        )
    hosts = hosts_of(site, name)
    generation = _next_generation(site, name, hosts)
    firstboot = source.firstboot or "farmhand"
    if not any(site.farm.hosts[host].INFO.guests for host in hosts):
        first = Action("build", "", "pretend a disk: the hosts are fake")
        return _Making(site, name, generation, hosts, source, first, nullcontext, firstboot)
    recipe = recipe_of(site, name)
    key = recipe.digest(source.size)
    found = None if fresh else _cached(key)
    if found:
        text = f"use the disk built from {source.build} {key} on {found.created:%Y-%m-%d}"
        first = Action("reuse", "", text)
    else:
        first = Action("build", "", f"build a disk from {source.build} {key}")

    @contextlib.contextmanager
    def image() -> Iterator[_Image]:
        cached = found or _build(site, name, recipe, key, fresh=fresh)
        yield _Image(_image_file(key), source.size, cached.sha256, cached.origin)

    making = _Making(site, name, generation, hosts, source, first, image, firstboot)
    if found is None:
        return making
    would = making.as_sealed(_Image(_image_file(key), source.size, found.sha256, found.origin))
    return replace(making, same=_newest_if(site, name, hosts, would))


def _importing(site: Site, name: str, given: Path | None = None) -> _Making:
    from hypervisors.disks.contents import contents
    from hypervisors.disks.images import (
        check_unused,
        convert,
        copy_image,
        image_info,
        open_image,
        sha256_file,
        unpacked,
    )

    source = _source(site, name)
    if given is None and source.image is None:
        raise UsageError(
            f"template {name} is built from recipe {source.build}",
            remedy=Call("template-build", name=name),
        )
    path = given or site.farm.path.parent / (source.image or "")
    with open_image(path.expanduser()) as opened:
        path, inode = _opened(opened)
        check_unused(opened, path)
        taken = _taken(opened)
    hosts = hosts_of(site, name)
    info = image_info(site.runner, path)
    _check_starts(site, name, hosts, path, contents(site.runner, path, info))
    bytes_ = unpacked(site.runner, path, info)
    _check_room(site, hosts, path, taken, bytes_)
    first = Action("import", "", f"import {path} ({info.format}, {about(info.size)})")

    @contextlib.contextmanager
    def image() -> Iterator[_Image]:
        # Others may own the image, replace it, or write to it at any time. So what is checked, converted
        # and hashed is our own copy: QEMU has no way to open an image and surely nothing else.
        # Hashed as it is copied, it is read no more often than without one.
        with _cache_lock(site) as cache:
            copy, work = (cache / f".import-{os.getpid()}.{kind}" for kind in ("copy", "qcow2"))
            try:
                with open_image(path) as file:
                    if _opened(file)[1] != inode:
                        raise WrongState(
                            f"{path} was replaced by another file while it was imported",
                            remedy="import it again when nobody else works on it",
                        )
                    check_unused(file, path)
                    before = _version(file)
                    site.reporter.say(f"importing {path}: it is copied, checked and converted")
                    digest = copy_image(file, copy)
                    if _version(file) != before:
                        raise WrongState(
                            f"{path} was written to while it was imported",
                            remedy="import it again when it is complete and nobody works on it",
                        )
                found = image_info(site.runner, copy, name=path)
                seen = contents(site.runner, copy, found, name=path)
                note = _check_starts(site, name, hosts, path, seen)
                if note:
                    site.reporter.say(note)
                most = unpacked(site.runner, copy, found, name=path)
                _need(cache, most + _SPARE, f"{path}, unpacked,")
                convert(
                    site.runner, copy, work, format=found.format, size=source.size, most=most + _SPARE,
                    name=path,
                )  # fmt: skip
                copy.unlink()
                yield _Image(
                    work,
                    image_info(site.runner, work).size,
                    sha256_file(work),
                    f"{path.name} sha256:{digest}",
                )
            finally:
                copy.unlink(missing_ok=True)
                work.unlink(missing_ok=True)

    generation, firstboot = _next_generation(site, name, hosts), source.firstboot or "cloud-init"
    return _Making(site, name, generation, hosts, source, first, image, firstboot)


def _opened(file: BinaryIO) -> tuple[Path, tuple[int, int]]:
    """The path of what was opened, without links, and its identity."""
    seen = os.fstat(file.fileno())
    return Path(f"/proc/self/fd/{file.fileno()}").readlink(), (seen.st_dev, seen.st_ino)


def _check_room(site: Site, hosts: Sequence[str], image: Path, copy: int, bytes_: int) -> None:
    """NoSpace unless the image, whose copy takes ``copy`` bytes, and ``bytes_`` unpacked, fits into the
    cache, and what is unpacked into each host's store."""
    _need(_images(), copy + bytes_ + _SPARE, f"{image}, copied and unpacked,")
    for host in hosts:
        free = site.disks(host).capacity().free
        if free < bytes_:
            raise NoSpace(
                f"{image} unpacks to {about(bytes_)}, and the disk store of host {host} has "
                f"{about(free)} free",
                remedy=("make room there, such as by ", Call("gc")),
            )


def _version(file: BinaryIO) -> tuple[int, int]:
    """Another one once the file was written to."""
    seen = os.fstat(file.fileno())
    return seen.st_size, seen.st_mtime_ns


def _check_starts(
    site: Site, name: str, hosts: Sequence[str], image: Path, found: Contents
) -> str | None:
    """Whether what is on the image starts as the template's VMs do. Unsupported if it surely doesn't; a
    note if it probably doesn't."""
    template = site.farm.templates[name]
    by_firmware = [host for host in hosts if site.farm.hosts[host].INFO.firmware]
    if template.boot or not by_firmware or getattr(found, template.firmware):
        return None
    where, kernel = f"host {by_firmware[0]}", f"give template {name} a 'boot', a kernel of the host's"
    if template.firmware == "efi":
        raise Unsupported(
            f"{image} has no EFI system partition, and template {name} starts by EFI",
            remedy=f"leave 'firmware' out of template {name}, or import another image",
        )
    if found.efi:
        raise Unsupported(
            f"{image} starts by EFI only (it has an EFI system partition, and no boot code for a BIOS), "
            f"and VMs on {where} are to start by BIOS",
            remedy=f"on a kvm host, give template {name} 'firmware: efi'; or import the image's variant "
            f"for BIOS, or {kernel}",
        )
    if found.whole:
        raise Unsupported(
            f"{image} holds {found.whole} without partitions and boot code: VMs on {where} can't start "
            "from it",
            remedy=f"{kernel}, or import a whole disk",
        )
    return f"{image} has no boot code in its first sector: a BIOS finds nothing to start there"


def _taken(file: BinaryIO) -> int:
    """Bytes that it takes where it is; a block device: all it has."""
    seen = os.fstat(file.fileno())
    if stat.S_ISREG(seen.st_mode):
        return seen.st_blocks * 512
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _seal(making: _Making, sealed: Template, image: _Image | None) -> Template:
    site, label = making.site, making.label
    own_directory(_images(), mode=0o700)
    with site.journal.begin(SEAL, (), LabelFacts(label)) as entry:
        _note_generation(site, making.name, making.generation)
        for host in making.hosts:
            part = _images() / f".seal-{os.getpid()}-{host}.qcow2"
            part.unlink(missing_ok=True)
            try:
                if image is None:
                    make_file(part)
                else:
                    _offer(image.path, part)
                entry.step(f"seal {label} on {host}")
                sealed = site.disks(host).seal(part, sealed)
            finally:
                part.unlink(missing_ok=True)
    site.reporter.say(f"template {label} is sealed on {', '.join(making.hosts)}")
    return sealed


def _offer(image: Path, part: Path) -> None:
    """Another name for the image, for a store to consume. Sealed and cached files never change, so one
    file may be both."""
    try:
        part.hardlink_to(image)
    except OSError:  # a file system without hard links
        shutil.copyfile(image, part)


def _remove(site: Site, label: str, hosts: Sequence[str]) -> None:
    name, _, generation = label.rpartition("@")
    _note_generation(site, name, int(generation))  # never given again, also if it was the newest
    with site.journal.begin(REMOVE, (), LabelFacts(label)) as entry:
        for host in hosts:
            entry.step(f"remove {label} from {host}")
            site.disks(host).remove_template(label)


# What the farm file says


def _source(site: Site, name: str) -> TemplateSource:
    source = site.farm.templates.get(name)
    if source is None:
        known = list(site.farm.templates)
        near = get_close_matches(name, known, 1, 0.5) or known
        raise UnknownName(
            f"no template {name!r} in {site.farm.path.name or site.farm.farm}",
            remedy=f"it has: {', '.join(near)}" if near else "add one under 'templates:'",
        )
    return source


# Generations


def _lock_of(name: str) -> str:
    return f"template-{name}"


def _generations_file(site: Site) -> Path:
    return site.paths.root / "generations.json"


@dataclass(frozen=True, slots=True)
class _Generations:
    of: Mapping[str, int]


def _noted(site: Site) -> Mapping[str, int]:
    file = _generations_file(site)
    try:
        return made(_Generations, {"of": json_object(read_file(file))}).of
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        remedy = f"move it aside (mv {file} {file}.aside): numbers of removed generations may come again"
        raise damaged(file, "the record of templates' generations", error, remedy) from error


def _note_generation(site: Site, name: str, generation: int) -> None:
    noted = _noted(site)
    if noted.get(name, 0) < generation:
        make_directory(site.paths.root, mode=0o711)
        text = json.dumps({**noted, name: generation}, sort_keys=True)
        write_atomic(_generations_file(site), f"{text}\n".encode())


def _next_generation(site: Site, name: str, hosts: Sequence[str]) -> int:
    """No farm's on these hosts."""
    sealed = [t.generation for host in hosts for t in site.disks(host).templates() if t.name == name]
    return max([*sealed, _noted(site).get(name, 0)]) + 1


# The cache of built images


@dataclass(frozen=True, slots=True)
class _Cached:
    sha256: str
    created: datetime
    bytes: int
    origin: str


def _images() -> Path:
    return cache_dir() / "images"


def _image_file(key: str) -> Path:
    return _images() / f"{key}.qcow2"


def _cached(key: str) -> _Cached | None:
    """The note of the cached image; None if there is no such image, or it is past its life. The note is
    written last: without it there is no image."""
    image = _image_file(key)
    try:
        note = made(_Cached, json_object(read_file(image.with_suffix(".json"))))
        present = image.stat().st_size == note.bytes
    except (OSError, ValueError):  # it is made anew
        return None
    fresh = time.time() - note.created.timestamp() <= CACHE_LIFE
    return note if present and fresh else None


@contextlib.contextmanager
def _cache_lock(site: Site) -> Iterator[Path]:
    """Held for one build or import at a time, for all farms of this user. It removes what killed ones
    left."""
    from provision.guest.debian import remove_build, stale_scratch, still_running

    cache = _images()
    own_directory(cache, mode=0o700)
    say = site.reporter.say
    others = partial(say, "waiting for another template build on this machine")
    killed = partial(say, "waiting until what a killed build started has ended")
    with FileLock(cache / ".lock").hold(waits=others):
        with FileLock(still_running(cache)).hold(waits=killed):
            pass  # a build of ours keeps it locked, too
        for pattern in (".build-*", ".import-*", ".*.qcow2.*"):
            for left in cache.glob(pattern):
                if left.is_dir():
                    remove_build(site.runner, left)
                else:
                    left.unlink(missing_ok=True)
        for left in stale_scratch():
            remove_build(site.runner, left)
        yield cache


def _build(site: Site, name: str, recipe: Recipe, key: str, *, fresh: bool) -> _Cached:
    """Build the template's disk into the cache. What was there stays until it is complete."""
    from hypervisors.disks.images import sha256_file
    from provision.guest.debian import build_image

    with _cache_lock(site) as cache:
        if not fresh and (waited_for := _cached(key)):
            return waited_for
        _prune(cache)
        logs = site.paths.root / "logs"
        make_directory(logs, mode=0o700)
        log = logs / f"template-{recipe.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.log"
        site.reporter.say(f"building {recipe.name} from Debian's packages; its log: {log}")
        with site.journal.begin(BUILD, (), BuildFacts(recipe.name, key)) as entry:
            entry.step(f"build image {key}")
            image, built = _image_file(key), cache / f".{key}.qcow2.new"
            packages = built.with_suffix(".packages")
            build_image(
                site.runner, recipe, size=site.farm.templates[name].size, out=built, packages=packages,
                log=log, place=partial(_place, site, name),
                working=lambda said: site.reporter.working(f"building {recipe.name}; {said}"),
            )  # fmt: skip
            done = _Cached(
                sha256=sha256_file(built), created=datetime.now(UTC), bytes=built.stat().st_size,
                origin=origin(recipe.name, key, packages.read_bytes()),
            )  # fmt: skip
            kept = image.with_suffix(".packages")
            image.with_suffix(".json").unlink(missing_ok=True)
            packages.replace(kept)
            built.replace(image)
            facts = {
                "recipe": recipe.name,
                "hash": key,
                "sha256": done.sha256,
                "bytes": done.bytes,
                "created": done.created.isoformat(),
                "origin": done.origin,
                "packages": kept.name,
                "log": str(log),
            }
            write_atomic(image.with_suffix(".json"), json.dumps(facts, indent=1).encode() + b"\n")
    return done


def _place(site: Site, name: str, package: str) -> str:
    """Where the farm file names a package of the template; "" if it doesn't."""
    from inventory.loader import place

    packages = site.farm.templates[name].packages
    if package not in packages:
        return ""
    return place(site.farm, "templates", name, "packages", packages.index(package))


def _prune(cache: Path) -> None:
    """Remove images past their life, with their notes."""
    for note in cache.glob("*.json"):
        if _cached(note.stem) is None:
            for suffix in (".json", ".qcow2", ".packages"):
                note.with_suffix(suffix).unlink(missing_ok=True)


def _need(directory: Path, bytes_: int, what: str) -> None:
    """NoSpace unless so many bytes are free there; it need not be there yet."""
    there = next(place for place in (directory, *directory.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < bytes_:
        raise NoSpace(
            f"{what} takes {about(bytes_)} in {directory}, {about(free)} are free",
            remedy="make room on its file system, or set FARMHAND_CACHE_DIR",
        )

"""repo-queue: what is uploaded goes in, or is refused with the reason beside it; what has stood its test
goes on. Real files, real inotify, real gpg."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from inventory.errors import Busy, InventoryError, NotFound, spelled
from inventory.loader import load
from provision.engine import registry
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.package_repositories import opened
from provision.repository_queue import Queue, QueueEvent
from provision.site import Site
from repositories.incoming import Incoming
from tests.many_packages import make_debs
from tests.repos import FORMATS, RepoFarm, contents
from tests.unit.cli_farm import CommandLine, command_line
from tests.unit.sshd_machine import wait_for
from tests.uploads import changes, gpg, uploader_keys

UPLOADS = "incoming: {top}/uploads\n"
RULES = """\
promotions:
  - {from: experimental, to: tested, after: 7d}
"""
TESTED = """\
promotions:
  - {from: experimental, to: tested, tested: yes}
"""


class QueueFarm(RepoFarm):
    """What is put into ``uploads/CHANNEL`` is looked at by ``turn``."""

    def __init__(self, directory: Path, kind: str, *, more: str = "") -> None:
        self.uploads = directory / "uploads"
        for channel in ("experimental", "tested"):
            (self.uploads / channel).mkdir(parents=True)
        super().__init__(directory, kind, more=UPLOADS.format(top=directory) + more)

    def turn(
        self,
        *files: Path,
        channel: str = "experimental",
        tested: Mapping[int, str] | None = None,
        plan: bool = False,
    ) -> list[QueueEvent]:
        """What a queue does that is there when these files are moved in."""
        with Site(load(self.file), reporter=QuietReporter(), plan=plan) as site:

            def act(name: str, **request: Any) -> object:
                return perform(site, registry.operation(name)(**request))

            with Queue(site, opened(site.farm), act) as queue:
                for file in files:
                    file.rename(self.uploads / channel / file.name)
                return list(queue.turn(lambda: tested or {}))

    def waiting(self, channel: str = "experimental") -> list[str]:
        return sorted(path.name for path in (self.uploads / channel).iterdir())

    def half_rejected(self) -> list[str]:
        """What a queue that runs is just about, or one that was killed left."""
        return [path.name for path in (self.uploads / "rejected").glob(".*")]

    def rejected(self) -> dict[str, tuple[str, list[str]]]:
        """Reasons and files, by the directory's name."""
        assert not self.half_rejected()
        found = {path.name: path for path in (self.uploads / "rejected").iterdir()}
        return {
            name: (found.pop(f"{name}.reason").read_text(), sorted(p.name for p in path.iterdir()))
            for name, path in tuple(found.items())
            if path.is_dir()
        }

    def notes(self, channel: str = "experimental") -> list[str]:
        return [entry.note for entry in self.repository.documents.log(channel)]


def whats(events: list[QueueEvent]) -> list[tuple[str, str, str]]:
    return [(event.what, event.channel, event.name) for event in events]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "s"))
    with tempfile.TemporaryDirectory(prefix="fh") as runtime:  # short: a socket is in it
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", runtime)
        yield


@pytest.fixture(params=FORMATS)
def farm(request: pytest.FixtureRequest, tmp_path: Path) -> QueueFarm:
    return QueueFarm(tmp_path, request.param)


@pytest.fixture
def deb(tmp_path: Path) -> QueueFarm:
    return QueueFarm(tmp_path, "deb")


# ---- Taking


def test_packages_go_in_each_to_the_channel_of_its_directory(farm: QueueFarm) -> None:
    one, two = farm.package(), farm.package("other")
    assert whats(farm.turn(one, two)) == [
        ("added", "experimental", one.name),
        ("added", "experimental", two.name),
    ]
    assert farm.turn(farm.package("third"), channel="tested")[0].channel == "tested"
    assert farm.read() == ["hello 1.0-1", "other 1.0-1"]
    assert farm.read("tested") == ["third 1.0-1"]
    assert farm.waiting() == farm.waiting("tested") == []
    assert farm.rejected() == {}
    assert farm.notes() == [f"upload {one.name}", f"upload {two.name}"]
    assert farm.turn() == []


def test_the_same_package_again_is_taken_and_makes_no_generation(farm: QueueFarm) -> None:
    farm.turn(farm.package())
    assert whats(farm.turn(again := farm.package())) == [("added", "experimental", again.name)]
    assert farm.waiting() == []
    assert len(farm.notes()) == 1


def test_what_nobody_was_seen_to_close_goes_in_when_it_stood_still(
    deb: QueueFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However seldom there is a turn."""
    monkeypatch.setattr("provision.repository_queue.Incoming", partial(Incoming, still=0.5))
    package = deb.package()
    package.rename(deb.uploads / "experimental" / package.name)
    with (
        Site(load(deb.file), reporter=QuietReporter()) as site,
        Queue(site, opened(site.farm), lambda *_, **__: None) as queue,
    ):
        assert list(queue.turn(dict)) == []
        queue.wait(3600)
        assert whats(list(queue.turn(dict))) == [("added", "experimental", package.name)]


@pytest.fixture(scope="module")
def keys() -> Iterator[tuple[Path, str, bytes]]:
    with uploader_keys() as found:
        yield found


class SignedUploads(QueueFarm):
    def __init__(self, directory: Path, keys: tuple[Path, str, bytes]) -> None:
        super().__init__(directory, "deb", more="uploaders: uploaders.asc\n")
        self.home, self.signer, public = keys
        (directory / "uploaders.asc").write_bytes(public)

    def upload(self, *packages: Path, name: str = "hello", who: str = "") -> Path:
        """Its .changes file."""
        text = changes({path.name: path.read_bytes() for path in packages})
        path = self.incoming / f"{name}.changes"
        path.write_bytes(gpg(self.home, "--local-user", who or self.signer, "--clear-sign", data=text))
        return path


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, str, bytes]) -> SignedUploads:
    return SignedUploads(tmp_path, keys)


def test_an_upload_that_one_of_them_signed(signed: SignedUploads) -> None:
    one, two = signed.package(), signed.package("other")
    upload = signed.upload(one, two)
    (event,) = signed.turn(upload, one, two)
    assert whats([event]) == [("added", "experimental", "hello.changes")]
    assert event.text == "2 of its files are packages"
    assert signed.read() == ["hello 1.0-1", "other 1.0-1"]
    assert signed.notes() == [f"upload hello.changes, signed by {signed.signer}"]
    assert signed.waiting() == []


def test_an_upload_waits_until_all_of_it_is_there(signed: SignedUploads) -> None:
    one, two = signed.package(), signed.package("other")
    upload = signed.upload(one, two)
    whole = two.read_bytes()
    two.write_bytes(whole[:100])
    assert signed.turn(upload, one) == []
    assert signed.turn(two) == []
    assert signed.waiting() == sorted(path.name for path in (one, two, upload))
    assert not (signed.top / "channels/experimental").exists()
    two.write_bytes(whole)
    assert whats(signed.turn(two)) == [("added", "experimental", "hello.changes")]
    assert (signed.waiting(), signed.rejected()) == ([], {})


def test_what_none_of_them_signed_is_refused(signed: SignedUploads) -> None:
    package = signed.package()
    upload = signed.upload(package, who="stranger@example.org")
    (event,) = signed.turn(upload, package)
    assert whats([event]) == [("rejected", "experimental", "hello.changes")]
    (reason, files) = signed.rejected()["1-hello.changes"]
    assert reason == f"{spelled(event.text)}\n"
    assert "which is none of the keys" in reason
    assert files == [upload.name, package.name]
    # Without a .changes file nobody signed it: it waits for one
    assert signed.turn(signed.package("other")) == []
    assert signed.waiting() == ["other_1.0-1_amd64.deb"]
    assert not (signed.top / "channels/experimental").exists()


def test_one_of_an_upload_that_is_no_package_keeps_all_of_it_out(signed: SignedUploads) -> None:
    good, bad = signed.package(), signed.package("other")
    bad.write_bytes(b"no package")
    assert whats(signed.turn(signed.upload(good, bad), good, bad)) == [
        ("rejected", "experimental", "hello.changes")
    ]
    assert signed.rejected()["1-hello.changes"][1] == sorted([good.name, bad.name, "hello.changes"])
    other = signed.incoming / "hello_1_amd64.buildinfo"
    other.write_bytes(b"Format: 1.0\n")
    (event,) = signed.turn(signed.upload(other), other)
    assert (event.what, event.text) == ("rejected", "no .deb file is in it")


UPLOADER = """
farm: try
templates: {{base: {{build: debian-12}}}}
vms: {{prod: {{}}}}
repositories:
  debs:
    {{format: deb, path: {top}/debs, channels: [experimental], incoming: {top}/incoming{more}}}
"""


@pytest.mark.parametrize("content", [None, b"", b"\n"])
def test_without_a_key_of_an_uploader_nothing_is_taken(tmp_path: Path, content: bytes | None) -> None:
    """Nobody's keys are not everybody's."""
    (tmp_path / "r").mkdir(exist_ok=True)
    (tmp_path / "incoming" / "experimental").mkdir(parents=True)
    line = CommandLine(tmp_path, tmp_path / "r")
    line.farm.write_text(UPLOADER.format(top=tmp_path, more=", uploaders: uploaders.gpg"))
    if content is not None:
        (tmp_path / "uploaders.gpg").write_bytes(content)
    [path] = make_debs(tmp_path / "incoming" / "experimental", ["hello"], "1.0")
    done = line("repo-queue")
    assert done.status == 1
    assert "uploaders.gpg" in done.err
    assert "Traceback" not in done.err and "defect" not in done.err
    assert path.exists()
    assert not list((tmp_path / "debs").glob("pool/*/*"))


# ---- Refusing


def test_what_is_damaged_or_contradicts_is_refused_under_names_of_its_own(farm: QueueFarm) -> None:
    farm.turn(farm.package())
    other = farm.package(text="another content")
    contradicting = other.read_bytes()
    (event,) = farm.turn(other)
    assert whats([event]) == [("rejected", "experimental", other.name)]
    assert "there is another hello 1.0-1" in spelled(event.text)
    other.write_bytes(contradicting[: len(contradicting) // 2])  # the same name again
    good = farm.package("good")
    assert sorted(whats(farm.turn(other, good))) == [
        ("added", "experimental", good.name),
        ("rejected", "experimental", other.name),
    ]
    found = farm.rejected()
    assert sorted(found) == [f"1-{other.name}", f"2-{other.name}"]
    assert all(files == [other.name] for _, files in found.values())
    assert found[f"1-{other.name}"][0] == f"{spelled(event.text)}\n"
    assert (farm.uploads / f"rejected/1-{other.name}/{other.name}").read_bytes() == contradicting
    assert farm.read() == ["good 1.0-1", "hello 1.0-1"]
    assert farm.waiting() == []


def test_what_is_ours_to_put_right_stays_and_stops_nothing_else(deb: QueueFarm, keys: Any) -> None:
    """Such as a signing key that is gone. With it, all goes on by itself."""
    home, fingerprint, _ = keys
    one, two = deb.package(), deb.package("other")
    lines = UPLOADS.format(top=deb.top.parent) + RULES
    deb.declare(lines)
    deb.add(deb.package("first"))
    deb.age(timedelta(days=8))
    deb.declare(f"{lines}signing:\n  - {{fingerprint: {fingerprint}, file: secret}}\n")
    two.rename(deb.uploads / "tested" / two.name)
    (deb.uploads / "experimental" / "evil.deb").symlink_to("/etc/hostname")
    with (deb.uploads / "tested" / two.name).open("ab"):
        events = deb.turn(one)
    assert whats(events) == [
        ("left", "experimental", one.name),
        ("rejected", "experimental", "evil.deb"),
        ("left", "tested", "what experimental has"),
    ]
    assert all("secret" in spelled(event.text) for event in events if event.what == "left")
    assert deb.waiting() == [one.name]
    secret = deb.file.with_name("secret")
    secret.write_bytes(gpg(home, "--export-secret-keys", fingerprint))
    secret.chmod(0o600)
    one = (deb.uploads / "experimental" / one.name).rename(deb.incoming / one.name)
    assert whats(deb.turn(one)) == [
        ("added", "experimental", one.name),
        ("promoted", "tested", "1"),
    ]
    assert deb.read() == ["first 1.0-1", "hello 1.0-1"]


def test_a_plan_moves_and_takes_nothing(deb: QueueFarm) -> None:
    deb.declare(UPLOADS.format(top=deb.top.parent) + RULES)
    deb.add(deb.package("first"))
    deb.age(timedelta(days=8))
    good, bad = deb.package(), deb.package("bad")
    bad.write_bytes(b"no package")
    for path in (good, bad):
        path.rename(deb.uploads / "experimental" / path.name)
    before = contents(deb.top.parent)
    back = [path.rename(deb.incoming / path.name) for path in (deb.uploads / "experimental").iterdir()]
    assert whats(deb.turn(*sorted(back), plan=True)) == [
        ("rejected", "experimental", bad.name),
        ("added", "experimental", good.name),
        ("promoted", "tested", "1"),
    ]
    assert contents(deb.top.parent) == before


def test_queues_that_can_not_be(deb: QueueFarm, tmp_path: Path) -> None:
    with Site(load(deb.file), reporter=QuietReporter()) as site:
        repository = opened(site.farm)
        with (
            Queue(site, repository, lambda *_, **__: None),
            pytest.raises(Busy, match="repo-queue of packages"),
            Queue(site, repository, lambda *_, **__: None),
        ):
            pass
    for channel in ("experimental", "tested"):
        (deb.uploads / channel).rmdir()
    with pytest.raises(NotFound, match="has no directory for uploads to a channel of packages"):
        deb.turn()
    deb.declare("")
    with pytest.raises(NotFound, match="has no queue"):
        deb.turn()
    deb.declare("incoming: /nowhere")
    with pytest.raises(NotFound, match=r"there is no directory .*nowhere"):
        deb.turn()
    text = deb.file.read_text().replace("[experimental, tested]", "[experimental, rejected]")
    deb.file.write_text(text)
    with pytest.raises(InventoryError, match="'rejected' is what uploads are moved to"):
        load(deb.file)


# ---- Promoting


def test_by_age(farm: QueueFarm) -> None:
    farm.declare(RULES)
    farm.add(farm.package())
    farm.age(timedelta(days=4))
    farm.add(farm.package(version="2.0-1"))
    assert farm.turn() == []
    farm.age(timedelta(days=4))
    assert whats(farm.turn()) == [("promoted", "tested", "1")]
    assert farm.read("tested") == ["hello 1.0-1"]
    assert farm.notes("tested") == ["rule experimental to tested"]
    assert farm.turn() == []
    farm.age(timedelta(days=8))
    assert whats(farm.turn()) == [("promoted", "tested", "2")]


def test_by_a_build_that_passed(farm: QueueFarm) -> None:
    farm.declare(TESTED)
    for version in ("1.0-1", "2.0-1", "3.0-1"):
        farm.add(farm.package(version=version))
    assert farm.turn() == []
    assert whats(farm.turn(tested={2: "a-build"})) == [("promoted", "tested", "2")]
    assert farm.turn(tested={1: "older", 2: "a-build"}) == []
    assert farm.read("tested") == ["hello 1.0-1", "hello 2.0-1"]


def test_a_roll_back_is_not_undone(farm: QueueFarm) -> None:
    """Neither of the channel that gets it, nor of the one that it comes from."""
    farm.declare(RULES)
    for version in ("1.0-1", "2.0-1"):
        farm.add(farm.package(version=version))
        farm.age(timedelta(days=8))
        assert len(farm.turn()) == 1
    farm.rollback("tested")
    assert farm.turn() == []
    assert farm.read("tested") == ["hello 1.0-1"]
    farm.add(farm.package(version="3.0-1"))
    farm.age(timedelta(days=5))
    farm.rollback("experimental")  # to 2.0
    farm.age(timedelta(days=5))  # 3.0 came ten days ago, and was there for five
    assert farm.turn() == []
    farm.age(timedelta(days=5))
    assert len(farm.turn()) == 1
    assert farm.read("tested") == ["hello 1.0-1", "hello 2.0-1"]


def test_nothing_older_takes_the_place_of_what_somebody_promoted(farm: QueueFarm) -> None:
    farm.declare(RULES)
    for version in ("1.0-1", "2.0-1"):
        farm.add(farm.package(version=version))
        farm.age(timedelta(days=5))
    farm.promote()
    farm.age(timedelta(days=1))
    assert farm.turn() == []  # 1.0 is due, 2.0 isn't
    assert farm.read("tested") == ["hello 1.0-1", "hello 2.0-1"]


# ---- As somebody runs it


@pytest.fixture
def line(tmp_path: Path) -> Iterator[CommandLine]:
    yield from command_line(tmp_path)


def begun(line: CommandLine, *words: str) -> subprocess.Popen[bytes]:
    """A queue that goes on, when it has begun to look."""
    argv = line.argv("repo-queue", "--watch", *words)
    process = subprocess.Popen(argv, cwd=line.directory, env=line.environment, stderr=subprocess.PIPE)
    wait_for(lambda: watches(process.pid))
    return process


def watches(pid: int) -> int:
    """Directories that a process has the kernel tell it of."""
    found = 0
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            found += path.read_text().count("inotify wd:")
        except FileNotFoundError:
            continue
    return found


def test_at_once_and_by_the_clock(line: CommandLine) -> None:
    """It also goes on when it was killed, with what came meanwhile."""
    farm = QueueFarm(line.directory, "deb", more=RULES)
    line.farm.write_bytes(farm.file.read_bytes())
    process = begun(line, "--every", "1h")
    wait_for(lambda: watches(process.pid) == 2)
    package = farm.package()
    package.rename(farm.uploads / "experimental" / package.name)
    wait_for(lambda: farm.versions() == ["hello 1.0-1"] and not farm.waiting())
    refused = line("repo-queue")
    assert refused.status == 75
    assert "repo-queue of packages" in refused.error
    process.kill()
    process.communicate()
    (farm.uploads / "experimental" / "evil.deb").symlink_to("/etc/hostname")
    process = begun(line, "--every", "1s")
    wait_for(lambda: not farm.waiting() and not farm.half_rejected())
    assert farm.rejected()["1-evil.deb"][1] == ["evil.deb"]
    farm.age(timedelta(days=8))
    wait_for(lambda: farm.versions("tested") == ["hello 1.0-1"])
    (farm.uploads / "tested" / "evil.deb").symlink_to("/etc/hostname")
    wait_for(lambda: not farm.waiting("tested"))  # so it has told of what was before that
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"experimental: evil.deb rejected: it is a link" in said
    assert b"tested: 1 promoted: rule experimental to tested" in said
    assert b"what was not taken is there the next time" in said


def test_from_cron(line: CommandLine) -> None:
    farm = QueueFarm(line.directory, "deb")
    line.farm.write_bytes(farm.file.read_bytes())
    done = line("repo-queue")
    assert (done.status, done.out) == (0, "nothing is there, and nothing is due\n")
    (farm.uploads / "experimental" / "evil.deb").symlink_to("/etc/hostname")
    planned = line("repo-queue", "--plan", "--watch")
    assert "evil.deb would be rejected: it is a link" in planned.err
    assert farm.waiting() == ["evil.deb"]
    done = line("repo-queue", "--json")
    assert done.status == 1
    (event,) = done.json["events"]
    assert event["what"] == "rejected" and event["text"].startswith("it is a link")
    assert farm.waiting() == []
    assert json.loads(line("repo-queue", "--json").out)["events"] == []

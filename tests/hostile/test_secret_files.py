"""Files of secrets, whoever reads them: none is followed, waited for, or taken from somebody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builds.dav_login import Credentials
from hypervisors.xenapi.session import read_credentials
from inventory.errors import FarmhandError, WrongState, spelled
from provision.engine.report import QuietReporter
from provision.site import Site, open_site
from tests.unit.receiver import SECRET

FARM = """
farm: kata
hosts: {here: {driver: fake}}
templates: {base: {build: debian-12, size: 64M}}
vms: {prod: {memory: 512M}}
cycle:
  steps:
  - {name: get, fetch: "http://127.0.0.1/x", to: prod, path: x, sha256: "%s", netrc: secret}
events:
  chat: {webhook: "http://127.0.0.1:9/x", secret_file: secret}
""" % ("0" * 64)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    file = tmp_path / "kata.yaml"
    file.write_text(FARM)
    with open_site(file, reporter=QuietReporter()) as made:
        yield made


def _webhook(site: Site, _path: Path) -> None:
    for _, error in site.outbox.check():
        if error is not None:
            raise error


def _netrc(site: Site, _path: Path) -> None:
    assert site.farm.cycle is not None
    site.farm.cycle.steps[0].check(site)


READERS: dict[str, tuple[str, Callable[[Site, Path], object]]] = {
    "webhook": (SECRET, _webhook),
    "netrc": ("machine 127.0.0.1 login builder password s3cret\n", _netrc),
    "xenapi": ("root\ns3cret\n", lambda _, path: read_credentials(path)),
    "webdav": ("builder:s3cret\n", lambda _, path: Credentials.read(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_ours_alone_is_not_read(site: Site, tmp_path: Path, reader: str) -> None:
    text, read = READERS[reader]
    path, elsewhere = tmp_path / "secret", tmp_path / "elsewhere"

    def refused(words: str) -> str:
        with pytest.raises(WrongState, match=words) as caught:
            read(site, path)
        assert str(path) in caught.value.message
        assert text not in str(caught.value)
        return spelled(caught.value.remedy)

    with pytest.raises(FarmhandError, match="No such file"):
        read(site, path)
    elsewhere.write_text(text)
    elsewhere.chmod(0o600)
    path.symlink_to(elsewhere)
    refused("is a symbolic link")
    path.unlink()
    os.link(elsewhere, path)
    refused("another name")
    path.unlink()
    os.mkfifo(path, 0o600)
    refused("is a FIFO")  # which nobody writes to
    path.unlink()
    path.write_text(text)
    path.chmod(0o640)
    assert refused("others may read or change") == f"chmod 600 {path}"
    path.chmod(0o600)
    read(site, path)
    if os.geteuid() == 0:
        os.chown(path, 65534, -1)
        refused("belongs to")

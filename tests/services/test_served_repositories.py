"""Package repositories by a real nginx."""

from __future__ import annotations

import os
import subprocess

import pytest
from daemons import Daemons
from yard import Yard

from host.files import barred
from inventory.errors import InventoryError, WrongState
from tests.unit.repo_tree import RepoTree, make_deb
from tests.unit.tls import certificate

BIG = make_deb("big", size=100000)
RELEASE = "channels/tested/dists/tested/Release"


@pytest.fixture
def tree(yard: Yard) -> RepoTree:
    made = RepoTree(yard.directory / "repository")
    made.publish("tested", ("big", BIG))
    yard.use("nginx")
    yard.repositories["kata"] = {
        "format": "deb", "path": str(made.top), "serve": "nginx",
        "url": "http://packages.example.org/debian/kata.d",
    }  # fmt: skip
    return made


def curl(url: str, *options: str) -> tuple[int, dict[str, str], bytes]:
    argv = [
        "curl", "-sS", "--path-as-is", "--resolve", "packages.example.org:8001:127.0.0.1",
        "--resolve", "packages.example.org:8002:127.0.0.1", "-D", "/dev/stderr", *options, url,
    ]  # fmt: skip
    done = subprocess.run(argv, check=True, capture_output=True)
    line, *lines = done.stderr.decode().strip().splitlines()
    return int(line.split()[1]), dict(text.split(": ", 1) for text in lines), done.stdout


def test_by_nginx(yard: Yard, daemons: Daemons, tree: RepoTree) -> None:
    daemons.start("nginx")
    yard.apply()
    url, top = "http://packages.example.org:8001/debian/kata.d", tree.top
    (top / "key.asc").write_text("a key\n")
    big = tree.url_of("big", BIG)
    for path in (big, f"/channels/tested{big}", f"/generations/1{big}"):
        status, fields, body = curl(url + path)
        assert (status, body) == (200, BIG), path
        assert fields["Cache-Control"] == "public, max-age=31536000, immutable"
        assert fields["Content-Type"] == "application/vnd.debian.binary-package"
        assert curl(url + path, "-r", "5-9")[0] == 206
        assert curl(url + path, "-H", f"If-None-Match: {fields['ETag']}")[0] == 304
    for path in (RELEASE, "channels/tested.mirrors", "dists/tested/Release", "key.asc"):
        status, fields, body = curl(f"{url}/{path}")
        assert (status, body) == (200, (top / path).read_bytes()), path
        assert (fields["Cache-Control"], "ETag" in fields) == ("no-cache", False)
        # What is published in the same second has the same date.
        assert curl(f"{url}/{path}", "-H", f"If-Modified-Since: {fields['Last-Modified']}")[0] == 200
        assert curl(f"{url}/{path}", "-r", "0-1")[0] == 200
    index = curl(f"{url}/channels/tested/dists/tested/main/binary-amd64/Packages.gz")
    assert index[1]["Content-Type"] == "application/gzip"
    assert "Content-Encoding" not in index[1]
    (top / "pool" / ".hidden").touch()
    (top / "generations" / "1" / "none").symlink_to("/nonexistent")
    for path in (
        "/.farmhand/repository.json", "/pool/../.farmhand/repository.json", "/pool/.hidden",
        "/%2efarmhand/repository.json", "/none", "/../../farm.yaml", "/generations/1/none",
    ):  # fmt: skip
        assert curl(url + path)[0] in (400, 404), path
    for path in ("", "/", "/pool/", "/channels/tested/"):
        assert curl(url + path)[0] in (301, 403, 404), path
    assert curl("http://packages.example.org:8001/")[0] == 404
    tree.publish("tested", ("late", make_deb("late")))
    assert curl(f"{url}/{RELEASE}")[2] == (top / "generations/2/dists/tested/Release").read_bytes()
    assert not yard.apply().changed


def test_a_link_of_somebody_else_is_not_followed(yard: Yard, daemons: Daemons, tree: RepoTree) -> None:
    daemons.start("nginx")
    yard.apply()
    url = "http://packages.example.org:8001/debian/kata.d"
    secret = yard.directory / "secret"
    secret.write_text("secret")
    planted = tree.top / "channels" / "planted"
    planted.symlink_to(secret)
    if os.geteuid() == 0:  # else nobody can plant one
        os.lchown(planted, 65534, 65534)
        assert curl(f"{url}/channels/planted")[0] == 403


def test_hosts_and_paths(yard: Yard) -> None:
    """Repositories of one name stand in one server; each name has its own; with TLS, too."""
    yard.use("nginx")
    pem = str(certificate(yard.directory))
    for name, url in (
        ("one", "http://packages.example.org/one"),
        ("two", "http://Packages.example.org/two/"),
        ("top", "http://top.example.org"),
        ("tls", "https://packages.example.org/tls"),
        ("port", "http://a-name-that-is-longer-than-nginx-has-room-for.example.org:8070/"),
    ):
        yard.repositories[name] = {"format": "rpm", "url": url, "serve": "nginx"}
    yard.repositories["tls"]["certificate"] = pem
    yard.repositories["not"] = {"format": "rpm", "url": "http://elsewhere.example.org/"}
    (document,) = yard.documents("nginx").values()
    assert document.text.count("server_name packages.example.org;") == 2
    assert document.text.count("location /one/ {") == 1
    assert document.text.count("location / {\n\t\talias") == 2
    assert "elsewhere" not in document.text
    yard.check("nginx")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"url": None}, "nginx needs a 'url' such as"),
        ({"url": "http://packages.example.org/a b"}, "is not an http or https address"),
        ({"url": "http://packages.example.org/$x"}, "nginx needs a 'url' such as"),
        ({"url": "http://packages.example.org/../x"}, "nginx needs a 'url' such as"),
        ({"url": "https://packages.example.org/"}, "https and 'certificate' go together"),
        ({"certificate": "/etc/x.pem"}, "https and 'certificate' go together"),
        ({"url": "http://dev2.example.org/kata"}, "dev2.example.org is the proxy name of a VM"),
        ({"serve": "none", "certificate": "/etc/x.pem"}, "'certificate' is for what 'serve' names"),
    ],
)
def test_what_nginx_could_not_serve(yard: Yard, changed: dict[str, str | None], said: str) -> None:
    section = {"format": "deb", "url": "http://packages.example.org/kata", "serve": "nginx", **changed}
    yard.repositories["kata"] = {key: value for key, value in section.items() if value is not None}
    with pytest.raises(InventoryError, match=said.replace("'", "['\"]?")):
        yard.farm()


def test_two_at_one_place(yard: Yard) -> None:
    for name in ("one", "two"):
        section = {"format": "deb", "url": "http://packages.example.org/kata", "serve": "nginx"}
        yard.repositories[name] = section
    with pytest.raises(InventoryError, match="repository one is served there"):
        yard.farm()


def test_the_directory_that_is_in_the_way_is_named(yard: Yard, daemons: Daemons, tree: RepoTree) -> None:
    main = yard.directory / "nginx" / "nginx.conf"
    lines = main.read_text().splitlines()
    main.write_text("\n".join(["user www-data;", *lines[1:]]) + "\n")
    daemons.start("nginx")
    yard.repositories["kata"]["path"] = str(yard.directory / "closed" / "kata")
    (yard.directory / "closed").mkdir(mode=0o700)
    tree.top.rename(yard.directory / "closed" / "kata")
    with pytest.raises(WrongState) as raised:
        yard.apply()
    where = yard.directory / "closed"
    assert f"its user www-data may not pass through {where} to repository kata" in str(raised.value)
    (yard.directory / "closed").chmod(0o711)
    yard.apply()
    url = "http://packages.example.org:8001/debian/kata.d"
    assert curl(url + tree.url_of("big", BIG))[2] == BIG


def test_who_may_pass(yard: Yard) -> None:
    nobody, way = 65534, yard.directory / "a"
    below = way / "b"
    below.mkdir(parents=True)
    mine = way.stat()
    way.chmod(0o710)
    assert barred(below, nobody) == way
    assert barred(below, nobody, [mine.st_gid]) is None
    assert barred(below, mine.st_uid) is None
    way.chmod(0o701)
    assert barred(below, nobody) is None
    assert barred(below, nobody, [mine.st_gid]) == way
    below.chmod(0o700)
    assert barred(below, nobody) == below
    assert barred(way / "none" / "yet", nobody) is None

"""Each daemon's own checker, on files that aren't live yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from host.run import Runner
from inventory.errors import CommandFailed
from inventory.model import Farm
from provision.network.document import Document
from provision.network.staged import stage


@dataclass(frozen=True, slots=True)
class Checker:
    """``shadow``: directories that the checker writes in."""

    argv: tuple[str, ...]
    shadow: tuple[str, ...] = ()


def check(
    runner: Runner, farm: Farm, documents: Sequence[Document], texts: Mapping[str, str | None]
) -> None:
    """Check the services of ``documents``; ``texts``: whole new files by path, None for those that
    go. CommandFailed of the first service whose checker refuses."""
    for service in dict.fromkeys(document.service for document in documents):
        of_one = [document for document in documents if document.service == service]
        files = {d.path: texts[d.path] for d in of_one if d.path in texts}
        checkers = tuple(_CHECKERS[service](farm, of_one)) if service in _CHECKERS else ()
        if not checkers:
            continue
        with stage(runner, files) as staged:
            for checker in checkers:
                try:
                    staged.check(checker.argv, shadow=checker.shadow)
                except CommandFailed as error:
                    error.message = f"{service}: {error.message}"
                    error.args = (error.message,)
                    error.remedy = error.remedy or "nothing was changed; correct what it names"
                    raise


def _bind(farm: Farm, documents: Sequence[Document]) -> Iterator[Checker]:
    bind = farm.services.bind
    assert bind is not None
    for document in documents:
        if document.zone and not document.initial and document.path != bind.parent:
            yield Checker(("named-checkzone", "-q", document.zone, document.path))
    if Path(bind.main).exists():
        yield Checker(("named-checkconf", "-z", bind.main))
    elif bind.own == "file":
        yield Checker(("named-checkconf", bind.config))


def _dhcpd(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.dhcpd
    assert service is not None
    yield Checker(("dhcpd", "-t", "-4", "-cf", service.config))


def _kea(farm: Farm, documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.kea
    assert service is not None
    for program, config in (("kea-dhcp4", service.config4), ("kea-dhcp6", service.config6)):
        if any(document.path == config for document in documents):
            yield Checker((program, "-t", config))


def _dnsmasq(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.dnsmasq
    assert service is not None
    yield Checker(("dnsmasq", "--test", "-C", service.config))
    if Path(service.main).exists():
        yield Checker(("dnsmasq", "--test", "-C", service.main))


def _nginx(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.nginx
    assert service is not None
    logs = {str(Path(p.access_log).parent) for v in farm.vms.values() for p in v.proxy if p.access_log}
    shadow = (service.logs, "/run", *sorted(logs))
    yield Checker(("nginx", "-t", "-q", "-c", service.main), shadow)


def _haproxy(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.haproxy
    assert service is not None
    yield Checker(("haproxy", "-c", "-q", "-f", service.config))


def _nftables(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.nftables
    assert service is not None
    yield Checker((*service.nft, "-c", "-f", service.config))


def _shorewall(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.shorewall
    assert service is not None
    yield Checker(("shorewall", "check", service.directory), ("/var/lib/shorewall",))


def _ssh_config(farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
    service = farm.services.ssh_config
    assert service is not None
    yield Checker(("ssh", "-G", "-F", service.config, "farmhand"))


def _libvirt(_farm: Farm, documents: Sequence[Document]) -> Iterator[Checker]:
    for document in documents:
        yield Checker(("virt-xml-validate", document.path, "network"))


_CHECKERS: Mapping[str, Callable[[Farm, Sequence[Document]], Iterator[Checker]]] = {
    "bind": _bind,
    "dhcpd": _dhcpd,
    "kea": _kea,
    "dnsmasq": _dnsmasq,
    "nginx": _nginx,
    "haproxy": _haproxy,
    "nftables": _nftables,
    "shorewall": _shorewall,
    "ssh_config": _ssh_config,
    "libvirt": _libvirt,
}

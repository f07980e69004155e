"""Clients that ask a yard's services over and over, each in a thread and at the place it belongs to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from dhcp_client import client, client6
from http_machine import answer_of
from networks import enter, wait_for
from test_apply import ask

MAC = "52:54:00:00:00:07"
"""Of prod, 10.77.0.7. No machine of that address may be there: a DHCP server tells its kernel that the
address is its client's."""
Question = Callable[[], str]
Way = Callable[[], contextlib.AbstractContextManager[Question]]
_RIGHT = ("10.77.0.6", "10.77.0.7", "fd77::7", "10.77.0.6:8080", "dev2.try.example.")
_SLOW = ("kea6",)  # dhclient waits for other servers' offers


class Clients:
    """``failed`` has what was wrong; ``answers``: how many each has had. ``places``: where services are
    that have a network to themselves."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._places = places
        self._ways = self._all()
        self.answers = dict.fromkeys(self._ways, 0)
        self._threads = [threading.Thread(target=self._loop, args=(name,)) for name in self._ways]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def round(self) -> None:
        """Until each has had an answer to a question that it put since now; not the slow ones."""
        before = dict(self.answers)
        quick = [name for name in before if name not in _SLOW]
        wait_for(lambda: all(self.answers[name] >= before[name] + 2 for name in quick))

    def _loop(self, name: str) -> None:
        where, way = self._ways[name]
        enter(self._places.get(where, ""))
        with way() as question:
            while not self._stop.wait(0.01):
                try:
                    said = question()
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed answer
                    said = repr(error)
                if said not in _RIGHT:
                    self.failed.append(f"{name}: {said}")
                self.answers[name] += 1

    def _all(self) -> dict[str, tuple[str, Way]]:
        """By what they are called: where they are, and how they ask."""
        name, back, web = "dev2.try.example", "6.0.77.10.in-addr.arpa", "dev2.example.org"

        def asking(question: Question) -> Way:
            return lambda: contextlib.nullcontext(question)

        def dhcp() -> contextlib.AbstractContextManager[Question]:
            return _said(client(MAC))

        return {
            "bind": ("", asking(lambda: ask(name, "A")[0])),
            "bind reverse": ("", asking(lambda: ask(back, "PTR")[0])),
            "dnsmasq": ("", asking(lambda: ask(name, "A", 5301, "10.77.0.1")[0])),
            "dnsmasq reverse": ("", asking(lambda: ask(back, "PTR", 5301, "10.77.0.1")[0])),
            "libvirt dns": ("libvirt", asking(lambda: ask(name, "A", 53, "10.77.0.1")[0])),
            "nginx": ("", asking(lambda: answer_of("127.0.0.1", 8001, web, patience=0))),
            "haproxy": ("", asking(lambda: answer_of("127.0.0.1", 8003, web, patience=0))),
            "nftables": ("", asking(lambda: answer_of("10.77.0.1", 22006, "x", patience=0))),
            "shorewall": ("shorewall", asking(lambda: answer_of("192.0.2.7", 22006, "x", patience=0))),
            "dnsmasq dhcp": ("dnsmasq", dhcp),
            "dhcpd": ("dhcpd", dhcp),
            "kea4": ("kea", dhcp),
            "kea6": ("kea", lambda: _said(client6(MAC))),
            "libvirt dhcp": ("libvirt", dhcp),
        }


@contextlib.contextmanager
def _said(exchange: contextlib.AbstractContextManager[Callable[[], object]]) -> Iterator[Question]:
    with exchange as ask_once:
        wait_for(ask_once)  # Kea may be deaf to the first after its start, while it says it runs
        yield lambda: str(ask_once())

"""What is seen of a machine's DHCP here, while it is waited for: that it asks, and what it is told.

A packet socket (packet(7), root only) of all interfaces, for a bridge itself sees nothing of what goes
from one of its ports to another. The kernel hands on the one machine's DHCP alone.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass
from ipaddress import IPv4Address

from provision.network._dhcp_probe import ACK, DISCOVER, HEAD, NAK, OFFER, REQUEST, options_of

_ETH_P_ALL = 3  # if_ether.h: what we send ourselves is among it only then
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_AT_ONCE = 1000  # packets of a look
_UDP = 8  # bytes of its header


@dataclass(frozen=True, slots=True)
class DhcpAnswer:
    """``kind``: OFFER, ACK or NAK."""

    kind: int
    address: IPv4Address
    server: str


class DhcpWatch:
    """One machine's DHCP since this was opened; for one thread at a time."""

    def __init__(self, channel: socket.socket, mac: str) -> None:
        self._channel = channel
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._asked: Counter[str] = Counter()  # by interface: one packet passes several
        self._answer: DhcpAnswer | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, mac: str) -> Iterator[DhcpWatch | None]:
        """None without the right to look."""
        try:
            channel = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        except PermissionError:
            yield None
            return
        with channel:
            code = _filter(bytes.fromhex(mac.replace(":", "")))
            channel.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, code.program)
            channel.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:  # what came before the filter did
                    channel.recv(1)
            yield cls(channel, mac)

    def look(self) -> None:
        """Take what came since the last look."""
        for _ in range(_AT_ONCE):
            try:
                data, (interface, *_) = self._channel.recvfrom(2048)
            except OSError:  # no more; or an interface went
                return
            self._take(data, interface)

    def _take(self, data: bytes, interface: str) -> None:
        message = data[(data[0] & 15) * 4 + _UDP :] if data else b""
        if len(message) < HEAD.size + 4:
            return
        fields = HEAD.unpack_from(message)
        if fields[11][:6] != self._mac:
            return
        options = options_of(message)
        kind = (options.get(53) or b"\0")[0]
        if fields[0] == 1 and kind in (DISCOVER, REQUEST):
            self._asked[interface] += 1
        elif fields[0] == 2 and kind in (OFFER, ACK, NAK):
            server = options.get(54, b"")
            named = socket.inet_ntoa(server) if len(server) == 4 else "without a name"
            self._answer = DhcpAnswer(kind, IPv4Address(fields[8]), named)

    @property
    def asked(self) -> int:
        """How often it asked."""
        return max(self._asked.values(), default=0)

    def told(self, wanted: IPv4Address | None) -> str:
        """Why it can't be reached at the address ``wanted`` (None: any will do), for people; "": nothing
        is seen in the way of that."""
        answer = self._answer
        if answer is None:
            times = "once" if self.asked == 1 else f"{self.asked} times"
            return (
                f"it asked for an address by DHCP {times}, and no server answered" if self.asked else ""
            )
        server = f"DHCP server {answer.server}"
        if answer.kind == NAK:
            return f"{server} refuses it an address"
        if answer.kind == OFFER:
            return f"{server} offered it {answer.address}, but no more"
        if wanted in (answer.address, None):
            return ""
        return f"{server} gave it {answer.address}, and it is waited for at {wanted}"


class _Filter:
    """A struct sock_fprog (linux/filter.h) and what it points to."""

    def __init__(self, code: list[tuple[int, int, int, int]]) -> None:
        self._code = create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
        self.program = struct.pack("HL", len(code), addressof(self._code))


def _filter(mac: bytes) -> _Filter:
    """IPv4, UDP, not a later fragment, to a port of BOOTP, of that machine."""
    first, rest = struct.unpack("!IH", mac)
    load_half, load_byte, load_word_x, load_half_x = 0x28, 0x30, 0x40, 0x48
    equal, any_bit, header_length, done = 0x15, 0x45, 0xB1, 0x06
    protocol = 0xFFFFF000  # SKF_AD_OFF + SKF_AD_PROTOCOL
    chaddr = _UDP + 28
    return _Filter([
        (load_half, 0, 0, protocol), (equal, 0, 12, 0x0800),
        (load_byte, 0, 0, 9), (equal, 0, 10, socket.IPPROTO_UDP),
        (load_half, 0, 0, 6), (any_bit, 8, 0, 0x1FFF),
        (header_length, 0, 0, 0),
        (load_half_x, 0, 0, 2), (equal, 1, 0, 67), (equal, 0, 4, 68),
        (load_word_x, 0, 0, chaddr), (equal, 0, 2, first),
        (load_half_x, 0, 0, chaddr + 4), (equal, 1, 0, rest),
        (done, 0, 0, 0), (done, 0, 0, 0xFFFF),
    ])  # fmt: skip

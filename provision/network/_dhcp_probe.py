"""Run as a program: DHCP exchanges for other machines' MACs, on one interface. Standard library only;
started by ``provision.network.dhcp_probe`` in a network namespace of its own.

One JSON argument: ``interface``, ``macs``, ``seconds`` to wait for each answer, ``give_back``: those of
the MACs whose leases are given back. Prints one JSON object: MAC to address, or to why there is none.

DISCOVER, OFFER, REQUEST, ACK (RFC 2131) with the machine's MAC as chaddr and the broadcast flag set, so
that no bridge learns a place for that MAC and answers come to everybody. The lease is the machine's own,
as if it had asked itself. That of a machine which isn't there would keep its address from others, and
ends by a RELEASE.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

_COOKIE = b"\x63\x82\x53\x63"
HEAD = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")
DISCOVER, OFFER, REQUEST, ACK, NAK, RELEASE = 1, 2, 3, 5, 6, 7
_TRIES = 3


def message(
    mac: bytes,
    xid: int,
    kind: int,
    options: bytes = b"",
    address: bytes = bytes(4),  # its own, as yet
) -> bytes:
    none = bytes(4)
    head = HEAD.pack(
        1,
        1,
        6,
        0,
        xid,
        0,
        0x8000,
        address,
        none,
        none,
        none,
        mac.ljust(16, b"\0"),
        bytes(64),
        bytes(128),
    )
    asked = bytes((55, 3, 1, 3, 6)) if kind != RELEASE else b""  # subnet mask, router, name servers
    return (head + _COOKIE + bytes((53, 1, kind)) + options + asked + b"\xff").ljust(300, b"\0")


def options_of(data: bytes) -> dict[int, bytes]:
    """By number. What is cut off is left out."""
    found, at = {}, HEAD.size + 4
    while at + 1 < len(data) and data[at] != 255:
        if data[at] == 0:
            at += 1
            continue
        length = data[at + 1]
        found[data[at]] = data[at + 2 : at + 2 + length]
        at += 2 + length
    return found


def answer(
    channel: socket.socket, mac: bytes, xid: int, kinds: tuple[int, ...], seconds: float
) -> tuple[int, str, bytes] | None:
    """Kind, address and server of the first answer to this machine; None: nobody answers in time."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        channel.settimeout(left)
        try:
            data = channel.recv(4096)
        except TimeoutError:
            return None
        if len(data) < HEAD.size + 4:
            continue
        fields = HEAD.unpack_from(data)
        options = options_of(data)
        kind = (options.get(53) or b"\0")[0]
        if fields[0] == 2 and fields[4] == xid and fields[11][:6] == mac and kind in kinds:
            return kind, socket.inet_ntoa(fields[8]), options.get(54, bytes(4))
    return None


def exchange(channel: socket.socket, mac: str, seconds: float, *, give_back: bool) -> str:
    """The address, or why there is none. ``give_back``: end the lease at once."""
    raw = bytes.fromhex(mac.replace(":", ""))
    xid = int.from_bytes(os.urandom(4))
    everybody = ("255.255.255.255", 67)
    for _ in range(_TRIES):
        channel.sendto(message(raw, xid, DISCOVER), everybody)
        offer = answer(channel, raw, xid, (OFFER,), seconds)
        if offer is None:
            continue
        wanted = bytes((50, 4)) + socket.inet_aton(offer[1]) + bytes((54, 4)) + offer[2]
        channel.sendto(message(raw, xid, REQUEST, wanted), everybody)
        last = answer(channel, raw, xid, (ACK, NAK), seconds)
        if last is not None and last[0] == ACK and give_back:
            own, server = socket.inet_aton(last[1]), bytes((54, 4)) + last[2]
            channel.sendto(message(raw, xid, RELEASE, server, own), everybody)  # nobody answers that
        if last is not None:
            return last[1] if last[0] == ACK else f"{offer[1]} was offered, then refused"
    return "no answer"


def main() -> None:
    order = json.loads(sys.argv[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, order["interface"].encode())
        channel.bind(("0.0.0.0", 68))  # noqa: S104 - of one interface, in a namespace of our own
        back, seconds = order["give_back"], order["seconds"]
        found = {mac: exchange(channel, mac, seconds, give_back=mac in back) for mac in order["macs"]}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except OSError as problem:
        sys.exit(str(problem))

"""What a guest is told that was given back the memory of an earlier moment, before anything else is run
in it.

It doesn't know: its clock stands where it stood, its random numbers come as they came in the life before
(a kernel that has no vmgenid gives two such lives the very same ones), and its address may be somebody
else's by now. All of it is one program on the connection that answered, for each program and each
handshake costs where the processor is emulated. Only the clock takes a second word from here: it is told
once the program runs there, so that nothing but the way there is between our clock and theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import secrets
import time
from collections.abc import Sequence
from typing import cast

import asyncssh

from host.printable import last_line
from inventory.errors import DriverFailed
from provision.guest.remote import CLOCK_LIMIT, Ready, Reseeded, Resumed
from provision.guest.shell import ANSWER_MAX, ANSWER_SECONDS, ended, start

_RIGHT = 0.1  # seconds that a clock is off which is let alone
_TRIES = 6  # to set it: a busy machine may take its time just then
_EXEC = 0.02  # seconds from our word to date(1)'s: what emulated guests take
_SEED = 32  # bytes, as much as the kernel's generator has

# In order of their cost. What is written to urandom is mixed in, and used from the next reseeding on,
# within a minute; RNDRESEEDCRNG does that at once (random(4)). No program of coreutils makes an ioctl.
_PROGRAM = r"""
root() { "$@" >/dev/null 2>&1 || sudo -n -- "$@" >/dev/null 2>&1; }
forked() {
    [ -d /sys/bus/acpi/drivers/vmgenid ] || return 1
    for as in "" "sudo -n"; do
        for at in $($as dmesg 2>/dev/null |
            sed -n 's/^[^ ]*\[ *\([0-9]*\)\..* reseeded due to virtual machine fork.*/\1/p'); do
            [ $((${up%.*} - at)) -gt AGE ] || return 0
        done
    done
    return 1
}
read -r up _ </proc/uptime
random=no
(printf %s SEED >/dev/urandom) 2>/dev/null && random=mixed
if forked; then
    random=vmgenid
elif root perl -e 'open R,">","/dev/urandom" and ioctl R,0x5207,0 or exit 1' ||
    root python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)'; then
    random=ioctl
fi
lease=none
LEASE
read -r boot </proc/sys/kernel/random/boot_id
read -r up _ </proc/uptime
date "+$boot $up $random $lease %s.%N"
while read -r when; do
    root date -u -s "@$when" || root date -u -s "@${when%.*}"
    date +%s.%N
done
"""

# networkd without D-Bus can't be told, but started anew asks for what it had. Nor can dhclient: it is
# ended so that it doesn't give the address back, and then run again.
_LEASE = r"""
for net in /sys/class/net/*; do
    read -r index <"$net/ifindex"
    [ -f "/run/systemd/netif/leases/$index" ] || continue
    root networkctl renew "${net##*/}" ||
        root systemctl --no-block restart systemd-networkd || continue
    lease=networkd
done
for file in /run/dhclient*.pid /run/dhclient/*.pid /run/udhcpc*.pid; do
    [ -f "$file" ] && read -r pid <"$file" && [ -r "/proc/$pid/cmdline" ] || continue
    command=$(tr '\0' '\n' <"/proc/$pid/cmdline")
    case $command in
        *udhcpc*) root kill -s USR1 "$pid" && lease=udhcpc ;;
        *dhclient*)
            root kill -s KILL "$pid" || continue
            lease=dhclient
            (
                set -f
                IFS='
'
                root setsid $command
            ) </dev/null >/dev/null 2>&1 &
            ;;
    esac
done
"""

_CLOCK = re.compile(r"([0-9]{1,12})(?:\.(?:([0-9]{1,9})|[^0-9\n]*))?")
_FIRST = re.compile(
    r"([0-9a-f-]{36}) ([0-9]{1,12}(?:\.[0-9]{1,9})?) (vmgenid|ioctl|mixed|no) "
    rf"(networkd|dhclient|udhcpc|none) {_CLOCK.pattern}"
)


async def resume(ssh: asyncssh.SSHClientConnection, *, lived: float, leased: bool) -> Ready:
    """Set the guest's clock to ours, have it make its random numbers anew, and with ``leased`` renew
    what it was given by DHCP. ``lived``: seconds since it runs again, or more. What it says of itself is
    as of ``facts``.

    A login that may not do all of it does what it may: see ``Resumed``. DriverFailed where the guest
    doesn't answer so; asyncssh.Error and OSError where the connection is lost."""
    said = _TimedLines()
    text = program(lived=lived, leased=leased)
    channel, shell = await start(ssh, text, said.feed, said.end, most=ANSWER_MAX)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            text, at = await said.line()
            found = _FIRST.fullmatch(text)
            if found is None:
                why = last_line(text, 300) or shell.said() or "nothing"
                raise DriverFailed(f"it can't be told that it runs again: {why}")
            boot_id, uptime, how, client, *clock = found.groups()
            before = _seconds(clock, whole=0.5) - at
            after = await _set_clock(channel, said, before, coarse=clock[1] is None)
        with contextlib.suppress(OSError):
            channel.write_eof()
    except TimeoutError:
        raise DriverFailed(f"a question was not answered within {ANSWER_SECONDS:.0f} s") from None
    finally:
        await ended(channel)
    resumed = Resumed(after, cast(Reseeded, how), "" if client == "none" else client)
    return Ready(boot_id, float(uptime), after, resumed=resumed)


def program(*, lived: float, leased: bool) -> str:
    """What is run there by sh(1). It prints a line (see _FIRST), then for each time that it reads, in
    seconds since 1970, what its clock says once it is set to that. Each has other bytes to mix in."""
    age = math.ceil(lived) + 1 if lived < math.inf else -1
    text = _PROGRAM.replace("LEASE", _LEASE if leased else "").replace("AGE", str(age))
    return text.replace("SEED", secrets.token_hex(_SEED))


async def _set_clock(
    channel: asyncssh.SSHClientChannel[bytes], said: _TimedLines, before: float, *, coarse: bool
) -> float:
    """Returns what is left, seconds. ``coarse``: its date(1) knows whole seconds only."""
    if abs(before) <= _RIGHT and not coarse:
        return before
    lag = _EXEC
    for _ in range(_TRIES):
        if coarse:  # at the moment when one begins
            await asyncio.sleep(1 - (time.time() + lag) % 1)
        asked = time.time()
        channel.write(f"{asked + lag:.3f}\n".encode())
        text, at = await said.line()
        if (found := _CLOCK.fullmatch(text)) is None:
            raise DriverFailed(f"its clock can't be read: {last_line(text, 300) or 'nothing'}")
        after = _seconds(found.groups(), whole=0.0) - (asked + at) / 2
        if abs(after) + (at - asked) / 2 <= CLOCK_LIMIT:
            break
        lag -= after
    return after


def _seconds(clock: Sequence[str | None], *, whole: float) -> float:
    """``whole``: what is added where date(1) has no %N."""
    seconds, part = clock
    return float(seconds or 0) + (float(f"0.{part}") if part else whole)


class _TimedLines:
    """What a program prints, a line at a time, each with ``time.time()`` of its arrival."""

    def __init__(self) -> None:
        self._begun = b""
        self._whole: asyncio.Queue[tuple[str, float]] = asyncio.Queue()

    def feed(self, data: bytes) -> None:
        now = time.time()
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._whole.put_nowait((line.decode(errors="replace"), now))

    def end(self) -> None:
        self._whole.put_nowait((self._begun.decode(errors="replace"), time.time()))

    async def line(self) -> tuple[str, float]:
        """The next one; what there is of it where the program has ended."""
        return await self._whole.get()

"""What guests with internet don't reach: what listens on this machine's own loopback.

QEMU's user network makes connections from this machine, as QEMU's user: to its loopback for the
gateway's address (10.0.2.2), and for 127.0.0.1 itself from a guest that routes it (tried with QEMU
7.2). Its libslirp has a switch for the first, which QEMU doesn't hand on, and none for the second; nor
does passt of Debian 12 hold up the second. So the kernel refuses it: new connections to the loopback by
that user, but to a name server (port 53), where those may be that QEMU asks. What comes in by forwarded
ports is answered as ever. One table for all farms of this machine, by root only; it is made anew at each
start, and is gone after a boot.
"""

from __future__ import annotations

from host.run import Runner, which
from inventory.errors import CommandFailed, Conflict, Unsupported

TABLE = "farmhand_loopback"
_MARK = "farmhand: guests of QEMU's user network stay off this machine's loopback"
_RULES = """\
table inet {table}
delete table inet {table}
table inet {table} {{
	comment "{mark}"
	chain output {{
		type filter hook output priority filter; policy accept;
		meta skuid {uid} ip daddr 127.0.0.0/8 goto loopback
		meta skuid {uid} ip6 daddr ::1 goto loopback
	}}
	chain loopback {{
		meta l4proto {{ tcp, udp }} th dport 53 accept
		tcp flags & (syn | ack) == syn reject with tcp reset
		meta l4proto udp reject
	}}
}}
"""


def check_able() -> None:
    """Unsupported without nft."""
    if which("nft") is None:
        raise Unsupported(
            "nft is not installed, which keeps guests off this machine's loopback",
            remedy="apt-get install nftables",
        )


def is_closed(runner: Runner) -> bool:
    """Conflict where somebody else's table has that name: it is left as it is."""
    listed = runner.read("nft", "list", "table", "inet", TABLE, ok=range(256), timeout=20)
    if listed.status == 0 and _MARK not in listed.stdout:
        raise Conflict(
            f"nftables: table inet {TABLE} is not farmhand's: it is left as it is",
            remedy=f"rename it, or remove it: nft delete table inet {TABLE}",
        )
    return listed.status == 0


def close(runner: Runner, uid: int) -> None:
    """Keep that user's new connections off the loopback, in one step. Errors: Conflict, Unsupported."""
    check_able()
    is_closed(runner)
    rules = _RULES.format(table=TABLE, mark=_MARK, uid=uid)
    try:
        runner.change("nft", "-f", "-", input=rules.encode(), timeout=20)
    except CommandFailed as error:
        raise Unsupported(
            f"nftables can't keep guests off this machine's loopback: {error.message}",
            remedy="see that the kernel and this container let nft work (nft list ruleset)",
            detail=error.detail,
        ) from error

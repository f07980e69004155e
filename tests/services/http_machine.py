"""A VM's stand-in: a network namespace on the bridge, with a listener that says who it is."""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
import time
from collections.abc import Iterator

from networks import place, unique, within

_SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("up", flush=True)
    while True:
        peer, _ = server.accept()
        with peer:
            peer.recv(65536)
            said = f"{sys.argv[1]}:{sys.argv[2]}".encode()
            head = "HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: {}\\r\\n\\r\\n"
            peer.sendall(head.format(len(said)).encode() + said)
"""


@contextlib.contextmanager
def machine(address: str, port: int, *, where: str = "") -> Iterator[None]:
    """``where``: the place whose bridge it is on."""
    link, here = unique("m"), within(where)
    with place(bridge=False) as name:
        words = (
            f"link add {link} type veth peer name eth0 netns {name}",
            f"link set {link} master br0 up",
            f"-n {name} addr add {address}/24 dev eth0",
            f"-n {name} link set eth0 up",
            f"-n {name} route add default via 10.77.0.1",
        )
        for line in words:
            subprocess.run([*here, "ip", *line.split()], check=True)
        argv = [*within(name), sys.executable, "-c", _SERVER, address, str(port)]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            yield
        finally:
            server.kill()
            server.wait()
            assert server.stdout is not None
            server.stdout.close()


def answer_of(address: str, port: int, host: str, *, patience: float = 60) -> str:
    """The body of GET / there; tried again while a reload takes place."""
    deadline = time.monotonic() + patience
    while True:
        connection = http.client.HTTPConnection(address, port, timeout=10)
        try:
            connection.request("GET", "/", headers={"Host": host})
            response = connection.getresponse()
            body = response.read().decode()
            if response.status == 200 or time.monotonic() > deadline:
                return body
        except OSError:
            if time.monotonic() > deadline:
                raise
        finally:
            connection.close()
        time.sleep(0.05)

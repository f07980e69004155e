"""What somebody uploads: .changes files, and keys that sign them."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


def changes(files: Mapping[str, bytes], **more: str) -> bytes:
    def listed(kind: str, words: str = "") -> str:
        return "".join(
            f"\n {hashlib.new(kind, data).hexdigest()} {len(data)} {words}{name}"
            for name, data in files.items()
        )

    fields = {
        "Format": "1.8",
        "Date": "Sun, 29 Nov 2026 10:00:00 +0000",
        "Source": "hello",
        "Architecture": "amd64",
        "Version": "1",
        "Distribution": "tested",
        "Description": "\n hello - says so\n .\n  more",
        "Checksums-Sha256": listed("sha256"),
        "Files": listed("md5", "devel optional "),
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return "".join(
        f"{name}:{' ' * (value[:1] != chr(10))}{value}\n" for name, value in fields.items()
    ).encode()


@contextlib.contextmanager
def uploader_keys() -> Iterator[tuple[Path, str, bytes]]:
    """A home with two keys, uploader@ and stranger@example.org; the first one's fingerprint and public
    key."""
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        home = Path(place)
        gpg(home, "--quick-gen-key", "uploader@example.org", "ed25519", "sign", "never")
        gpg(home, "--quick-gen-key", "stranger@example.org", "ed25519", "sign", "never")
        listed = gpg(home, "--with-colons", "--list-keys", "uploader@example.org").decode()
        found = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr"))
        try:
            yield home, found, gpg(home, "--armor", "--export", found)
        finally:
            subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
            subprocess.run(["gpgconf", "--homedir", home, "--remove-socketdir"], check=False)


def gpg(home: Path, *args: str, data: bytes = b"") -> bytes:
    words = ("gpg", "--homedir", home, "--batch", "--no-tty", "--passphrase", "", "--quiet")
    return subprocess.run([*words, *args], input=data, capture_output=True, check=True).stdout

"""Events by HTTP POST, signed as https://www.standardwebhooks.com has it.

The signature is HMAC-SHA256 over ``ID.TIMESTAMP.BODY``; a receiver checks it, refuses timestamps that
are minutes off, and takes an id only once (docs/events.md).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from host.files import read_secret
from host.run import Runner
from inventory.base import at_key
from inventory.errors import TimedOut, UsageError
from provision.engine.events import Event, Refused, SubscriberSection, Undelivered

if TYPE_CHECKING:  # a command that tells nobody needs none of them
    import ssl

    from inventory.fields import FilePath, Variable, WebAddress

_LIMIT = 10.0
"""Seconds for a whole try: connection, handshake, request and answer."""
_NEVER = (400, 413, 415, 422)
"""Answers that say that this event will never be taken (RFC 9110, section 15.5)."""
_PREFIX = "whsec_"
_LEAST = 16  # bytes of a secret
_MOST = 4096  # bytes of its file


@dataclass(frozen=True, kw_only=True)
class WebhookSubscriber(SubscriberSection):
    """Is sent events by POST, as JSON, signed as the Standard Webhooks specification has it."""

    webhook: WebAddress
    """Where to. Redirects are not followed. On this very machine http:// will do."""
    secret_file: FilePath | None = None
    """A file (relative to the farm file, readable by its owner alone) with the secret that signs."""
    secret_variable: Variable | None = None
    """Instead of `secret_file`: the environment variable that holds the secret."""
    ca: FilePath | None = None
    """The PEM file of the CA that the server's certificate is checked by; absent: the system's CAs."""

    def __post_init__(self) -> None:
        if self.secret_file is None and self.secret_variable is None:
            raise at_key("webhook", "a webhook needs a secret", "secret_file", "secret_variable")
        if self.secret_file is not None and self.secret_variable is not None:
            raise at_key("secret_variable", "there is 'secret_file' already", "secret_file")
        if self.ca is not None and self.webhook.startswith("http:"):
            raise at_key("ca", "'ca' is for an https URL", "webhook")

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.secret_variable,) if self.secret_variable else ()

    def opened(self, beside: Path, _runner: Runner) -> Webhook:
        return Webhook(self, beside)


class Webhook:
    """Takes nothing from the environment but the secret, where the farm file says so: no proxy."""

    def __init__(self, section: WebhookSubscriber, beside: Path) -> None:
        self._section = section
        self._beside = beside

    def deliver(self, event: Event) -> None:
        """As ``provision.engine.events.Subscriber`` has it."""
        from http.client import responses

        stamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "farmhand",
            "webhook-id": event.id,
            "webhook-timestamp": stamp,
            "webhook-signature": signature(self._key(), event.id, stamp, event.body),
        }
        status = self._post(event.body, headers)
        if 200 <= status < 300:
            return
        words = f"{self._where} answered {status} {responses.get(status, '')}".rstrip()
        if 300 <= status < 400:
            words += ": redirects are not followed"
        raise Refused(words) if status in _NEVER else Undelivered(words)

    def check(self) -> None:
        """As ``provision.engine.events.Subscriber`` has it; nobody is called."""
        self._key()
        self._context()

    @property
    def _where(self) -> str:
        """What may be shown of the address: the rest may be as good as a password."""
        from urllib.parse import urlsplit

        parts = urlsplit(self._section.webhook)
        return f"{parts.scheme}://{parts.netloc}"

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        import ssl
        from http.client import HTTPException
        from urllib.parse import urlsplit

        from host.web import calling

        parts = urlsplit(self._section.webhook)
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        try:
            with calling(parts, self._context(), _LIMIT) as connection:
                connection.request("POST", path, body, headers)
                return connection.getresponse().status
        except TimeoutError:
            raise TimedOut(f"{self._where} gave no answer within {_LIMIT:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise Undelivered(
                f"{self._where}: its certificate isn't trusted: {error.verify_message}"
            ) from error
        except HTTPException as error:  # its words are the other side's
            raise Undelivered(f"{self._where} gave no answer as of an HTTP server") from error
        except OSError as error:
            raise Undelivered(f"{self._where}: {error.strerror or error}") from error

    def _context(self) -> ssl.SSLContext | None:
        from host.web import trusted

        ca = self._section.ca and self._beside / self._section.ca.expanduser()
        return trusted(self._section.webhook, ca)

    def _key(self) -> bytes:
        """UsageError, WrongState: there is none, or others can read it."""
        file, variable = self._section.secret_file, self._section.secret_variable
        if file is not None:
            path = self._beside / file.expanduser()
            where, text = str(path), _text(path)
        else:
            where = f"the environment variable {variable}"
            text = os.environ.get(variable or "", "")
            if not text:
                raise UsageError(f"{where} is not set: it is to hold the webhook's secret")
        try:
            key = secret_key(text.strip())
        except ValueError as error:
            raise UsageError(f"{where} holds no webhook secret: {error}") from None
        return key


def secret_key(text: str) -> bytes:
    """The bytes that sign: ``whsec_`` and base64, or the text itself. ValueError."""
    if text.startswith(_PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"after {_PREFIX} base64 is expected") from None
    else:
        key = text.encode()
    if len(key) < _LEAST:
        raise ValueError(f"it has {len(key)} bytes, and at least {_LEAST} are needed")
    return key


def signature(key: bytes, id: str, timestamp: str, body: bytes) -> str:
    """The value of the header webhook-signature."""
    signed = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(signed).decode()}"


def _text(path: Path) -> str:
    try:
        return read_secret(path, "the webhook's secret", _MOST).decode()
    except UnicodeDecodeError:
        raise UsageError(f"the secret {path} is not text") from None

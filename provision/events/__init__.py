"""Subscribers of events, a line each: where the section of one is, module:class, by the key that only
that kind has. Its file says the rest."""

from __future__ import annotations

from collections.abc import Mapping

SUBSCRIBERS: Mapping[str, str] = {
    "webhook": "provision.events.webhook:WebhookSubscriber",
    "command": "provision.events.command:CommandSubscriber",
}

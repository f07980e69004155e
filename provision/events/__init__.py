"""Subscribers of events, a file for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from host.run import Runner
from inventory.base import Model
from provision.engine.events import Subscriber

SUBSCRIBERS: Mapping[str, str] = {
    "WebhookSubscriber": "provision.events.webhook:Webhook",
    "CommandSubscriber": "provision.events.command:Command",
}
"""By the section of the farm file that one is: a line each."""


def open_subscriber(section: Model, beside: Path, runner: Runner) -> Subscriber:
    """Each takes its section, the farm file's directory, and what runs commands."""
    module, _, name = SUBSCRIBERS[type(section).__name__].partition(":")
    subscriber: Subscriber = getattr(import_module(module), name)(section, beside, runner)
    return subscriber

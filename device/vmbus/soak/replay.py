"""The commands that run a campaign, or one of its episodes, again; and settings as words of a command line.

    scripts/soak --seed 7 --operations 50 --set weights.clone=0 --set audit=false --episode 17 --report night-episode-17

They are made of the settings alone, so a report that was sent to a colleague says all that is needed. They name a new
folder in the current directory.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from vmbus.errors import UsageError
from vmbus.places import command
from vmbus.soak.settings import Settings

_OWN_OPTIONS = {"seed": "--seed", "operations": "--operations", "seconds": "--seconds"}


def campaign_command(settings: dict[str, Any], folder: Path) -> str:
    """The command that runs the whole campaign again, in another folder."""
    return shlex.join([*command("soak").split(), *words(settings), "--report", f"{folder.resolve().name}-again"])


def replay_command(settings: dict[str, Any], episode: int, folder: Path) -> str:
    target = f"{folder.resolve().name}-episode-{episode}"
    return shlex.join([*command("soak").split(), *words(settings), "--episode", str(episode), "--report", target])


def words(settings: dict[str, Any]) -> list[str]:
    """The options that say these settings: `settings` is `Settings` as plain data."""
    defaults = msgspec.to_builtins(Settings())
    said: list[str] = []
    for name, option in _OWN_OPTIONS.items():
        value = settings.get(name)
        if value is not None:
            said += [option, _text(value)]
    for name, value in settings.items():
        if name in _OWN_OPTIONS or value == defaults.get(name):
            continue
        if isinstance(value, dict) and value and isinstance(defaults.get(name), dict):
            for key, one in value.items():
                said += ["--set", f"{name}.{key}={_text(one)}"]
        else:
            said += ["--set", f"{name}={_text(value)}"]
    return said


def parse_words(values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """`values` with those of the words KEY=VALUE put in; a dot in KEY leads into a table, VALUE is JSON or text.

    Raises `UsageError` for a word that is not of this form.
    """
    result: dict[str, Any] = json.loads(json.dumps(values))
    for word in words:
        name, equals, text = word.partition("=")
        path = name.split(".")
        if not equals or not all(path):
            raise UsageError(f"--set {word!r} is not of the form KEY=VALUE, such as weights.clone=0")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        table = result
        for key in path[:-1]:
            if not isinstance(table.setdefault(key, {}), dict):
                table[key] = {}
            table = table[key]
        table[path[-1]] = value
    return result


def _text(value: Any) -> str:
    """A value as a word that `parse_words` reads as the same value."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, separators=(",", ":"))

"""The user's ssh keys on their way into a guest: public ones, on its kernel's command line, as a systemd credential."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from vmbus.errors import UsageError, os_error
from vmbus.provision.debian_system import KEYS_CREDENTIAL
from vmbus.vm.description import VmDescription

MOST_CHARACTERS = 1400
"""Of the word on the command line: Linux takes 2,047 in all."""

_KINDS = ("ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ecdsa-sha2-", "sk-ecdsa-sha2-", "ssh-rsa")
"""Kinds of keys, by how their names begin, the shorter keys first."""

_LINE = re.compile(r"^([a-z0-9@.-]+) ([A-Za-z0-9+/]+={0,2})(?: .*)?$")


def public_keys(text: str) -> list[str]:
    """The keys in a file, such as one that ends in `.pub`, without their comments; other lines are skipped."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if match is not None and match[1].startswith(_KINDS):
            found.append(f"{match[1]} {match[2]}")
    return found


def read_keys(files: Sequence[Path], home: Path | None = None) -> list[str]:
    """The keys in these files; without any, those of `~/.ssh/*.pub`.

    Raises EnvironmentProblem if a file cannot be read, UsageError if one that was named has no key.
    """
    if not files:
        folder = (home or Path.home()) / ".ssh"
        return [key for path in sorted(folder.glob("*.pub")) for key in public_keys(_text(path))]
    keys = []
    for path in files:
        found = public_keys(_text(path))
        if not found:
            raise UsageError(f"{path} has no public ssh key: such a line begins with ssh-ed25519, ssh-rsa or the like")
        keys += found
    return keys


def _text(path: Path) -> str:
    with os_error(f"cannot read {path}"):
        return path.read_text(encoding="utf-8", errors="replace")


def keys_word(keys: Iterable[str]) -> tuple[str, int]:
    """The word for the kernel's command line, and how many keys had no room in it; an empty one without keys."""
    ranked = sorted(
        dict.fromkeys(keys), key=lambda key: next(i for i, kind in enumerate(_KINDS) if key.startswith(kind))
    )
    taken: list[str] = []
    for key in ranked:
        if len(_word([*taken, key])) <= MOST_CHARACTERS:
            taken.append(key)
    return (_word(taken) if taken else ""), len(ranked) - len(taken)


def _word(keys: Sequence[str]) -> str:
    data = "".join(f"{key}\n" for key in keys).encode()
    return f"systemd.set_credential_binary={KEYS_CREDENTIAL}:{base64.b64encode(data).decode()}"


def with_keys(description: VmDescription, files: Sequence[Path], home: Path | None = None) -> tuple[VmDescription, str]:
    """The description with the user's keys, and a sentence if there is something to say of them.

    Raises as `read_keys`.
    """
    word, left = keys_word(read_keys(files, home))
    if not word:
        return description, (
            "no ssh key in ~/.ssh/*.pub: log in on this console, or make a key with ssh-keygen, or name one: --ssh-key"
        )
    guest = msgspec.structs.replace(description.guest, kernel_arguments=[*description.guest.kernel_arguments, word])
    notice = f"{left} ssh keys have no room on the kernel's command line; name one: --ssh-key" if left else ""
    return msgspec.structs.replace(description, guest=guest), notice

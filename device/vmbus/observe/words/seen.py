"""A packet as far as it is known to somebody who looks, and what text about it may be."""

from typing import NamedTuple

LONGEST = 120
"""Characters of the text about one packet."""


class Seen(NamedTuple):
    """One packet. `body`: the headers of its type; `payload`: as it lies in the ring, or less of it; `external`: what
    is known of the memory that it describes, from its beginning, which may be nothing."""

    to_guest: bool
    kind: int
    transaction: int
    body: bytes
    payload: bytes
    external: bytes = b""


def clean(text: str) -> str:
    """Printable ASCII, not too long: some of it is a guest's, and goes to terminals and into files of other tools."""
    if not (text.isascii() and text.isprintable()):
        # Of long text only what can be shown: an escape is not shorter than what it stands for.
        text = "".join(
            letter if letter.isascii() and letter.isprintable() else letter.encode("unicode_escape").decode()
            for letter in text[: LONGEST + 1]
        )
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def counted(number: int, what: str) -> str:
    """`3 bytes`, `1 byte`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

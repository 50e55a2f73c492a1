"""The source's question what became of its VM, when it has decided and hears nothing."""

from __future__ import annotations

import asyncio
import time

import msgspec

from vmbus.errors import EnvironmentProblem, VmbusError
from vmbus.operations.migration.address import Address
from vmbus.operations.migration.channel import connect
from vmbus.operations.migration.link import Link
from vmbus.operations.migration.messages import Fate, Hello
from vmbus.operations.migration.tls import Tls

ASK_TIMEOUT = 60.0
"""Seconds for which a silent destination is asked what became of the VM."""
ASK_INTERVAL = 0.5
_ASK_ONCE = 5.0


class Asking:
    """For one migration. `destination`: whose word counts (see `vmbus.operations.migration.messages.Wanted`)."""

    destination: str | None = None

    def __init__(
        self,
        migration: str,
        address: Address,
        secret: bytes,
        tls: Tls | None = None,
        *,
        silence: float | None,
        timeout: float,
    ) -> None:
        """`timeout`: seconds for which `ask` goes on."""
        self.timeout = timeout
        self._migration = migration
        self._address = address
        self._secret = secret
        self._tls = tls
        self._silence = silence

    async def ask(self, problem: Exception) -> Fate:
        """What became of the VM, and why; still ``undecided`` if the destination could not tell in time.

        Only the destination that this migration began with can tell: neither that nobody listens there (a firewall, a
        listener that was given up, a reboot), nor the word of another one that knows the same secret says anything.
        """
        deadline = time.monotonic() + self.timeout
        reason = str(problem) or type(problem).__name__
        while True:
            try:
                answer = await self.once()
                if answer.fate != "undecided":
                    return msgspec.structs.replace(answer, reason=answer.reason or reason)
                latest = answer.reason
            except VmbusError as error:
                latest = str(error)
            if time.monotonic() >= deadline:
                return Fate(fate="undecided", reason=f"{reason}; {latest}" if latest else reason)
            await asyncio.sleep(ASK_INTERVAL)

    async def once(self) -> Fate:
        """The word of the destination that this migration began with, ``undecided`` included. Raises `VmbusError`."""
        try:
            channel = await connect(self._address, self._secret, _ASK_ONCE, self._tls)
        except ConnectionRefusedError:
            raise EnvironmentProblem(f"nobody listens at {self._address}") from None
        async with Link(channel, silence=self._silence) as link:
            await link.send(Hello(migration=self._migration, purpose="ask"))
            answer = await link.expect(Fate, timeout=_ASK_ONCE, what="what became of the VM")
        if answer.fate == "unknown" or answer.destination != self.destination:
            raise EnvironmentProblem(
                f"at {self._address} is another destination, which knows nothing of this migration"
            )
        return answer

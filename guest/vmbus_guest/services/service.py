"""What services have in common: channels that come and go with the host, and no end of their own."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.workload import Workload


class Service(Workload):
    """A workload that lasts. A subclass makes its channels in `channels_wanted` and learns of their life from the
    channels' own callbacks (opened, started, closed).

    Nothing waits for the host: a channel is opened when it is offered, and once more whenever it is offered anew after
    a rescind. A channel that failed, because the host broke its rules, stays closed.
    """

    lasting = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.channels: list[ClientChannel] = []
        self.reopened = 0
        self._stopped = False

    def channels_wanted(self) -> list[ClientChannel]:
        """Make the channels, with their callbacks: `self.make_channel`. By default one, of `interface_type`; `prepare`
        sets its callbacks."""
        self.channel = self.make_channel(self.interface_type, self.name, self._instance)
        self.prepare()
        return [self.channel]

    def make_channel(
        self, interface_type: UUID, name: str, instance: UUID | None = None, *, subchannel_index: int = 0
    ) -> ClientChannel:
        """A disabled channel with rings as the parameters ask for."""
        return self.driver.client_channel(
            interface_type,
            instance=instance,
            ring_pages_in=self._pages_in,
            ring_pages_out=self._pages_out,
            name=name,
            subchannel_index=subchannel_index,
        )

    def open(self, driver: ChannelDriver) -> None:
        """Ask for the channels; they open when they are offered."""
        self.driver = driver
        self.channels = self.channels_wanted()
        for channel in self.channels:
            channel.enable()

    def begin(self) -> None:
        """Channels begin by themselves, when they are open."""

    def rescinded(self, channel: ClientChannel) -> None:
        """Wait for the next offer."""
        if channel in self.channels and not self._stopped:
            self.reopened += 1
            channel.enable()

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """A service waits for its host as long as it takes."""
        return None

    def finished(self) -> bool:
        """When it was stopped."""
        return self._stopped

    def stop(self) -> None:
        """End."""
        self._stopped = True

    def close(self) -> None:
        """Forget channels that were never offered: nothing would close them."""
        for channel in self.channels:
            if channel.state is ChannelState.CLOSED:
                channel.disable()

    def result(self) -> dict[str, Any]:
        """The last counts."""
        return self.counts()

    def counts(self) -> dict[str, Any]:
        """Which channels are open; subclasses add what they did."""
        return {
            "open": sum(channel.active for channel in self.channels),
            "channels": len(self.channels),
            "reopened": self.reopened,
        }

    def good(self) -> bool:
        """A service has nothing to prove."""
        return True

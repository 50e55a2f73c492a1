"""Test driver `hotplug`: the lab rescinds channels that are in use and offers them again: sub-channels, and a whole
station. Each is opened as soon as it is there. What was under way on a channel that goes is cancelled.

Parameters:

    count        how often a channel is withdrawn, all together; 0: until stopped
    subchannels  of the station that is asked; these come and go
    stations     other stations that come and go (the lab needs one more for each)
    requests     answers on a channel before it is withdrawn
    window       requests outstanding on each channel
    size         most bytes of data in a request
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from vmbus.errors import UsageError
from vmbus.kmcl.channel import Channel
from vmbus.kmcl.client import ClientChannel
from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.status import Status as PacketStatus
from vmbus.wire.lab import LAB_TYPE, Op, Status, parse_reply, request
from vmbus_guest.channel_driver import ChannelDriver
from vmbus_guest.testdrivers.context import Parameters
from vmbus_guest.testdrivers.requests import Books, LabWorkload, Requests, ask, post


class Phase(Enum):
    """COMING: waits for its offer. HERE: in use. LEAVING: the host was asked to withdraw it."""

    COMING = "coming"
    HERE = "here"
    LEAVING = "leaving"


class Target:
    """One channel that comes and goes."""

    def __init__(self, channel: ClientChannel, withdraw: Op, offer: Op) -> None:
        self.channel = channel
        self.withdraw = withdraw
        self.offer = offer
        self.number = 0
        """Of the sub-channel, or the station, as the lab knows it."""
        self.phase = Phase.COMING
        self.since = 0.0
        """When it came into its phase; not known yet: 0."""
        self.session: Requests | None = None


class HotplugWorkload(LabWorkload):
    """See the module's text."""

    name = "hotplug"
    default_pages = 2

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._count = parameters.get("count", 12, minimum=0)
        self._subchannels = parameters.get("subchannels", 2, minimum=0, maximum=64)
        self._stations = parameters.get("stations", 1, minimum=0, maximum=16)
        self._requests = parameters.get("requests", 20, minimum=0)
        self._window = parameters.get("window", 16, minimum=1, maximum=4096)
        self._size = parameters.get("size", 200, minimum=1, maximum=4000)
        if not self._subchannels + self._stations:
            raise UsageError("parameters 'subchannels' and 'stations' are both 0: nothing would come and go")
        self._books = Books()
        self._targets: list[Target] = []
        self.withdrawn = 0
        """How often something was asked to go."""
        self.rescinds = 0
        """How often something went."""
        self.opened = 0

    def begin(self) -> None:
        """Learn which stations there are, and wait for all channels."""
        others = []
        for number in range(self._stations):
            instance = self.driver.claim(LAB_TYPE)
            channel = self.driver.client_channel(
                LAB_TYPE,
                instance=instance,
                ring_pages_in=self._pages_in,
                ring_pages_out=self._pages_out,
                name=f"{self.name} station {number}",
            )
            others.append(Target(channel, Op.UNPLUG, Op.PLUG))
        self.ask(Op.SUBCHANNELS, self._subchannels)
        for index in range(1, self._subchannels + 1):
            channel = self.new_channel(subchannel_index=index, name=f"{self.name}.{index}")
            self._targets.append(Target(channel, Op.WITHDRAW, Op.OFFER))
            self._targets[-1].number = index
        for target in others:
            # Once, to learn its number.
            self.driver.enable(target.channel)
            target.number = ask(target.channel, Op.STATION, timeout=self.stall_seconds)
            self.driver.close_channel(target.channel)
            self._targets.append(target)
        self.moved()
        for target in self._targets:
            target.channel.set_state_change_callbacks(started=self._started)
            target.channel.enable()

    def _target_of(self, channel: Channel) -> Target | None:
        return next((target for target in self._targets if target.channel is channel), None)

    def _started(self, channel: Channel) -> None:
        target = self._target_of(channel)
        assert target is not None
        self.opened += 1
        self.moved()
        target.phase, target.since = Phase.HERE, 0.0
        target.session = Requests(target.channel, window=self._window, size=self._size, moved=self.moved)
        target.session.begin()

    def tick(self, now: float) -> float:
        """Have those withdrawn that were used enough."""
        for target in self._targets:
            session = target.session
            target.since = target.since or now
            if target.phase is not Phase.HERE or session is None:
                continue
            if self._ending:
                if session.tally.completed >= self._requests or self._stopped:
                    session.stop()
            elif session.tally.completed >= self._requests:
                target.phase, target.since = Phase.LEAVING, 0.0
                self.withdrawn += 1
                self._post(target, target.withdraw)
        return super().tick(now)

    def trouble_now(self, now: float, driver: ChannelDriver) -> str | None:
        """What the lab was asked for has to happen, whatever else goes on."""
        for target in self._targets:
            if target.phase is not Phase.HERE and target.since and now - target.since >= self.stall_seconds:
                reasons = "".join(f"; {failure}" for failure in driver.failures)
                return f"channel {target.channel.name} is {target.phase.value} for {self.stall_seconds:g} s{reasons}"
        return super().trouble_now(now, driver)

    def clock_jumped(self, seconds: float) -> None:
        """That is no time in which something could have happened."""
        super().clock_jumped(seconds)
        for target in self._targets:
            target.since += seconds if target.since else 0.0

    @property
    def _ending(self) -> bool:
        return self._stopped or (self._count > 0 and self.withdrawn >= self._count)

    def _post(self, target: Target, op: Op) -> None:
        def answered(status: int, reply: bytes) -> None:
            if status == PacketStatus.SUCCESS and parse_reply(reply) != (Status.OK, target.number):
                self.trouble.append(f"the lab refused {op.name} {target.number}: {parse_reply(reply)}")

        post(self.channel, request(op, target.number), answered)

    def rescinded(self, channel: ClientChannel) -> None:
        """Ask for it again, and wait for it."""
        target = self._target_of(channel)
        if target is None or target.session is None:
            return
        self.moved()
        self.rescinds += 1
        target.session.end()
        self._books.add(target.session)
        target.session = None
        if target.phase is not Phase.LEAVING:
            self.trouble.append(f"channel {channel.name} was rescinded, and nobody had asked for it")
        target.phase, target.since = Phase.COMING, 0.0
        channel.enable()
        self._post(target, target.offer)

    def finished(self) -> bool:
        """All channels are here and have come to their end."""
        return self._ending and all(
            target.phase is Phase.HERE and target.session is not None and target.session.finished
            for target in self._targets
        )

    def close(self) -> None:
        """Forget channels that were never offered again: nothing would close them."""
        for target in self._targets:
            if target.channel.state is ChannelState.CLOSED:
                target.channel.disable()

    def counts(self) -> dict[str, Any]:
        """All sessions of all channels together."""
        books = Books()
        for target in self._targets:
            if target.session is not None:
                books.add(target.session)
        now, before = books.as_dict(), self._books.as_dict()
        total = {name: now[name] + before[name] for name in now}
        return {"opened": self.opened, "withdrawn": self.withdrawn, "rescinded": self.rescinds, **total}

    def result(self) -> dict[str, Any]:
        """All sessions of all channels together."""
        for target in self._targets:
            if target.session is not None:
                target.session.end()
        return self.counts()

    def good(self) -> bool:
        """Whatever was withdrawn went and came again; each request was answered right or cancelled."""
        counts = self.counts()
        return (
            self.finished()
            and self.withdrawn == self.rescinds
            and self.opened == self.rescinds + len(self._targets)
            and not any(target.session is not None and target.session.cancelled for target in self._targets)
            and not (counts["lost"] or counts["duplicated"] or counts["reordered"] or counts["corrupted"])
            and counts["sent"] == counts["completed"] + counts["cancelled"]
        )


WORKLOAD = HotplugWorkload

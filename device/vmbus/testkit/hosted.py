"""A provider on its pretend host: started, saved and restored in a fresh object, stopped; with what it owes then."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from vmbus.bus.local import LocalBus
from vmbus.bus.replacing import key_of
from vmbus.errors import StateError, UsageError, VmbusError, WaitTimeout
from vmbus.kmcl.saved import ChannelRecord
from vmbus.kmcl.server import ServerChannel
from vmbus.providers import Provider
from vmbus.server.files import copy_files, files_of, wanted_files
from vmbus.testkit import contract
from vmbus.testkit.contract import ContractViolation, shorten
from vmbus.testkit.device import InFlight
from vmbus.testkit.host import Clock, FakeHost
from vmbus.testkit.watch import KitMemory, Watch

Key = tuple[UUID, UUID, int]


@dataclass(frozen=True)
class Saved(InFlight):
    """What a save found. `state`: the provider's own bytes."""

    state: bytes


def key(channel: ServerChannel) -> Key:
    """What names a channel over a restore."""
    return channel.interface_type, channel.interface_instance, channel.subchannel_index


class Hosted:
    """One provider, running.

    Attributes:
        provider, host: others after a save and restore. bus: what joins its channels with clients. clock: virtual time.
        errors: what its callbacks have raised, each with the callback's name; somebody looks at it in `check`.
    """

    provider: Provider
    host: FakeHost

    def __init__(
        self,
        class_: type[Provider],
        name: str,
        instance: UUID,
        options: Mapping[str, Any],
        *,
        bus: LocalBus,
        pause_timeout: float,
        check: Callable[[], None],
        payloads: Callable[[ServerChannel], Mapping[int, bytes]],
    ) -> None:
        """`pause_timeout`: virtual seconds for what it holds at a save. `check` raises for what went wrong meanwhile.
        `payloads`: what a channel's guest has sent, by transaction, for messages."""
        self.name = name
        self.bus = bus
        self.clock = Clock()
        self.errors: list[tuple[str, BaseException]] = []
        self._class = class_
        self._instance = instance
        self._options = options
        self._pause_timeout = pause_timeout
        self._check = check
        self._payloads = payloads
        self._scratch = tempfile.TemporaryDirectory(prefix="vmbus-testkit-")
        self._saves = 0
        bus.server_memory = KitMemory()
        self.watch = Watch(class_, name)

    def start(self) -> None:
        """Make and start the provider, and activate it."""
        self._start()
        self.activate()

    def _start(self) -> None:
        self.host = FakeHost(self.clock, self.bus, self.name, Path(self._scratch.name))
        self.host.faults.on_seen = self.errors.append
        with self.watch.turn("start()"):
            self.provider = self._class(self.host, self.name, self._instance, self._options)
            self.provider.start()

    def activate(self) -> None:
        """As when the device begins to run."""
        with self.watch.turn("activate()"):
            self.provider.activate()
        self.host.active = True

    def deactivate(self) -> None:
        """As when a pause is complete."""
        try:
            self.provider.deactivate()
        finally:
            self.host.active = False

    def cleanup(self) -> None:
        """Remove its files."""
        self._scratch.cleanup()

    # ---- save and restore ----------------------------------------------------------------------------------------

    def save_restore(self, *, moving: bool) -> Saved:
        """See `ProviderTest.save_restore`, and `migrate` for `moving`."""
        if moving and (stay := wanted_files([self.provider], moving=True)):
            raise UsageError(f"a live migration takes no files along, and the device has {', '.join(stay)}")
        with self.watch.turn("the suspend callbacks"):
            self.quiesce("saved")
        self.watch.saved(self.provider)
        self.deactivate()
        old = self.bus.offers
        self._saves += 1
        directory = Path(self._scratch.name) / str(self._saves)
        directory.mkdir()
        if not moving:
            copy_files(wanted_files([self.provider]), directory)
        records = self._save_channels()
        state = self._save_provider()
        packets = {key(channel): contract.packets_of(channel) for channel in old}
        saved = Saved(
            sum(channel.packets_queued for channel in old), sum(channel.packets_sent for channel in old), state
        )
        # What a process that ends does not do, the old objects shall not do either.
        self.host.abandon()
        early = b""
        chunks = {record.key: record.chunks for record in records}

        def before_packets() -> None:
            nonlocal early
            try:
                self.provider.check(state)
                self.provider.restore_files(files_of(self.provider, directory))
                self.provider.restore(state)
            except Exception as error:
                raise ContractViolation(
                    f"restore() of provider {self.name} refused what save() had returned ({shorten(state)}): {error}"
                ) from error
            early = self.provider.save()

        def after_packets() -> None:
            # A provider may complete its own state out of its packets: either moment will do.
            if early != state:
                contract.check_provider_state(self.name, state, self.provider.save())
            for channel in self.bus.offers:
                saved_as = chunks.get(key_of(channel))
                if saved_as is not None and not channel.force_new_channel:
                    contract.check_packets(channel, packets[key(channel)])
                    contract.check_channel_state(channel, saved_as[1:], channel.save()[1:])
            self.activate()

        try:
            self.bus.replace(records, lambda: self._make_anew(old), before_packets, after_packets)
        except (ContractViolation, WaitTimeout):
            raise
        except (StateError, VmbusError) as error:
            raise ContractViolation(str(error)) from error
        self._check()
        return saved

    def _make_anew(self, old: list[ServerChannel]) -> None:
        with self.watch.turn("stop()"):
            self.provider.stop()
        self.watch.stopped()
        self.host.abandon()
        self._start()
        # Sub-channels come with restore().
        missing = {key(one): one.name for one in old if not (one.subchannel_index or one.force_new_channel)}
        for one in self.bus.offers:
            missing.pop(key(one), None)
        if missing:
            raise ContractViolation(
                f"channels {sorted(missing.values())} of provider {self.name} were saved, and start() of a fresh "
                "one does not make them; expected: the same channels (type and instance) from the same options"
            )

    def quiesce(self, what: str) -> None:
        """Suspend every channel and see that what the provider holds gets completed."""
        channels = self.bus.offers
        for channel in channels:
            channel.quiesce()
        self._check()
        deadline = self.clock.now + self._pause_timeout
        while any(channel.outstanding for channel in channels) or self.host.jobs:
            due = self.host.next_due()
            if self.host.busy:
                self.host.run_soon()
            elif due is not None and due <= deadline:
                self.host.fire_next()
            elif any(channel.outstanding for channel in channels):
                self._complain(channels, what)
            self._check()

    def _complain(self, channels: list[ServerChannel], what: str) -> None:
        for channel in channels:
            channel.unquiesce()
        for channel in channels:
            if channel.outstanding:
                sent = self._payloads(channel)
                shown = ", ".join(
                    f"{number} ({shorten(sent[number])})" if number in sent else str(number)
                    for number in channel.outstanding[:8]
                )
                raise ContractViolation(
                    f"channel {channel.name} cannot be {what}: packets {shown} were handed to process_packet and are "
                    f"not completed {self._pause_timeout:g} s after the suspend callback; expected: "
                    "completion.complete() for each of them, in the suspend callback or soon after it"
                )

    def _save_provider(self) -> bytes:
        state = self.provider.save()
        if not isinstance(state, bytes):
            raise ContractViolation(f"save() of provider {self.name} returned {type(state).__name__}; expected: bytes")
        contract.check_save_is_repeatable(f"provider {self.name}", "save()", state, self.provider.save())
        return state

    def _save_channels(self) -> list[ChannelRecord]:
        try:
            records, again = self.bus.save(), self.bus.save()
        except VmbusError as error:
            raise ContractViolation(str(error)) from error
        for channel, one, other in zip(self.bus.offers, records, again, strict=True):
            contract.check_save_is_repeatable(f"channel {channel.name}", "the save callback", one.chunks, other.chunks)
        return records

    def check_refuses(self, state: bytes) -> str:
        """See `ProviderTest.check_refuses`."""
        host = FakeHost(Clock(), LocalBus(), self.name, Path(self._scratch.name))
        provider = self._class(host, self.name, self._instance, self._options)
        provider.start()
        what = "check()"
        try:
            provider.check(state)
            what = "restore()"
            provider.restore(state)
        except StateError as error:
            return str(error)
        except Exception as error:
            raise ContractViolation(
                f"{what} of provider {self.name} raised {error!r} for {shorten(state)}; expected: StateError"
            ) from error
        finally:
            provider.stop()
        raise ContractViolation(f"restore() of provider {self.name} took {shorten(state)}; expected: StateError")

    # ---- the end -------------------------------------------------------------------------------------------------

    def withdraw(self) -> None:
        """Every channel is closed."""
        self.quiesce("closed")
        for channel in self.bus.offers:
            self.bus.disabled(channel)

    def stop(self) -> None:
        """The provider is stopped. Raises ContractViolation for what it leaves."""
        self.deactivate()
        self.provider.stop()

    def check_stopped(self) -> None:
        """Raises ContractViolation for what stop() has left."""
        if self.host.watched:
            raise ContractViolation(
                f"stop() of provider {self.name} leaves descriptors {self.host.watched} watched; expected: "
                "remove_reader() and remove_writer(), before they are closed"
            )
        due = self.host.next_due()
        if due is not None:
            raise ContractViolation(
                f"stop() of provider {self.name} leaves a timer that runs out in {due - self.clock.now:g} s; expected: "
                "Timer.cancel() of every one"
            )
        self.watch.stopped()

"""What every card has in common: the host's interface, the link, and when its frames are read. No protocol."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from vmbus.errors import EnvironmentProblem, UsageError
from vmbus.providers.base import Host, Provider, Timer
from vmbus.providers.network.interface import Port, Settings, open_port, rejoin, set_mtu
from vmbus.providers.network.mending import Mending
from vmbus.providers.network.veth import open_veth
from vmbus.providers.network.watch import Trouble
from vmbus.util.complaints import bounded_log
from vmbus.wire.ethernet import (
    MTU_MAXIMUM,
    MTU_MINIMUM,
    QUEUES_MAXIMUM,
    announcement,
    format_mac,
    introduction,
    parse_mac,
)

log = bounded_log(__name__)

FRAMES_PER_TURN = 64
"""Frames read from the interface before others on the loop get their turn."""
WHOLE_FRAME = 60 << 10
"""Bytes of a frame that the host leaves whole: Linux puts each into memory of its own, of a power of two."""
DRAIN_BYTES = 4 << 20
"""At a pause, most bytes of frames taken out of the interface, to travel with the state."""
ANNOUNCE_AFTER = (0.01, 0.1, 0.3, 0.6, 1.2)
"""Seconds after the interface was made in which the guest's address is announced; not before the device runs here."""

InterfaceName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]
COUNTERS = ("to_guest", "to_host", "bytes_to_host", "refused", "no_link", "not_taken", "drained", "announced")


class CardOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See docs/provider-network.md."""

    mac: str | None = None
    mtu: Annotated[int, msgspec.Meta(ge=MTU_MINIMUM, le=MTU_MAXIMUM)] = 1500
    queues: Annotated[int, msgspec.Meta(ge=1, le=QUEUES_MAXIMUM)] = 1
    offload: bool = True
    window_kib: Annotated[int, msgspec.Meta(ge=64, le=16384)] = 512
    end: Literal["tap", "veth"] = "tap"
    interface: InterfaceName | None = None
    namespace: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    bridge: InterfaceName | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.mac is not None:
            parse_mac(self.mac)
        if self.address is not None:
            ipaddress.ip_interface(self.address)


class Card(Provider):
    """A card without its protocol.

    Attributes:
        mac: the guest's Ethernet address. address: the one that it uses. settings: of the host's interface. port: that,
            while the device runs here.
        counters: what happened so far.
    """

    Options = CardOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        chosen: CardOptions = self.options
        self.mac = derived_mac(_digest(instance)) if chosen.mac is None else parse_mac(chosen.mac)
        self.address = self.mac
        self.settings = host_settings(chosen, instance)
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.port: Port | None = None
        self._link = True  # as tools want it
        self._carrier = False  # whether the interface has a link
        self._reading = False
        self._announcements: list[Timer] = []
        self._mtu_wanted = self._mtu_there = chosen.mtu
        self._mtu_changing = False
        self._trouble: Trouble | None = None
        self._mending: Mending | None = None
        self._attempted = self.settings
        self._had_port = False

    # ---- what a protocol says ------------------------------------------------------------------------------------

    @property
    def _guest_there(self) -> bool:
        """Whether there is a guest that takes frames, if need be later, when the device goes on."""
        raise NotImplementedError

    @property
    def _guest_ready(self) -> bool:
        """Whether it can be handed some right now."""
        raise NotImplementedError

    @property
    def _guest_mtu(self) -> int | None:
        """The MTU that was agreed upon, if one was."""
        raise NotImplementedError

    @property
    def _guest_offload(self) -> bool | None:
        """Whether the guest takes frames that are to be cut; None before that was agreed upon."""
        raise NotImplementedError

    def _to_guest(self, frame: bytes) -> None:
        """Keep a frame with its offload header for the guest: it goes out with the next `_flush`, at the latest."""
        raise NotImplementedError

    def _flush(self) -> None:
        raise NotImplementedError

    def _tell_link(self) -> None:
        """Let the guest know how the link is, if it does not know."""
        raise NotImplementedError

    # ---- life ----------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Make the interface, and tell the network where the guest is."""
        if self.port is not None:
            return
        mtu = self._guest_mtu
        self._trouble = None
        self._mtu_wanted = self.options.mtu if mtu is None else mtu
        settings, offload = self._port_wanted()
        try:
            self._take_port(self._port_made(settings, offload), settings)
        except EnvironmentProblem as error:
            if not self._had_port:
                raise
            # After a pause, the guest does not have to end for what others have done meanwhile.
            log.warning("network %s: %s", self.name, error)
            self._note(Trouble.GONE)
        self._had_port = True
        self._announce_soon()

    def _port_wanted(self) -> tuple[Settings, bool | None]:
        """Its settings, and whether frames may come that are to be cut, if that was agreed upon."""
        return self.settings._replace(mtu=self._mtu_wanted, carrier=self._has_link), self._guest_offload

    def _port_made(self, settings: Settings, offload: bool | None) -> Port:
        port = self.make_port(settings)
        if offload is not None:
            try:
                port.set_offload(offload)
            except OSError as error:
                port.close()
                raise EnvironmentProblem(
                    f"interface {settings.name!r} cannot take the offloads that the guest knows of: {error}"
                ) from error
        return port

    def _take_port(self, port: Port, settings: Settings) -> None:
        """It is the host's end from now on."""
        self.port, self._carrier, self._mtu_there = port, settings.carrier, settings.mtu
        self.host.add_reader(port.watch.fd, self._hear)
        self._update()

    def make_port(self, settings: Settings) -> Port:
        """The host's end. Tests put another one here."""
        return open_port(settings) if self.options.end == "tap" else open_veth(settings)

    def deactivate(self) -> None:
        """Take along what the interface holds for the guest, then remove it: another host may have one now."""
        if self.port is not None and self._guest_there:
            self._drain(self.port)
        self._close_port()

    def stop(self) -> None:
        self._close_port()

    def _close_port(self) -> None:
        for timer in self._announcements:
            timer.cancel()
        self._announcements.clear()
        self._give_up_mending()
        if self.port is not None:
            self._stop_reading()
            self.host.remove_reader(self.port.watch.fd)
            self.port.close()
            self.port = None

    def _drain(self, port: Port) -> None:
        """Frames that the kernel holds become the guest's, and are saved with all others."""
        taken = 0
        with contextlib.suppress(OSError):  # it is gone, and with it what it has held
            while taken < DRAIN_BYTES and (frame := port.read()) is not None:
                taken += len(frame)
                self._to_guest(frame)
                self.counters["to_guest"] += 1
                self.counters["drained"] += 1
        self._flush()

    # ---- the interface -------------------------------------------------------------------------------------------

    @property
    def _has_link(self) -> bool:
        """Whether there is a guest that may be sent frames (later, while it is paused)."""
        return self._guest_there and self._link

    def _update(self) -> None:
        """Let the interface have a link, and read it, exactly when there is a guest for its frames."""
        port = self.port
        if port is None:
            return
        link = self._has_link
        if link is not self._carrier:
            self._carrier = link
            try:
                port.set_carrier(link)
            except OSError as error:
                self._fails(error)
                return
        if link:
            self._read_on()
        else:
            self._stop_reading()

    def _read_on(self) -> None:
        if self._reading or self.port is None or not (self._has_link and self._guest_ready):
            return
        self._reading = True
        self.host.add_reader(self.port.fd, self._readable)

    def _stop_reading(self) -> None:
        if self._reading and self.port is not None:
            self._reading = False
            self.host.remove_reader(self.port.fd)

    def _hear(self) -> None:
        """The kernel has something to say about the interface."""
        assert self.port is not None
        self._note(self.port.watch.look())

    def _fails(self, error: OSError) -> None:
        """The interface is gone; its watch may not have said so yet."""
        log.warning("network %s: interface %s: %s", self.name, self.settings.name, error.strerror or error)
        self._note(Trouble.GONE)

    def _note(self, trouble: Trouble | None) -> None:
        """How the interface is now. While it is of no use, the guest's card has no link."""
        if trouble is not self._trouble:
            self._trouble = trouble
            log.warning("network %s: interface %s: %s", self.name, self.settings.name, trouble or "it is back")
            if trouble is Trouble.GONE:
                self._close_port()
            self._give_up_mending()
            self._update()
            self._tell_link()
            if trouble is None:
                self._announce_soon()
        if trouble in (Trouble.GONE, Trouble.NO_BRIDGE) and self._mending is None:
            self._mending = Mending(self.host, self._attempt, self._mended)

    def _attempt(self) -> Callable[[], Port | None]:
        """For `Mending`."""
        if self.port is not None:
            return partial(rejoin, self.settings)
        self._attempted, offload = self._port_wanted()
        return partial(self._port_made, self._attempted, offload)

    def _mended(self, port: Port | None) -> None:
        self._mending = None
        if port is None:
            self._hear()  # whether it has helped
            return
        self._take_port(port, self._attempted)
        # The guest may have asked for something else meanwhile.
        self._change_mtu(self._mtu_wanted)
        self._use_offload(bool(self._guest_offload))
        self._note(None)

    def _give_up_mending(self) -> None:
        mending, self._mending = self._mending, None
        if mending is not None:
            mending.give_up()

    def _readable(self) -> None:
        port = self.port
        assert port is not None
        taken = 0
        try:
            while taken < FRAMES_PER_TURN and (frame := port.read()) is not None:
                self._to_guest(frame)
                taken += 1
                if not self._guest_ready:
                    self._stop_reading()
                    break
        except OSError as error:
            self._fails(error)
        self.counters["to_guest"] += taken
        self._flush()

    def _to_host(self, frame: bytes | memoryview) -> bool:
        """A frame of the guest's, with its offload header, which was found to be in order; whether it was taken."""
        counters = self.counters
        try:
            if self.port is not None and self.port.write(frame):
                counters["to_host"] += 1
                counters["bytes_to_host"] += len(frame)
                return True
        except OSError as error:
            self._fails(error)
        counters["not_taken"] += 1
        return False

    def _announce_soon(self) -> None:
        """Again and again, for a while. By timers, which stand still until the device runs: a destination that has
        everything, but may still be discarded, must not draw the guest's frames to itself."""
        if self._guest_mtu is not None:
            self._announcements += [self.host.call_later(seconds, self._announce) for seconds in ANNOUNCE_AFTER]

    def _announce(self) -> None:
        """Switches learn from it where the guest is now, and the guest where its bridge is: the one of another host may
        have the same IP address and another Ethernet address."""
        if self.port is not None and self._link:
            for address, mac in self.port.hosts:
                self._to_guest(introduction(address, mac))
            self._flush()
            try:
                self.counters["announced"] += self.port.write(announcement(self.address))
            except OSError as error:
                self._fails(error)

    def _use_offload(self, wanted: bool) -> None:
        """The guest has said whether it takes frames that are to be cut."""
        if self.port is not None:
            try:
                self.port.set_offload(wanted)
            except OSError as error:
                self._fails(error)

    def _change_mtu(self, mtu: int) -> None:
        """Bring the interface's MTU to this. One change at a time: a guest may ask faster than they are made, and a
        pause waits for those under way."""
        self._mtu_wanted = mtu
        if self.port is not None and mtu != self._mtu_there and not self._mtu_changing:
            self._bring_mtu()

    def _bring_mtu(self) -> None:
        mtu = self._mtu_there = self._mtu_wanted

        def done(_: None, error: BaseException | None) -> None:
            self._mtu_changing = False
            if error is not None:
                self._mtu_there = 0  # the next wish is tried, whatever it is
                log.error("network %s: %s", self.name, error)
            if self._mtu_wanted != mtu:
                self._change_mtu(self._mtu_wanted)

        self._mtu_changing = True
        self.host.run_blocking(partial(set_mtu, self.settings, mtu), done)

    # ---- tools ---------------------------------------------------------------------------------------------------

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`link state=up|down` pulls the cable, or puts it in again; `announce` tells switches where the guest is."""
        if name == "link" and set(arguments) <= {"state"}:
            state = arguments.get("state")
            if state not in ("up", "down", None):
                raise UsageError(f"network {self.name!r}: state is 'up' or 'down', not {state!r}")
            if state is not None:
                self._link = state == "up"
                self._update()
                self._tell_link()
            return {"link": "up" if self._link else "down"}
        if name == "announce" and not arguments:
            self._announce()
            return {"announced": self.counters["announced"]}
        raise UsageError(f"network {self.name!r} has the commands 'link' (state=up, state=down) and 'announce'")

    def status(self) -> dict[str, Any]:
        return {
            "interface": self.settings.name,
            "namespace": self.settings.namespace,
            "present": self.port is not None,
            "trouble": self._trouble,
            "mac": format_mac(self.mac),
            "link": "up" if self._link else "down",
            **self.counters,
        }


def _digest(instance: UUID) -> bytes:
    return hashlib.sha256(b"network " + instance.bytes).digest()


def host_settings(options: CardOptions, instance: UUID) -> Settings:
    """Of the host's interface of a card with these options."""
    digest = _digest(instance)
    return Settings(
        name=options.interface or f"vmnet-{digest[:4].hex()}",
        # The same after every move, or the guest would go on talking to an address that is no more. High, so that a
        # bridge does not take it for its own.
        mac=b"\xfe" + digest[8:13],
        mtu=options.mtu,
        namespace=options.namespace,
        address=options.address,
        bridge=options.bridge,
        longest=WHOLE_FRAME,
    )


def derived_mac(digest: bytes) -> bytes:
    """A station's address, locally administered, from a digest of what it belongs to."""
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]

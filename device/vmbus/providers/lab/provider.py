"""The lab: several stations, and pipes, each offered as an instance of its own."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from uuid import UUID, uuid5

import msgspec

from vmbus.errors import StateError, UsageError
from vmbus.kmcl.pipe import PipeMode
from vmbus.kmcl.server import ServerChannel
from vmbus.providers.base import Bound, Host, Provider
from vmbus.providers.lab.pipe import PipeEnd, PipeState
from vmbus.providers.lab.station import Shared, Station, StationState
from vmbus.util.explaining import explain
from vmbus.wire.lab import LAB_PIPE_TYPE, LAB_TYPE
from vmbus.wire.packet import MAX_PACKET_SIZE


class LabOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`stations`: each test driver that needs the lab takes one or two; `pipes`: pairs of a pipe of messages and one of
    bytes."""

    stations: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    pipes: Annotated[int, msgspec.Meta(ge=0, le=16)] = 1


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    stations: Annotated[list[StationState], msgspec.Meta(max_length=64)]
    pipes: Annotated[list[PipeState], msgspec.Meta(max_length=32)]


_decoder = msgspec.msgpack.Decoder(_State)


class _PlugArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    station: Annotated[int, msgspec.Meta(ge=0)]


class LabProvider(Provider):
    """See the package's text. Commands: `plug` and `unplug` with the number of a `station`."""

    kind = "lab"
    Options = LabOptions

    def __init__(self, host: Host, name: str, instance: UUID, options: Mapping[str, Any]) -> None:
        super().__init__(host, name, instance, options)
        chosen: LabOptions = self.options
        self._shared = Shared(host)
        self.stations = [self._make_station(number) for number in range(chosen.stations)]
        self.pipes = [self._make_pipe(number, mode) for number in range(chosen.pipes) for mode in PipeMode]

    def _make_station(self, number: int) -> Station:
        # The description gives one GUID for all.
        instance = uuid5(self.instance, f"station {number}")

        def make_channel(index: int) -> ServerChannel:
            name = f"{self.name}-{number}" + (f".{index}" if index else "")
            channel = ServerChannel(LAB_TYPE, instance, name=name, subchannel_index=index)
            channel.set_maximum_packet_size(MAX_PACKET_SIZE)
            return channel

        return Station(self.host, self._shared, number, make_channel, self._station)

    def _make_pipe(self, number: int, mode: PipeMode) -> PipeEnd:
        instance = uuid5(self.instance, f"pipe {mode.name} {number}")
        channel = ServerChannel(LAB_PIPE_TYPE, instance, name=f"{self.name}-{mode.name.lower()}-{number}")
        return PipeEnd(self.host, channel, mode)

    def start(self) -> None:
        for station in self.stations:
            station.start()
        for pipe in self.pipes:
            pipe.start()

    def _station(self, number: int) -> Station | None:
        return self.stations[number] if number < len(self.stations) else None

    def command(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if name not in ("plug", "unplug"):
            raise UsageError(f"provider {self.name!r} (lab) has no command {name!r}; there are plug and unplug")
        try:
            wanted = msgspec.convert(dict(arguments), _PlugArguments)
        except msgspec.ValidationError as error:
            raise UsageError(f"provider {self.name!r} (lab), {name}: {explain(error)}") from error
        station = self._station(wanted.station)
        if station is None:
            raise UsageError(
                f"provider {self.name!r} (lab) has no station {wanted.station}; there are {len(self.stations)}"
            )
        station.plug(name == "plug")
        return {"station": wanted.station, "plugged": station.plugged}

    def save(self) -> bytes:
        return msgspec.msgpack.encode(
            _State(1, [station.save() for station in self.stations], [pipe.save() for pipe in self.pipes])
        )

    def _decoded(self, state: bytes) -> _State:
        saved = self.decoded(_decoder, state)
        if (len(saved.stations), len(saved.pipes)) != (len(self.stations), len(self.pipes)):
            raise StateError(
                f"provider {self.name!r} (lab) was saved with {len(saved.stations)} stations and "
                f"{len(saved.pipes)} pipes, and has {len(self.stations)} and {len(self.pipes)}"
            )
        for station in saved.stations:
            station.check()
        return saved

    def check(self, state: bytes) -> None:
        self._decoded(state)

    def restore(self, state: bytes) -> None:
        saved = self._decoded(state)
        for station, one in zip(self.stations, saved.stations, strict=True):
            station.restore(one)
        for pipe, other in zip(self.pipes, saved.pipes, strict=True):
            pipe.restore(other)

    def status(self) -> dict[str, Any]:
        lines = [line for station in self.stations for line in station.lines.values()]
        return {
            "stations": [
                {"plugged": station.plugged, "open": station.open, "sub-channels": len(station.lines) - 1}
                for station in self.stations
            ],
            "requests": sum(line.tally.started for line in lines),
            "wrong": sum(not line.tally.good or not line.push_tally.good for line in lines),
            "pushed": sum(line.pushed for line in lines),
            "pipe_bytes": sum(pipe.bytes for pipe in self.pipes),
        }

    def bounds(self) -> dict[str, Bound]:
        return self._shared.bounds()

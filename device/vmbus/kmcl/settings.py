"""What is set on a channel while it is disabled: sizes, callbacks, flags, names. The VmbChannelInit functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.kmcl.lifecycle import ChannelState
from vmbus.kmcl.status import ChannelStateError, KmclError, Status

if TYPE_CHECKING:
    from vmbus.kmcl.channel import Channel
    from vmbus.kmcl.completion import Completion

    ProcessPacket = Callable[[Channel, Completion, bytes], None]
    ProcessingComplete = Callable[[Channel, int], None]
    StateCallback = Callable[[Channel], None]

DEFAULT_MAXIMUM_PACKET_SIZE = 65536
DEFAULT_MAXIMUM_EXTERNAL_DATA = 16 << 20
DEFAULT_MAXIMUM_CHAIN = 1024
FLAG_IS_PIPE = 0x1


class Settings:
    """The part of a channel that its owner configures before `enable`.

    Every set-up call raises ChannelStateError (INVALID_PARAMETER_1) later than that, and KmclError naming the
    parameter that is wrong (INVALID_PARAMETER_2, _3).

    Attributes:
        name: for logs and errors (VmbChannelInitSetFriendlyName).
        pointer: the owner's context (VmbChannelSetPointer, VmbChannelGetPointer), never looked at.
        is_pipe: packets are datagrams with an exact length (see `vmbus.kmcl.pipe`).
        client_context_size: bytes of scratch space on every incoming packet, `Completion.context`.
    """

    pointer: object = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = ChannelState.DISABLED
        self.is_pipe = False
        self.maximum_packet_size = DEFAULT_MAXIMUM_PACKET_SIZE
        self.maximum_external_data = DEFAULT_MAXIMUM_EXTERNAL_DATA
        self.maximum_chain = DEFAULT_MAXIMUM_CHAIN
        self.client_context_size = 0
        self._process_packet: ProcessPacket | None = None
        self._processing_complete: ProcessingComplete | None = None
        self._opened: StateCallback | None = None
        self._closed: StateCallback | None = None
        self._suspend: StateCallback | None = None
        self._started: StateCallback | None = None
        self._post_started: StateCallback | None = None

    def _require_disabled(self, call: str) -> None:
        if self.state is not ChannelState.DISABLED:
            raise ChannelStateError(
                f"channel {self.name} is {self.state.value}: {call} is only possible before enable()",
                Status.INVALID_PARAMETER_1,
            )

    def refuse(self, what: str, status: Status) -> KmclError:
        """The error for a call that is wrong: `what` about this channel."""
        return KmclError(f"channel {self.name}: {what}", status)

    def set_flags(self, flags: int) -> None:
        """FLAG_IS_PIPE, or 0 (VmbChannelInitSetFlags)."""
        self._require_disabled("set_flags")
        if flags & ~FLAG_IS_PIPE:
            raise self.refuse(f"flags {flags:#x}; only IS_PIPE ({FLAG_IS_PIPE:#x}) exists", Status.INVALID_PARAMETER_2)
        self.is_pipe = bool(flags & FLAG_IS_PIPE)

    def set_friendly_name(self, name: str) -> None:
        """For logs and counters (VmbChannelInitSetFriendlyName)."""
        self._require_disabled("set_friendly_name")
        self.name = name

    def set_maximum_packet_size(self, size: int) -> None:
        """Largest payload in bytes (VmbChannelInitSetMaximumPacketSize)."""
        self._require_disabled("set_maximum_packet_size")
        if size <= 0:
            raise self.refuse(f"a maximum packet size of {size}", Status.INVALID_PARAMETER_2)
        self.maximum_packet_size = size

    def set_maximum_external_data(self, size: int, chain_length: int = DEFAULT_MAXIMUM_CHAIN) -> None:
        """Most bytes, and most pieces, of memory that a packet may describe (VmbChannelInitSetMaximumExternalData)."""
        self._require_disabled("set_maximum_external_data")
        if size <= 0:
            raise self.refuse(f"maximum external data of {size} bytes", Status.INVALID_PARAMETER_2)
        if chain_length <= 0:
            raise self.refuse(f"a maximum chain length of {chain_length}", Status.INVALID_PARAMETER_3)
        self.maximum_external_data = size
        self.maximum_chain = chain_length

    def set_client_context_size(self, size: int) -> None:
        """Bytes of scratch space on every incoming packet (VmbChannelInitSetClientContextSize)."""
        self._require_disabled("set_client_context_size")
        if size < 0:
            raise self.refuse(f"a client context of {size} bytes", Status.INVALID_PARAMETER_2)
        self.client_context_size = size

    def set_process_packet_callbacks(
        self, process_packet: ProcessPacket, processing_complete: ProcessingComplete | None = None
    ) -> None:
        """Who gets incoming packets (VmbChannelInitSetProcessPacketCallbacks).

        `process_packet(channel, completion, payload)` runs once per packet and must see to it that
        `completion.complete` is called once, now or later. `processing_complete(channel, count)` ends a batch.
        """
        self._require_disabled("set_process_packet_callbacks")
        self._process_packet = process_packet
        self._processing_complete = processing_complete

    def set_state_change_callbacks(
        self,
        *,
        opened: StateCallback | None = None,
        closed: StateCallback | None = None,
        suspend: StateCallback | None = None,
        started: StateCallback | None = None,
        post_started: StateCallback | None = None,
    ) -> None:
        """Who learns of state changes (VmbChannelInitSetStateChangeCallbacks).

        opened: the guest opened the channel; raising refuses the open. closed: it is closed; all packets are back.
        suspend: no packet will come until the next started; complete all that you hold. started: sends go out from
        here on. post_started: the same, after incoming packets were enabled.
        """
        self._require_disabled("set_state_change_callbacks")
        self._opened = opened
        self._closed = closed
        self._suspend = suspend
        self._started = started
        self._post_started = post_started

"""A random history of two channels, printed: `python trace_of_history.py SEED`, with the core that VMBUS_CORE says."""

from __future__ import annotations

import random
import sys
from hashlib import sha256

from support.pair import BASE, Pair
from vmbus.errors import VmbusError
from vmbus.kmcl import Channel, Completion, incoming
from vmbus.kmcl.packet import Packet
from vmbus.wire.packet import PacketType, TransferPages


def history(seed: int) -> list[str]:
    """What happened, line by line."""
    choose = random.Random(seed)
    pair = Pair(up_pages=choose.choice([1, 2, 16]), down_pages=choose.choice([1, 2, 16]))
    lines: list[str] = []
    held: dict[str, list[Completion]] = {"server": [], "client": []}

    def watch(side: str, channel: Channel) -> None:
        def process(_: Channel, completion: Completion, payload: bytes) -> None:
            what = sha256(payload).hexdigest()[:8]
            lines.append(f"{side} takes {completion.transaction} {completion.wanted} {completion.size} {what}")
            if completion.kind == PacketType.TRANSFER_PAGES:
                lines.append(f"  {completion.transfer_pages()}")
            act = choose.randrange(4)
            if act == 0:
                completion.complete(choose.randbytes(choose.randrange(0, 200)))
            elif act == 1 and completion.has_external_data:
                grant = completion.external_data()
                lines.append(f"  {grant.size} bytes outside")
                completion.complete(b"".join(grant.views)[:64])
            else:
                held[side].append(completion)

        channel.set_process_packet_callbacks(process)
        channel.set_state_change_callbacks(
            suspend=lambda _: lines.append(f"{side} suspended"),
            started=lambda _: lines.append(f"{side} started"),
            closed=lambda _: lines.append(f"{side} closed"),
        )

    for side, channel in (("server", pair.server), ("client", pair.client)):
        watch(side, channel)
    pair.server.client_context_size = choose.choice([0, 16])
    if choose.randrange(2):
        pair.server.set_transaction_quota(choose.randrange(1, 20))
    pair.open()

    def done(packet: Packet, status: int, reply: bytes) -> None:
        lines.append(f"{packet.channel.name} done {packet.transaction} {int(status):#x} {reply.hex()[:32]}")
        if not status and choose.randrange(8) == 0:
            packet.send(choose.randbytes(choose.randrange(0, 64)), wait_for_completion=choose.randrange(2) == 0)

    for _ in range(400):
        side = choose.choice(["server", "client"])
        channel: Channel = pair.server if side == "server" else pair.client
        act = choose.randrange(12)
        try:
            if act < 4:
                with channel.batch():
                    for _ in range(choose.randrange(1, 12)):
                        packet = channel.allocate_packet()
                        packet.completion_routine = done
                        external = (
                            [(BASE, choose.randrange(1, 64))] if side == "client" and not choose.randrange(5) else None
                        )
                        pages = None
                        if side == "server" and not choose.randrange(5):
                            ranges = [
                                (64 * number, choose.randrange(1, 64)) for number in range(choose.randrange(1, 9))
                            ]
                            pages = TransferPages(0xCAFE, ranges)
                        wait = external is not None or pages is not None or choose.randrange(4) > 0
                        packet.send(
                            choose.randbytes(choose.randrange(0, 300)),
                            external=external,
                            transfer_pages=pages,
                            wait_for_completion=wait,
                        )
            elif act < 7:
                for completion in held[side][: choose.randrange(0, 9)]:
                    held[side].remove(completion)
                    completion.complete(choose.randbytes(choose.randrange(0, 100)))
            elif act < 10:
                pair.turn(side)
            elif act == 10:
                pair.server.begin_pause() if pair.server.started else pair.server.start()
            else:
                pair.server.set_incoming_processing_at_passive(choose.randrange(2) == 0)
        except VmbusError as error:
            lines.append(f"{side} refused: {error}")
        queued = (channel.packets_queued, channel.packets_sent, channel.flow.requests, channel.flow.held_bytes)
        lines.append(f"{side} {channel.state.value} {queued} {channel.counters}")
    # The trailers and indices, too: everything that the two have put into the rings.
    lines.append(sha256(pair.ram).hexdigest())
    pair.server.close(lambda: lines.append("the server's end is closed"), force=True)
    return lines


if __name__ == "__main__":
    incoming.TURN_SECONDS = 1e9  # how fast the machine is has no part in this
    print("\n".join(history(int(sys.argv[1]))))

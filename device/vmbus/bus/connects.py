"""Channels that the guest asks for (ConnectRequest): who on the host is asked, and what the guest is told.

Whoever serves such requests is asked in turn until one takes it. It then offers a channel with the service as its type
and the endpoint as its instance, and ends the request when the guest has opened that, or was told that it will not be.
A request that nobody takes is refused at once, with a ConnectResult; so is one too many.

Requests are not saved: channels that are offered for them do not survive a restore either.
"""

from collections.abc import Callable
from typing import Any
from uuid import UUID

from vmbus.wire import messages as m

MOST_CONNECTS = 64
"""Requests of a guest for a channel that may be under way."""
CONNECTION_REFUSED = 0xC0000236


class Wish:
    """One request under way. `endpoint`: the instance that the offer must have; `service`: its type."""

    __slots__ = ("_desk", "endpoint", "service")

    def __init__(self, desk: "ConnectDesk", endpoint: UUID, service: UUID) -> None:
        self._desk = desk
        self.endpoint = endpoint
        self.service = service

    def end(self) -> None:
        """The guest has what it asked for, or knows that it will not get it. Repeating it does nothing."""
        self._desk.ended(self)

    def refuse(self, status: int = CONNECTION_REFUSED) -> None:
        """Tell the guest that there will be no offer, with a failing NTSTATUS. (Linux does not listen to that: it waits
        until its own time is over.)"""
        if self._desk.ended(self):
            self._desk.tell(self.endpoint, self.service, status)


Asked = Callable[[Wish], bool]


class ConnectDesk:
    """Of one bus. `refused`: requests that were refused here, since nobody took them or too many were under way."""

    def __init__(self, post: Callable[[Any], None]) -> None:
        """`post`: sends a message to the guest."""
        self._post = post
        self._asked: list[Asked] = []
        self._under_way: dict[tuple[UUID, UUID], Wish] = {}
        self.refused = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def serve(self, asked: Asked) -> Callable[[], None]:
        """Ask `asked` about requests from here on, after those that serve already; True: it sees to this one, now or
        later. Returns what ends that."""
        self._asked.append(asked)

        def end() -> None:
            if asked in self._asked:
                self._asked.remove(asked)

        return end

    def requested(self, message: m.ConnectRequest) -> None:
        """The guest asks. Raises MessageError for a request that is under way already, and for one too many."""
        if message in self._under_way:
            raise m.MessageError(f"a second request for service {message.service} by endpoint {message.endpoint}")
        if len(self._under_way) >= MOST_CONNECTS:
            self._refuse(message)
            raise m.MessageError(f"a request for a channel while {MOST_CONNECTS} are under way")
        wish = Wish(self, message.endpoint, message.service)
        self._under_way[message] = wish
        if not any(asked(wish) for asked in list(self._asked)) and self.ended(wish):
            self._refuse(message)

    def _refuse(self, message: m.ConnectRequest) -> None:
        self.refused += 1
        self.tell(message.endpoint, message.service, CONNECTION_REFUSED)

    def tell(self, endpoint: UUID, service: UUID, status: int) -> None:
        """Say no."""
        self._post(m.ConnectResult(endpoint, service, status))

    def ended(self, wish: Wish) -> bool:
        """Forget a request; whether it was under way."""
        key = wish.endpoint, wish.service
        if self._under_way.get(key) is not wish:
            return False
        del self._under_way[key]
        return True

    def clear(self) -> None:
        """The guest's connection is gone, and its requests are."""
        self._under_way.clear()

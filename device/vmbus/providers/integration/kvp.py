"""Keys and values: the guest's pools, and what the guest is told whenever it opens the channel."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Annotated, Any

import msgspec

from vmbus.errors import UsageError, VmbusError
from vmbus.providers.integration.exchange import Exchange, Phase, Request
from vmbus.providers.integration.parts import Answer, Part, settle
from vmbus.wire import ic

MOST_KEYS = 1024
"""Keys of a pool that are listed, and looked at for one that is wanted, at most."""
MOST_TOLD = 64
"""Keys that the guest is told of at each open."""

Key = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Value = Annotated[str, msgspec.Meta(max_length=1023)]


class Wish(msgspec.Struct, frozen=True):
    """What the guest's pool `external` has to have for a key; None: nothing."""

    value: Value | None
    value_type: ic.ValueType = ic.ValueType.STRING

    def request(self, key: str, pool: int = ic.Pool.EXTERNAL) -> ic.Kvp:
        """The request that makes it true."""
        if self.value is None:
            return ic.Kvp(ic.KvpOperation.DELETE, pool, key)
        return ic.Kvp(ic.KvpOperation.SET, pool, key, self.value, self.value_type)

    def check(self, key: str) -> None:
        """Raises ValueError if it cannot be told."""
        ic.kvp(self.request(key))


class Kvp(Part):
    """See the module's text. `wishes` is saved: what the description and commands have for the pool `external`."""

    def __init__(self, exchange: Exchange, values: Mapping[str, str]) -> None:
        super().__init__(exchange)
        self.wishes = {key: Wish(value) for key, value in values.items()}
        self.numbers = {"told": 0}

    def ready(self) -> None:
        """The guest is told all wishes once after each open."""
        if self.numbers["told"]:
            return
        self.numbers["told"] = 1
        for key, wish in list(self.wishes.items()):
            told = functools.partial(self._told, key, wish)
            self._ask(wish.request(key), told, keep=True, bounded=False, patient=True)

    def closed(self) -> None:
        """The next open is another guest, or the same one without its memory."""
        self.numbers["told"] = 0

    def _told(self, key: str, wish: Wish, found: ic.Kvp | None = None) -> None:
        """What the guest no longer has nobody brings back."""
        if wish.value is None and self.wishes.get(key) is wish:
            del self.wishes[key]

    # ---- commands --------------------------------------------------------------------------------------------------

    def change(self, key: str, wish: Wish, pool: int) -> Answer:
        """Set or remove a key. The answer is whether the guest was `told`; of what is in its pool `external` it is told
        at each open from now on. Raises UsageError."""
        answer: Answer = Future()
        request = wish.request(key, pool)
        before = self.wishes.get(key)
        ours = pool == ic.Pool.EXTERNAL

        def done(found: ic.Kvp | None) -> None:
            if ours:
                self._told(key, wish)
            settle(answer, None if found is None else {"told": True}, _missing(key, pool))

        def forget() -> None:
            if ours and self.wishes.get(key) is wish:
                del self.wishes[key]
                if before is not None:
                    self.wishes[key] = before

        _body(request)
        if ours:
            if key not in self.wishes and len(self.wishes) >= MOST_TOLD:
                raise UsageError(f"the guest is to be told of {MOST_TOLD} keys at most: delete others first")
            self.wishes[key] = wish
            if self.exchange.phase in (Phase.CLOSED, Phase.NEGOTIATING):
                settle(answer, {"told": False})
                return answer
        try:
            self._ask(request, done, answer=answer, keep=True, refused=forget)
        except UsageError:
            forget()
            raise
        return answer

    def get(self, key: str, pool: int) -> Answer:
        """A key's `value` and its `type`. Found by listing: Linux answers a request to get without the value."""

        def look(found: ic.Kvp) -> dict[str, Any] | None:
            if found.key != key:
                return None
            return {"value": found.value, "type": ic.ValueType(found.value_type).name.lower()}

        return self._walk(pool, look, lambda: _missing(key, pool))

    def list(self, pool: int) -> Answer:
        """All `values` of a pool, by key."""
        values: dict[str, str] = {}

        def note(found: ic.Kvp) -> None:
            values[found.key] = found.value

        return self._walk(pool, note, lambda: {"values": values})

    # ---- requests --------------------------------------------------------------------------------------------------

    def _walk(
        self,
        pool: int,
        look: Callable[[ic.Kvp], dict[str, Any] | None],
        end: Callable[[], dict[str, Any] | UsageError],
    ) -> Answer:
        """Go through a pool until `look` has an answer; else `end` has it. What makes no sense is left out, and named.
        Raises UsageError as `Exchange.ask`."""
        answer: Answer = Future()
        senseless: list[str] = []

        def following(position: int) -> None:
            request = ic.Kvp(ic.KvpOperation.ENUMERATE, pool, position=position)
            self._ask(request, partly, answer=answer, senseless=lambda what: beyond(position, what))

        def partly(found: ic.Kvp | None) -> None:
            if answer.done():
                return
            result = None if found is None else look(found)
            if result is not None:
                settle(answer, result)
            elif found is not None and found.position + 1 < MOST_KEYS:
                go_on(found.position + 1)
            else:
                finish()

        def beyond(position: int, what: str) -> None:
            senseless.append(f"number {position}: {what}")
            if position + 1 < MOST_KEYS:
                go_on(position + 1)
            else:
                finish()

        def go_on(position: int) -> None:
            if answer.done():
                return
            try:
                following(position)
            except UsageError as error:
                settle(answer, None, error)

        def finish() -> None:
            last = end()
            if isinstance(last, UsageError):
                more = f"; and the guest's answers make no sense: {'; '.join(senseless[:3])}" if senseless else ""
                settle(answer, None, UsageError(f"{last}{more}"))
            else:
                settle(answer, last | ({"senseless": senseless} if senseless else {}))

        following(0)
        return answer

    def _ask(
        self,
        request: ic.Kvp,
        done: Callable[[ic.Kvp | None], None],
        *,
        answer: Answer | None = None,
        keep: bool = False,
        bounded: bool = True,
        patient: bool = False,
        refused: Callable[[], None] = lambda: None,
        senseless: Callable[[str], None] | None = None,
    ) -> None:
        """Ask for something; `done` gets the answer, or None for what is not there. `refused` is called before the
        error gets to `answer`; `senseless` gets what is wrong with an answer in its stead."""

        def failed(error: VmbusError | None) -> None:
            if answer is not None:
                settle(answer, None, error)

        def answered(message: ic.Message | None, error: VmbusError | None) -> None:
            if message is None:
                failed(error)
            elif message.status == ic.IcStatus.NO_MORE_ITEMS and request.operation != ic.KvpOperation.SET:
                done(None)
            elif message.status != ic.IcStatus.OK:
                operation = ic.KvpOperation(request.operation).name.lower()
                what = f"key {request.key!r}" if request.key else f"number {request.position} of pool {request.pool}"
                refused()
                failed(UsageError(f"the guest refused to {operation} {what}: status {message.status:#010x}"))
            else:
                try:
                    found = ic.parse_kvp_answer(message.body, request)
                except ic.IcError as wrong:
                    if senseless is not None:
                        senseless(str(wrong))
                    else:
                        failed(UsageError(f"the guest's key-value service: {wrong}"))
                else:
                    done(found)

        asked = Request(ic.MessageType.KVP, _body(request), answered, keep=keep, patient=patient)
        self.exchange.ask(asked, bounded=bounded)


def _body(request: ic.Kvp) -> bytes:
    """A request's bytes. Raises UsageError for what does not fit."""
    try:
        return ic.kvp(request)
    except ValueError as error:
        raise UsageError(f"key-value exchange: {error}") from error


def _missing(key: str, pool: int) -> UsageError:
    name = ic.Pool(pool).name.lower().replace("_", "-")
    return UsageError(f"the guest has no key {key!r} in its pool {name}")

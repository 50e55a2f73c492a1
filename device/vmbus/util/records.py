"""What all saved records share: the types of their fields, and decoding that fails in one way only."""

from typing import Annotated, TypeVar

import msgspec

from vmbus.errors import StateError
from vmbus.util.explaining import explain

# Of each structure, for a change that a new optional field cannot express.
OLDEST_STRUCTURE_VERSION = 1
NEWEST_STRUCTURE_VERSION = 1
StructVersion = Annotated[int, msgspec.Meta(ge=OLDEST_STRUCTURE_VERSION, le=NEWEST_STRUCTURE_VERSION)]

U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no larger integers
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Relid = Annotated[int, msgspec.Meta(ge=0, le=2047)]
Guid = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]

Record = TypeVar("Record")
Bytes = bytes | memoryview | msgspec.Raw


class Refusing:
    """A context in which bytes are decoded, without effects. Raises StateError that names them as `what`, nothing else.

    So whatever comes out of decoding is about the bytes: values of another kind or out of range, but also text that is
    no text (UnicodeDecodeError) and nesting without end (RecursionError).
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StateError):
            text = explain(error) if isinstance(error, msgspec.ValidationError) else error
            raise StateError(f"{self._what} is not valid: {text}") from error


def decode(decoder: msgspec.msgpack.Decoder[Record], data: Bytes, what: str) -> Record:
    """The record in `data`, see `Refusing`."""
    with Refusing(what):
        return decoder.decode(data)

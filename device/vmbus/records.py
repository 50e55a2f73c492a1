"""What all saved records share: the types of their fields, and decoding that fails in one way only."""

from typing import Annotated, TypeVar

import msgspec

from vmbus.description import explain
from vmbus.errors import StateError

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


def decode(decoder: msgspec.msgpack.Decoder[Record], data: Bytes, what: str) -> Record:
    """The record in `data`. Raises StateError that names it as `what`, and nothing else.

    Decoding has no effects, so whatever comes out of it is about the bytes: values of another kind or out of range, but
    also text that is no text (UnicodeDecodeError) and nesting without end (RecursionError).
    """
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise StateError(f"{what} is not valid: {explain(error)}") from error
    except Exception as error:
        raise StateError(f"{what} is not valid: {error}") from error

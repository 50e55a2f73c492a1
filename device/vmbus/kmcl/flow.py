"""The part of a channel that is touched for every packet: in C where that is there, else in Python (`flow_pure`)."""

from typing import TYPE_CHECKING

from vmbus.kmcl.flow_pure import NO_LIMIT, CompletionBase, Flow
from vmbus.native.choice import core

if not TYPE_CHECKING and core is not None:
    CompletionBase, Flow = core.CompletionBase, core.Flow

__all__ = ["NO_LIMIT", "CompletionBase", "Flow"]

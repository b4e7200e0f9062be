"""What rank 0 says to the others between collectives: a plan, to read one, a sign of life, or the end.

A plan is computed and read at once, or begun alone: then the others read it when they are told to, so that
every rank begins and reads in one order.

A message carries its number, so that a lost or foreign one is noticed, and a checksum of the tokens that
rank 0 sampled in the step that it read last, so that ranks that no longer agree end instead of going on.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

PLAN, ALIVE, CLOSE, BEGIN, READ = 1, 2, 3, 4, 5
_HEADER = struct.Struct("<IIQ")  # kind, checksum, number


@dataclass(frozen=True, slots=True)
class Message:
    """`payload`: of PLAN and BEGIN a packed plan, of others nothing."""

    kind: int
    number: int
    checksum: int
    payload: bytes = b""

    def pack(self) -> bytes:
        return _HEADER.pack(self.kind, self.checksum, self.number) + self.payload

    @staticmethod
    def unpack(data: bytes) -> Message:
        kind, checksum, number = _HEADER.unpack_from(data)
        return Message(kind, number, checksum, data[_HEADER.size :])


def checksum(token_ids: Sequence[int]) -> int:
    """Of the tokens of one step; 0 where none were sampled."""
    return zlib.crc32(array("q", token_ids).tobytes())

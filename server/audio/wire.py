"""Messages between the server and its decoding processes.

A message is a JSON header and raw bytes, each behind its length. No pickle: a decoder that a
hostile file has taken over can say something wrong, but can run nothing in the server.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import asyncio

_LENGTHS = struct.Struct(">IQ")  # of the header and of the payload, bytes
MAX_HEADER_BYTES = 1 << 16


def pack(header: dict[str, Any], payload_bytes: int) -> bytes:
    """Return what goes before the payload."""
    encoded = json.dumps(header).encode()
    return _LENGTHS.pack(len(encoded), payload_bytes) + encoded


def read_blocking(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Read a message in a decoding process; None once the server has closed the pipe."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    return json.loads(stream.read(header_bytes)), stream.read(payload_bytes)


async def read_async(
    stream: asyncio.StreamReader, max_payload_bytes: int
) -> tuple[dict[str, Any], bytes]:
    """Read a message in the server.

    Raises:
        asyncio.IncompleteReadError: the process is gone.
        ValueError: the message is larger than any answer, or no JSON.
    """
    header_bytes, payload_bytes = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise ValueError(f"a decoder's answer of {payload_bytes} bytes")
    header = json.loads(await stream.readexactly(header_bytes))
    if not isinstance(header, dict):
        raise ValueError("a decoder's answer is no object")
    return header, await stream.readexactly(payload_bytes)

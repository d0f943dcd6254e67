"""MP3: frame headers, and the tag of an encoder in the first frame.

Sources: ISO/IEC 11172-3 and 13818-3 (frames), ID3v2.4. The Xing tag, `Info` where the bit rate is
constant, has no standard; LAME and FFmpeg agree on it.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYNC_SEARCH = 4096  # bytes of junk tolerated before the first frame
_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # of Layer III
_CHAIN_FRAMES = 3
OPEN_END = b"\x7f\xff\xff\xff"
"""A number of frames that no file has."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame's header.

    Attributes:
        rate_hz: sample rate.
        channels: 1 or 2.
        samples: of each channel.
        size: of the frame, bytes.
        side_info: bytes between the header and a Xing tag.
    """

    rate_hz: int
    channels: int
    samples: int
    size: int
    side_info: int

    def continues(self, other: Frame) -> bool:
        """Whether one decoder takes both."""
        return (self.rate_hz, self.channels) == (other.rate_hz, other.channels)


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where the frames begin, and what a Xing tag in the first of them claims.

    Attributes:
        at: offset of the first frame.
        frame: its header.
        has_tag: whether it holds a tag, and no audio then.
        n_frames: frames of audio, None where no tag tells.
        n_frames_at: offset of that number, four bytes.
        size: bytes from `at` to the end, None where no tag tells.
    """

    at: int
    frame: Frame
    has_tag: bool = False
    n_frames: int | None = None
    n_frames_at: int = 0
    size: int | None = None


# kbit/s by index, for MPEG-1 and MPEG-2/2.5, Layer III
_BITRATES = {
    True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def skip_id3(data: bytes) -> int:
    """Return the offset behind an ID3v2 tag, whose size has seven bits a byte."""
    if data[:3] != b"ID3" or len(data) < 10:  # noqa: PLR2004 - the tag header's length
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size


def beginning(data: bytes) -> Beginning | None:
    """Find the first frame, behind an ID3 tag and a little junk; None if there is none.

    Raises:
        struct.error: the file ends within a Xing tag.
    """
    start = skip_id3(data)
    for match in _SYNC.finditer(data, start, start + _SYNC_SEARCH):
        at = match.start()
        frame = _frame(data, at)
        # A second frame behind it tells a frame from two chance bytes.
        if frame and (at + frame.size == len(data) or _frame(data, at + frame.size)):
            return _with_tag(data, at, frame)
    return None


def _with_tag(data: bytes, at: int, frame: Frame) -> Beginning:
    tag = at + 4 + frame.side_info
    if data[tag : tag + 4] not in {b"Xing", b"Info"}:
        return Beginning(at, frame)
    (flags,) = struct.unpack_from(">I", data, tag + 4)
    field = tag + 8
    n_frames_at, n_frames, size = field, None, None
    if flags & 1:
        (n_frames,) = struct.unpack_from(">I", data, field)
        field += 4
    if flags & 2:
        (size,) = struct.unpack_from(">I", data, field)
    return Beginning(at, frame, True, n_frames, n_frames_at, size)


def _frame(data: bytes, at: int) -> Frame | None:
    return _parse(data[at : at + 4])


@functools.lru_cache(maxsize=1024)  # a file has some dozens of headers
def _parse(header: bytes) -> Frame | None:
    if len(header) < 4:  # noqa: PLR2004 - bytes of a header
        return None
    (word,) = struct.unpack(">I", header)
    version, layer = word >> 19 & 3, word >> 17 & 3
    bitrate_index, rate_index = word >> 12 & 15, word >> 10 & 3
    if word >> 21 != 0x7FF or version == 1 or layer != 1:  # noqa: PLR2004 - sync word; Layer III
        return None
    if bitrate_index in {0, 15} or rate_index == 3:  # noqa: PLR2004 - free format; reserved
        return None
    mpeg1 = version == 3  # noqa: PLR2004 - codes of the header's fields
    rate_hz = _RATES_HZ[version][rate_index]
    samples = 1152 if mpeg1 else 576
    size = samples // 8 * _BITRATES[mpeg1][bitrate_index] * 1000 // rate_hz + (word >> 9 & 1)
    mono = word >> 6 & 3 == 3  # noqa: PLR2004 - codes of the header's fields
    side_info = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}
    return Frame(rate_hz, 1 if mono else 2, samples, size, side_info[mpeg1, mono])


def with_open_end(data: bytes, first: Beginning) -> bytes:
    """Put a frame before the first whose tag announces OPEN_END frames."""
    a, b, c, d = data[first.at : first.at + 4]
    # The rate, the version and the channels stay, without a checksum, at a middling bit rate,
    # which makes the frame large enough for the tag.
    header = bytes([a, b | 0x01, 0x90 | c & 0x0C, d])
    frame = _parse(header)
    if frame is None:
        raise ValueError("there is no frame at the beginning")
    tag = b"Info" + struct.pack(">I", 1) + OPEN_END
    body = (header + bytes(frame.side_info) + tag).ljust(frame.size, b"\0")
    return data[: first.at] + body + data[first.at :]


def frames(data: bytes, first: Beginning) -> Iterator[Frame]:
    """Yield the header of each whole frame of audio, whatever lies between them."""
    last = first.frame
    at = first.at + last.size * first.has_tag
    while True:
        frame = _frame(data, at)
        if frame is None or not frame.continues(last):
            found = _resync(data, at)
            if found is None:
                return
            at, frame = found
        at += frame.size
        if at > len(data):
            return
        yield frame
        last = frame


def _resync(data: bytes, start: int) -> tuple[int, Frame] | None:
    """Find the next frames behind tags, other junk or damage: a few in a row are no chance."""
    for match in _SYNC.finditer(data, start):
        chain = [_frame(data, match.start())]
        at = match.start()
        while (frame := chain[-1]) and len(chain) < _CHAIN_FRAMES:
            at += frame.size
            chain.append(_frame(data, at))
        first = chain[0]
        if first and all(frame and frame.continues(first) for frame in chain):
            return match.start(), first
    return None

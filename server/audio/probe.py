"""What a container's header says of the audio in it, without decoding any.

Cheap enough for the event loop: a few reads at known places, never a loop over samples. Everything
a header says is a claim: it lets us refuse early, and the decoder enforces the limits anyway.

A container that announces more bytes than came is truncated: WAV, M4A, WebM, MP3 with a Xing header
and a broken last OGG page tell. ADTS and plain MP3 cannot, and what came of them is transcribed. A
WAV of unknown length, as written to a pipe, is read to its end.

Sources: RIFF/WAVE (Microsoft), RFC 3533 and RFC 7845 (Ogg, Opus), RFC 9639 (FLAC), ISO/IEC 14496-12
(boxes), RFC 8794 and RFC 9559 (EBML, Matroska); of MP3 in `mp3`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from server.audio import mp3
from server.errors import AudioEmptyError, AudioUnrecognisedError

if TYPE_CHECKING:
    from collections.abc import Iterator

Container = Literal["wav", "flac", "ogg", "mp3", "mp4", "webm", "adts"]

_MAX_ELEMENTS = 4096  # boxes, chunks or elements looked at before a forged header is given up on
_MAX_NUMBER_BYTES = 8
_WAV_UNKNOWN_LENGTH = 0x7FFF0000  # writers to a pipe put this or more for "until the end"
_OGG_MAX_PAGE = 65_307  # bytes: 27 + 255 + 255 * 255
_OPUS_GRANULE_RATE_HZ = 48_000


@dataclass(frozen=True, slots=True)
class Probe:
    """A header's claims.

    Attributes:
        container: which it is, by its magic bytes; file names and media types are not trusted.
        duration_s: seconds of audio, None where the header does not tell.
        sample_rate_hz: None where the header does not tell.
        channels: None where the header does not tell.
        truncated: the container announces more bytes than there are.
    """

    container: Container
    duration_s: float | None = None
    sample_rate_hz: int | None = None
    channels: int | None = None
    truncated: bool = False


def probe(data: bytes) -> Probe:
    """Read the header of an upload.

    Raises:
        AudioEmptyError: there are no bytes.
        AudioUnrecognisedError: the bytes are no container that we know.
    """
    if not data:
        raise AudioEmptyError("the file is empty")
    try:
        found = _dispatch(data)
    except (struct.error, IndexError):  # a header cut short
        found = None
    if found is None:
        raise AudioUnrecognisedError(
            "the file is not audio in a known container: WAV, FLAC, OGG, MP3, M4A, AAC or WebM"
        )
    return found


def _dispatch(data: bytes) -> Probe | None:  # noqa: PLR0911 - one return a container
    if data[:4] in {b"RIFF", b"RIFX", b"RF64"} and data[8:12] == b"WAVE":
        return _probe_wav(data)
    if data[:4] == b"OggS":
        return _probe_ogg(data)
    if data[4:8] == b"ftyp":
        return _probe_mp4(data)
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return _probe_webm(data)
    start = mp3.skip_id3(data)
    if data[start : start + 4] == b"fLaC":
        return _probe_flac(data, start)
    if _is_adts(data, start):
        return Probe("adts")
    return _probe_mp3(data, start)


def _probe_wav(data: bytes) -> Probe:
    order = ">" if data[:4] == b"RIFX" else "<"
    rate = channels = None
    bytes_per_s = 0
    position = 12
    for _ in range(_MAX_ELEMENTS):
        if position + 8 > len(data):
            break
        name = data[position : position + 4]
        (size,) = struct.unpack_from(order + "I", data, position + 4)
        position += 8
        if name == b"fmt ":
            channels, rate, bytes_per_s = struct.unpack_from(order + "2xHII", data, position)
        if name == b"data":
            known = 0 < size < _WAV_UNKNOWN_LENGTH
            duration_s = size / bytes_per_s if known and bytes_per_s else None
            truncated = known and position + size > len(data)
            return Probe("wav", duration_s, rate, channels, truncated)
        position += size + size % 2  # chunks are padded to even sizes
    return Probe("wav", None, rate, channels, truncated=True)  # no data chunk came


def _probe_flac(data: bytes, start: int) -> Probe:
    packed = int.from_bytes(data[start + 18 : start + 26], "big")  # of STREAMINFO
    rate, channels = packed >> 44, (packed >> 41 & 7) + 1
    samples = packed & (1 << 36) - 1
    cut = len(data) < start + 42  # magic, block header and STREAMINFO
    return Probe("flac", samples / rate if samples and rate else None, rate or None, channels, cut)


def _probe_ogg(data: bytes) -> Probe:
    packet = data[27 + data[26] :][:64]
    rate = channels = granule_rate = None
    pre_skip = 0
    if packet[:8] == b"OpusHead":
        channels, pre_skip = struct.unpack_from("<BH", packet, 9)
        rate = granule_rate = _OPUS_GRANULE_RATE_HZ
    elif packet[:7] == b"\x01vorbis":
        channels, rate = struct.unpack_from("<BI", packet, 11)
        granule_rate = rate
    last = data.rfind(b"OggS", max(0, len(data) - _OGG_MAX_PAGE))
    truncated = last < 0 or _ogg_page_end(data, last) > len(data)
    granule = struct.unpack_from("<q", data, last + 6)[0] if not truncated else -1
    known = granule > 0 and granule_rate
    duration_s = max(0, granule - pre_skip) / granule_rate if known and granule_rate else None
    return Probe("ogg", duration_s, rate, channels, truncated)


def _ogg_page_end(data: bytes, page: int) -> int:
    if page + 27 > len(data):
        return len(data) + 1
    segments = data[page + 26]
    table = data[page + 27 : page + 27 + segments]
    return page + 27 + segments + sum(table) if len(table) == segments else len(data) + 1


def _probe_mp4(data: bytes) -> Probe:
    duration_s = None
    end = 0
    looked_at = iter(range(_MAX_ELEMENTS))
    for name, start, end in _boxes(data, 0, len(data), looked_at):
        if name != b"moov":
            continue
        for inner, body, _ in _boxes(data, start, min(end, len(data)), looked_at):
            if inner == b"mvhd":
                layout = ">16xIQ" if data[body] == 1 else ">8xII"  # version 1 has 64-bit times
                timescale, duration = struct.unpack_from(layout, data, body + 4)
                duration_s = duration / timescale if timescale and duration else None
    return Probe("mp4", duration_s, truncated=end > len(data))


def _boxes(
    data: bytes, start: int, stop: int, looked_at: Iterator[int]
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start of the body, end) of the boxes that begin before `stop`.

    `looked_at` counts them, those within others too, and ends where it is enough.
    """
    for _ in looked_at:
        if start + 8 > stop:
            return
        size, name = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1:
            header = 16
            (size,) = struct.unpack_from(">Q", data, start + 8)
        elif size == 0:  # to the end of the file
            size = stop - start
        if size < header:
            return
        yield name, start + header, start + size
        start += size


_EBML_SEGMENT = 0x18538067
_EBML_CLUSTER = 0x1F43B675
_EBML_INFO = 0x1549A966
_EBML_TIMESTAMP_SCALE = 0x2AD7B1
_EBML_DURATION = 0x4489


def _probe_webm(data: bytes) -> Probe:
    duration_s = None
    truncated = False
    looked_at = iter(range(_MAX_ELEMENTS))
    for element, start, end in _elements(data, 0, len(data), looked_at):
        if element != _EBML_SEGMENT:
            continue
        truncated = end is not None and end > len(data)
        for inner, body, inner_end in _elements(data, start, len(data), looked_at):
            if inner == _EBML_CLUSTER:
                break
            if inner == _EBML_INFO and inner_end is not None:
                stop = min(inner_end, len(data))
                duration_s = _webm_duration_s(data, body, stop, looked_at)
                break
        break
    return Probe("webm", duration_s, truncated=truncated)


def _webm_duration_s(data: bytes, start: int, stop: int, looked_at: Iterator[int]) -> float | None:
    scale_ns, duration = 1_000_000, 0.0
    for element, body, end in _elements(data, start, stop, looked_at):
        value = data[body:end]
        if element == _EBML_TIMESTAMP_SCALE and len(value) <= _MAX_NUMBER_BYTES:
            scale_ns = int.from_bytes(value, "big")
        elif element == _EBML_DURATION and len(value) in {4, 8}:
            (duration,) = struct.unpack(">f" if len(value) == 4 else ">d", value)  # noqa: PLR2004 - sizes and masks of the format
    duration_s = duration * scale_ns / 1e9
    return duration_s if math.isfinite(duration_s) and duration_s > 0 else None


def _elements(
    data: bytes, start: int, stop: int, looked_at: Iterator[int]
) -> Iterator[tuple[int, int, int | None]]:
    """Yield (id, start of the body, end) of EBML elements; the end is None where unknown.

    `looked_at` counts them, those within others too, and ends where it is enough.
    """
    for _ in looked_at:
        if start >= stop:
            return
        id_length = 9 - data[start].bit_length()
        element = int.from_bytes(data[start : start + id_length], "big")
        start += id_length
        size_length = 9 - data[start].bit_length()
        size = int.from_bytes(data[start : start + size_length], "big") & (1 << 7 * size_length) - 1
        start += size_length
        unknown = size == (1 << 7 * size_length) - 1
        yield element, start, None if unknown else start + size
        if unknown:
            return
        start += size


def _is_adts(data: bytes, start: int) -> bool:
    """Two AAC frames in a row, the second where the first says that it ends."""
    header = data[start : start + 7]
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0:  # noqa: PLR2004 - sizes and masks of the format
        return False
    second = start + (int.from_bytes(header[3:6], "big") >> 5 & 0x1FFF)
    return data[second : second + 1] == b"\xff" and data[second + 1] & 0xF6 == 0xF0  # noqa: PLR2004 - sizes and masks of the format


def _probe_mp3(data: bytes, start: int) -> Probe | None:
    if 0 < start >= len(data):  # nothing came behind the ID3 tag
        return Probe("mp3", truncated=True)
    first = mp3.beginning(data)
    if first is None:
        return None
    frame, n_frames = first.frame, first.n_frames
    duration_s = None if n_frames is None else n_frames * frame.samples / frame.rate_hz
    truncated = first.size is not None and first.at + first.size > len(data)
    return Probe("mp3", duration_s, frame.rate_hz, frame.channels, truncated)

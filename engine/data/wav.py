"""WAV headers: the one that this engine writes, and where the samples lie in those that others wrote.

Writers that cannot go back to the header leave a placeholder for the size of the `data` chunk, and 32 bits do not hold
sizes from 4 GiB on. The rule, for a chunk that claims C bytes where H bytes lie between its beginning and the end of
the file:

- H - C is 4 GiB or more: the size wrapped round, and as many times 4 GiB are added as fit.
- C is 0 but something follows: if that begins with the name of a usual chunk, or is a chain of whole chunks, there are
  no samples; else it is the samples.
- C > H: a placeholder if nobody can have counted it: within 64 KiB of 2^31 or below 2^32, within 1 KiB of a multiple
  of 10^9, unknown by a `ds64` chunk of RF64, or beyond a RIFF that ends exactly where the file does. Then the samples
  are all that is there. Any other size counts what was there, and the file is truncated.
- Otherwise C is the size.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
HEADER_BYTES = HEADER.size
WAV_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"BW64")
_FIXED = (1, 3, 6, 7, 0xFFFE)  # PCM, float, A-law, mu-law, WAVE_FORMAT_EXTENSIBLE: a frame is `align` bytes
_NAMES = (
    *(b"fmt ", b"data", b"fact", b"LIST", b"JUNK", b"PAD ", b"FLLR", b"bext", b"cue ", b"smpl", b"inst", b"id3 "),
    *(b"ID3 ", b"PEAK", b"iXML", b"afsp", b"_PMX", b"acid", b"plst", b"DISP"),
)
_4_GIB = 1 << 32


class WavError(ValueError):
    """A header at odds with itself or with the file; the message is the reason that the user reads."""


def wav_header(frames: int, sample_rate: int) -> bytes:
    """The 44 bytes before `frames` mono int16 samples: RIFF, fmt of 16 bytes, data; nothing else says the same in
    fewer.
    """
    size = 2 * frames
    parts = (b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16, b"data", size)
    return HEADER.pack(*parts)


@dataclass(frozen=True)
class Layout:
    """Where the samples of a WAV lie: `length` bytes from byte `start` on. `frames` is None where the format has no
    fixed number of bytes a frame. `remark` says why the size in the header was not taken, "" if it was.
    """

    start: int
    length: int
    frames: int | None
    is_big_endian: bool
    format_chunk: bytes
    remark: str


def read_layout(file: BinaryIO, size: int) -> Layout | None:
    """The layout of the WAV of `size` bytes in `file`; None where it has no `data` chunk, of which a decoder can say
    more.

    Raises:
        WavError: the file is truncated, or its format chunk contradicts itself.
    """
    file.seek(0)
    header = file.read(12).ljust(12, b"\0")
    order = ">" if header.startswith(b"RIFX") else "<"
    riff_end = struct.unpack_from(f"{order}I", header, 4)[0] + 8
    align, tag, long_size, form = 0, 0, 0, b""
    for _ in range(10_000):
        name, length = struct.unpack(f"{order}4sI", file.read(8).ljust(8, b"\0"))
        body = file.tell()
        if name == b"data" or body >= size:
            break
        content = file.read(min(length, 64))
        if name == b"fmt ":
            tag, channels, _, _, align, bits = struct.unpack(f"{order}HHIIHH", content[:16].ljust(16, b"\0"))
            if tag in _FIXED and 0 < align < channels * -(-bits // 8):
                raise WavError(f"contradictory header: {channels} channels of {bits} bits in {align} bytes")
            form = content
        elif name == b"ds64":
            long_size = int.from_bytes(content[8:16], "little")
        file.seek(body + length)
        is_padded = length % 2 == 1 and file.read(4) not in _NAMES  # the byte of padding is forgotten now and then
        file.seek(body + length + is_padded)
    if name != b"data":
        return None
    there = size - body
    is_long = header.startswith((b"RF64", b"BW64")) and length == 0xFFFFFFFF
    claimed = long_size if is_long else length
    unit, per = ("samples", align) if tag in _FIXED and align else ("bytes", 1)
    taken, remark = claimed, ""
    if not is_long and there - claimed >= _4_GIB:
        taken = claimed + (there - claimed) // _4_GIB * _4_GIB
        remark = f"size wrapped at 4 GiB: header says {claimed // per} {unit}, {taken // per} are read"
    elif claimed == 0 and there >= max(align, 1) and not _are_chunks(file, body, size, order):
        taken = there
    elif claimed // per > there // per:
        round_riff = _is_round(riff_end - 8) and claimed == riff_end - body
        if not (_is_round(claimed) or round_riff or riff_end == size) or (is_long and claimed < 1 << 62):
            raise WavError(f"truncated: header says {claimed // per} {unit}, file holds {there // per}")
        taken = there
    elif claimed > there:  # part of a frame is missing
        taken = there
    if taken != claimed and not remark and claimed // per != taken // per:
        remark = f"no size in the header: it says {claimed // per} {unit}, all {taken // per} to the end are read"
    return Layout(body, taken, taken // align if per == align else None, order == ">", form, remark)


def _is_round(size: int) -> bool:
    """Whether a size of 32 bits is one that writers leave where they do not know it."""
    near_giga = size >= 10**9 - 1024 and min(size % 10**9, -size % 10**9) <= 1024
    return near_giga or abs(size - (1 << 31)) <= 1 << 16 or size >= _4_GIB - (1 << 16)


def _are_chunks(file: BinaryIO, at: int, end: int, order: str) -> bool:
    """Whether the bytes from `at` to `end` are whole chunks, one after the other, or a usual one."""
    while at < end:
        file.seek(at)
        head = file.read(8)
        if head[:4] in _NAMES:
            return True
        if len(head) < 8 or not all(0x20 <= letter < 0x7F for letter in head[:4]):
            return False
        length = struct.unpack(f"{order}I", head[4:])[0]
        if at + 8 + length > end:
            return False
        at += 8 + length + length % 2
    return True


class Mended(io.RawIOBase):
    """The file at `path` as it would be if its header said what `layout` does."""

    def __init__(self, path: str | bytes, layout: Layout) -> None:
        self._file, self._layout, self._at = open(path, "rb", buffering=0), layout, 0  # noqa: SIM115
        order, form, length = ">" if layout.is_big_endian else "<", layout.format_chunk, layout.length
        chunks = b"fmt " + struct.pack(f"{order}I", len(form)) + form + b"data"
        riff_size = 4 + len(chunks) + 4 + length
        if riff_size + 36 < _4_GIB:
            magic = b"RIFX" if layout.is_big_endian else b"RIFF"
            start, end = magic + struct.pack(f"{order}I", riff_size) + b"WAVE", struct.pack(f"{order}I", length)
        else:
            numbers = struct.pack("<4sIQQQI", b"ds64", 28, riff_size + 36, length, layout.frames or 0, 0)
            start, end = b"RF64\xff\xff\xff\xffWAVE" + numbers, b"\xff\xff\xff\xff"
        self._head = start + chunks + end

    def readable(self) -> bool:
        """As of any file."""
        return True

    def seekable(self) -> bool:
        """As of any file."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._head) + self._layout.length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """As of any file: the header first, then the samples."""
        view = memoryview(buffer).cast("B")
        if self._at < len(self._head):
            part = self._head[self._at : self._at + len(view)]
            view[: len(part)] = part
            got = len(part)
        else:
            at = self._at - len(self._head)
            self._file.seek(self._layout.start + at)
            got = self._file.readinto(view[: max(0, self._layout.length - at)])
        self._at += got
        return got

    def close(self) -> None:
        """Close the file beneath, too."""
        self._file.close()
        super().close()

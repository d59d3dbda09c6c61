"""Decodes audio files to the end, and converts those that NVIDIA DALI cannot decode, or not faithfully: the worker of
check.py.

It runs as a script, `python -P probe.py MEMORY_BYTES`, so that it starts fast: torch is not imported. A line of
standard input is a file, [path, size, mtime in ns, path for a converted copy] in JSON. Each is answered by a line of
standard output: {"sound": [frames, rate, channels, size of the copy, its mtime], "remark": lines for people}, where
size -1 means no copy; or
{"reason": why the file is of no use, "transient": true if that may pass by itself}; or {"fatal": what no other file
would change}.
"""

import contextlib
import ctypes
import io
import json
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import soundfile

from ssast.engine.data.remarks import Ear
from ssast.engine.data.resample import as_float, mean_of_channels, to_int16
from ssast.engine.data.wav import WAV_MAGIC, Layout, Mended, WavError, read_layout
from ssast.engine.files import atomic_write
from ssast.engine.twins import missing_file

COPY_RATE = 16_000  # Hz
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
MAX_PEAK = 1_000.0  # full scale is 1: beyond this, samples are finite but no audio

# What DALI's decoder (libsndfile without MP3) returns equal to libsndfile as int16. It also opens AIFF, AU, CAF and
# others, but there nothing would tell a cut file from a whole one; and one-channel float files come back as -1, 0 and
# 1, that is as silence.
_PCM = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "ULAW", "ALAW"}
DALI_FORMATS = {
    "WAV": _PCM,
    "WAVEX": _PCM,
    "RF64": _PCM,
    "FLAC": {"PCM_S8", "PCM_16", "PCM_24"},
    "OGG": {"VORBIS", "OPUS"},
}

# FFmpeg's demuxers for audio files. The others are kept out: text and images are not audio, and playlists open other
# files.
_DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,gsm,iff,ircam,loas,matroska,mov,mp3,mpc,mpc8,mpeg,"
    "nistsphere,nut,ogg,oma,paf,pvf,rm,sds,shn,sox,tak,tta,voc,w64,wav,wv"
)
_GUESSED_DURATION = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3", "mpeg"}  # from the bit rate of the beginning
_UNKNOWN = "format not recognised"
# Names of samples without a header; folder.py takes such files for candidates.
_HEADERLESS = (".al", ".alaw", ".pcm", ".raw", ".s16", ".s16le", ".s24le", ".s32le", ".sln", ".ul", ".ulaw", ".vox")
_BLOCK = 1 << 16  # samples of all channels that FFmpeg's frames are gathered to


class Reject(Exception):
    """The file cannot be used; the message is the reason that the user reads."""


class _CannotWriteError(Exception):
    """The copy cannot be written, which no other file would change."""


def serve(memory: int, handle: Callable[[Any], Iterable[Any]]) -> None:
    """Answers each job, a line of JSON on standard input, with lines of JSON, in at most `memory` bytes of address
    space.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what decoders print must not get between the answers
    with contextlib.suppress(OSError, AttributeError):
        # PR_SET_PDEATHSIG: dies with its parent, even in the middle of a file
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers.write("null\n")  # ready
    for line in sys.stdin.buffer:
        for answer in handle(json.loads(line)):
            answers.write(json.dumps(answer) + "\n")


def _verdict(path: str, size: int, mtime_ns: int, copy: str, memory: int) -> dict[str, Any]:
    try:
        sound, remarks = _inspect(path, size, copy)
        now = os.stat(path)
        if (now.st_size, now.st_mtime_ns) != (size, mtime_ns):
            return {"reason": "changed while it was being checked", "transient": True}
        return {"sound": sound, "remark": "\n".join(remarks)}
    except _CannotWriteError as error:
        return {"fatal": str(error)}
    except ImportError as error:
        return {"fatal": f"cannot import what decodes audio: {error}"}
    except Exception as error:  # decoders' bindings raise all kinds, and one file must not end the check
        verdict: dict[str, Any] = {"reason": describe(error, memory)}
        return verdict if isinstance(error, Reject) else verdict | {"transient": True}


def describe(error: Exception, memory: int) -> str:
    """Why a file cannot be used, given what was raised while it was decoded in `memory` bytes of address space."""
    if isinstance(error, Reject):
        return str(error)
    if isinstance(error, MemoryError):
        return f"needs more than {memory / 2**30:.1f} GiB of memory to decode"
    if isinstance(error, OSError):
        return f"unreadable: {error.strerror or error}"
    return f"cannot be decoded: {type(error).__name__}: {error}"


def file_status(path: str) -> tuple[int, int] | str:
    """(size, mtime in ns) of a file worth opening, or what is wrong with it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "broken symbolic link" if os.path.islink(path) else missing_file(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        return f"unreadable: {getattr(error, 'strerror', error)}"
    if not stat.S_ISREG(status.st_mode):
        return "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    return (status.st_size, status.st_mtime_ns) if status.st_size else "empty file"


def _inspect(path: str, size: int, copy: str) -> tuple[list[int], list[str]]:
    """(what DALI is to read of a file, remarks on it)."""
    ear = Ear()
    with open_native(path, size) as native:
        if native.sound is not None and not native.is_mended:
            frames, peak = _scan(native.sound, ear)
            # One-channel Vorbis and Opus beyond full scale wrap around in the int16 that DALI asks libsndfile for.
            if peak <= 1 or native.sound.channels > 1:
                ear.header = native.remark
                return [frames, native.sound.samplerate, native.sound.channels, -1, 0], ear.remarks()
    ear = Ear()
    return _convert(path, size, copy, ear), ear.remarks()


@dataclass(frozen=True)
class Native:
    """A file in libsndfile's hands; `sound` is None where FFmpeg must read it, `problem` says why libsndfile could not
    open it, "" if it could. `is_mended`: it is read under another header than it has, which DALI cannot do. `remark`
    is for people, "" for none.
    """

    sound: soundfile.SoundFile | None
    problem: str = ""
    is_mended: bool = False
    remark: str = ""


@contextlib.contextmanager
def open_native(path: str, size: int) -> Iterator[Native]:
    """A file of `size` bytes, if possible in libsndfile's hands.

    Raises `Reject` for a header at odds with the `size` bytes that there are.
    """
    layout = None
    with open(path, "rb") as file:
        magic = file.read(4)
        if magic in WAV_MAGIC:
            try:
                layout = read_layout(file, size)
            except WavError as error:
                raise Reject(str(error)) from None
        elif magic == b"OggS":
            _check_ogg(file, size)
    with contextlib.ExitStack() as stack:
        problem, sound = "", None
        try:
            sound = stack.enter_context(soundfile.SoundFile(os.fsencode(path)))
        except TypeError:  # named .raw
            problem = _UNKNOWN
        except soundfile.LibsndfileError as error:
            is_audio = magic in (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM") and "not recognised" not in str(error)
            problem = _message(error) if is_audio else _UNKNOWN
        is_mended = False
        if layout is not None and not _sees_all(sound, layout):
            with contextlib.suppress(soundfile.LibsndfileError):
                mended = stack.enter_context(soundfile.SoundFile(stack.enter_context(Mended(path, layout))))
                is_mended = sound is None or _sees_all(mended, layout)
                sound = mended if is_mended else sound
        remark = layout.remark if layout is not None else ""
        # A FLAC written to a pipe knows no length, and DALI then decodes nothing.
        if sound is not None and sound.subtype in DALI_FORMATS.get(sound.format, ()) and sound.frames < 2**62:
            _check_rate(sound.samplerate)
            yield Native(sound, "", is_mended, remark)
        else:
            yield Native(None, problem, False, remark)


def _sees_all(sound: soundfile.SoundFile | None, layout: Layout) -> bool:
    """Whether libsndfile sees the samples of a WAV where they are; None: it cannot open the file."""
    if sound is None:
        return not layout.format_chunk
    return sound.frames == layout.frames or (layout.frames is None and (sound.frames > 0 or not layout.remark))


def decode(path: str, size: int, ear: Ear) -> Iterator[tuple[int, np.ndarray]]:
    """A file of `size` bytes in blocks: (sample rate in Hz, mean of the channels: int16 [n], or float32 [n] of full
    scale 1). `ear` hears it all.

    Raises `Reject`, at the end at the latest, if it is not whole and sound.
    """
    with open_native(path, size) as native:
        ear.header = native.remark
        if native.sound is not None:
            sound = native.sound
            exact = sound.subtype == "PCM_16" and sound.channels == 1
            for block in native_blocks(sound, "int16" if exact else "float32"):
                mono = mean_of_channels(block)
                ear.hear(block, mono if sound.channels > 1 else None)
                yield sound.samplerate, mono
            return
    yield from ffmpeg_blocks(path, native.problem, ear)


def _check_ogg(file: BinaryIO, size: int) -> None:
    """Rejects an Ogg file without the page that ends the stream."""
    file.seek(max(0, size - 2 * 65_307))  # the largest page, twice
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    table = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 + len(table) + sum(table) or not page[5] & 4:
        raise Reject("truncated: the end of the Ogg stream is missing")


def _check_rate(rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise Reject(f"sample rate of {rate} Hz, outside {MIN_RATE} to {MAX_RATE}")


def _check_samples(samples: np.ndarray) -> tuple[float, int]:
    """Peak, and how many samples are not finite."""
    peak = float(np.abs(samples).max(initial=0.0))
    if not np.isfinite(peak):
        return 0.0, int(samples.size - np.count_nonzero(np.isfinite(samples)))
    if peak > MAX_PEAK:
        raise Reject(f"absurd samples: peak {peak:.3g} where 1 is full scale")
    return peak, 0


def _message(error: soundfile.LibsndfileError) -> str:
    """libsndfile's message without "Error : " and the full stop."""
    return error.error_string.rpartition("rror : ")[2].rstrip(".")


def _scan(sound: soundfile.SoundFile, ear: Ear) -> tuple[int, float]:
    """Decodes all of a file: (frames, peak), the peak of integer formats being 1."""
    kind = "float32" if sound.format == "OGG" else "int16"
    frames, peak = 0, 1.0 if kind == "int16" else 0.0
    for block in native_blocks(sound, kind):
        frames += len(block)
        ear.hear(block, mean_of_channels(as_float(block)) if sound.channels > 1 else None)
        if kind == "float32":
            peak = max(peak, float(np.abs(block).max()))
    return frames, peak


def native_blocks(sound: soundfile.SoundFile, kind: str) -> Iterator[np.ndarray]:
    """All of a file in blocks [n, channels] of `kind`, int16 or float32; each is overwritten by the next.

    Raises `Reject`, at the end at the latest, if it cannot be decoded in full or holds what is no sound.
    """
    block = np.empty((max(1, (1 << 18) // sound.channels), sound.channels), dtype=kind)
    frames, bad = 0, 0
    try:
        while got := sound.buffer_read_into(block, kind):
            frames += got
            if kind == "float32":
                bad += _check_samples(block[:got])[1]
            if not bad:
                yield block[:got]
    except soundfile.LibsndfileError as error:
        raise Reject(
            f"truncated or damaged: header says {sound.frames} samples, decoding failed ({_message(error)})"
        ) from error
    if bad:
        raise Reject(f"NaN or infinite samples ({bad})")
    if frames != sound.frames:
        raise Reject(f"truncated: header says {sound.frames} samples, {frames} can be decoded")
    if not frames:
        raise Reject("no samples")


def _convert(path: str, size: int, copy: str, ear: Ear) -> list[int]:
    """Writes what `decode` returns of a file to `copy`: 16 kHz, the mean of the channels, 16-bit FLAC."""
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", COPY_RATE, 1, "PCM_16", format="FLAC") as flac:
        for samples in to_int16(decode(path, size, ear), COPY_RATE):
            flac.write(samples)
    content.seek(0)
    with soundfile.SoundFile(content) as flac:  # what could not be written would not show otherwise
        frames, _ = _scan(flac, Ear())
    return [frames, COPY_RATE, 1, *_write_copy(copy, content)]


def _write_copy(copy: str, content: io.BytesIO) -> tuple[int, int]:
    """(size, mtime in ns) of the copy, which appears whole or not at all."""
    try:
        with atomic_write(copy) as aside:
            aside.write_bytes(content.getbuffer())
        status = os.stat(copy)
        return status.st_size, status.st_mtime_ns
    except OSError as error:
        folder = os.path.dirname(copy)
        free = shutil.disk_usage(folder).free / 2**20
        raise _CannotWriteError(
            f"cannot write converted clips to {folder}: {error.strerror} ({free:.0f} MiB free)"
        ) from error


def ffmpeg_blocks(path: str, problem: str, ear: Ear) -> Iterator[tuple[int, np.ndarray]]:
    """What FFmpeg decodes of the first audio stream: (rate, mean of the channels, float32 [n], full scale 1).

    `problem` says why libsndfile could not open the file, "" if it could. Raises `Reject`, at the end at the latest.
    """
    import av  # only some data sets need it

    try:
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
        with av.open(path, container_options=options, metadata_errors="ignore") as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                raise Reject("no audio stream that can be decoded")
            sound = _Sound(container, ear)
            yield from sound.mono()
            sound.require_whole(path, problem)
    except MemoryError:
        raise
    except (av.FFmpegError, Reject) as error:
        if path.lower().endswith(_HEADERLESS):
            raise Reject("no header says its rate and format: convert it to WAV first") from error
        if isinstance(error, Reject):
            raise
        raise Reject(f"not audio: {problem or error.strerror}") from error


class _Sound:
    """The first audio stream of a container, decoded past errors as players do."""

    def __init__(self, container: Any, ear: Ear) -> None:
        self._container, self._stream, self._ear = container, container.streams.audio[0], ear
        self._seconds, self._errors, self._bad = 0.0, 0, 0

    def mono(self) -> Iterator[tuple[int, np.ndarray]]:
        """(rate, mean of the channels), float32 [n], full scale 1: many frames at a time, of which most codecs make
        short ones.
        """
        rate, num_samples = 0, 0
        pieces: list[np.ndarray] = []
        for frame in self._frames():
            _check_rate(frame.sample_rate)
            samples = frame.to_ndarray()
            if not frame.format.is_planar:
                samples = samples.reshape(-1, frame.layout.nb_channels).T
            self._seconds += frame.samples / frame.sample_rate
            if pieces and (frame.sample_rate != rate or num_samples >= _BLOCK or _differ(samples, pieces[0])):
                yield from self._join(rate, pieces)
                pieces, num_samples = [], 0
            rate, num_samples = frame.sample_rate, num_samples + samples.size
            pieces.append(samples)
        if pieces:
            yield from self._join(rate, pieces)

    def _join(self, rate: int, pieces: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        samples = np.concatenate(pieces, axis=1)
        if samples.dtype.kind in "iu":
            samples = samples.astype(np.float32) / 2 ** (8 * samples.itemsize - 1) - (samples.dtype.kind == "u")
        self._bad += _check_samples(samples)[1]
        if samples.size and not self._bad:
            mono = samples.mean(axis=0).astype(np.float32, copy=False)
            self._ear.hear(samples, mono if len(samples) > 1 else None)
            yield rate, mono

    def _frames(self) -> Iterator[Any]:
        import av

        packets = self._container.demux(self._stream)
        is_first = True
        while True:
            try:
                packet = next(packets)
                if is_first:
                    self._skip_all(packet)
                is_first = False
                yield from packet.decode()
            except StopIteration:
                return
            except MemoryError:
                raise
            except av.FFmpegError:
                self._errors += 1

    def _skip_all(self, packet: Any) -> None:
        """Make FFmpeg leave out all of the samples before the beginning of an Opus stream.

        RFC 7845, 5.1: its header counts them at 48 kHz. FFmpeg goes by Matroska's CodecDelay instead, which its own
        muxer once wrote too short for recordings of other rates.
        """
        context = self._stream.codec_context
        header = bytes(context.extradata or b"")
        is_opus = context.codec.name in ("opus", "libopus") and header.startswith(b"OpusHead") and len(header) >= 19
        if is_opus and packet.has_sidedata("skip_samples"):
            skipped = packet.get_sidedata("skip_samples")
            skipped.update(header[10:12] + bytes(2) + bytes(skipped)[4:])
            packet.set_sidedata(skipped)

    def require_whole(self, path: str, problem: str) -> None:
        """Rejects what was not decoded in full; called at the end."""
        if self._bad:
            raise Reject(f"NaN or infinite samples ({self._bad})")
        claimed = self._claimed_seconds(path)
        if not self._seconds:
            empty = not problem or (problem == _UNKNOWN and claimed)
            raise Reject("no samples" if empty else f"not audio: {problem}")
        if claimed - self._seconds > max(0.5, 0.1 * claimed):
            raise Reject(f"truncated: header says {claimed:.1f} s, {self._seconds:.1f} s can be decoded")

    def _claimed_seconds(self, path: str) -> float:
        """Duration by the header; 0 where FFmpeg made it up from the bit rate, unless errors while decoding lend it
        weight.
        """
        if self._container.format.name in _GUESSED_DURATION and not self._errors:
            with open(path, "rb") as file:
                head = file.read(1 << 18)
            if b"Xing" not in head and b"Info" not in head:  # the frame count of an MP3
                return 0.0
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        alone = len(self._container.streams) == 1  # otherwise it may be that of a longer video
        return (self._container.duration or 0) / 1e6 if alone else 0.0


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) != len(other) or one.dtype != other.dtype


def _main(memory: int) -> None:
    def handle(job: Any) -> list[dict[str, Any]]:
        path, size, mtime_ns, copy = job
        return [_verdict(path, size, mtime_ns, copy, memory)]

    serve(memory, handle)


if __name__ == "__main__":
    _main(int(sys.argv[1]))

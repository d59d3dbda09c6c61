"""Recordings of any kind as streams of samples, decoded by processes that may crash, hang or run out of memory at the
cost of one file.

As a script, `python -P sound.py SETTINGS`, this is such a process. A line of standard input is a job in JSON, [path,
offset, size] of a whole recording, or [path, offset, size, start, end] in seconds. It is answered by lines of JSON on
standard output: {"samples": int16 of base64}, as many as it takes, and then {"end": true, "remarks": lines for people}
or {"reason": why the recording is of no use}, or {"fatal": what no other file would change}.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import math
import os
import select
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ssast.engine.data.extract import as_file, segment
from ssast.engine.data.probe import decode, describe, file_status, serve
from ssast.engine.data.record import Record
from ssast.engine.data.remarks import Ear, Remarks
from ssast.engine.data.resample import to_int16
from ssast.engine.data.workers import Worker
from ssast.engine.errors import UserError

TIMEOUT_S = 60.0  # from block to block
MEMORY = 4 << 30  # bytes of address space of a process
_PIPE_BYTES = 1 << 20  # about 25 s of sound, decoded ahead
_BLOCK = 1 << 16  # samples of an answer


class UnreadableError(ValueError):
    """A recording cannot be used; the message is the reason that people read."""


def find_recordings(sources: Sequence[str], remark: Any = None) -> list[Record]:
    """All recordings of audio files, folders, manifests, tars and prepared folders, in their order, each once.

    `remark` is called with a line for people on what was left out.

    Raises:
        UserError: a source that is not there or cannot be understood, or no recording at all.
    """
    from ssast.engine.data.sources import read_source  # not in the processes that decode, which start often

    recordings_by_place: dict[tuple[str, int, float, float], Record] = {}
    for source in sources:
        read = read_source(source)
        if remark and (read.remarks or read.notes):
            remark(f"{source}: {'; '.join([*read.remarks, *read.notes])}")
        for recording in read.records:
            recordings_by_place.setdefault(recording.place, recording)
    if not recordings_by_place:
        raise UserError("no recordings were named: give audio files, folders or manifests")
    return list(recordings_by_place.values())


def read_recordings(
    recordings: Iterable[Record],
    sample_rate: int,
    *,
    workers: int = 1,
    timeout_s: float = TIMEOUT_S,
    memory: int = MEMORY,
) -> Generator[Iterator[np.ndarray], None, None]:
    """For each recording, in order, its samples: blocks int16 [n], mono, at `sample_rate` Hz. `workers` processes
    decode ahead, little.

    What is worth a remark, such as silence, goes to standard error at the end, a line for each kind.
    A stream is to be read before the next one is asked for; what is left of it is passed over.

    Raises:
        UnreadableError: while a stream is read, where it cannot be decoded in full. The next ones can be read
            nevertheless.
        UserError: decoding is impossible for any file.
        RuntimeError: a process could not start.
    """
    arguments = [json.dumps({"sample_rate": sample_rate, "memory": memory})]
    waiting = iter(recordings)
    busy: deque[_Decoder] = deque()
    remarks = Remarks()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [tqdm.write(line, file=sys.stderr) for line in remarks.lines()])
        for _, recording in zip(range(workers), waiting, strict=False):  # in this order, or it would take one too many
            busy.append(_Decoder(arguments, timeout_s, remarks))
            stack.callback(busy[-1].close)
            busy[-1].begin(recording)
        while busy:
            decoder = busy.popleft()
            yield decoder.blocks()
            decoder.pass_over()
            following = next(waiting, None)
            if following is not None:
                decoder.begin(following)
                busy.append(decoder)


class _Decoder:
    """A process, started anew whenever it has ended, and the recording it has in hand."""

    def __init__(self, arguments: list[str], timeout_s: float, remarks: Remarks) -> None:
        self._arguments, self._timeout_s, self._remarks = arguments, timeout_s, remarks
        self._source = ""
        self._worker: Worker | None = None
        self._reader: Worker | str = ""  # what decodes the recording, or why nothing does
        self._is_done = True

    def begin(self, recording: Record) -> None:
        self._is_done, self._source = False, recording.source
        status = file_status(recording.path)
        if isinstance(status, str):
            self._reader = status
            return
        if self._worker is None:
            self._worker = Worker(__file__, self._arguments, self._timeout_s)
            with contextlib.suppress(OSError):  # more than a user may have: it is then less far ahead
                fcntl.fcntl(self._worker.output, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        size = status[0] if recording.offset < 0 else recording.size
        self._reader = self._worker
        self._worker.send(None, [recording.path, recording.offset, size, recording.start, recording.end])

    def blocks(self) -> Iterator[np.ndarray]:
        worker = self._reader
        if isinstance(worker, str):
            self._is_done = True
            raise UnreadableError(worker)
        while not self._is_done:
            for answer in self._answers(worker):
                if "samples" in answer:
                    yield np.frombuffer(base64.b64decode(answer["samples"]), dtype=np.int16)
                    continue
                self._is_done = True
                self._remarks.add(self._source, answer.get("remarks", ()))
                if "fatal" in answer:
                    raise UserError(answer["fatal"])
                if "reason" in answer:
                    raise UnreadableError(answer["reason"])

    def pass_over(self) -> None:
        """Make the process free for another recording."""
        if not self._is_done:
            self.close()  # sooner than reading hours of what nobody wants

    def close(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _answers(self, worker: Worker) -> list[Any]:
        # it may have waited for us meanwhile: time starts now
        patience = max(self._timeout_s, 0.0 if worker.ready else 60.0)
        end = time.monotonic() + patience
        while (left := end - time.monotonic()) > 0:
            if not select.select([worker.output], [], [], left)[0]:
                break
            answers = worker.answers()
            if answers is None:
                return self._ended(worker, "")
            if answers:
                return answers
        return self._ended(worker, f"took longer than {patience:g} s")

    def _ended(self, worker: Worker, problem: str) -> list[Any]:
        self._worker = None
        how, complaint = worker.stop()
        if not worker.ready:
            raise RuntimeError(f"a process that decodes audio did not start ({problem or how}): {complaint}")
        return [{"reason": problem or f"decoder crashed ({how})"}]


def _stream(job: Sequence[Any], sample_rate: int, memory: int) -> Iterator[dict[str, Any]]:
    path, offset, size, start, end = (*job, 0.0, math.inf)[:5]
    ear = Ear()
    try:
        with as_file(path, offset, size, folder=tempfile.gettempdir()) as file:
            for samples in segment(to_int16(decode(file, size, ear), sample_rate), sample_rate, start, end):
                for first in range(0, len(samples), _BLOCK):
                    yield {"samples": base64.b64encode(samples[first : first + _BLOCK].tobytes()).decode("ascii")}
        yield {"end": True, "remarks": ear.remarks()}
    except ImportError as error:
        yield {"fatal": f"cannot import what decodes audio: {error}"}
    except Exception as error:  # decoders' bindings raise all kinds, and one file must not end the run
        yield {"reason": describe(error, memory)}


def default_workers() -> int:
    """Processes that decode beside a model: a few, and never more than there are cores."""
    return min(4, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    serve(settings["memory"], lambda job: _stream(job, **settings))

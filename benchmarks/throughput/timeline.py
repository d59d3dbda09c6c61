"""What the time of a training step goes to, read from a trace of torch.profiler (Kineto's Chrome format).

The parts of a step are the ranges of `ssast.engine.spans` that the trainer marks on its main thread. Every moment of a
step belongs to one part, so that the parts add up to it.

On a GPU (the trace has device activity) it is the device's time that is divided. A kernel, copy or fill belongs to the
range in which it was launched, whichever thread launched it; outside any range, to the one before it in that step
(before the first: to the first). Two kinds have their own rule: NCCL's kernels are "communication", and what another
thread than the main one copies to the device is the loader's: "copy". When several run at once, the moment belongs to
the one that computes, then to communication, then to a copy between host and device: what hides behind computing costs
nothing. A moment at which nothing runs is "data wait" while the main thread waits for data, and otherwise "host gaps".
A step lasts from the first activity that it launched to the first one of the next step. So the last step of a trace
only marks the end of the one before, unless it is alone: the wait for data after it is not in the trace.

On a CPU the work is done where it is called, the backward pass included: a part is the time in its ranges on the main
thread, and what is in none of them is "host gaps". Gloo exchanges on threads of its own, and a wait for it within
another range is counted in that range; "communication" is what the trainer marks as such.

On either, waiting for a slower rank is counted as communicating: no trace of one rank can tell the two apart.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssast.benchmarks.formulas import Need, attention
from ssast.engine.spans import PREFIX

PARTS = (
    "data wait",
    "copy",
    "fbank",
    "mask + embed",
    "encoder forward",
    "decoder forward",
    "heads + loss",
    "backward",
    "communication",
    "optimizer",
    "host gaps",
)

Interval = tuple[int, int]  # from, to, in ns


@dataclass(frozen=True, slots=True)
class Event:
    """Something on a thread of the host. Times are ns on the trace's clock. `need`: of an operator whose work is
    known.
    """

    name: str
    thread: int | str
    start: int
    end: int
    need: Need | None = None
    eight_bit: bool = False


@dataclass(frozen=True, slots=True)
class Activity:
    """A kernel, copy or fill on the device, launched by a thread of the host at `launched` ns."""

    name: str
    start: int
    end: int
    thread: int | str
    launched: int
    part: str

    @property
    def precedence(self) -> int:
        """Of those that run at once, the lowest has the moment."""
        if self.name.startswith("nccl"):
            return 1
        return 2 if self.name.startswith(("Memcpy HtoD", "Memcpy DtoH")) else 0


@dataclass(frozen=True)
class Trace:
    """What is kept of a trace: all in order of time, spans (named by their parts) only within steps."""

    steps: list[Event]
    spans: list[Event]
    operators: list[Event]  # those of the main thread in steps, and on other threads those with known work
    activities: list[Activity]  # launched since the first step began; empty on a CPU

    @property
    def on_device(self) -> bool:
        """Whether the trace has a GPU's activity."""
        return bool(self.activities)

    @property
    def measured_steps(self) -> int:
        """Whole steps: on a device, the last only marks the end of the one before."""
        return max(len(self.steps) - 1, 1) if self.on_device else len(self.steps)


@dataclass(frozen=True)
class StepParts:
    """Means of `steps` steps, in seconds; the parts, in the order of PARTS, add up to the step."""

    steps: int
    step_seconds: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class KernelRow:
    """A kernel (on a CPU, an operator without what it calls), a step: all its calls together.

    share: of `busy_seconds`; where kernels run beside each other, shares add up to more than 1.
    part: the one with most of its time.
    flop, bytes: what the calls need at least, as in ssast.benchmarks.formulas; None unless known of every call.
    eight_bit: its matrix products are of 8-bit factors.
    """

    name: str
    calls: float
    seconds: float
    share: float
    part: str
    flop: float | None
    bytes: float | None
    eight_bit: bool


def read_trace(path: Path) -> Trace:
    """Read a .json or .json.gz file of `torch.profiler.profile.export_chrome_trace`, recorded over whole steps; with
    record_shapes=True if FLOP are wanted. Events are dropped as they are parsed, so that memory holds the text and what
    a Trace keeps.

    Raises:
        ValueError: no such trace, or one without the trainer's ranges.
    """
    reader = _Reader()
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as stream
        ):
            json.load(stream, object_hook=reader.keep)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole trace of torch.profiler: {error}") from None
    return reader.trace(path)


def step_parts(trace: Trace) -> StepParts:
    """Where a step's time goes, by the rules at the top of this file."""
    total, parts = _device_parts(trace) if trace.on_device else _host_parts(trace)
    seconds = {part: _seconds(parts[part], trace) for part in PARTS}
    return StepParts(trace.measured_steps, _seconds(total, trace), seconds)


def busy_seconds(trace: Trace) -> float:
    """Seconds of a step in which anything runs on the device; on a CPU, in which the main thread runs an operator."""
    if trace.on_device:
        busy = _intersection(_union((each.start, each.end) for each in trace.activities), [_device_extent(trace)])
    else:
        main = trace.steps[0].thread
        busy = _union((each.start, each.end) for each in _calls(trace.operators, main))
    return _seconds(_length(busy), trace)


def top_kernels(trace: Trace, count: int = 15) -> list[KernelRow]:
    """The kernels that take most time, most first. The work of an operator that launches several is credited to the
    longest of them.
    """
    groups: dict[str, _Group] = {}
    for name, part, duration, operator in _device_calls(trace) if trace.on_device else _host_calls(trace):
        groups.setdefault(name, _Group()).add(part, duration, operator)
    longest = sorted(groups.items(), key=lambda item: -item[1].duration)[:count]
    busy = busy_seconds(trace)
    return [_row(name, group, trace, busy) for name, group in longest]


def floor_seconds(row: KernelRow, matmul_tflops: float, copy_gb_per_s: float) -> float | None:
    """The least time that a step's calls could take at the given rates: the longer of computing and moving bytes. None
    where the work is not known. 8-bit products may take half the time of 16-bit ones, as on every GPU that multiplies
    in FP8.
    """
    if row.flop is None or row.bytes is None:
        return None
    computing = row.flop / (matmul_tflops * 1e12 * (2 if row.eight_bit else 1))
    return max(computing, row.bytes / (copy_gb_per_s * 1e9))


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces, parameters and template arguments, but for the one that says what it does."""
    plain = kernel.removeprefix("void ").replace("(anonymous namespace)::", "")
    matched = _BASE_NAME.match(plain)
    base, opening, arguments = matched.groups() if matched else (plain, None, "")
    what = (
        next((each for each in _TELLING.findall(arguments or "") if each not in _NOT_TELLING), "")
        if opening == "<"
        else ""
    )
    return base.rpartition("::")[2] + (f"<{what}>" if what else "")


_BASE_NAME = re.compile(r"(.*?)(?:(<|(?<! )\()(.*)|$)", re.DOTALL)  # "Memcpy HtoD (Pinned -> Device)" is no call
_TELLING = re.compile(r"\b(?:\w*[Ff]unctor\w*|\w+_cuda|\w+CUDAKernelImpl|\w+Ops|\w*gemm\w*|Flash[A-Z]\w+)\b")
_NOT_TELLING = {"BinaryFunctor", "AUnaryFunctor", "BUnaryFunctor"}


# --- reading ----------------------------------------------------------------------------------------------------------

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


class _Reader:
    """Picks from the events of a trace, one by one."""

    def __init__(self) -> None:
        self._steps: list[Event] = []
        self._spans: list[Event] = []
        self._operators: list[Event] = []
        self._on_device: list[tuple[str, int, int, int]] = []  # name, start, end, correlation
        self._launches: dict[int, tuple[int | str, int]] = {}  # by correlation: thread, time

    def keep(self, read: dict[str, Any]) -> dict[str, Any] | None:
        """Of json.load's dictionaries: hand on what may be inside an event, take what is one."""
        if "ph" not in read:
            return read
        category = read.get("cat")
        if read["ph"] != "X" or category is None:
            return None
        name, arguments = sys.intern(read["name"]), read.get("args", {})
        start = round(read["ts"] * 1000)
        end = start + round(read["dur"] * 1000)
        if category in _ON_DEVICE:
            self._on_device.append((name, start, end, arguments.get("correlation", 0)))
        elif category in ("cuda_runtime", "cuda_driver"):
            self._launches[arguments.get("correlation", 0)] = (read["tid"], start)
        elif category in ("cpu_op", "user_annotation"):
            self._keep_host_event(category, Event(name, read["tid"], start, end), arguments)
        return None

    def _keep_host_event(self, category: str, event: Event, arguments: dict[str, Any]) -> None:
        if category == "cpu_op":  # some operators are named like ranges
            need, eight_bit = _need(event.name, arguments.get("Input Dims", []), arguments.get("Input type", []))
            self._operators.append(Event(event.name, event.thread, event.start, event.end, need, eight_bit))
        elif event.name == PREFIX + "step":
            self._steps.append(event)
        elif event.name.removeprefix(PREFIX) in PARTS[:-1]:
            self._spans.append(Event(event.name.removeprefix(PREFIX), event.thread, event.start, event.end))

    def trace(self, path: Path) -> Trace:
        steps = sorted(self._steps, key=_begin)
        if not steps:
            raise ValueError(
                f"{path}: no range '{PREFIX}step' in this trace. Record whole training steps, which the trainer marks, "
                "with torch.profiler.profile(record_shapes=True)."
            )
        main = steps[0].thread
        spans = [each for each in self._spans if each.thread == main and _around(steps, each.start)]
        if not any(span.name != "data wait" for span in spans):
            raise ValueError(f"{path}: steps without the ranges of their parts ('{PREFIX}backward' and the like).")
        operators = [
            each for each in self._operators if each.need or (each.thread == main and _around(steps, each.start))
        ]
        activities = self._activities(path, steps, sorted(spans, key=_begin))
        return Trace(steps, sorted(spans, key=_begin), sorted(operators, key=_nesting), activities)

    def _activities(self, path: Path, steps: list[Event], spans: list[Event]) -> list[Activity]:
        main, working, activities = steps[0].thread, [span for span in spans if span.name != "data wait"], []
        for name, start, end, correlation in self._on_device:
            thread, launched = self._launches.get(correlation, (main, -1))
            if not steps[0].start <= launched <= steps[-1].end:  # or launched before the profiler began
                continue
            if name.startswith("nccl"):
                part = "communication"
            elif name.startswith("Memcpy HtoD") and thread != main:
                part = "copy"
            else:
                part = _part_of_launch(launched, steps, working)
            activities.append(Activity(name, start, end, thread, launched, part))
        if self._on_device and not activities:
            raise ValueError(
                f"{path}: no device activity was launched within a step. Record activities CPU and CUDA, of whole "
                "steps, "
                "and wait for the device before the profiler stops."
            )
        return sorted(activities, key=_begin)


def _part_of_launch(launched: int, steps: list[Event], working: list[Event]) -> str:
    """The range begun last in the step, or its first one; a wait for data is none, since the device works."""
    step = steps[bisect_right(steps, launched, key=_begin) - 1]
    index = bisect_right(working, launched, key=_begin) - 1
    if index < 0 or working[index].start < step.start:
        index = min(index + 1, len(working) - 1)
    return working[index].name


# --- the device's time ------------------------------------------------------------------------------------------------


def _device_extent(trace: Trace) -> Interval:
    """From the first activity of the first measured step to that of the step after the last one. What the loader copies
    beside the step begins none.
    """
    begins = []
    for step, following in zip(trace.steps, [*trace.steps[1:], None], strict=True):
        until = following.start if following else math.inf
        own = (
            each.start
            for each in trace.activities
            if step.start <= each.launched < until and (each.thread == step.thread or each.part != "copy")
        )
        begins.append(min(own, default=None))
    if begins[0] is None or begins[-1] is None:
        raise ValueError("The first or the last step of the trace launched nothing on the device. Record whole steps.")
    return begins[0], begins[-1] if len(begins) > 1 else max(each.end for each in trace.activities)


def _device_parts(trace: Trace) -> tuple[int, Counter[str]]:
    """ns of all measured steps, and of each part."""
    extent = _device_extent(trace)
    parts, idle = _sweep(trace.activities, extent)
    waiting = _length(_intersection(idle, _intervals(each for each in trace.spans if each.name == "data wait")))
    parts["data wait"] += waiting
    parts["host gaps"] += _length(idle) - waiting
    return extent[1] - extent[0], parts


def _sweep(activities: Sequence[Activity], extent: Interval) -> tuple[Counter[str], list[Interval]]:
    """ns within the extent that belong to each part, and when nothing runs."""
    parts: Counter[str] = Counter()
    idle: list[Interval] = []
    running: list[tuple[int, int, int, str]] = []  # precedence, start, end, part: a heap
    upcoming, now = 0, extent[0]
    while now < extent[1]:
        while upcoming < len(activities) and activities[upcoming].start <= now:
            each = activities[upcoming]
            heapq.heappush(running, (each.precedence, each.start, each.end, each.part))
            upcoming += 1
        while running and running[0][2] <= now:
            heapq.heappop(running)
        until = min(extent[1], activities[upcoming].start if upcoming < len(activities) else extent[1])
        if running:
            until = min(until, running[0][2])
            parts[running[0][3]] += until - now
        else:
            idle.append((now, until))
        now = until
    return parts, idle


def _device_calls(trace: Trace) -> Iterator[tuple[str, str, int, Event | None]]:
    """Name, part and ns of each activity that the measured steps launched, and the operator whose work is credited to
    it.
    """
    by_thread: dict[int | str, list[Event]] = {}
    for operator in trace.operators:
        if operator.need:
            by_thread.setdefault(operator.thread, []).append(operator)
    until = trace.steps[-1].start if len(trace.steps) > 1 else math.inf
    launched = [each for each in trace.activities if each.launched < until]
    longest: dict[Event, Activity] = {}
    for each in launched:
        around = _around(by_thread.get(each.thread, ()), each.launched)
        if around and (around not in longest or each.end - each.start > longest[around].end - longest[around].start):
            longest[around] = each
    credited = {id(activity): operator for operator, activity in longest.items()}
    for each in launched:
        yield each.name, each.part, each.end - each.start, credited.get(id(each))


# --- the main thread's time -------------------------------------------------------------------------------------------


def _host_parts(trace: Trace) -> tuple[int, Counter[str]]:
    """ns of all steps, and of each part."""
    parts: Counter[str] = Counter()
    for each in trace.spans:
        parts[each.name] += each.end - each.start
    total = _length(_intervals(trace.steps))
    parts["host gaps"] = total - parts.total()
    return total, parts


def _calls(operators: Iterable[Event], thread: int | str) -> Iterator[Event]:
    """The operators of one thread, without those that only call others (hooks, for instance)."""
    calling = ("autograd::engine::", "torch::autograd::", "torch.distributed.")
    return (each for each in operators if each.thread == thread and not each.name.startswith(calling))


def _host_calls(trace: Trace) -> Iterator[tuple[str, str, int, Event | None]]:
    """Name, part and own ns of each operator of the main thread; the operator itself, for its work."""
    main = trace.steps[0].thread
    own: dict[int, int] = {}
    for start, end, operator in _innermost(each for each in trace.operators if each.thread == main):
        own[id(operator)] = own.get(id(operator), 0) + end - start
    for operator in _calls(trace.operators, main):
        span = _around(trace.spans, operator.start)
        yield operator.name, span.name if span else "host gaps", own.get(id(operator), 0), operator


def _innermost(events: Iterable[Event]) -> Iterator[tuple[int, int, Event]]:
    """Of one thread's events, which nest, in order of `_nesting`: from, to, and the innermost event there."""
    around: list[tuple[int, Event]] = []  # end, event
    now = 0
    for event in events:
        while around and around[-1][0] <= event.start:
            end, left = around.pop()
            if end > now:
                yield now, end, left
                now = end
        if around and event.start > now:
            yield now, event.start, around[-1][1]
        now = max(now, event.start)
        around.append((min(event.end, around[-1][0]) if around else event.end, event))
    while around:
        end, left = around.pop()
        if end > now:
            yield now, end, left
            now = end


# --- what operators need ----------------------------------------------------------------------------------------------

# Where the first factor is among the inputs. aten::linear is not here: the product inside it is recorded as one of
# these.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::_scaled_mm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
# "math" is not here, either: it calls products. "ssast::attention_backward" launches two kernels of about the same
# length.
_ATTENTION = re.compile(
    r"(?:aten::_scaled_dot_product_(?:flash|efficient|cudnn)_attention(?:_for_cpu)?(_backward)?|ssast::attention_forward)$"
)
_SIZES = {"double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1}


def _need(name: str, dims: list[Any], types: list[str]) -> tuple[Need | None, bool]:
    """What an operator needs, if its name and its recorded inputs tell, and whether it multiplies 8-bit factors."""
    try:
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            *copied, n, k = dims[first]
            p = dims[first + 1][-1]
            size, copies = _SIZES[types[first]], math.prod(copied)
            out_size = max(size, 2)  # of 8-bit factors: a 16-bit result
            values = copies * (n * k + k * p) * size + copies * n * p * out_size
            added = math.prod(dims[0]) * out_size if first else 0
            return Need(values + added, 2 * copies * n * k * p), size == 1
        if matched := _ATTENTION.match(name):
            backward = bool(matched.group(1))
            q, k = dims[backward], dims[backward + 1]
            if q != k:
                return None, False
            batch, heads, tokens, width = q
            needs = attention(batch, heads, tokens, width, _SIZES[types[backward]])
            return needs["backward" if backward else "forward"], False
    except (IndexError, KeyError, ValueError, TypeError):  # shapes not recorded, or of another kind
        pass
    return None, False


class _Group:
    """Sums over the calls of one name."""

    def __init__(self) -> None:
        self.calls, self.duration, self.flop, self.bytes = 0, 0, 0, 0
        self.parts: Counter[str] = Counter()
        self.all_counted, self.eight_bit = True, False

    def add(self, part: str, duration: int, operator: Event | None) -> None:
        self.calls += 1
        self.duration += duration
        self.parts[part] += duration
        if operator is None or operator.need is None:
            self.all_counted = False
        else:
            self.flop += operator.need.flop
            self.bytes += operator.need.bytes
            self.eight_bit |= operator.eight_bit


def _row(name: str, group: _Group, trace: Trace, busy: float) -> KernelRow:
    steps, seconds = trace.measured_steps, _seconds(group.duration, trace)
    return KernelRow(
        name=short_name(name) if trace.on_device else name,
        calls=group.calls / steps,
        seconds=seconds,
        share=seconds / busy,
        part=group.parts.most_common(1)[0][0],
        flop=group.flop / steps if group.all_counted else None,
        bytes=group.bytes / steps if group.all_counted else None,
        eight_bit=group.eight_bit,
    )


# --- intervals: lists of them are sorted and disjoint -----------------------------------------------------------------


def _begin(each: Event | Activity) -> int:
    return each.start


def _nesting(each: Event) -> Interval:
    """Orders outer events before those within."""
    return each.start, -each.end


def _around(events: Sequence[Event], moment: int) -> Event | None:
    """The one of these events, which do not overlap, that the moment lies in."""
    index = bisect_right(events, moment, key=_begin) - 1
    return events[index] if index >= 0 and moment < events[index].end else None


def _intervals(events: Iterable[Event]) -> list[Interval]:
    return _union((each.start, each.end) for each in events)


def _seconds(duration: int, trace: Trace) -> float:
    return duration / 1e9 / trace.measured_steps


def _length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    united: list[Interval] = []
    for start, end in sorted(intervals):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((start, end))
    return united


def _intersection(some: list[Interval], others: list[Interval]) -> list[Interval]:
    common, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < end:
            common.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return common

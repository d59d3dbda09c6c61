"""A small corpus of synthetic sound events, for demonstrations and tests that must run where no recordings are at hand.

Ten classes that differ in their time-frequency structure (glides, harmonics, formants, transients, noise textures) and vary within
each class in pitch, timbre, rhythm, room, background, level and length. A clip depends only on its label, the seed and its index:
a corpus comes out the same in whatever order it is made.
"""

import argparse
import csv
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from ssast.engine.errors import UserError

GENERATOR = "ssast.engine.data.synth"
VERSION = 1  # to be raised with every change that alters what any clip sounds like
SAMPLE_RATE = 16_000
FULL_SCALE = 32_768
CONTROL_HOP = 64  # samples between the points at which slowly varying gains are computed

SCALE_SEMITONES = np.array([0, 2, 4, 7, 9, 12, 14, 16, 19, 21, 24])
BELL_RATIOS = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0, 4.1, 5.4])
VOWEL_FORMANTS_HZ = np.array([[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]])
FORMANT_GAINS = np.array([1.0, 0.6, 0.35])
FORMANT_BANDWIDTHS_HZ = np.array([80.0, 110.0, 160.0])

# From harmonic numbers [K, 1] and their frequencies in Hz [K, C] to their gains, [K, 1] or [K, C].
Gain = Callable[[np.ndarray, np.ndarray], np.ndarray]

SIRENS: tuple[tuple[Callable[[np.ndarray], np.ndarray], float, float], ...] = (  # pitch against phase, slowest and fastest in Hz
    (lambda phase: 0.5 - 0.5 * np.cos(phase), 0.25, 1.0),
    (lambda phase: phase / (2 * np.pi) % 1, 1.5, 5.0),
    (lambda phase: 0.5 + 0.5 * np.tanh(12 * np.sin(phase)), 0.5, 1.5),
)


class _Canvas:
    """One clip in the making: its random stream, its rate, and what has been mixed into it so far."""

    def __init__(self, rng: np.random.Generator, seconds: float, sample_rate: int) -> None:
        self.rng = rng
        self.sample_rate = sample_rate
        self.audio = np.zeros(round(seconds * sample_rate))

    @property
    def seconds(self) -> float:
        return len(self.audio) / self.sample_rate

    def between(self, low: float, high: float) -> float:
        """A log-uniform draw, as suits frequencies and durations."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def coin(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def noise(self, seconds: float) -> np.ndarray:
        return self.rng.standard_normal(round(seconds * self.sample_rate))

    def times(self, seconds: float) -> np.ndarray:
        return np.arange(round(seconds * self.sample_rate)) / self.sample_rate

    def onsets(self, count: int) -> np.ndarray:
        """Ascending onsets in seconds, one at a random place in each of `count` equal slots of the clip."""
        return (np.arange(count) + self.rng.uniform(0.0, 0.7, count)) * self.seconds / count

    def add(self, onset_seconds: float, event: np.ndarray) -> None:
        """Mix an event in; what reaches past the end of the clip is cut."""
        start = round(onset_seconds * self.sample_rate)
        room = self.audio[start : start + len(event)]
        room += event[: len(room)]


def _fast_length(samples: int) -> int:
    """The next multiple of a large power of two, for which Fourier transforms are quick."""
    return -(-samples // 8192) * 8192


def _filter(signal: np.ndarray, sample_rate: int, response: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a frequency response given as a function of Hz; the padding keeps its ringing from wrapping round to the start."""
    size = _fast_length(len(signal) + sample_rate // 4)
    spectrum = np.fft.rfft(signal, size) * response(np.fft.rfftfreq(size, 1 / sample_rate))
    return np.fft.irfft(spectrum, size)[: len(signal)]


def _resonate(signal: np.ndarray, sample_rate: int, *modes: tuple[float, float, float]) -> np.ndarray:
    """Two-pole resonators side by side, each given as its gain, centre and bandwidth in Hz, with zeros at 0 Hz and Nyquist."""

    def response(frequency_hz: np.ndarray) -> np.ndarray:
        delay = np.exp(-2j * np.pi * frequency_hz / sample_rate)
        total = np.zeros_like(delay)
        for gain, centre_hz, bandwidth_hz in modes:
            radius, angle = np.exp(-np.pi * bandwidth_hz / sample_rate), 2 * np.pi * centre_hz / sample_rate
            total += gain * (1 - radius) / (1 - 2 * radius * np.cos(angle) * delay + (radius * delay) ** 2)
        return total * (1 - delay**2)

    return _filter(signal, sample_rate, response)


def _tilt(signal: np.ndarray, sample_rate: int, decibels_per_octave: float) -> np.ndarray:
    """Colour a signal with a constant spectral slope above 40 Hz and nothing much below, at unit gain at 1 kHz."""
    exponent = decibels_per_octave / 6.02
    return _filter(signal, sample_rate, lambda hz: (np.maximum(hz, 40.0) / 1000.0) ** exponent * np.minimum(hz / 40.0, 1.0))


def _additive(pitch_hz: np.ndarray, sample_rate: int, gain: Gain, harmonics: int) -> np.ndarray:
    """Sum the harmonics of a pitch contour [S], leaving out what comes near the Nyquist frequency."""
    samples = np.arange(len(pitch_hz))
    points = samples[::CONTROL_HOP]
    numbers = np.arange(1.0, harmonics + 1.0)[:, None]
    frequencies = numbers * pitch_hz[points]
    gains = np.where(frequencies < 0.45 * sample_rate, gain(numbers, frequencies), 0.0)
    fundamental = np.exp(2j * np.pi * np.cumsum(pitch_hz) / sample_rate)
    harmonic, tone = fundamental.copy(), np.zeros(len(pitch_hz))
    for contour in gains[gains.any(axis=1)]:
        tone += np.interp(samples, points, contour) * harmonic.imag
        harmonic *= fundamental
    return tone


def _fade(event: np.ndarray, sample_rate: int, attack_seconds: float, release_seconds: float) -> np.ndarray:
    """Raised-cosine ramps at both ends."""
    after = np.arange(len(event)) / sample_rate
    ramp = np.minimum(1.0, np.minimum(after / attack_seconds, after[::-1] / release_seconds))
    return event * np.sin(0.5 * np.pi * ramp) ** 2


def _decay(times: np.ndarray, t60_seconds: float | np.ndarray) -> np.ndarray:
    """An exponential envelope that has fallen by 60 dB after `t60_seconds`."""
    return 10.0 ** (-3.0 * times / t60_seconds)


def _drift(clip: _Canvas, samples: int, points_per_second: float, deviation: float) -> np.ndarray:
    """A smooth random contour [samples] around 1."""
    points = max(4, round(samples / clip.sample_rate * points_per_second))
    values = np.exp(deviation * clip.rng.standard_normal(points))
    return np.interp(np.linspace(0, points - 1, samples), np.arange(points), values)


def _sweep(clip: _Canvas) -> None:
    """Single glides over one to three octaves, rising or falling."""
    rolloff, harmonics = clip.rng.uniform(1.0, 2.0), clip.count(1, 4)
    for onset in clip.onsets(clip.count(1, 4)):
        times = clip.times(clip.between(0.5, 2.0))
        low_hz, ratio = clip.between(150, 800), clip.between(2.0, 8.0)
        progress = (times / times[-1]) ** clip.between(0.6, 1.7)
        pitch_hz = low_hz * ratio ** (progress if clip.coin() else 1 - progress)
        tone = _additive(pitch_hz, clip.sample_rate, lambda k, hz: k**-rolloff, harmonics)
        clip.add(onset, clip.between(0.4, 1.0) * _fade(tone, clip.sample_rate, 0.02, 0.05))


def _burst(clip: _Canvas) -> None:
    """Bursts of band-passed noise with sharp edges."""
    centre_hz = clip.between(400, 5000)
    bandwidth_hz = centre_hz * clip.between(0.2, 0.8)
    for onset in clip.onsets(clip.count(2, 8)):
        noise = clip.noise(clip.between(0.06, 0.5))
        band = _resonate(noise, clip.sample_rate, (1.0, centre_hz * clip.between(0.8, 1.25), bandwidth_hz))
        clip.add(onset, clip.between(0.4, 1.0) * _fade(band, clip.sample_rate, 0.004, clip.between(0.01, 0.1)))


def _siren(clip: _Canvas) -> None:
    """An alarm through the whole clip: a slow wail, a fast rising yelp, or two notes in turn."""
    shape, slowest_hz, fastest_hz = SIRENS[clip.count(0, len(SIRENS) - 1)]
    times = clip.times(clip.seconds)
    modulation = shape(2 * np.pi * clip.between(slowest_hz, fastest_hz) * times + clip.rng.uniform(0, 2 * np.pi))
    pitch_hz = clip.between(400, 900) * clip.between(1.25, 2.2) ** modulation
    rolloff = clip.rng.uniform(0.7, 1.4)
    tone = _additive(pitch_hz, clip.sample_rate, lambda k, hz: k**-rolloff, clip.count(5, 10))
    swell = _drift(clip, len(tone), 0.7, 0.4)
    clip.add(0.0, _fade(tone * swell, clip.sample_rate, clip.between(0.02, 0.5), clip.between(0.02, 0.5)))


def _string(clip: _Canvas, pitch_hz: float, seconds: float, blend: float, t60_seconds: float) -> np.ndarray:
    """A Karplus-Strong string, a period at a time: each period is the one before it through a two-tap low-pass."""
    period = round(clip.sample_rate / pitch_hz - blend)
    periods = max(2, round(seconds * clip.sample_rate / period))
    loss = 10.0 ** (-3.0 * period / (t60_seconds * clip.sample_rate))
    taps = loss * (1 - blend), loss * blend
    # A column in front holds the last sample of the period before, which the low-pass reaches back to.
    wave = np.zeros((periods, period + 1))
    wave[0, 1:] = clip.rng.uniform(-1, 1, period)
    wave[0] -= wave[0, 1:].mean()
    wave[0, 0] = 0.0
    for now in range(1, periods):
        wave[now, 0] = wave[now - 1, -1]
        wave[now, 1:] = taps[0] * wave[now - 1, 1:] + taps[1] * wave[now - 1, :-1]
    return wave[:, 1:].ravel()


def _pluck(clip: _Canvas) -> None:
    """A melody of plucked strings."""
    root_hz, blend, t60_seconds = clip.between(90, 260), clip.rng.uniform(0.2, 0.5), clip.between(1.5, 5.0)
    for onset in clip.onsets(clip.count(4, 14)):
        pitch_hz = root_hz * 2 ** (clip.rng.choice(SCALE_SEMITONES) / 12)
        note = _string(clip, pitch_hz, clip.between(0.6, 2.0), blend, t60_seconds)
        clip.add(onset, clip.between(0.4, 1.0) * _fade(note, clip.sample_rate, 0.001, 0.1))


def _bell(clip: _Canvas) -> None:
    """Strikes of one bell: inharmonic partials, of which the higher die away sooner."""
    times = clip.times(min(clip.seconds, 4.0))
    prime_hz, t60_seconds = clip.between(250, 1200), clip.between(1.5, 5.0)
    bell = np.zeros(len(times))
    for partial_hz in prime_hz * BELL_RATIOS * clip.rng.uniform(0.98, 1.02, len(BELL_RATIOS)):
        if partial_hz < 0.45 * clip.sample_rate:
            partial = np.sin(2 * np.pi * partial_hz * times) * _decay(times, t60_seconds * (prime_hz / partial_hz) ** 0.6)
            bell += clip.between(0.2, 1.0) * partial
    bell = _fade(bell, clip.sample_rate, 0.002, 0.3)
    for onset in clip.onsets(clip.count(1, 4)):
        clip.add(onset, clip.between(0.4, 1.0) * bell)


def _pulse_train(clip: _Canvas, rate_hz: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Pulses at the rate [S], their heights cycling through `strengths` with some jitter; split over two samples to be in time."""
    phase = np.cumsum(rate_hz) / clip.sample_rate
    firings = np.arange(1, int(phase[-1]))
    position = np.interp(firings, phase, np.arange(len(phase)))
    height = strengths[firings % len(strengths)] * np.exp(0.1 * clip.rng.standard_normal(len(firings)))
    before = position.astype(int)
    pulses = np.zeros(len(phase))
    pulses[before] += height * (before + 1 - position)
    pulses[before + 1] += height * (position - before)
    return pulses


def _engine(clip: _Canvas) -> None:
    """A motor: uneven firing that speeds up and slows down, heard through a few resonances, with exhaust noise on top."""
    rate_hz = clip.between(22, 80) * _drift(clip, len(clip.audio), clip.between(0.5, 1.5), clip.rng.uniform(0.02, 0.35))
    pulses = _pulse_train(clip, rate_hz, clip.rng.uniform(0.5, 1.0, clip.count(2, 6)))
    throb = _resonate(np.abs(pulses), clip.sample_rate, (1.0, 60.0, 120.0))
    noise = clip.noise(clip.seconds) * np.maximum(throb, 0.0) / throb.std()
    source = pulses / pulses.std() + clip.between(0.05, 0.3) * noise
    centres_hz = [clip.between(low, high) for low, high in ((90, 250), (250, 600), (600, 1400), (1400, 3000))]
    clip.add(0.0, _resonate(source, clip.sample_rate, *((clip.between(0.3, 1.0), hz, 0.3 * hz) for hz in centres_hz)))


def _syllable(clip: _Canvas, pitch_hz: np.ndarray, formants_hz: np.ndarray) -> np.ndarray:
    """A voiced sound with the pitch contour [S], gliding from the formants [0] to the formants [1] of [2, F]."""

    def gain(numbers: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        progress = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, frequencies.shape[1]))
        total = np.zeros(frequencies.shape)
        for (start, end), peak, bandwidth in zip(formants_hz.T, FORMANT_GAINS, FORMANT_BANDWIDTHS_HZ, strict=True):
            total += peak / (1 + ((frequencies - start - (end - start) * progress) / bandwidth) ** 2)
        return total

    return _additive(pitch_hz, clip.sample_rate, gain, harmonics=int(4500 / pitch_hz.min()))


def _vowel(clip: _Canvas) -> None:
    """One voice that glides between vowels, its pitch moving with every syllable."""
    voice_hz, tract = clip.between(90, 300), clip.rng.uniform(0.9, 1.15)
    onsets = clip.onsets(clip.count(2, max(2, round(1.5 * clip.seconds))))
    for onset, following in zip(onsets, [*onsets[1:], clip.seconds], strict=True):
        times = clip.times(min(1.2, (following - onset) * clip.rng.uniform(0.7, 0.95)))
        start, end = voice_hz * np.exp(clip.rng.uniform(-0.25, 0.25, 2))
        vibrato = 1 + 0.012 * np.sin(2 * np.pi * clip.between(4, 7) * times)
        formants_hz = tract * VOWEL_FORMANTS_HZ[clip.rng.integers(len(VOWEL_FORMANTS_HZ), size=2)]
        syllable = _syllable(clip, np.geomspace(start, end, len(times)) * vibrato, formants_hz)
        clip.add(onset, clip.between(0.5, 1.0) * _fade(syllable, clip.sample_rate, 0.03, 0.06))


def _chirps(clip: _Canvas) -> None:
    """A bird's phrases: trains of one short, high, curved note."""
    for onset in clip.onsets(clip.count(2, 4)):
        centre_hz, seconds, gap_seconds = clip.between(2000, 5000), clip.between(0.04, 0.16), clip.between(0.02, 0.1)
        tilt, bend = clip.rng.uniform(-0.4, 0.4), clip.rng.uniform(-0.35, 0.35)
        x = np.linspace(-1, 1, round(seconds * clip.sample_rate))
        note = _additive(centre_hz * np.exp(tilt * x + bend * x**2), clip.sample_rate, lambda k, hz: 0.2 ** (k - 1), harmonics=2)
        note = _fade(note, clip.sample_rate, 0.4 * seconds, 0.4 * seconds) * clip.between(0.4, 1.0)
        for repeat in range(clip.count(3, 10)):
            clip.add(onset + repeat * (seconds + gap_seconds), note * clip.between(0.7, 1.0))


def _rain(clip: _Canvas) -> None:
    """Drops of many sizes, each ringing briefly at its own pitch, over a hiss that comes in gusts."""
    times, drops = clip.times(0.03), round(clip.seconds * clip.between(20, 250))
    pitches_hz = np.exp(clip.rng.uniform(np.log(clip.between(400, 1200)), np.log(clip.between(3500, 7000)), (drops, 1)))
    sizes = clip.rng.exponential(1.0, (drops, 1)) ** 1.5
    rings = sizes * np.sin(2 * np.pi * pitches_hz * times) * _decay(times, 12.0 / pitches_hz + 0.008)
    places = clip.rng.integers(len(clip.audio) - len(times), size=(drops, 1)) + np.arange(len(times))
    clip.audio += np.bincount(places.ravel(), rings.ravel(), minlength=len(clip.audio))
    clip.audio /= clip.audio.std()
    hiss = _tilt(clip.noise(clip.seconds), clip.sample_rate, clip.rng.uniform(0.0, 4.0))
    clip.audio += clip.between(0.1, 0.6) * hiss / hiss.std() * _drift(clip, len(hiss), 1.0, 0.5)


def _drum_kit(clip: _Canvas) -> dict[str, np.ndarray]:
    """A kick, a snare and a hat, tuned anew for every clip."""
    times, rate = clip.times(0.4), clip.sample_rate
    kick_hz = clip.between(45, 70) * (1 + clip.between(1.5, 4.0) * np.exp(-times / 0.03))
    kick = np.sin(2 * np.pi * np.cumsum(kick_hz) / rate) * _decay(times, clip.between(0.2, 0.45))
    rattle = _resonate(clip.noise(0.4), rate, (1.0, clip.between(1200, 3000), 2500.0)) * _decay(times, clip.between(0.12, 0.35))
    body = np.sin(2 * np.pi * clip.between(160, 240) * times) * _decay(times, 0.15)
    hat = _resonate(clip.noise(0.4), rate, (1.0, 7000.0, 1500.0)) * _decay(times, clip.between(0.04, 0.2))
    return {"kick": kick, "snare": 0.8 * rattle + 0.4 * body, "hat": 0.5 * hat}


def _drum(clip: _Canvas) -> None:
    """A bar of sixteen steps, repeated: kick on the strong beats, snare on the weak ones, hats between, and a few strays."""
    step_seconds, hat_every = 15.0 / clip.between(75, 170), int(clip.rng.choice([1, 2, 2, 4]))
    kit = _drum_kit(clip)
    strays = clip.rng.random(16) < 0.12
    for step in range(clip.count(0, 3), int(clip.seconds / step_seconds)):
        onset, place = max(0.0, step * step_seconds + 0.003 * clip.rng.standard_normal()), step % 16
        hits = {"kick": place % 8 == 0 or strays[place], "snare": place % 8 == 4, "hat": place % hat_every == 0}
        for name in (name for name, hit in hits.items() if hit):
            clip.add(onset, clip.between(0.6, 1.0) * _fade(kit[name], clip.sample_rate, 0.001, 0.05))


_GENERATORS: dict[str, Callable[[_Canvas], None]] = {
    "sweep": _sweep,
    "burst": _burst,
    "siren": _siren,
    "pluck": _pluck,
    "bell": _bell,
    "engine": _engine,
    "vowel": _vowel,
    "chirps": _chirps,
    "rain": _rain,
    "drum": _drum,
}
CLASSES: tuple[str, ...] = tuple(_GENERATORS)


def _reverberate(clip: _Canvas) -> None:
    """Add a diffuse tail of decaying noise, as a room would."""
    t60_seconds = clip.between(0.15, 0.8)
    impulse = clip.noise(t60_seconds) * _decay(clip.times(t60_seconds), t60_seconds)
    size = _fast_length(len(clip.audio) + len(impulse))
    tail = np.fft.irfft(np.fft.rfft(clip.audio, size) * np.fft.rfft(impulse, size), size)[: len(clip.audio)]
    clip.audio += clip.between(0.1, 0.4) * tail * clip.audio.std() / tail.std()


def _add_background(clip: _Canvas) -> None:
    """Coloured noise, mains hum with a little noise, or next to nothing, at a random signal-to-noise ratio."""
    kind = clip.rng.choice(["noise", "hum", "quiet"], p=[0.55, 0.2, 0.25])
    if kind == "quiet":
        return
    background = _tilt(clip.noise(clip.seconds), clip.sample_rate, clip.rng.uniform(-6.0, 1.0))
    background /= background.std()
    if kind == "hum":
        mains_hz = np.full(len(clip.audio), clip.rng.choice([50.0, 60.0]))
        hum = _additive(mains_hz, clip.sample_rate, lambda k, hz: k**-1.0, clip.count(3, 8))
        background = 0.2 * background + hum / hum.std()
    clip.audio += background * clip.audio.std() * 10 ** (-clip.rng.uniform(10, 40) / 20)


def _quantise(clip: _Canvas) -> np.ndarray:
    """Scale to a random peak level and round to 16 bits with triangular dither, so that quiet stretches stay free of distortion."""
    peak = 10 ** (clip.rng.uniform(-30.0, -3.0) / 20)
    scaled = clip.audio * (peak * FULL_SCALE / np.abs(clip.audio).max())
    dither = clip.rng.random(len(scaled)) - clip.rng.random(len(scaled))
    return (np.rint(scaled + dither) / FULL_SCALE).astype(np.float32)


def synthesize(label: str, seed: int, index: int, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Make one clip.

    Returns float32 [S] in [-1, 1], mono, 2 to 6 seconds long, with a peak of -30 to -3 dBFS and every value a multiple of 2**-15,
    so that 16-bit files hold it exactly.

    Raises ValueError for a label not in `CLASSES`, a seed outside 0..2**64-1, an index outside 0..2**32-1, or a rate below 16 kHz,
    which would cut off what sets some of the classes apart.
    """
    if label not in _GENERATORS:
        raise ValueError(f"unknown label {label!r}: expected one of {', '.join(CLASSES)}")
    if not 0 <= seed < 2**64 or not 0 <= index < 2**32:
        raise ValueError(f"seed {seed} or index {index} is out of range: expected 0 <= seed < 2**64 and 0 <= index < 2**32")
    if sample_rate < SAMPLE_RATE:
        raise ValueError(f"sample rate {sample_rate} Hz is too low: expected at least {SAMPLE_RATE} Hz")
    key = np.array([seed, (CLASSES.index(label) << 32) | index], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    clip = _Canvas(rng, rng.uniform(2.0, 6.0), sample_rate)
    _GENERATORS[label](clip)
    if clip.coin():
        _reverberate(clip)
    _add_background(clip)
    return _quantise(clip)


@dataclass(frozen=True)
class _Entry:
    """A clip's place in the corpus."""

    label: str
    index: int
    split: str

    @property
    def path(self) -> Path:
        return Path(self.label) / f"{self.label}-{self.index:04d}.flac"

    def tag(self, seed: int) -> str:
        """What the file says of its origin, by which a later run knows it for its own."""
        return f"{GENERATOR} version {VERSION} seed {seed} {self.label} {self.index}"


def _plan(clips: int) -> list[_Entry]:
    """Share the clips out evenly among classes, and each class's about 80/10/10 among splits, none empty from three clips on."""
    entries = []
    for place, label in enumerate(CLASSES):
        count = clips // len(CLASSES) + (place < clips % len(CLASSES))
        held_out = max(1, round(count / 10)) if count >= 3 else 0
        splits = ["train"] * (count - 2 * held_out) + ["valid"] * held_out + ["test"] * held_out
        entries += [_Entry(label, index, split) for index, split in enumerate(splits)]
    return entries


def _manifest(plan: list[_Entry]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    writer.writerows([entry.path.as_posix(), entry.label, entry.split] for entry in plan)
    return text.getvalue().encode()


def _flac(audio: np.ndarray, tag: str) -> bytes:
    encoded = io.BytesIO()
    with soundfile.SoundFile(encoded, "w", SAMPLE_RATE, channels=1, subtype="PCM_16", format="FLAC") as file:
        file.comment = tag
        file.write((audio * FULL_SCALE).astype(np.int16))
    return encoded.getvalue()


def _read_tag(path: Path) -> str | None:
    try:
        with soundfile.SoundFile(path) as file:
            return file.comment
    except soundfile.LibsndfileError:
        return None


def _write_aside(path: Path, content: bytes) -> None:
    """Write under a temporary name and rename, so that a file is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read_record(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _refuse_foreign_files(folder: Path, tags: dict[Path, str], texts: dict[Path, bytes]) -> None:
    """Let pass only what an interrupted run for the same corpus can have left behind."""
    for path in folder.rglob("*"):
        if path in tags:
            own = path.is_file() and _read_tag(path) == tags[path]
        elif path in texts:
            own = path.is_file() and path.read_bytes() == texts[path]
        elif path.is_dir():
            own = path.parent == folder and path.name in CLASSES
        else:
            aside = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.part", path.name)
            own = aside is not None and path.with_name(aside[1]) in tags | texts
        if not own:
            name = path.relative_to(folder)
            raise UserError(f"{folder} already holds {name}, which is no part of the corpus asked for: choose another folder")


def _fill(folder: Path, clips: int, seed: int, progress: bool) -> Path:
    plan, record = _plan(clips), {"generator": GENERATOR, "version": VERSION, "clips": clips, "seed": seed}
    manifest_path, record_path = folder / "manifest.csv", folder / "corpus.json"
    texts = {manifest_path: _manifest(plan), record_path: json.dumps(record).encode()}
    if record_path.exists() and _read_record(record_path) != record:
        raise UserError(f"{record_path} is of something other than the corpus asked for, {record}: choose another folder")
    if record_path.exists() and manifest_path.exists():
        return manifest_path
    _refuse_foreign_files(folder, {folder / entry.path: entry.tag(seed) for entry in plan}, texts)
    for label in CLASSES:
        (folder / label).mkdir(parents=True, exist_ok=True)
    missing = [entry for entry in plan if not (folder / entry.path).exists()]
    for entry in tqdm(missing, desc="synthesising", unit="clip", disable=None if progress else True):
        _write_aside(folder / entry.path, _flac(synthesize(entry.label, seed, entry.index), entry.tag(seed)))
    for path, text in texts.items():
        _write_aside(path, text)
    return manifest_path


def write_corpus(folder: Path, clips: int = 300, seed: int = 0, progress: bool = True) -> Path:
    """Write a corpus of 16 kHz mono 16-bit FLAC files and return the path of its manifest.

    Writes `folder/<label>/<label>-0000.flac` and on, `folder/manifest.csv` (columns path, label and split; paths relative to the
    folder, splits named train, valid and test) and, last of all, `folder/corpus.json`, the sign of a finished corpus. The clips are
    shared out evenly among `CLASSES`. A corpus that is finished already is left as it is, one that was interrupted is completed.
    `progress` shows a bar where stderr is a terminal.

    Raises UserError for fewer clips than classes, for a seed outside 0..2**64-1, for a folder that holds anything else (no file is
    ever overwritten with other content), and for a folder that cannot be written to.
    """
    if clips < len(CLASSES):
        raise UserError(f"cannot make a corpus of {clips} clips: ask for at least {len(CLASSES)}, one for each class")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
    try:
        return _fill(Path(folder), clips, seed, progress)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {folder}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Write a corpus from the command line, print the path of its manifest and return the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {GENERATOR}", description="Write a corpus of synthetic sound events.")
    parser.add_argument("folder", type=Path, help="an empty or new folder, or one that an earlier run left unfinished")
    parser.add_argument("--clips", type=int, default=300, help="number of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random streams (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        print(write_corpus(arguments.folder, arguments.clips, arguments.seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

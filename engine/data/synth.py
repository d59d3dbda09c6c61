"""A small corpus of synthetic sound events, for demonstrations and tests that must run where no recordings are at hand.

Ten classes that differ in their time-frequency structure (glides, harmonics, formants, transients, noise textures) and
vary within each class in pitch, timbre, rhythm, room, background, level and length. A clip depends only on its label,
the seed and its index.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from ssast.engine.errors import UserError
from ssast.engine.files import atomic_write, path_argument

GENERATOR = "ssast.engine.data.synth"
VERSION = 1  # to be raised with every change that alters what any clip sounds like
SAMPLE_RATE = 16_000
FULL_SCALE = 32_768
CONTROL_HOP = 64  # samples between the points at which slowly varying gains are computed

SCALE_SEMITONES = np.array([0, 2, 4, 7, 9, 12, 14, 16, 19, 21, 24])
BELL_RATIOS = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0, 4.1, 5.4])
VOWELS_HZ = np.array([[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]])
FORMANT_GAINS, FORMANT_BANDWIDTHS_HZ = np.array([[1.0, 0.6, 0.35], [80.0, 110.0, 160.0]])[..., None, None]


class _Clip:
    """A clip in the making: its random stream, what has been mixed into it so far, and the tools to make more at its
    rate.
    """

    def __init__(self, rng: np.random.Generator, seconds: float, rate: int) -> None:
        self.rng, self.rate = rng, rate
        self.audio = np.zeros(round(seconds * rate))
        self.seconds = len(self.audio) / rate

    def between(self, low: float, high: float) -> float:
        """A log-uniform draw, as suits frequencies and durations."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def noise(self, seconds: float) -> np.ndarray:
        return self.rng.standard_normal(round(seconds * self.rate))

    def drift(self, points_per_second: float, deviation: float) -> np.ndarray:
        """A smooth random contour around 1, as long as the clip."""
        points = max(4, round(self.seconds * points_per_second))
        values = np.exp(deviation * self.rng.standard_normal(points))
        return np.interp(np.linspace(0, points - 1, len(self.audio)), np.arange(points), values)

    def times(self, seconds: float) -> np.ndarray:
        return np.arange(round(seconds * self.rate)) / self.rate

    def onsets(self, low: int, high: int) -> np.ndarray:
        """From `low` to `high` ascending onsets in seconds, each at a random place in one of equal slots of the
        clip.
        """
        count = self.count(low, high)
        return (np.arange(count) + self.rng.uniform(0.0, 0.7, count)) * self.seconds / count

    def add(self, onset_seconds: float, event: np.ndarray) -> None:
        """Mixes an event in; what reaches past the end of the clip is cut."""
        start = round(onset_seconds * self.rate)
        room = self.audio[start : start + len(event)]
        room += event[: len(room)]

    def additive(self, pitch_hz: np.ndarray, gains: np.ndarray) -> np.ndarray:
        """The harmonics of a pitch contour [S] with their gains [K, 1] or, every `CONTROL_HOP` samples, [K, C]; no
        aliases.
        """
        samples = np.arange(len(pitch_hz))
        points = samples[::CONTROL_HOP]
        gains = np.where(np.arange(1, len(gains) + 1)[:, None] * pitch_hz[points] < 0.45 * self.rate, gains, 0.0)
        fundamental = np.exp(2j * np.pi * np.cumsum(pitch_hz) / self.rate)
        harmonic, tone = fundamental.copy(), np.zeros(len(pitch_hz))
        for contour in gains[gains.any(axis=1)]:
            tone += np.interp(samples, points, contour) * harmonic.imag
            harmonic *= fundamental
        return tone

    def fade(self, event: np.ndarray, attack_seconds: float, release_seconds: float) -> np.ndarray:
        """Raised-cosine ramps at both ends."""
        after = np.arange(len(event)) / self.rate
        ramp = np.minimum(1.0, np.minimum(after / attack_seconds, after[::-1] / release_seconds))
        return event * np.sin(0.5 * np.pi * ramp) ** 2

    def filter(self, signal: np.ndarray, response: Callable[[np.ndarray], np.ndarray], ringing: int = 0) -> np.ndarray:
        """Applies a frequency response, given as a function of Hz, that rings for `ringing` samples (by default, 0.25
        s).
        """
        size = -(-(len(signal) + (ringing or self.rate // 4)) // 8192) * 8192  # such transforms are quick
        spectrum = np.fft.rfft(signal, size) * response(np.fft.rfftfreq(size, 1 / self.rate))
        return np.fft.irfft(spectrum, size)[: len(signal)]

    def resonate(self, signal: np.ndarray, *modes: tuple[float, float, float]) -> np.ndarray:
        """Two-pole resonators side by side, each given as its gain, centre and bandwidth in Hz, with zeros at 0 Hz and
        Nyquist.
        """

        def response(frequency_hz: np.ndarray) -> np.ndarray:
            delay = np.exp(-2j * np.pi * frequency_hz / self.rate)
            total = np.zeros_like(delay)
            for gain, centre_hz, bandwidth_hz in modes:
                radius, angle = np.exp(-np.pi * bandwidth_hz / self.rate), 2 * np.pi * centre_hz / self.rate
                total += gain * (1 - radius) / (1 - 2 * radius * np.cos(angle) * delay + (radius * delay) ** 2)
            return total * (1 - delay**2)

        return self.filter(signal, response)

    def tilt(self, signal: np.ndarray, slope: float) -> np.ndarray:
        """A constant slope in dB per octave above 40 Hz and nothing much below, at unit gain at 1 kHz."""
        return self.filter(
            signal, lambda hz: (np.maximum(hz, 40.0) / 1000.0) ** (slope / 6.02) * np.minimum(hz / 40.0, 1.0)
        )


def _decay(times: np.ndarray, t60_seconds: float | np.ndarray) -> np.ndarray:
    """An exponential envelope that has fallen by 60 dB after `t60_seconds`."""
    return 10.0 ** (-3.0 * times / t60_seconds)


def _rolling_off(power: float, harmonics: int) -> np.ndarray:
    return np.arange(1.0, harmonics + 1.0)[:, None] ** -power


def _sweep(clip: _Clip) -> None:
    """Single glides over one to three octaves, rising or falling."""
    gains = _rolling_off(clip.rng.uniform(1.0, 2.0), clip.count(1, 4))
    for onset in clip.onsets(1, 4):
        times = clip.times(clip.between(0.5, 2.0))
        low_hz, ratio = clip.between(150, 800), clip.between(2.0, 8.0)
        progress = (times / times[-1]) ** clip.between(0.6, 1.7)
        pitch_hz = low_hz * ratio ** (progress if clip.rng.random() < 0.5 else 1 - progress)
        clip.add(onset, clip.between(0.4, 1.0) * clip.fade(clip.additive(pitch_hz, gains), 0.02, 0.05))


def _burst(clip: _Clip) -> None:
    """Bursts of band-passed noise with sharp edges."""
    centre_hz = clip.between(400, 5000)
    bandwidth_hz = centre_hz * clip.between(0.2, 0.8)
    for onset in clip.onsets(2, 8):
        noise = clip.noise(clip.between(0.06, 0.5))
        band = clip.resonate(noise, (1.0, centre_hz * clip.between(0.8, 1.25), bandwidth_hz))
        clip.add(onset, clip.between(0.4, 1.0) * clip.fade(band, 0.004, clip.between(0.01, 0.1)))


def _siren(clip: _Clip) -> None:
    """An alarm through the whole clip: a slow wail, a fast rising yelp, or two notes in turn."""
    kind = clip.count(0, 2)
    rate_hz = clip.between(*((0.25, 1.0), (1.5, 5.0), (0.5, 1.5))[kind])
    phase = 2 * np.pi * rate_hz * clip.times(clip.seconds) + clip.rng.uniform(0, 2 * np.pi)
    shape = (0.5 - 0.5 * np.cos(phase), phase / (2 * np.pi) % 1, 0.5 + 0.5 * np.tanh(12 * np.sin(phase)))[kind]
    pitch_hz = clip.between(400, 900) * clip.between(1.25, 2.2) ** shape
    tone = clip.additive(pitch_hz, _rolling_off(clip.rng.uniform(0.7, 1.4), clip.count(5, 10))) * clip.drift(0.7, 0.4)
    clip.add(0.0, clip.fade(tone, clip.between(0.02, 0.5), clip.between(0.02, 0.5)))


def _pluck(clip: _Clip) -> None:
    """A melody of Karplus-Strong strings, a period at a time: each is the one before it through a two-tap low-pass."""
    root_hz, blend, t60_seconds = clip.between(90, 260), clip.rng.uniform(0.2, 0.5), clip.between(1.5, 5.0)
    for onset in clip.onsets(4, 14):
        pitch_hz = root_hz * 2 ** (clip.rng.choice(SCALE_SEMITONES) / 12)
        period = round(clip.rate / pitch_hz - blend)
        periods = max(2, round(clip.between(0.6, 2.0) * clip.rate / period))
        loss = 10.0 ** (-3.0 * period / (t60_seconds * clip.rate))
        wave = np.zeros(1 + periods * period)  # the low-pass reaches back to the zero in front
        wave[1 : 1 + period] = clip.rng.uniform(-1, 1, period)
        wave[1 : 1 + period] -= wave[1 : 1 + period].mean()
        for start in range(1, len(wave) - period, period):
            before = wave[start - 1 : start + period]
            wave[start + period : start + 2 * period] = loss * (1 - blend) * before[1:] + loss * blend * before[:-1]
        clip.add(onset, clip.between(0.4, 1.0) * clip.fade(wave[1:], 0.001, 0.1))


def _bell(clip: _Clip) -> None:
    """Strikes of one bell: inharmonic partials, of which the higher die away sooner."""
    times = clip.times(min(clip.seconds, 4.0))
    prime_hz, t60_seconds = clip.between(250, 1200), clip.between(1.5, 5.0)
    bell = np.zeros(len(times))
    for partial_hz in prime_hz * BELL_RATIOS * clip.rng.uniform(0.98, 1.02, len(BELL_RATIOS)):
        if partial_hz < 0.45 * clip.rate:
            partial = np.sin(2 * np.pi * partial_hz * times) * _decay(
                times, t60_seconds * (prime_hz / partial_hz) ** 0.6
            )
            bell += clip.between(0.2, 1.0) * partial
    bell = clip.fade(bell, 0.002, 0.3)
    for onset in clip.onsets(1, 4):
        clip.add(onset, clip.between(0.4, 1.0) * bell)


def _engine(clip: _Clip) -> None:
    """A motor: uneven firing that speeds up and slows down, heard through a few resonances, with exhaust noise on
    top.
    """
    rate_hz = clip.between(22, 80) * clip.drift(clip.between(0.5, 1.5), clip.rng.uniform(0.02, 0.35))
    strengths = clip.rng.uniform(0.5, 1.0, clip.count(2, 6))
    phase = np.cumsum(rate_hz) / clip.rate
    firings = np.arange(1, int(phase[-1]))
    heights = strengths[firings % len(strengths)] * np.exp(0.1 * clip.rng.standard_normal(len(firings)))
    position = np.interp(firings, phase, np.arange(len(phase)))
    before = position.astype(int)  # each pulse is split over two samples, to be in time
    pulses = np.zeros(len(phase))
    pulses[before] += heights * (before + 1 - position)
    pulses[before + 1] += heights * (position - before)
    throb = clip.resonate(np.abs(pulses), (1.0, 60.0, 120.0))
    noise = clip.noise(clip.seconds) * np.maximum(throb, 0.0) / throb.std()
    source = pulses / pulses.std() + clip.between(0.05, 0.3) * noise
    centres_hz = [clip.between(low, high) for low, high in ((90, 250), (250, 600), (600, 1400), (1400, 3000))]
    clip.add(0.0, clip.resonate(source, *((clip.between(0.3, 1.0), hz, 0.3 * hz) for hz in centres_hz)))


def _vowel(clip: _Clip) -> None:
    """One voice that glides between vowels, its pitch moving with every syllable."""
    voice_hz, tract = clip.between(90, 300), clip.rng.uniform(0.9, 1.15)
    onsets = clip.onsets(2, max(2, round(1.5 * clip.seconds)))
    for onset, following in zip(onsets, [*onsets[1:], clip.seconds], strict=True):
        times = clip.times(min(1.2, (following - onset) * clip.rng.uniform(0.7, 0.95)))
        start, end = voice_hz * np.exp(clip.rng.uniform(-0.25, 0.25, 2))
        vibrato = 1 + 0.012 * np.sin(2 * np.pi * clip.between(4, 7) * times)
        pitch_hz = np.geomspace(start, end, len(times)) * vibrato
        harmonics_hz = np.arange(1, int(4500 / pitch_hz.min()) + 1)[:, None] * pitch_hz[::CONTROL_HOP]
        progress = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, harmonics_hz.shape[1]))
        first_hz, last_hz = tract * VOWELS_HZ[clip.rng.integers(len(VOWELS_HZ), size=2)][..., None, None]
        distances = (harmonics_hz - first_hz - (last_hz - first_hz) * progress) / FORMANT_BANDWIDTHS_HZ
        syllable = clip.additive(pitch_hz, (FORMANT_GAINS / (1 + distances**2)).sum(axis=0))
        clip.add(onset, clip.between(0.5, 1.0) * clip.fade(syllable, 0.03, 0.06))


def _chirps(clip: _Clip) -> None:
    """A bird's phrases: trains of one short, high, curved note."""
    for onset in clip.onsets(2, 4):
        centre_hz, seconds, gap_seconds = clip.between(2000, 5000), clip.between(0.04, 0.16), clip.between(0.02, 0.1)
        tilt, bend = clip.rng.uniform(-0.4, 0.4), clip.rng.uniform(-0.35, 0.35)
        x = np.linspace(-1, 1, round(seconds * clip.rate))
        note = clip.additive(centre_hz * np.exp(tilt * x + bend * x**2), np.array([[1.0], [0.2]]))
        note = clip.fade(note, 0.4 * seconds, 0.4 * seconds) * clip.between(0.4, 1.0)
        for repeat in range(clip.count(3, 10)):
            clip.add(onset + repeat * (seconds + gap_seconds), note * clip.between(0.7, 1.0))


def _rain(clip: _Clip) -> None:
    """Drops of many sizes, each ringing briefly at its own pitch, over a hiss that comes in gusts."""
    times, drops = clip.times(0.03), round(clip.seconds * clip.between(20, 250))
    pitches_hz = np.exp(clip.rng.uniform(np.log(clip.between(400, 1200)), np.log(clip.between(3500, 7000)), (drops, 1)))
    sizes = clip.rng.exponential(1.0, (drops, 1)) ** 1.5
    rings = sizes * np.sin(2 * np.pi * pitches_hz * times) * _decay(times, 12.0 / pitches_hz + 0.008)
    places = clip.rng.integers(len(clip.audio) - len(times), size=(drops, 1)) + np.arange(len(times))
    clip.audio += np.bincount(places.ravel(), rings.ravel(), minlength=len(clip.audio))
    clip.audio /= clip.audio.std()
    hiss = clip.tilt(clip.noise(clip.seconds), clip.rng.uniform(0.0, 4.0))
    clip.audio += clip.between(0.1, 0.6) * hiss / hiss.std() * clip.drift(1.0, 0.5)


def _drum(clip: _Clip) -> None:
    """A bar of sixteen steps, repeated: kick on the strong beats, snare on the weak ones, hats between, and a few
    strays.
    """
    step_seconds, hat_every = 15.0 / clip.between(75, 170), int(clip.rng.choice([1, 2, 2, 4]))
    times = clip.times(0.4)
    kick_hz = clip.between(45, 70) * (1 + clip.between(1.5, 4.0) * np.exp(-times / 0.03))
    kick = np.sin(2 * np.pi * np.cumsum(kick_hz) / clip.rate) * _decay(times, clip.between(0.2, 0.45))
    rattle = clip.resonate(clip.noise(0.4), (1.0, clip.between(1200, 3000), 2500.0)) * _decay(
        times, clip.between(0.12, 0.35)
    )
    body = np.sin(2 * np.pi * clip.between(160, 240) * times) * _decay(times, 0.15)
    hat = clip.resonate(clip.noise(0.4), (1.0, 7000.0, 1500.0)) * _decay(times, clip.between(0.04, 0.2))
    kick, snare, hat = (clip.fade(drum, 0.001, 0.05) for drum in (kick, 0.8 * rattle + 0.4 * body, 0.5 * hat))
    strays = clip.rng.random(16) < 0.12
    for step in range(clip.count(0, 3), int(clip.seconds / step_seconds)):
        onset, place = max(0.0, step * step_seconds + 0.003 * clip.rng.standard_normal()), step % 16
        for drum, hit in (
            (kick, place % 8 == 0 or strays[place]),
            (snare, place % 8 == 4),
            (hat, place % hat_every == 0),
        ):
            if hit:
                clip.add(onset, clip.between(0.6, 1.0) * drum)


_GENERATORS = (_sweep, _burst, _siren, _pluck, _bell, _engine, _vowel, _chirps, _rain, _drum)
CLASSES: tuple[str, ...] = tuple(generator.__name__[1:] for generator in _GENERATORS)  # the order is part of the sound


def _reverberate(clip: _Clip) -> None:
    """Adds a diffuse tail of decaying noise, as a room would."""
    t60_seconds = clip.between(0.15, 0.8)
    impulse = clip.noise(t60_seconds) * _decay(clip.times(t60_seconds), t60_seconds)
    tail = clip.filter(clip.audio, lambda hz: np.fft.rfft(impulse, 2 * (len(hz) - 1)), ringing=len(impulse))
    clip.audio += clip.between(0.1, 0.4) * tail * clip.audio.std() / tail.std()


def _add_background(clip: _Clip) -> None:
    """Coloured noise, mains hum with a little noise, or next to nothing, at a random signal-to-noise ratio."""
    kind = clip.rng.choice(["noise", "hum", "quiet"], p=[0.55, 0.2, 0.25])
    if kind == "quiet":
        return
    background = clip.tilt(clip.noise(clip.seconds), clip.rng.uniform(-6.0, 1.0))
    background /= background.std()
    if kind == "hum":
        mains_hz = np.full(len(clip.audio), clip.rng.choice([50.0, 60.0]))
        hum = clip.additive(mains_hz, _rolling_off(1.0, clip.count(3, 8)))
        background = 0.2 * background + hum / hum.std()
    clip.audio += background * clip.audio.std() * 10 ** (-clip.rng.uniform(10, 40) / 20)


def synthesize(label: str, seed: int, index: int, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """One clip, float32 [S], 2 to 6 seconds long: peak at -30 to -3 dBFS, all multiples of 2**-15, which 16-bit files
    hold exactly.

    Raises:
        ValueError: a label not in `CLASSES`, a seed outside 0..2**64-1, an index outside 0..2**32-1, or a rate below
            16 kHz, which would cut off what sets some of the classes apart.
    """
    if label not in CLASSES:
        raise ValueError(f"unknown label {label!r}: expected one of {', '.join(CLASSES)}")
    if not 0 <= seed < 2**64 or not 0 <= index < 2**32:
        raise ValueError(
            f"seed {seed} or index {index} is out of range: expected 0 <= seed < 2**64 and 0 <= index < 2**32"
        )
    if sample_rate < SAMPLE_RATE:
        raise ValueError(f"sample rate {sample_rate} Hz is too low: expected at least {SAMPLE_RATE} Hz")
    place = CLASSES.index(label)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, (place << 32) | index], dtype=np.uint64)))
    clip = _Clip(rng, rng.uniform(2.0, 6.0), sample_rate)
    _GENERATORS[place](clip)
    if rng.random() < 0.5:
        _reverberate(clip)
    _add_background(clip)
    peak = 10 ** (rng.uniform(-30.0, -3.0) / 20)
    scaled = clip.audio * (peak * FULL_SCALE / np.abs(clip.audio).max())
    dither = rng.random(len(scaled)) - rng.random(len(scaled))  # triangular: quiet stretches stay free of distortion
    return (np.rint(scaled + dither) / FULL_SCALE).astype(np.float32)


def _plan(clips: int) -> list[tuple[str, int, str]]:
    """(label, index, split): evenly among classes, each class about 80/10/10 among splits, none empty from three clips
    on.
    """
    plan = []
    for place, label in enumerate(CLASSES):
        count = clips // len(CLASSES) + (place < clips % len(CLASSES))
        held_out = max(1, round(count / 10)) if count >= 3 else 0
        splits = ["train"] * (count - 2 * held_out) + ["valid"] * held_out + ["test"] * held_out
        plan += [(label, index, split) for index, split in enumerate(splits)]
    return plan


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as aside:
        aside.write_bytes(content)


def write_corpus(folder: Path, clips: int = 300, seed: int = 0, progress: bool = True) -> Path:
    """Writes a corpus of 16 kHz mono 16-bit FLAC files, `folder/<label>/<label>-0000.flac` and on; the path of its
    manifest.

    The manifest `folder/manifest.csv` has columns path (relative to the folder), label and split (train, valid, test).
    Last of all comes `folder/corpus.json`, until then corpus.json.part: a finished corpus is left as it is, an
    interrupted one is completed.

    Raises:
        UserError: fewer clips than classes, a seed outside 0..2**64-1, or a folder that holds anything else or cannot
            be written to.
    """
    if clips < len(CLASSES):
        raise UserError(f"cannot make a corpus of {clips} clips: ask for at least {len(CLASSES)}, one for each class")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1")
    try:
        return _fill(Path(folder), clips, seed, progress)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {folder}: {error}") from error


def _fill(folder: Path, clips: int, seed: int, progress: bool) -> Path:
    manifest, begun, finished = folder / "manifest.csv", folder / "corpus.json.part", folder / "corpus.json"
    record = json.dumps({"generator": GENERATOR, "version": VERSION, "clips": clips, "seed": seed})
    files = {
        folder / label / f"{label}-{index:04d}.flac": (label, index, split) for label, index, split in _plan(clips)
    }
    mine = [path for path in (begun, finished) if path.is_file() and path.read_bytes() == record.encode()]
    if finished in mine and manifest.is_file():
        return manifest
    own = {manifest, begun, finished, *files, *(path.parent for path in files)} if mine else set()
    foreign = [path for path in folder.rglob("*") if path not in own and path.suffix != ".tmp"]
    if foreign:
        found = finished if finished in foreign else min(foreign)
        raise UserError(f"{found} is not of the corpus asked for, {record}: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(begun, record.encode())
    missing = [path for path in files if not path.is_file()]
    for path in tqdm(missing, desc="synthesising", unit="clip", disable=None if progress else True):
        label, index, _ = files[path]
        samples, flac = (synthesize(label, seed, index) * FULL_SCALE).astype(np.int16), io.BytesIO()
        soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        path.parent.mkdir(exist_ok=True)
        _write(path, flac.getvalue())
    rows = [f"{label}/{path.name},{label},{split}\n" for path, (label, _, split) in files.items()]
    _write(manifest, "".join(["path,label,split\n", *rows]).encode())
    _write(finished, record.encode())
    begun.unlink(missing_ok=True)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Writes a corpus from the command line, prints the path of its manifest and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {GENERATOR}", description="Write a corpus of synthetic sound events."
    )
    parser.add_argument(
        "folder", type=path_argument, help="an empty or new folder, or one that an earlier run left unfinished"
    )
    parser.add_argument("--clips", type=int, default=300, help="number of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random streams (default: %(default)s)")
    try:
        print(write_corpus(**vars(parser.parse_args(argv))))
    except UserError as error:
        print(f"ssast: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

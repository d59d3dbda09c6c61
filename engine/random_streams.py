"""Every use that is made of a run's seed.

Random numbers come from Philox generators, which are functions of a key and a counter. The key is the seed (32 bits)
with a stream above it; counters are numbers of clips, steps or epochs, and where several draws share a key, a stream in
the last word of the counter. A stream has one use, so that no two draws are ever made from the same numbers.
"""

from __future__ import annotations

import enum


@enum.unique
class Stream(enum.IntEnum):
    """Values are part of every run's reproducibility: they never change."""

    # above the seed, in the key
    ORDER = 0
    MASK = 1
    RECONSTRUCTION_MASK = 2
    VALIDATION_MASK = 3
    MIXUP = 4
    SPEC_AUGMENT = 5
    NOISE = 6
    ORDER_BLOCK = 0x626C6F63
    ORDER_SET = 0x73657400
    """And above: one for each data set that is mixed, by its number."""

    # in the last word of the counter
    CROP = 0x63726F70
    DRAW = 0x64726177
    FEW_CLIPS = 0x66657700
    MIXUP_PARTNER = 0x6D697875
    MIXUP_FRACTION = 0x73686172
    SPEC_AUGMENT_BANDS = 0x73706563
    NOISE_VALUES = 0x6E6F6973
    ROLL = 0x726F6C6C


def key_of(seed: int, stream: int) -> int:
    """The key of a Philox generator, 64 bits: the stream above a seed of 32 bits."""
    return seed + (stream << 32)

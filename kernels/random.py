"""Counter-based random numbers: the same bits for the same (key, counter) on every device and in every batch.

Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), which is also the generator
behind `triton.language.philox`, CUDA's curand and NumPy's Philox: a kernel that uses it draws the numbers that this
file draws.
"""

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(
    seed: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Four 32-bit random words for each counter (c0, c1, c2, c3).

    Args:
        seed: 64-bit key.
        c0, c1, c2, c3: int64 tensors of one broadcastable shape, each value in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply_32(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply_32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def below(words: torch.Tensor, bound: int | torch.Tensor) -> torch.Tensor:
    """Map 32-bit words to integers in [0, bound) by the high half of a product; the bias is below bound / 2**32."""
    return (words * bound) >> 32


def _multiply_32(x: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in 16-bit halves because int64 cannot hold all unsigned 64-bit
    products.
    """
    low = x * (multiplier & 0xFFFF)
    high = x * (multiplier >> 16)
    low_sum = low + ((high & 0xFFFF) << 16)  # below 2**48 + 2**32
    return (high >> 16) + (low_sum >> 32), low_sum & _MASK32

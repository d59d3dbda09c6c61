import torch

from ssast.kernels.random import below, philox


def words(seed: int, *counter: int) -> list[int]:
    return [word.item() for word in philox(seed, *(torch.tensor([value]) for value in counter))]


def test_philox_matches_the_published_answers():
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(2**64 - 1, ones, ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(0x299F31D0_A4093822, *pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_below_is_uniform():
    index = torch.arange(200_000)
    zero = torch.zeros_like(index)
    drawn = below(philox(3, index, zero, zero, zero)[0], 7)
    counts = torch.bincount(drawn, minlength=7).double()
    assert drawn.min() == 0 and drawn.max() == 6
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 22.5  # 0.1% point of 6 degrees of freedom

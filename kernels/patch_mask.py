"""Which patches of each clip are masked.

Every clip draws its squares from its own counters, so a mask depends on (seed, offset + index of the clip) alone, never on the batch
size, the device or what was drawn before.

All three algorithms share one vectorised idea with no loop that depends on the data: draw surely enough squares at once, give every
patch the index of the first square that covers it, and keep the N patches covered earliest.
"""

import functools
import math

import torch

from .backend import resolve_backend
from .random import below, philox

_STREAM_SQUARES, _STREAM_TIES = 0, 1


def sample_patch_mask(
    batch: int,
    *,
    grid: tuple[int, int] = (8, 64),
    num_masked: int = 400,
    cluster: tuple[int, ...] | None = (3, 4, 5),
    algorithm: str = "centered",
    seed: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Draw the masked patches of `batch` clips.

    Args:
        batch: number of clips B.
        grid: patches along (frequency, time); patch number p = frequency index * grid[1] + time index.
        num_masked: patches to mask in every clip, 0 < num_masked < P.
        cluster: side lengths in patches; each clip draws one of them, all its squares have that side. None masks uniformly at random.
        algorithm: "centered" - the paper: squares centred on patches drawn uniformly, clipped at the edges of the grid, until
            `num_masked` patches are covered; the surplus of the last square is dropped at random. An even side has no middle patch, so
            which of the four middle ones is the centre is drawn too.
            "official" - what the authors' code does: squares grow right and down from a uniform corner in *patch number*, so they run
            over the right edge into the next row; patch 0 is never masked; drawing stops when more than `num_masked` patches are
            covered, and the highest patch numbers are dropped. (Their set comes out ascending in CPython when it is large enough,
            which holds for all published settings; for fewer than 77 masked of 512 patches theirs drops others.)
            Without `cluster` both are uniform sampling without replacement.
        seed, offset: clip b draws from the counter `offset + b` under the key `seed`.
        device: of the result; default CPU.
        backend: None, "torch" or "triton".

    Returns:
        [B, num_masked] int64 patch numbers, ascending, without repeats.

    Raises:
        ValueError: sizes that cannot be met, or an unknown algorithm.
    """
    device = torch.device(device or "cpu")
    _check(batch, grid, num_masked, cluster, algorithm, offset)
    resolve_backend(backend, device, has_triton=False)
    return _reference(batch, grid, num_masked, cluster, algorithm, seed, offset, device)


def _reference(
    batch: int,
    grid: tuple[int, int],
    num_masked: int,
    cluster: tuple[int, ...] | None,
    algorithm: str,
    seed: int,
    offset: int,
    device: torch.device,
) -> torch.Tensor:
    patches = grid[0] * grid[1]
    clip = torch.arange(batch, device=device, dtype=torch.int64) + offset  # [B]
    tie = _words(seed, clip, patches, _STREAM_TIES)[0]  # [B, P] 32-bit
    if cluster is None:
        return _keep_smallest(tie * patches + torch.arange(patches, device=device), num_masked)

    squares = num_squares(grid, num_masked, min(cluster))
    covered_by = _first_square(grid, cluster, algorithm, _words(seed, clip, squares, _STREAM_SQUARES))  # [B, P] in [0, squares]
    if algorithm == "centered":
        return _keep_smallest(covered_by << 32 | tie, num_masked)
    # official: all patches of the squares up to the one that takes the count past num_masked, then the lowest numbers of those
    last_square = covered_by.sort(dim=1).values[:, num_masked : num_masked + 1]
    number = torch.arange(patches, device=device)
    return _keep_smallest(torch.where(covered_by <= last_square, number, number + patches), num_masked)


def num_squares(grid: tuple[int, int], num_masked: int, side: int) -> int:
    """Squares to draw so that too few to cover `num_masked` patches is all but impossible (never seen in 10^6 draws of the paper's
    settings); the patches then still missing are filled up at random, so the count is exact in any case.

    A patch stays free after n squares with probability about exp(-n * side**2 / P) inside the grid, less so at the edges.
    """
    patches = grid[0] * grid[1]
    expected = patches / side**2 * math.log(patches / max(patches - num_masked, 1))
    return 1 << max(6, math.ceil(math.log2(2.5 * expected)))


def _words(seed: int, clip: torch.Tensor, count: int, stream: int) -> tuple[torch.Tensor, ...]:
    """Four [B, count] tensors of 32-bit words; counters are (index, low and high half of the clip number, stream)."""
    index = torch.arange(count, device=clip.device, dtype=torch.int64)[None, :]
    return philox(seed, index, (clip & 0xFFFFFFFF)[:, None], (clip >> 32)[:, None], torch.full_like(index, stream))


def _first_square(grid: tuple[int, int], cluster: tuple[int, ...], algorithm: str, words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[B, P] index of the first square that covers each patch, or the number of squares where none does."""
    rows, columns = grid
    place, size_word, parity, _ = words  # each [B, squares]
    device, squares = place.device, place.shape[1]
    side = _sides(cluster, device)[below(size_word[:, :1], len(cluster))]  # [B, 1]: one side a clip, from its first counter
    start = below(place, rows * columns)  # [B, squares]
    cell = torch.arange(max(cluster) ** 2, device=device)  # of the largest square, row by row
    down, right = cell // max(cluster), cell % max(cluster)
    inside = (down < side[..., None]) & (right < side[..., None])  # [B, 1, cells]
    if algorithm == "centered":
        lead = (side - 1) // 2  # patches before the centre; for even sides one more on a coin toss, apart for rows and columns
        even = (side + 1) % 2
        row = (start // columns - lead - even * (parity & 1))[..., None] + down  # [B, squares, cells]
        column = (start % columns - lead - even * (parity >> 1 & 1))[..., None] + right
        inside = inside & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        number = row * columns + column
    else:
        number = start[..., None] + columns * down + right
        inside = inside & (number > 0) & (number < rows * columns)
    nowhere = rows * columns  # one column more, thrown away
    number = torch.where(inside, number, nowhere).flatten(1)
    index = torch.arange(squares, device=device).repeat_interleave(len(cell)).expand_as(number)
    covered_by = torch.full((place.shape[0], nowhere + 1), squares, device=device)
    covered_by = covered_by.scatter_reduce_(1, number, index, "amin")[:, :nowhere]
    if algorithm == "official":
        covered_by[:, 0] = squares + 1  # last of all, also where squares run out
    return covered_by


@functools.lru_cache(maxsize=16)
def _sides(cluster: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(cluster, device=device)  # kept: copying it each time would make the host wait


def _keep_smallest(key: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count] ascending positions of the `count` smallest keys of each row."""
    return key.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values


def _check(
    batch: int, grid: tuple[int, int], num_masked: int, cluster: tuple[int, ...] | None, algorithm: str, offset: int
) -> None:
    patches = grid[0] * grid[1]
    if algorithm not in ("centered", "official"):
        raise ValueError(f"algorithm must be 'centered' or 'official', not {algorithm!r}")
    if batch < 0 or offset < 0:
        raise ValueError(f"batch and offset must not be negative: {batch}, {offset}")
    if not 0 < num_masked < patches:
        raise ValueError(
            f"num_masked must lie between 1 and {patches - 1} for a grid of {grid[0]}x{grid[1]} patches, not {num_masked}"
        )
    if cluster is not None and (not cluster or min(cluster) < 1):
        raise ValueError(f"cluster must be None or side lengths of at least 1, not {cluster}")
    if cluster is not None and algorithm == "official" and num_masked > patches - 2:
        raise ValueError(f"the official algorithm cannot mask more than {patches - 2} of {patches} patches, not {num_masked}")

"""Which patches of each clip are masked.

Every clip draws its squares from its own counters, so a mask depends on (seed, offset + index of the clip) alone, never
on the batch size, the device or what was drawn before; reference and kernel draw the same bits and give the same masks.

All three algorithms share one vectorised idea with no loop that depends on the data: draw surely enough squares at
once, give every patch the index of the first square that covers it, and keep the N patches covered earliest.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .backend import resolve_backend
from .random import below, philox

_STREAM_SQUARES, _STREAM_TIES = 0, 1


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
    # [B, P] in [0, squares]
    covered_by = _first_square(grid, cluster, algorithm, _words(seed, clip, squares, _STREAM_SQUARES))
    if algorithm == "centered":
        return _keep_smallest(covered_by << 32 | tie, num_masked)
    # official: all patches of the squares up to the one that takes the count past num_masked, then the lowest numbers
    # of those
    last_square = covered_by.sort(dim=1).values[:, num_masked : num_masked + 1]
    number = torch.arange(patches, device=device)
    return _keep_smallest(torch.where(covered_by <= last_square, number, number + patches), num_masked)


def num_squares(grid: tuple[int, int], num_masked: int, side: int) -> int:
    """Squares to draw so that too few to cover `num_masked` patches is all but impossible (three quarters of them were
    enough in each of 400 draws of the paper's settings, a test says). Patches then still missing are filled up at
    random: the count is exact.

    A patch stays free after n squares with probability about exp(-n * side**2 / P) inside the grid, less so at the
    edges.
    """
    patches = grid[0] * grid[1]
    expected = patches / side**2 * math.log(patches / max(patches - num_masked, 1))
    return 1 << max(6, math.ceil(math.log2(2.5 * expected)))


def _words(seed: int, clip: torch.Tensor, count: int, stream: int) -> tuple[torch.Tensor, ...]:
    """Four [B, count] tensors of 32-bit words; counters are (index, low and high half of the clip number, stream)."""
    index = torch.arange(count, device=clip.device, dtype=torch.int64)[None, :]
    return philox(seed, index, (clip & 0xFFFFFFFF)[:, None], (clip >> 32)[:, None], torch.full_like(index, stream))


def _first_square(
    grid: tuple[int, int], cluster: tuple[int, ...], algorithm: str, words: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """[B, P] index of the first square that covers each patch, or the number of squares where none does."""
    rows, columns = grid
    place, size_word, parity, _ = words  # each [B, squares]
    device, squares = place.device, place.shape[1]
    # [B, 1]: one side a clip, from its first counter
    side = _sides(cluster, device)[below(size_word[:, :1], len(cluster))]
    start = below(place, rows * columns)  # [B, squares]
    cell = torch.arange(max(cluster) ** 2, device=device)  # of the largest square, row by row
    down, right = cell // max(cluster), cell % max(cluster)
    inside = (down < side[..., None]) & (right < side[..., None])  # [B, 1, cells]
    if algorithm == "centered":
        lead = (
            side - 1
        ) // 2  # patches before the centre; for even sides one more on a coin toss, apart for rows and columns
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
@torch.inference_mode(False)  # kept, and may be asked for in another mode later
def _sides(cluster: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # kept: copying it each time would make the host wait
    return torch.tensor(cluster, dtype=torch.int64, device=device)


def _keep_smallest(key: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count] ascending positions of the `count` smallest keys of each row."""
    return key.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values


@triton.jit(do_not_specialize=["seed", "offset"])
def _mask_kernel(
    out_ptr,  # [B, M] int64
    sides_ptr,  # [NUM_SIDES] int64
    seed,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_2: tl.constexpr,  # the next powers of two
    COLUMNS_2: tl.constexpr,
    M: tl.constexpr,
    NUM_SIDES: tl.constexpr,  # 0: uniform
    SQUARES: tl.constexpr,
    SQUARE_BITS: tl.constexpr,  # hold SQUARES + 1 and something above it
    NUMBER_BITS: tl.constexpr,  # hold 2 P
    OFFICIAL: tl.constexpr,
    WRAPS: tl.constexpr,  # how often a square can run over the right edge
    STREAM_SQUARES: tl.constexpr,
    STREAM_TIES: tl.constexpr,
):
    """One program a clip. Squares come 32 at a time: a word of 32 bits for each row and each column says which of them
    cover it, so a patch's word is the `and` of its row's and its column's, and the lowest bit of it is the first square
    there.
    """
    P: tl.constexpr = ROWS * COLUMNS
    clip = offset.to(tl.int64) + tl.program_id(0)
    clip_low, clip_high = (clip & 0xFFFFFFFF).to(tl.uint32), (clip >> 32).to(tl.uint32)
    seed = seed.to(tl.int64)
    row, column = tl.arange(0, ROWS_2), tl.arange(0, COLUMNS_2)
    number = row[:, None] * COLUMNS + column[None, :]  # [ROWS_2, COLUMNS_2]
    is_patch = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]

    first = tl.full((ROWS_2, COLUMNS_2), SQUARES, tl.int32)  # first square that covers the patch
    if NUM_SIDES > 0:
        pick = tl.philox(seed, tl.zeros((1,), tl.uint32), clip_low, clip_high, STREAM_SQUARES)[1]
        side = tl.load(sides_ptr + tl.sum((pick.to(tl.int64) * NUM_SIDES) >> 32)).to(tl.int32)
        # Later squares change nothing once enough patches are covered: `official` looks for one more than are masked,
        # and not at patch 0. Of the eight words for 400 of 512 the first two or four suffice.
        word, covered = 0, 0
        while (word < SQUARES // 32) & (covered <= M):
            bit = tl.arange(0, 32)
            drawn = tl.philox(seed, (word * 32 + bit).to(tl.uint32), clip_low, clip_high, STREAM_SQUARES)
            start, parity = ((drawn[0].to(tl.int64) * P) >> 32).to(tl.int32), drawn[2].to(tl.int32)
            top, left = start // COLUMNS, start % COLUMNS  # [32]
            if not OFFICIAL:
                even = (side + 1) % 2
                top -= (side - 1) // 2 + even * (parity & 1)
                left -= (side - 1) // 2 + even * (parity >> 1 & 1)
            covers = tl.zeros((ROWS_2, COLUMNS_2), tl.int32)
            for wrap in tl.static_range(WRAPS + 1):
                covers |= (
                    _covered_bits(row, top + wrap, side)[:, None]
                    & _covered_bits(column, left - wrap * COLUMNS, side)[None, :]
                )
            # the lowest bit alone is a power of two, and its exponent as a float32 the bit's number
            lowest = (covers & -covers).to(tl.float32).to(tl.int32, bitcast=True)
            square = word * 32 + ((lowest >> 23) & 0xFF) - 127
            first = tl.where(covers != 0, tl.minimum(first, square), first)
            covered = tl.sum(((first < SQUARES) & is_patch & (number > 0)).to(tl.int32))
            word += 1

    first = tl.reshape(first, (ROWS_2 * COLUMNS_2,)).to(tl.int64)
    number = tl.reshape(number, (ROWS_2 * COLUMNS_2,))
    is_patch = tl.reshape(is_patch, (ROWS_2 * COLUMNS_2,))
    if OFFICIAL and NUM_SIDES > 0:
        first = tl.where(number == 0, SQUARES + 1, first)  # patch 0 is never masked
        first = tl.where(is_patch, first, (1 << SQUARE_BITS) - 1)
        last_square = _nth_smallest(first, M + 1, SQUARE_BITS)
        key = tl.where(first <= last_square, number, number + P).to(tl.int64)
        key = tl.where(is_patch, key, (1 << NUMBER_BITS) - 1)
        masked = _is_among_smallest(key, M, NUMBER_BITS)
    else:
        tie = tl.philox(seed, number.to(tl.uint32), clip_low, clip_high, STREAM_TIES)[0]
        if NUM_SIDES > 0:
            key = (first << 32) | tie.to(tl.int64)
            key = tl.where(is_patch, key, ((1 << SQUARE_BITS) - 1) << 32)
            masked = _is_among_smallest(key, M, 32 + SQUARE_BITS)
        else:
            key = tie.to(tl.int64) * P + number
            key = tl.where(is_patch, key, (1 << (32 + NUMBER_BITS)) - 1)
            masked = _is_among_smallest(key, M, 32 + NUMBER_BITS)

    slot = tl.cumsum(masked.to(tl.int32)) - 1
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * M + slot, number.to(tl.int64), mask=masked)


@triton.jit
def _covered_bits(line, start, side):
    """line [L] rows or columns, start [32] of the squares -> [L] words whose bit i says that square i covers the
    line.
    """
    distance = line[:, None] - start[None, :]
    inside = (distance >= 0) & (distance < side)
    return tl.sum(inside.to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def _is_among_smallest(key, count, BITS: tl.constexpr):
    """Which of the keys [X] are the `count` smallest; among equal ones the first."""
    threshold = _nth_smallest(key, count, BITS)
    smaller, equal = (key < threshold).to(tl.int32), (key == threshold).to(tl.int32)
    return (smaller != 0) | ((equal != 0) & (tl.cumsum(equal) <= count - tl.sum(smaller)))


@triton.jit
def _nth_smallest(key, n, BITS: tl.constexpr):
    """The n-th smallest, from 1, of int64 keys in [0, 2**BITS): the largest value that fewer than n keys are below, bit
    by bit.
    """
    value = tl.zeros((), tl.int64)
    for step in range(BITS):
        candidate = value | (tl.full((), 1, tl.int64) << (BITS - 1 - step))
        value = tl.where(tl.sum((key < candidate).to(tl.int32)) < n, candidate, value)
    return value


@torch.library.custom_op("ssast::sample_patch_mask", mutates_args=())
def _mask_op(
    batch: int,
    rows: int,
    columns: int,
    num_masked: int,
    cluster: list[int],
    algorithm: str,
    seed: int,
    offset: int,
    device: torch.device,
) -> torch.Tensor:
    """`cluster` empty: uniform."""
    squares = num_squares((rows, columns), num_masked, min(cluster)) if cluster else 32
    is_official = algorithm == "official"
    rows_2, columns_2 = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    out = torch.empty(batch, num_masked, dtype=torch.int64, device=device)
    if batch == 0:
        return out
    with torch.cuda.device_of(out):
        _mask_kernel[(batch,)](
            out,
            _sides(tuple(cluster), out.device),
            seed,
            offset,
            ROWS=rows,
            COLUMNS=columns,
            ROWS_2=rows_2,
            COLUMNS_2=columns_2,
            M=num_masked,
            NUM_SIDES=len(cluster),
            SQUARES=squares,
            SQUARE_BITS=(squares + 2).bit_length(),
            NUMBER_BITS=(2 * rows * columns).bit_length(),
            OFFICIAL=is_official,
            WRAPS=(columns + max(cluster) - 2) // columns if is_official and cluster else 0,
            STREAM_SQUARES=_STREAM_SQUARES,
            STREAM_TIES=_STREAM_TIES,
            num_warps=max(1, rows_2 * columns_2 // 512),  # 16 patches a lane
        )
    return out


@_mask_op.register_fake
def _(batch, rows, columns, num_masked, cluster, algorithm, seed, offset, device):
    return torch.empty(batch, num_masked, dtype=torch.int64, device=device)


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
        cluster: side lengths in patches; each clip draws one of them, all its squares have that side. None masks
            uniformly at random.
        algorithm: "centered" - the paper: squares centred on patches drawn uniformly, clipped at the edges of the grid,
            until `num_masked` patches are covered; the surplus of the last square is dropped at random. An even side
            has no middle patch, so which of the four middle ones is the centre is drawn too.
            "official" - what the authors' code does: squares grow right and down from a uniform corner in *patch
            number*, so they run over the right edge into the next row; patch 0 is never masked; drawing stops when more
            than `num_masked` patches are covered, and the highest patch numbers are dropped. (Their set comes out
            ascending in CPython when it is large enough, which holds for all published settings; for fewer than 77
            masked of 512 patches theirs drops others.) Without `cluster` both are uniform sampling without replacement.
        seed, offset: clip b draws from the counter `offset + b` under the key `seed`.
        device: of the result; default CPU.
        backend: None, "torch" or "triton".

    Returns:
        [B, num_masked] int64 patch numbers, ascending, without repeats.

    Raises:
        ValueError: sizes that cannot be met, or an unknown algorithm.
    """
    device = torch.device(device or "cpu")
    cluster = None if cluster is None else tuple(cluster)
    _check(batch, grid, num_masked, cluster, algorithm, seed, offset)
    if resolve_backend(backend, device) == "torch":
        return _reference(batch, grid, num_masked, cluster, algorithm, seed, offset, device)
    return _mask_op(batch, *grid, num_masked, list(cluster or ()), algorithm, seed, offset, device)


def _check(
    batch: int,
    grid: tuple[int, int],
    num_masked: int,
    cluster: tuple[int, ...] | None,
    algorithm: str,
    seed: int,
    offset: int,
) -> None:
    patches = grid[0] * grid[1]
    if algorithm not in ("centered", "official"):
        raise ValueError(f"algorithm must be 'centered' or 'official', not {algorithm!r}")
    if batch < 0 or offset < 0 or offset + batch > 2**63:
        raise ValueError(f"batch and offset must not be negative, nor clip numbers reach 2**63: {batch}, {offset}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits with a sign, not {seed}")
    if not 0 < num_masked < patches:
        raise ValueError(
            f"num_masked must lie between 1 and {patches - 1} for a grid of {grid[0]}x{grid[1]} patches, not "
            f"{num_masked}"
        )
    if cluster is not None and (not cluster or min(cluster) < 1):
        raise ValueError(f"cluster must be None or side lengths of at least 1, not {cluster}")
    if cluster is not None and algorithm == "official" and num_masked > patches - 2:
        raise ValueError(
            f"the official algorithm cannot mask more than {patches - 2} of {patches} patches, not {num_masked}"
        )

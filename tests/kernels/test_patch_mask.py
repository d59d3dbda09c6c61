import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssast.kernels import sample_patch_mask
from ssast.kernels.patch_mask import _STREAM_SQUARES, _first_square, _words, num_squares

draw = functools.partial(sample_patch_mask, backend="torch")  # the reference
PAPER = [((8, 64), 400), ((8, 64), 250), ((8, 64), 100), ((8, 16), 40)]


def as_grid(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[B, f, t] bool."""
    flat = torch.zeros(mask.shape[0], grid[0] * grid[1], dtype=torch.bool).scatter_(1, mask, True)
    return flat.view(-1, *grid)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(2, 20),
    share=st.floats(0, 1),
    cluster=st.sampled_from([None, (1,), (3, 4, 5), (2,)]),
    algorithm=st.sampled_from(["centered", "official"]),
    seed=st.integers(0, 2**40),
    offset=st.integers(0, 2**40),
)
def test_any_mask_is_ascending_and_of_exact_size(rows, columns, share, cluster, algorithm, seed, offset):
    patches = rows * columns
    if patches < 4:
        return
    num_masked = 1 + int(share * (patches - 3))
    mask = draw(
        3, grid=(rows, columns), num_masked=num_masked, cluster=cluster, algorithm=algorithm, seed=seed, offset=offset
    )
    assert mask.shape == (3, num_masked) and mask.dtype == torch.int64
    assert mask.min() >= 0 and mask.max() < patches
    assert (mask.diff(dim=1) > 0).all()


@pytest.mark.parametrize("algorithm", ["centered", "official"])
@pytest.mark.parametrize("cluster", [None, (3, 4, 5)])
def test_a_clip_draws_the_same_whatever_the_batch(algorithm, cluster):
    options = {"num_masked": 300, "algorithm": algorithm, "cluster": cluster, "seed": 5}
    whole = draw(7, offset=2**33 - 3, **options)
    apart = torch.cat([draw(1, offset=2**33 - 3 + clip, **options) for clip in range(7)])
    assert torch.equal(whole, apart)
    assert not torch.equal(whole, draw(7, offset=2**33 - 2, **options))
    assert not torch.equal(whole, draw(7, offset=2**33 - 3, **{**options, "seed": 6}))


@pytest.mark.parametrize(("grid", "num_masked"), PAPER)
def test_drawn_squares_suffice(grid, num_masked):
    """Three quarters of the squares were enough in every one of 400 draws, so patches left over to chance are out of
    reach.
    """
    squares = num_squares(grid, num_masked, 3)
    words = _words(1, torch.arange(400), squares, _STREAM_SQUARES)
    needed = _first_square(grid, (3,), "centered", words).sort(dim=1).values[:, num_masked - 1]
    assert needed.max() < squares * 0.75, needed.max()


def test_centered_reaches_every_patch_and_is_symmetric():
    """No position is left out, and turning the grid over in either axis leaves the odds alone (edges are masked less
    than the middle, being inside fewer squares).
    """
    share = as_grid(torch.cat([draw(500, seed=2, offset=500 * i) for i in range(8)]), (8, 64)).double().mean(dim=0)
    assert share.min() > 0.35
    sigma = (share * (1 - share) / 4000).sqrt()
    for mirrored in (share.flip(0), share.flip(1)):
        assert ((share - mirrored).abs() / (sigma * 2**0.5)).max() < 4.8
    assert share[0].mean() < share[4].mean() and share[7].mean() < share[3].mean()


def test_centered_squares_never_wrap():
    """With one square's worth of patches masked, all of them lie within one 3x3 box."""
    for clip in as_grid(draw(200, num_masked=4, cluster=(3,), seed=9), (8, 64)):
        rows, columns = clip.nonzero(as_tuple=True)
        assert rows.max() - rows.min() < 3 and columns.max() - columns.min() < 3


@pytest.mark.parametrize("algorithm", ["centered", "official"])
def test_every_cluster_size_is_drawn_alike(algorithm):
    """The first square of each clip, away from the edges, is 3, 4 or 5 on each side, a third of the clips each."""
    words = _words(7, torch.arange(3000), 64, _STREAM_SQUARES)
    first = (_first_square((8, 64), (3, 4, 5), algorithm, words) == 0).sum(dim=1)
    whole = torch.bincount(first, minlength=26)[[9, 16, 25]].double()
    assert first.max() == 25 and (whole > 300).all()
    one = _first_square((8, 64), (4,), algorithm, words) == 0
    assert one.sum(dim=1).max() == 16


@pytest.mark.parametrize("name", ["patch512_n400", "patch512_n100", "patch128_n40"])
def test_official_has_the_official_marginals(golden_values, name):
    """Against 20,000 draws of the official code: every position, and how often a shift of a masked patch is masked,
    too.
    """
    golden = np.load(golden_values / "masks" / f"{name}.npz")
    patches = golden["position_mask_count"].size
    grid = (8, patches // 8)
    num_masked = golden["example_masks"].shape[1]
    draws = 10_000
    masks = torch.cat(
        [
            draw(500, grid=grid, num_masked=num_masked, algorithm="official", seed=11, offset=offset)
            for offset in range(0, draws, 500)
        ]
    )
    masked = as_grid(masks, grid).double().numpy()
    expected = golden["position_mask_count"] / 20_000
    share = masked.mean(axis=0).ravel()
    assert share[0] == share[-1] == 0
    sigma = np.sqrt(expected * (1 - expected) * (1 / 20_000 + 1 / draws))
    deviations = (share - expected)[sigma > 0] / sigma[sigma > 0]
    assert np.abs(deviations).max() < 4.5
    assert np.square(deviations).mean() < 2.5  # 1 by chance; neighbours go together, so it wavers by about a half

    together = golden["shift_cooccurrence"]  # [df 0..7, dt -16..16]
    for df, dt in [(0, 1), (0, 4), (1, 0), (2, 2), (3, -3), (4, 0)]:
        here = masked[:, : grid[0] - df, max(0, -dt) : grid[1] - max(0, dt)]
        there = masked[:, df:, max(0, dt) : grid[1] + min(0, dt)]
        assert abs((here * there).sum() / here.sum() - together[df, dt + 16]) < 0.006, (df, dt)


def test_uniform_masks_every_patch_alike(golden_values):
    """The frame model: independent of position; the official frame sampler has the same odds."""
    golden = np.load(golden_values / "masks" / "frame512_n400.npz")
    mask = draw(4000, grid=(1, 512), num_masked=400, cluster=None, seed=4)
    share = as_grid(mask, (1, 512)).double().mean(dim=0).numpy().ravel()
    expected = golden["position_mask_count"] / 20_000
    assert np.abs(share - expected).max() < 4.8 * np.sqrt(0.78 * 0.22 * (1 / 4000 + 1 / 20_000))


def test_bad_arguments():
    for options, message in [
        ({"num_masked": 512}, "between 1 and 511"),
        ({"num_masked": 0}, "between 1 and 511"),
        ({"num_masked": 511, "algorithm": "official"}, "at most|more than 510"),
        ({"algorithm": "random"}, "algorithm"),
        ({"cluster": ()}, "cluster"),
        ({"offset": -1}, "negative"),
        ({"backend": "cuda"}, "backend must be"),
        ({"offset": 2**63 - 1, "batch": 2}, "2\\*\\*63"),
        ({"seed": 2**63}, "64 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_patch_mask(**{"batch": 1, **options})


# Why each: the paper's three counts and its small grid; clusters that leave the grid on every side (3x7); frame
# patches, one row; columns that are no power of two; official squares that wrap over the right edge more than once
# (8x2); the fewest and the most patches.
TRITON_GRID = [
    ((8, 64), 400, (3, 4, 5)),
    ((8, 64), 400, None),
    ((8, 64), 100, (3, 4, 5)),
    ((8, 16), 40, (3, 4, 5)),
    ((3, 7), 9, (2,)),
    ((1, 512), 400, (3,)),
    ((5, 50), 200, (3, 4, 5)),
    ((8, 2), 6, (5,)),
    ((1, 3), 1, (1,)),
    ((4, 4), 14, (2, 3)),
    ((20, 40), 500, (3, 4, 5)),  # more than one warp holds
]


@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (1, 1), (2**63 - 1, 2**40 + 7)]
)  # 1 is a constant to Triton unless told otherwise
@pytest.mark.parametrize("algorithm", ["centered", "official"])
@pytest.mark.parametrize(("grid", "num_masked", "cluster"), TRITON_GRID)
@pytest.mark.parametrize("backend", ["triton"])
def test_kernel_draws_the_masks_of_the_reference(backend, grid, num_masked, cluster, algorithm, seed, offset, device):
    options = {
        "grid": grid,
        "num_masked": num_masked,
        "cluster": cluster,
        "algorithm": algorithm,
        "seed": seed,
        "offset": offset,
    }
    mask = sample_patch_mask(3, **options, device=device, backend=backend)
    assert torch.equal(mask.cpu(), sample_patch_mask(3, **options, backend="torch"))


def test_kernel_takes_an_empty_batch(device):
    assert sample_patch_mask(0, device=device, backend="triton").shape == (0, 400)

"""What each operator needs at least: bytes through memory and floating-point operations. Every figure in GB/s, TFLOP/s
or fraction of a ceiling in the results has one of these as its numerator.

Bytes: every tensor that the caller hands in is read once and every one that it gets back is written once; nothing in
between counts, nor does what another implementation happens to store. The three modes are operations of their own:
`forward` maps inputs to outputs, `backward` maps inputs and the output's gradient to gradients, `both` maps inputs and
the output's gradient to outputs and gradients.

Operations: a multiply-add counts 2. Matrix products count, elementwise work beside them does not (it is under 2%), and
recomputing in the backward pass what the forward pass already had does not either. Published figures of flash attention
do count that: 2.5 times the forward pass for the backward pass, where this file counts 2.

Shapes are named as in ssast.kernels. `size` is bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW, SHIFT, FFT = 400, 160, 512  # of 16 kHz audio
INDEX = 8  # bytes of an int64
SLOT = 4  # bytes of an int32


@dataclass(frozen=True)
class Need:
    """The least that an operation moves through memory, in bytes, and computes, in floating-point operations."""

    bytes: int
    flop: int


def fbank(B: int, S: int, T: int, F: int, in_size: int, out_size: int) -> dict[str, Need]:
    """Samples in, features out. Of each whole frame: mean, its subtraction, pre-emphasis (2 each a sample, mean 1) and
    window (1 a sample), a real FFT at the textbook 2.5 n log2 n, power (3 a bin), two mel weights a bin (4 a bin),
    logarithm and normalisation (3 a mel bin). What a matrix product spends instead of the FFT is not needed.
    """
    frames = 1 + (S - WINDOW) // SHIFT
    fft = 5 * FFT * (FFT.bit_length() - 1) // 2
    per_frame = (1 + 1 + 2 + 1) * WINDOW + fft + (3 + 4) * (FFT // 2) + 3 * F
    return {"forward": Need(B * S * in_size + B * T * F * out_size, B * min(frames, T) * per_frame)}


def mask(B: int, M: int) -> dict[str, Need]:
    """Patch numbers out. Its arithmetic is all integer, so no FLOP are counted."""
    return {"forward": Need(B * M * INDEX, 0)}


def embed(B: int, P: int, M: int, K: int, D: int, size: int) -> dict[str, Need]:
    """Of the patches only the P - M visible ones need reading and projecting: the others become the mask token. The
    patches are data and get no gradient, so backward is one product, for the weight's.
    """
    patches = B * (P - M) * K * size + B * M * INDEX
    parameters = (D * K + D + (2 + P) * D + 2 * D + D) * size  # weight, bias, position, prefix, mask token
    tokens = B * (2 + P) * D * size
    product = 2 * B * (P - M) * K * D
    # gradients need no parameter values: written, not read
    return {
        "forward": Need(patches + parameters + tokens, product),
        "backward": Need(patches + parameters + tokens, product),
        "both": Need(patches + 2 * parameters + 2 * tokens, 2 * product),
    }


def embed_visible(B: int, P: int, M: int, K: int, D: int, size: int) -> dict[str, Need]:
    """As `embed`, without the masked patches' tokens; the slots, 4 bytes a patch, are written forward and read
    backward.
    """
    patches = B * (P - M) * K * size + B * M * INDEX + B * P * SLOT
    parameters = (D * K + D + (2 + P) * D + 2 * D) * size  # weight, bias, position, prefix
    tokens = B * (2 + P - M) * D * size
    product = 2 * B * (P - M) * K * D
    return {
        "forward": Need(patches + parameters + tokens, product),
        "backward": Need(patches + parameters + tokens, product),
        "both": Need(patches + 2 * parameters + 2 * tokens, 2 * product),
    }


def mask_tokens(B: int, P: int, M: int, D: int, size: int) -> dict[str, Need]:
    """Encoder output, mask token, positions and slots in, whole clips out; backward the other way round."""
    encoded = B * (2 + P - M) * D * size
    parameters = (1 + 2 + P) * D * size
    tokens = B * (2 + P) * D * size
    slots = B * P * SLOT
    return {
        "forward": Need(encoded + parameters + tokens + slots, 0),
        "backward": Need(encoded + parameters + tokens + slots, 0),
        "both": Need(2 * (encoded + parameters + tokens) + slots, 0),
    }


def loss(B: int, M: int, K: int, size: int, gathered: bool) -> dict[str, Need]:
    """class_pred, recon_pred and target in, four scalars out (not counted), gradients of the first two. `gathered`: the
    target rows are picked by a mask, which is read as well. Products: scores forward; the gradient of class_pred
    backward (the target has none).
    """
    rows = B * M * K * size
    index = B * M * INDEX if gathered else 0
    product = 2 * B * M * M * K
    return {
        "forward": Need(3 * rows + index, product),
        "backward": Need(5 * rows + index, product),
        "both": Need(5 * rows + index, 2 * product),
    }


def attention(B: int, H: int, N: int, d: int, size: int) -> dict[str, Need]:
    """q, k, v in, output out; their gradients back. Products: two forward, four backward."""
    rows, product = B * H * N * d * size, 2 * B * H * N * N * d
    return {
        "forward": Need(4 * rows, 2 * product),
        "backward": Need(7 * rows, 4 * product),
        "both": Need(8 * rows, 6 * product),
    }


def copy(size: int) -> dict[str, Need]:
    """Of `size` bytes: read and written."""
    return {"forward": Need(2 * size, 0)}


def matmul(n: int, size: int) -> dict[str, Need]:
    """Two n x n matrices to a third."""
    return {"forward": Need(3 * n * n * size, 2 * n**3)}

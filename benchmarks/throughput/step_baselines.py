"""Whole training steps to measure ours against: what the authors' code does, and what a practised PyTorch user would
write today.

Each starts from the same weights and turns a batch of waveforms, int16 on the host, into one optimizer step of the
joint objective, with nothing of ours in it: no operator of ssast.kernels (constants apart) and no module of the engine.

What all are spared, whoever needs it: accuracy and other metrics, clipping of gradients, the schedule of the learning
rate, and clips shorter than the window.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from ssast.benchmarks.operator_baselines import (
    LOG_FLOOR,
    MEL_BINS,
    PRE_EMPHASIS,
    SAMPLE_RATE,
    bmm_loss,
    official_fbank,
    official_mask,
)
from ssast.engine.config import Config
from ssast.engine.errors import UserError
from ssast.engine.model.config import PATCH_VALUES, ModelConfig
from ssast.kernels import NUM_PREFIX
from ssast.kernels.fbank import frame_geometry, mel_filters

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q, k, v, each [B, H, N, d] -> [B, H, N, d]."""


# ---- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, attend: Attention) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads, self.attend = config.heads, attend
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, D] -> [B, N, D]
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        attended = self.attend(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.attn["proj"](attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """What both models share. Parameters are named and shaped as the engine's, so that its weights load."""

    def __init__(self, config: ModelConfig, attend: Attention) -> None:
        super().__init__()
        self.config, width = config, config.width
        shapes = {
            "weight": (width, PATCH_VALUES),
            "bias": (width,),
            "position": (NUM_PREFIX + config.num_patches, width),
            "prefix": (NUM_PREFIX, width),
            "mask_token": (width,),
        }
        self.embedding = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.class_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PATCH_VALUES))
        self.recon_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PATCH_VALUES))

    def encode(self, patches: torch.Tensor) -> torch.Tensor:
        """[B, P, D] embedded and masked -> [B, N, D]."""
        prefix = self.embedding["prefix"].to(patches.dtype).expand(patches.shape[0], -1, -1)
        x = torch.cat((prefix, patches), dim=1) + self.embedding["position"]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def stored_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As timm 0.4.5: the [B, H, N, N] weights go through memory."""
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3)
    return weights @ v


class OfficialModel(Transformer):
    """The authors' model: each objective masks, embeds and encodes for itself. [B, T, F] features and [B, M] mask ->
    its loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, stored_attention)

    def discriminative(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """InfoNCE, its softmax over the predictions, one clip at a time."""
        prediction, target = self._predict(self.class_head, features, mask)
        nce = features.new_zeros(())
        for clip in range(len(mask)):
            scores = target[clip] @ prediction[clip].T
            nce = nce - scores.log_softmax(dim=1).diagonal().sum()
        return nce / mask.numel()

    def generative(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean square error."""
        return functional.mse_loss(*self._predict(self.recon_head, features, mask))

    def _predict(
        self, head: nn.Module, features: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(predictions, targets), each [B, M, K]."""
        shape, weight = self.config.patch_shape, self.embedding["weight"]
        image = features.unsqueeze(1).transpose(2, 3)  # [B, 1, F, T]
        patches = functional.unfold(image, shape, stride=shape).transpose(1, 2)  # [B, P, K]
        embedded = functional.conv2d(image, weight.view(-1, 1, *shape), self.embedding["bias"], stride=shape)
        embedded = embedded.flatten(2).transpose(1, 2)  # [B, P, D]
        visible = torch.ones_like(embedded)
        for clip, rows in enumerate(mask):
            visible[clip, rows] = 0
        tokens = self.encode(embedded * visible + (1 - visible) * self.embedding["mask_token"])
        predictions = [head(tokens[clip, rows + NUM_PREFIX]) for clip, rows in enumerate(mask)]
        return torch.stack(predictions), torch.stack([patches[clip, rows] for clip, rows in enumerate(mask)])


class EagerModel(Transformer):
    """One pass for both objectives, everything for the whole batch at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, functional.scaled_dot_product_attention)

    def forward(self, features: torch.Tensor, mask: torch.Tensor, recon_weight: float) -> torch.Tensor:
        """[B, T, F] and [B, M] -> the joint loss."""
        (rows, columns), (bins, frames) = self.config.grid, self.config.patch_shape
        tiles = features.reshape(-1, columns, frames, rows, bins)
        patches = tiles.permute(0, 3, 1, 4, 2).reshape(-1, rows * columns, bins * frames)  # [B, P, K]
        embedded = functional.linear(patches, self.embedding["weight"], self.embedding["bias"])
        is_masked = torch.zeros(patches.shape[:2], dtype=torch.bool, device=mask.device).scatter(1, mask, True)
        mask_token = self.embedding["mask_token"].to(embedded.dtype)
        tokens = self.encode(torch.where(is_masked[..., None], mask_token, embedded))
        masked = _gather(tokens, mask + NUM_PREFIX)
        return bmm_loss(self.class_head(masked), self.recon_head(masked), _gather(patches, mask), recon_weight)[0]


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, P, K], index [B, M] -> [B, M, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


# ---- steps -----------------------------------------------------------------------------------------------------------


class StepBaseline(abc.ABC):
    """A model, its optimizer, and one way to train it."""

    name: str
    what: str
    """What it does and where it is kinder than what it stands for, in a sentence."""
    precision = "fp32"
    """Of the products: "bf16" or "fp32"."""
    model_type: ClassVar[type[Any]]

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        mean: float,
        std: float,
        seed: int,
    ) -> None:
        """`weights`: the state of ssast.engine.SSAST; they are copied, in fp32. `mean`, `std`: of the log-mel features.

        Raises:
            UserError: a config that this way of training does not know.
        """
        self.config, self.device, self.mean, self.std = config, device, mean, std
        self._check()
        self.shape = config.architecture
        self.model = self.model_type(self.shape).to(device)
        self.model.load_state_dict(weights)
        self.optimizer = self._make_optimizer()

    def loss(self, waveform: torch.Tensor, mask: torch.Tensor, recon_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The joint loss of waveforms [B, S], int16 on the host, under masks [B, M] of patch numbers on the device.
        `recon_mask` is for the second pass of those that make two; None: `mask` again.
        """
        return self._loss(self.features(waveform), iter((mask, mask if recon_mask is None else recon_mask)))

    def step(self, waveform: torch.Tensor) -> torch.Tensor:
        """Train on waveforms [B, S], int16 on the host, under masks drawn here; return the loss, on the device."""
        return self._train(self.features(waveform))

    @abc.abstractmethod
    def features(self, waveform: torch.Tensor) -> torch.Tensor:
        """[B, S] int16 on the host -> [B, T, F] normalised log-mel in fp32 on the device."""

    @abc.abstractmethod
    def draw_mask(self, batch: int) -> torch.Tensor:
        """[B, M] patch numbers on the device."""

    @abc.abstractmethod
    def _loss(self, features: torch.Tensor, masks: Iterator[torch.Tensor]) -> torch.Tensor:
        """Takes a mask for each pass, when it needs it."""

    def _train(self, features: torch.Tensor) -> torch.Tensor:
        loss = self._loss(features, (self.draw_mask(len(features)) for _ in itertools.count()))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _check(self) -> None:
        for key, only in (("name", "joint"), ("softmax_over", "predictions")):
            value = getattr(self.config.objective, key)
            if value != only:
                raise UserError(
                    f"objective.{key}: the baselines train with {only} only, not {value}; measure without them"
                )

    def _make_optimizer(self, **options: Any) -> torch.optim.Optimizer:
        section = self.config.deepspeed["optimizer"]
        params: dict[str, Any] = {
            key: tuple(value) if key == "betas" else value for key, value in section["params"].items()
        }
        kind = torch.optim.Adam if section["type"] == "Adam" else torch.optim.AdamW
        return kind(self.model.parameters(), **params, **options)


class OfficialWay(StepBaseline):
    """What the authors' code does for a batch: filter banks of each clip on the host, in fp32, before the batch is put
    together; then for each objective a mask, a forward pass, and Python loops over the clips.

    Their loader's 16 worker processes run ahead of training. Here one thread does, by one batch, each clip with all of
    PyTorch's threads; a step lasts until both are done.

    Kinder than the original: window and mel filters are made once; masks grow in one set and travel in one copy;
    predictions are stacked, where writing them into a buffer clip by clip copies its gradient as often; the loss is not
    read three times a step; nothing is printed; the optimizer is PyTorch's of today with its default, one launch for
    many tensors; products on the GPU may use TF32 in `step`, the default of the PyTorch that it was written for.
    """

    name = "official way"
    what = (
        "the authors' way: filter banks clip by clip on the host, a batch ahead of training, fp32 (TF32 products "
        "allowed on a GPU), a mask "
        "and a forward pass for each objective, loops over clips for masks, targets, heads and InfoNCE, attention "
        "weights stored; kinder "
        "than their code: no metrics or waiting for them, constants made once, predictions stacked, PyTorch's "
        "optimizer of today"
    )
    model_type = OfficialModel
    model: OfficialModel

    def __init__(self, *args: Any, seed: int, **options: Any) -> None:
        super().__init__(*args, seed=seed, **options)
        self._random = random.Random(seed)
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._prepared: torch.Tensor | None = None

    def step(self, waveform: torch.Tensor) -> torch.Tensor:
        """As the base's; but what is trained on is the batch of the call before, prepared then. The first call trains
        on its own.
        """
        ahead = self._worker.submit(self._prepare, waveform)
        prepared = ahead.result() if self._prepared is None else self._prepared
        with _tf32_allowed():
            loss = self._train(prepared.to(self.device))
        self._prepared = ahead.result()
        return loss

    def features(self, waveform: torch.Tensor) -> torch.Tensor:
        """As the base's; on the host, in fp32."""
        return self._prepare(waveform).to(self.device)

    def draw_mask(self, batch: int) -> torch.Tensor:
        """As the base's; by the official algorithm, in Python."""
        mask, patches = self.config.mask, self.shape.num_patches
        if mask.cluster is None:
            rows = [self._random.sample(range(patches), mask.num_masked) for _ in range(batch)]
            return torch.tensor(rows, device=self.device)
        return official_mask(
            batch,
            grid=self.shape.grid,
            num_masked=mask.num_masked,
            cluster=mask.cluster,
            device=self.device,
            generator=self._random,
        )

    def _prepare(self, waveform: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"num_frames": self.shape.input_frames, "mean": self.mean, "std": self.std}
        return official_fbank(waveform, **options, dtype=torch.float32)

    def _loss(self, features: torch.Tensor, masks: Iterator[torch.Tensor]) -> torch.Tensor:
        nce = self.model.discriminative(features, next(masks))
        return nce + self.config.objective.recon_weight * self.model.generative(features, next(masks))

    def _check(self) -> None:
        super()._check()
        data, mask = self.config.data, self.config.mask
        if (data.sample_rate, self.config.model.num_mel_bins) != (SAMPLE_RATE, MEL_BINS):
            raise UserError(
                f"data.sample_rate, model.num_mel_bins: {self.name!r} knows {SAMPLE_RATE} Hz and {MEL_BINS} mel bins "
                "only, not "
                f"{data.sample_rate} and {self.config.model.num_mel_bins}; measure without it"
            )
        most = self.config.architecture.num_patches - 2
        if mask.cluster is not None and mask.num_masked > most:
            raise UserError(
                f"mask.num_masked: {self.name!r} masks at most {most} patches, not {mask.num_masked}; measure "
                "without it"
            )


class Eager(StepBaseline):
    """Plain PyTorch as a practised user writes it: all of the batch at once on the device, one mask and one forward
    pass.
    """

    model_type = EagerModel
    model: EagerModel

    def __init__(self, config: Config, *args: Any, seed: int, **options: Any) -> None:
        super().__init__(config, *args, seed=seed, **options)
        self.precision = "bf16" if config.bf16 else "fp32"  # as the run's own step: what differs is not the precision
        self.name = f"eager {self.precision}"
        self.what = (
            "plain PyTorch as a practised user writes it: batched filter banks and masks on the device, one forward "
            f"pass in {self.precision}"
            f"{' by autocast' if config.bf16 else ''}, scaled_dot_product_attention, batched InfoNCE, "
            f"{'fused ' if self.device.type == 'cuda' else ''}{config.deepspeed['optimizer']['type']}; no metrics"
        )
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._forward: Callable[..., torch.Tensor] = self.model
        window, self._shift, self._fft = frame_geometry(config.data.sample_rate)
        self._window = torch.hann_window(window, periodic=False, dtype=torch.float64).to(self.device, torch.float32)
        filters = mel_filters(config.model.num_mel_bins, self._fft, config.data.sample_rate)
        self._filters = filters.T.to(self.device, torch.float32)  # [FFT / 2 + 1, F]

    def features(self, waveform: torch.Tensor) -> torch.Tensor:
        """As the base's; batched, on the device."""
        wave = waveform.to(self.device, non_blocking=True).float() / 32768.0
        frames = wave.unfold(1, len(self._window), self._shift)  # [B, T, window]
        frames = frames - frames.mean(dim=2, keepdim=True)
        previous = torch.cat((frames[..., :1], frames[..., :-1]), dim=2)
        spectrum = torch.fft.rfft((frames - PRE_EMPHASIS * previous) * self._window, n=self._fft)
        power = spectrum.real.square() + spectrum.imag.square()
        features = (power @ self._filters).clamp_min(LOG_FLOOR).log()
        features = functional.pad(features, (0, 0, 0, self.shape.input_frames - features.shape[1]))
        return (features - self.mean) / (2 * self.std)

    def draw_mask(self, batch: int) -> torch.Tensor:
        """The patches that come first when every one has drawn a number; in squares, when each has the lowest of those
        around it.
        """
        mask = self.config.mask
        options: dict[str, Any] = {"generator": self._generator, "device": self.device}
        order = torch.rand(batch, *self.shape.grid, **options)
        if mask.cluster is not None:
            of_sides = torch.stack([_lowest_around(order, side) for side in mask.cluster])
            side = torch.randint(len(mask.cluster), (batch,), **options)
            order = of_sides[side, torch.arange(batch, device=self.device)]
            # which of a square's are left when it has too many
            order = order + 1e-6 * torch.rand(order.shape, **options)
        return order.flatten(1).argsort(dim=1)[:, : mask.num_masked]

    def _loss(self, features: torch.Tensor, masks: Iterator[torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._forward(features, next(masks), self.config.objective.recon_weight)

    def _make_optimizer(self, **options: Any) -> torch.optim.Optimizer:
        return super()._make_optimizer(fused=True if self.device.type == "cuda" else None, **options)


class Compiled(Eager):
    """`Eager` with model and loss compiled as one graph, for the one shape of training."""

    def __init__(self, *args: Any, backend: str | Callable[..., Any] = "inductor", **options: Any) -> None:
        super().__init__(*args, **options)
        self.what = f"as {self.name}, with model and loss under torch.compile as one graph, in its default mode"
        self.name = "torch.compile"
        self._forward = torch.compile(self.model, fullgraph=True, dynamic=False, backend=backend)


def _lowest_around(x: torch.Tensor, side: int) -> torch.Tensor:
    """[B, f, t] -> of the square of `side` around each place the lowest value, of what lies on the grid."""
    lead, trail = side // 2, (side - 1) // 2
    padded = functional.pad(-x, (lead, trail, lead, trail), value=float("-inf"))
    return -functional.max_pool2d(padded, side, stride=1)


@contextlib.contextmanager
def _tf32_allowed() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def step_baselines(
    config: Config,
    model: nn.Module,
    device: torch.device,
    *,
    mean: float,
    std: float,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[StepBaseline]:
    """Baselines that begin with the weights of `model`, an ssast.engine.SSAST whole in memory; `names` picks some of
    them, in its order.

    Raises:
        UserError: an unknown name, or a config that a baseline asked for does not know.
    """
    kinds = {"official way": OfficialWay, "eager": Eager, "torch.compile": Compiled}
    for name in names or ():
        if name not in kinds:
            raise UserError(f"baseline {name!r}: unknown; there are {', '.join(kinds)}")
    weights = model.state_dict()
    return [
        kinds[name](config, weights, device, mean=mean, std=std, seed=seed)
        for name in (kinds if names is None else names)
    ]

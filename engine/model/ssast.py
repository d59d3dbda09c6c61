"""The Audio Spectrogram Transformer of SSAST: patch embedding, ViT encoder, two pretraining heads, and a classifier for
fine-tuning.

Shapes: B clips, T frames, F mel bins, f x t patch grid, P = f * t patches, K = 256 values of a patch, M masked patches,
V = P - M visible ones, D width, D' width of the decoder, H heads, N = 2 + P tokens, C classes. Patch p = frequency
index * t + time index; tokens are [cls, dist, patches...].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ssast.engine.spans import span
from ssast.kernels import (
    NUM_PREFIX,
    MSPMLoss,
    attention,
    embed_patches,
    embed_visible_patches,
    found_patches,
    fp8_linear,
    insert_mask_tokens,
    mspm_loss,
    patchify,
)
from ssast.kernels.attention import BACKENDS as ATTENTION_BACKENDS

from .config import PATCH_VALUES, LossConfig, ModelCard, ModelConfig
from .front_end import FrontEnd

T = TypeVar("T")


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_shape: tuple[int, int]) -> torch.Tensor:
    """[B, P, K] -> [B, T, F] for patches that do not overlap: the inverse of `patchify`."""
    tiles = patches.reshape(patches.shape[0], *grid, *patch_shape)  # [B, f, t, mel, frame]
    return tiles.permute(0, 2, 4, 1, 3).reshape(patches.shape[0], grid[1] * patch_shape[1], grid[0] * patch_shape[0])


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [B, P, K], index [B, M] -> [B, M, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _is_kept(context: Any, operator: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of selective checkpointing: what is dear to compute again."""
    is_dear = any(word in operator.name() for word in ("mm", "linear", "attention", "attn"))
    return CheckpointPolicy.MUST_SAVE if is_dear else CheckpointPolicy.PREFER_RECOMPUTE


_keep_products = functools.partial(create_selective_checkpoint_contexts, _is_kept)


class PatchEmbedding(nn.Module):
    """Holds what `embed_patches` needs, or where there is a decoder `embed_visible_patches`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.weight = nn.Parameter(torch.empty(width, config.patch_values))
        self.bias = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(NUM_PREFIX + config.num_patches, width))
        self.prefix = nn.Parameter(torch.empty(NUM_PREFIX, width))
        has_mask_token = config.pretraining_heads and not config.has_decoder
        self.mask_token = nn.Parameter(torch.empty(width)) if has_mask_token else None
        self.visible_only = config.has_decoder

    def forward(
        self, patches: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, P, K] -> tokens [B, 2 + P, D] and None; of visible patches only: tokens [B, 2 + V, D] and slot [B, P]."""
        if mask is not None and self.visible_only:
            return embed_visible_patches(patches, self.weight, self.bias, self.position, self.prefix, mask)
        tokens = embed_patches(patches, self.weight, self.bias, self.position, self.prefix, self.mask_token, mask)
        return tokens, None


class Attention(nn.Module):
    """Multi-head self-attention."""

    backend: str | None = None  # of `ssast.kernels.attention`

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, D] -> [B, N, D]
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        out = attention(q, k, v, backend=self.backend)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class WideLinear(nn.Linear):
    """The layers with most of the work, which may compute it in FP8."""

    fp8 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return fp8_linear(x, self.weight, self.bias) if self.fp8 else super().forward(x)


class MLP(nn.Module):
    """The two layers of a block behind its attention."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = WideLinear(width, hidden)
        self.fc2 = WideLinear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))  # the exact, erf form


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, mlp_ratio * width)
        self.activation_checkpointing = "none"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._transform(x)
        options: dict[str, Any] = {"context_fn": _keep_products} if self.activation_checkpointing == "selective" else {}
        return checkpoint(self._transform, x, use_reentrant=False, preserve_rng_state=False, **options)

    def _transform(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """From the encoder's visible tokens to whole clips: a linear map, mask tokens where patches are masked, positions
    once more, a few blocks and a norm (He et al. 2021, section 3; MAE-AST, Baade, Peng and Harwath 2022).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.head_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(NUM_PREFIX + config.num_patches, width))
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, config.mlp_ratio) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, encoded: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """[B, 2 + V, D], [B, P] as `embed_visible_patches` gives it -> [B, 2 + P, D']."""
        x = insert_mask_tokens(self.embed(encoded), self.mask_token, self.position, slot)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SSAST(nn.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig, card: ModelCard | None = None) -> None:
        super().__init__()
        self.config = config
        self.card = card or ModelCard()
        # tensors of an official file that no computation uses, kept for writing it back
        self.unused: dict[str, torch.Tensor] = {}
        self.embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.decoder = Decoder(config) if config.has_decoder else None
        if config.pretraining_heads:
            self.class_head = _two_layers(config.head_width)
            self.recon_head = _two_layers(config.head_width)
        if config.num_classes is not None:
            self.classifier = nn.Sequential(
                nn.LayerNorm(config.width, eps=1e-5), nn.Linear(config.width, config.num_classes)
            )
        if config.layer_weights:
            self.layer_weights = nn.Parameter(torch.zeros(1 + config.depth))

    def forward(self, compute: Callable[[SSAST], T]) -> T:
        """What `compute` returns of this model.

        Engines that wrap the model, DeepSpeed's and DistributedDataParallel, have this one way in; hooks of theirs
        around it find the tensors in what is returned.
        """
        return compute(self)

    @property
    def front_end(self) -> FrontEnd:
        """Waveforms to the features that this model takes."""
        return FrontEnd.of(self.config, self.card)

    def encode(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, F] normalised log-mel -> [B, 2 + P, D] tokens after the final norm; `mask` [B, M] patch numbers to
        hide. A model of `encoder_tokens` "visible" gives no tokens for hidden patches: [B, 2 + V, D].

        Raises:
            ValueError: features of another size than the model was built for.
        """
        return self._encode_patches(self._patchify(features), mask)[0]

    def pretrain(
        self,
        features: torch.Tensor,
        mask: torch.Tensor,
        recon_mask: torch.Tensor | None = None,
        *,
        softmax_over: str = "predictions",
        objective: str = "joint",
        recon_weight: float = 10.0,
    ) -> MSPMLoss:
        """The pretraining loss of a batch (SSAST, algorithm 1).

        Args:
            features: [B, T, F] normalised log-mel; also the target, in its own precision.
            mask: [B, M] patch numbers.
            recon_mask: a second mask for the reconstruction, in a forward pass of its own, as the official code does.
                None: one forward pass and one mask for both.
            softmax_over: see `ssast.kernels.mspm_loss`.
            objective: "joint", "discriminative" or "generative".
            recon_weight: lambda of the joint loss.

        Raises:
            ValueError: a model without pretraining heads, an unknown objective, or overlapping patches.
        """
        loss = LossConfig(objective, softmax_over, recon_weight)
        return self.pretrain_patches(self._patchify(features), mask, recon_mask, loss)

    def pretrain_patches(
        self,
        patches: torch.Tensor,  # [B, P, K]
        mask: torch.Tensor,
        recon_mask: torch.Tensor | None = None,
        loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    ) -> MSPMLoss:
        """`pretrain` of features that are in patch order already, as `FrontEnd.features(patch=...)` writes them.

        Raises:
            ValueError: as `pretrain`, or patches of another number or size than the model's.
        """
        self._check_pretraining()
        if patches.ndim != 3 or patches.shape[1:] != (self.config.num_patches, self.config.patch_values):
            raise ValueError(
                f"patches must be [B, {self.config.num_patches}, {self.config.patch_values}] for this model, not "
                f"{tuple(patches.shape)}"
            )
        if recon_mask is None:
            return self._masked_loss(patches, mask, loss)
        if loss.objective != "joint":
            raise ValueError(f"recon_mask belongs to the joint objective, not to the {loss.objective} one")
        nce_half = self._masked_loss(patches, mask, replace(loss, objective="discriminative"))
        mse_half = self._masked_loss(patches, recon_mask, replace(loss, objective="generative"))
        total = nce_half.nce + loss.recon_weight * mse_half.mse
        return MSPMLoss(total, nce_half.nce, mse_half.mse, nce_half.accuracy)

    @torch.no_grad()
    def reconstruct(
        self, features: torch.Tensor, mask: torch.Tensor, *, softmax_over: str = "predictions"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pretrained heads make of masked clips.

        Returns:
            [B, T', F'] the reconstruction in the masked patches and NaN elsewhere (T', F': what whole patches cover),
            and [B, M] bool: which masked patches were found, by the rule of the pretext accuracy.
        """
        self._check_pretraining()
        patches = self._patchify(features)
        tokens = gather_rows(self._predictor_tokens(patches, mask), mask + NUM_PREFIX)  # [B, M, D']
        canvas = torch.full_like(patches, float("nan"))
        canvas.scatter_(1, mask[..., None].expand(-1, -1, patches.shape[2]), self.recon_head(tokens).to(patches.dtype))
        matches = found_patches(
            self.class_head(tokens).to(patches.dtype), patches, mask=mask, softmax_over=softmax_over
        )
        return unpatchify(canvas, self.config.grid, self.config.patch_shape), matches

    def classify(self, features: torch.Tensor, pool: str | None = None) -> torch.Tensor:
        """[B, T, F] -> [B, C] logits; pool: "mean" of the patch tokens, "cls": mean of the cls and the dist token,
        None: the card's.

        Raises:
            ValueError: a model without classifier, or an unknown `pool`.
        """
        if self.config.num_classes is None:
            raise ValueError("this model has no classifier: load it with num_classes=...")
        pool = self.card.pool if pool is None else pool
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool must be 'mean' or 'cls', not {pool!r}")
        tokens = self._weighted_layers(self._patchify(features)) if self.config.layer_weights else self.encode(features)
        pooled = tokens[:, NUM_PREFIX:].mean(dim=1) if pool == "mean" else tokens[:, :NUM_PREFIX].mean(dim=1)
        return self.classifier(pooled)

    def _patchify(self, features: torch.Tensor) -> torch.Tensor:
        frames, bins = self.config.input_frames, self.config.num_mel_bins
        if features.ndim != 3 or features.shape[1:] != (frames, bins):
            raise ValueError(
                f"features must be [B, {frames}, {bins}] (frames x mel bins) for this model, not "
                f"{tuple(features.shape)}; "
                "load it with input_frames=... for another length"
            )
        return patchify(features, self.config.patch_shape, self.config.stride)

    def _masked_loss(self, patches: torch.Tensor, mask: torch.Tensor, loss: LossConfig) -> MSPMLoss:
        tokens = self._predictor_tokens(patches, mask)
        with span("heads + loss"):
            return self._heads_and_loss(tokens, patches, mask, loss)

    def _encode_patches(
        self, patches: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The encoder's tokens, and the slots that the embedding gave."""
        with span("mask + embed"):
            x, slot = self.embedding(patches, mask)
        with span("encoder forward"):
            return self._encoder(x), slot

    def _predictor_tokens(self, patches: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, P, K], [B, M] -> [B, 2 + P, D']: what the heads pick the masked patches from."""
        x, slot = self._encode_patches(patches, mask)
        if self.decoder is None:
            return x
        with span("decoder forward"):
            return self.decoder(x, slot)

    def _weighted_layers(self, patches: torch.Tensor) -> torch.Tensor:  # [B, P, K] -> [B, N, D]
        x, _ = self.embedding(patches)
        weights = self.layer_weights.softmax(dim=0)
        total = weights[0] * x
        for weight, block in zip(weights[1:], self.blocks, strict=True):
            x = block(x)
            total = total + weight * x
        return total

    # --- the parts that torch.compile is given, beside the decoder ----------------------------------------------------

    def _encoder(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, D] -> [B, N, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _heads_and_loss(
        self,
        tokens: torch.Tensor,  # [B, N, D']
        patches: torch.Tensor,
        mask: torch.Tensor,
        loss: LossConfig,
    ) -> MSPMLoss:
        masked = gather_rows(tokens, mask + NUM_PREFIX)  # [B, M, D']
        class_pred = self.class_head(masked) if loss.objective != "generative" else None
        recon_pred = self.recon_head(masked) if loss.objective != "discriminative" else None
        return mspm_loss(
            class_pred,
            recon_pred,
            patches,
            mask=mask,
            softmax_over=loss.softmax_over,
            recon_weight=loss.recon_weight,
        )

    def _all_blocks(self) -> list[Block]:
        return [*self.blocks, *(self.decoder.blocks if self.decoder is not None else ())]

    def checkpoint_activations(self, kind: str) -> None:
        """What the backward pass computes again: "none", "selective" (all of a block but its products and attention),
        or "block" (all).
        """
        for block in self._all_blocks():
            block.activation_checkpointing = kind

    def use_attention(self, backend: str | None) -> None:
        """Compute attention in every block, the decoder's included, with this backend of `ssast.kernels.attention`.
        None: PyTorch's own choice, which a model has from the start.

        Raises:
            ValueError: an unknown backend. Whether a known one can run depends on device, dtype and head dimension:
                `attention` checks it in each call.
        """
        if backend is not None and backend not in ATTENTION_BACKENDS:
            raise ValueError(f"attention backend must be one of {', '.join(ATTENTION_BACKENDS)}, not {backend!r}")
        for block in self._all_blocks():
            block.attn.backend = backend

    def use_fp8(self) -> None:
        """Compute the products of the MLPs in FP8 (`ssast.kernels.fp8_linear`)."""
        for module in self.modules():
            if isinstance(module, WideLinear):
                module.fp8 = True

    def compile_regions(self, regions: str, **options: Any) -> None:
        """Have torch.compile make the encoder one graph and the decoder another ("encoder"), or each block ("blocks":
        equal, they share the code of one), and heads and loss one more. `options` are torch.compile's.
        """
        if regions == "encoder":
            setattr(self, "_encoder", torch.compile(self._encoder, **options))  # noqa: B010 - in place of the method
            if self.decoder is not None:
                self.decoder.compile(**options)
        else:
            for block in self._all_blocks():
                block.compile(**options)
        setattr(self, "_heads_and_loss", torch.compile(self._heads_and_loss, **options))  # noqa: B010

    def _check_pretraining(self) -> None:
        if not self.config.pretraining_heads:
            raise ValueError("this model has no pretraining heads: it was built or saved for fine-tuning")
        if self.config.stride != self.config.patch_shape:
            raise ValueError(f"pretraining needs patches that do not overlap, not stride {self.config.stride}")


def _two_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PATCH_VALUES))

"""Models as one graph from waveform to output, for programs that know nothing of this engine: ONNX and `torch.export`.

The front end is inside: what `ssast.kernels.fbank` computes by its PyTorch reference is traced as it stands, so the
graph holds Kaldi's filter bank in PyTorch's own operators, equal to the one of training. The window is fixed: as many
samples as the model's frames take.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssast.engine.errors import UserError
from ssast.engine.files import atomic_write
from ssast.engine.model.ssast import SSAST
from ssast.kernels import NUM_PREFIX
from ssast.kernels.fbank import count_frames, samples_of

TOLERANCE = 1e-3
"""Of a written file's output, in units of its largest value or of 1, above which it is thrown away: a wrong graph, not
rounding."""

CARD_FILE = "card.json"
"""Inside a `.pt2`: what the metadata of an ONNX file hold."""


class FromWaveform(nn.Module):
    """waveform [B, S] float32, lengths [B] int64 samples -> logits [B, C]; without classifier: embedding [B, D], tokens
    [B, 2 + P, D].

    The embedding is what `ssast.engine.inference.embed` gives for a clip of one window: the mean of the patch tokens
    that hold sound, or with `pool` "cls" of the prefix tokens. A clip too short for a frame counts as one step of
    silence.
    """

    def __init__(self, model: SSAST) -> None:
        """A clean copy: float32, on the CPU, nothing compiled, without decoder and heads of pretraining."""
        super().__init__()
        self.model = SSAST(dataclasses.replace(model.config, pretraining_heads=False), model.card)
        used, weights = self.model.state_dict(), model.state_dict()
        self.model.load_state_dict({name: weights[name].detach().cpu().float() for name in used})
        self.eval()

    @property
    def output_names(self) -> list[str]:
        """Of what `forward` returns, in its order."""
        return ["embedding", "tokens"] if self.model.config.num_classes is None else ["logits"]

    def forward(
        self, waveform: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the class says; waveforms are in [-1, 1]."""
        config, card = self.model.config, self.model.card
        features = self.model.front_end.features(waveform, lengths, backend="torch")
        if config.num_classes is not None:
            return self.model.classify(features)
        tokens = self.model.encode(features)
        if card.pool == "cls":
            return tokens[:, :NUM_PREFIX].mean(dim=1), tokens
        frames = count_frames(lengths.clamp(0, waveform.shape[1]), card.sample_rate)
        steps = ((frames + config.stride[1] - 1) // config.stride[1]).clamp(1, config.grid[1])  # [B]
        columns = tokens[:, NUM_PREFIX:].unflatten(1, config.grid).mean(dim=1)  # [B, t, D]
        is_heard = torch.arange(config.grid[1], device=tokens.device)[None, :] < steps[:, None]
        return torch.where(is_heard[..., None], columns, 0.0).sum(dim=1) / steps[:, None], tokens


def input_samples(model: SSAST) -> int:
    """Samples of the window: what the model's frames take."""
    return samples_of(model.config.input_frames, model.card.sample_rate)


def export_torch(model: SSAST, out: Path) -> float:
    """Write a `torch.export` program; returns the largest deviation of its output from the model's.

    Raises:
        UserError: a program that does not compute what the model does, or one with operators of this engine inside.
    """
    module = FromWaveform(model)
    with atomic_write(out, suffix=".tmp.pt2") as aside:
        torch.export.save(_traced(module), aside, extra_files={CARD_FILE: json.dumps(describe(model))})
        program = torch.export.load(aside).module()
        waveform, lengths = example(model)
        return _deviation(module, _as_tuple(program(waveform, lengths)), out)


def export_onnx(model: SSAST, out: Path) -> float | None:
    """Write an ONNX file with inputs `waveform` and `lengths`, which may be left out: then all clips fill the window.

    Returns:
        The largest deviation of onnxruntime's output from the model's; None where onnxruntime is not installed.

    Raises:
        UserError: onnx or onnxscript are not installed, or a graph that does not compute what the model does.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")
    import onnx

    module = FromWaveform(model)
    proto = _to_onnx(module)
    with atomic_write(out) as aside:
        onnx.save(proto, aside)
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        return _deviation(module, _run_onnx(aside, *example(model)), out)


def describe(model: SSAST) -> dict[str, Any]:
    """What a caller of the graph must know, as JSON holds it."""
    return dataclasses.asdict(model.card) | {
        "input_samples": input_samples(model),
        "model": dataclasses.asdict(model.config),
    }


def example(model: SSAST) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clips of noise and their lengths: a whole window, part of one, and one that is too short for a frame."""
    samples = input_samples(model)
    waveform = 0.1 * torch.randn(3, samples, generator=torch.Generator().manual_seed(0))
    return waveform, torch.tensor([samples, samples // 3, 10])


def _traced(module: FromWaveform) -> torch.export.ExportedProgram:
    waveform, lengths = example(module.model)
    with torch.no_grad():
        # fills the cache of filters; while tracing, it would be filled with stand-ins
        module(waveform[:1], lengths[:1])
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(
            module, (waveform, lengths), dynamic_shapes={"waveform": {0: batch}, "lengths": {0: batch}}
        )
    foreign = {str(op) for op in _operators(program) if op.namespace != "aten"}
    if foreign:
        raise UserError(
            f"operators that only this process has were traced: {', '.join(sorted(foreign))}; use `ssast export` "
            "instead"
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _operators(program: torch.export.ExportedProgram) -> list[torch._ops.OpOverload]:
    return [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def _to_onnx(module: FromWaveform) -> Any:
    import onnx

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of torchvision, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _traced(module),
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=["waveform", "lengths"],
                output_names=module.output_names,
            )
            assert program is not None  # it is for dynamo=True
            proto = program.model_proto
    finally:
        logger.setLevel(level)
    samples = input_samples(module.model)
    graph = proto.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"
    # an input with a value of its own may be left out; one number then stands for all clips
    graph.input[1].type.tensor_type.shape.dim[0].dim_param = "batch_or_1"
    graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor([samples]).numpy(), "lengths"))
    for part in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph]:
        del part.metadata_props[:]  # where in this machine's files each node came from
        part.doc_string = ""
    onnx.helper.set_model_props(proto, {"ssast": json.dumps(describe(module.model))})
    onnx.checker.check_model(proto)
    return proto


def _run_onnx(file: Path, waveform: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return tuple(
        torch.from_numpy(x) for x in session.run(None, {"waveform": waveform.numpy(), "lengths": lengths.numpy()})
    )


def _deviation(module: FromWaveform, outputs: tuple[torch.Tensor, ...], out: Path) -> float:
    with torch.no_grad():
        expected = _as_tuple(module(*example(module.model)))
    worst = 0.0
    for name, theirs, ours in zip(module.output_names, outputs, expected, strict=True):
        worst = max(worst, check_equal(theirs, ours, f"{out}: {name}"))
    return worst


def check_equal(theirs: torch.Tensor, ours: torch.Tensor, what: str) -> float:
    """The largest deviation.

    Raises:
        UserError: it is beyond `TOLERANCE`, or something is not finite.
    """
    deviation = (theirs - ours).abs().max().item()
    if not deviation <= TOLERANCE * max(1.0, ours.abs().max().item()):
        raise UserError(f"{what} differs by {deviation:.1e} from the model's, so nothing was written")
    return deviation


def _as_tuple(output: Any) -> tuple[torch.Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else tuple(output)

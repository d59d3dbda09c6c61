"""How a step is computed: compiled or not, plain or DeepSpeed, with which optimizer, norm and checkpointing. Nothing of
it may change what is learned.
"""

import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from training_runs import SMALL, free_port

from ssast.engine.config import Config
from ssast.engine.distributed.ranks import Ranks
from ssast.engine.errors import UserError
from ssast.engine.model.adapt import build_model
from ssast.engine.model.config import ModelConfig
from ssast.engine.model.ssast import SSAST
from ssast.engine.training.auto_batch import AutoBatch, activation_bytes, find_auto_batch, with_micro_batch
from ssast.engine.training.backends import choose_backend
from ssast.engine.training.backends.ddp import PlainEngine
from ssast.engine.training.compilation import Compilation, choose_compile
from ssast.engine.training.pretraining import Pretraining
from ssast.engine.training.step import TrainingStep, build_optimizer, choose_optimizer, use_norms
from ssast.kernels.attention import BACKENDS

SHAPE = ModelConfig(depth=2, input_frames=64)
CPU = torch.device("cpu")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.stack([torch.randperm(32, generator=generator)[:20].sort().values for _ in range(4)])
    return torch.randn(4, 32, 256, generator=generator), mask


@pytest.fixture
def alone():
    """A world of this process."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield Ranks(0, 1, CPU, dist.group.WORLD)
    dist.destroy_process_group()


def gradients(model: SSAST, batch: tuple, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.pretrain_patches(*batch, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["selective", "block"])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_changes_memory_and_nothing_else(batch, kind, compiled):
    plain, saving = build_model(SHAPE), build_model(SHAPE)
    saving.checkpoint_activations(kind)
    if compiled:
        saving.compile_regions("encoder", fullgraph=True, dynamic=False, backend="aot_eager")
    for (name, ours), theirs in zip(gradients(saving, batch).items(), gradients(plain, batch).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_activation_checkpointing_saves_memory():
    config = Config.model_validate({**SMALL, "model": {**SMALL["model"], "depth": 4}})
    kept = {}
    for kind in ("none", "selective", "block"):
        model = build_model(config.architecture)
        model.checkpoint_activations(kind)
        kept[kind] = activation_bytes(model, config, CPU, 4)
    # selective checkpointing keeps products and attention in a place of its own, which is not counted here
    assert kept["block"] < 0.5 * kept["none"] and kept["selective"] < 0.5 * kept["none"]


@pytest.mark.parametrize("regions", ["encoder", "blocks"])
@pytest.mark.parametrize("separate", [False, True])
def test_compiled_regions_give_the_same_gradients_in_whole_graphs(batch, regions, separate):
    """backend="aot_eager" traces forward and backward without making code of them."""
    plain, compiled = build_model(SHAPE), build_model(SHAPE)
    Compilation(compiled, regions, "default", backend="aot_eager")
    options = {"recon_mask": batch[1].flip(0)} if separate else {}
    for (name, ours), theirs in zip(
        gradients(compiled, batch, **options).items(), gradients(plain, batch, **options).values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_blocks_are_compiled_once_for_all(batch):
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = build_model(ModelConfig(depth=5, input_frames=64))
    Compilation(model, "blocks", "default", backend=count)
    model.pretrain_patches(*batch)
    assert len(graphs) == 2, "one for all blocks, one for heads and loss"


def test_having_to_compile_again_ends_the_run_with_a_line(batch):
    torch._dynamo.reset()
    model = build_model(SHAPE)
    compilation = Compilation(model, "encoder", "default", backend="aot_eager")
    for _ in range(3):
        with compilation.micro_batch():
            model.pretrain_patches(*batch)
        compilation.step_done()
    with compilation.left_out(), torch.no_grad():  # validation: other shapes are welcome
        model.pretrain_patches(*(tensor[:3] for tensor in batch))
    with compilation.micro_batch():
        model.pretrain_patches(*batch)
    with pytest.raises(UserError, match=r"step\.compile: .* after 3 steps"), compilation.micro_batch():
        model.pretrain_patches(*(tensor[:3] for tensor in batch))


def test_what_is_compiled_when_nothing_is_said():
    def settle(compile: str = "auto", device: str = "cuda", stage: int = 1, ranks: int = 1) -> str:
        return choose_compile(compile, device=torch.device(device), zero_stage=stage, world_size=ranks)[0]

    assert settle() == "encoder" and settle(ranks=8) == "blocks"
    assert settle(device="cpu") == "off" and settle(stage=3) == "off"
    assert settle("blocks", device="cpu") == "blocks"
    with pytest.raises(UserError, match="ZeRO 3"):
        settle("encoder", stage=3)


@pytest.mark.parametrize("regions", ["off", "encoder", "blocks"])
def test_attention_is_chosen_for_every_block_of_one_model(batch, monkeypatch, regions):
    """A backend that gives v: every block of encoder and decoder that takes it moves the loss."""
    monkeypatch.setitem(BACKENDS, "math", lambda q, k, v: v)
    torch._dynamo.reset()
    shape = replace(SHAPE, depth=1, encoder_tokens="visible", decoder_depth=1)
    losses = {}
    for name in ("plain", "by hand", "chosen"):
        model = build_model(shape)
        if name == "by hand":
            for block in (*model.blocks, *model.decoder.blocks):
                monkeypatch.setattr(block.attn, "backend", "math")
        if name == "chosen":
            model.use_attention("math")
        if regions != "off":
            model.compile_regions(regions, fullgraph=True, dynamic=False, backend="eager")
        losses[name] = model.pretrain_patches(*batch).loss.item()
        with torch.no_grad():  # other models know nothing of it
            assert build_model(shape).pretrain_patches(*batch).loss.item() == pytest.approx(losses["plain"], rel=1e-5)
        if name == "chosen":
            model.use_attention(None)  # compiled code sees it
            assert model.pretrain_patches(*batch).loss.item() == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["chosen"] == losses["by hand"] != pytest.approx(losses["plain"], rel=1e-5)
    with pytest.raises(ValueError, match=r"must be one of torch, math, flash, cudnn, .*, triton, not 'fast'"):
        model.use_attention("fast")


def test_the_step_gives_the_model_the_attention_that_the_config_names(alone):
    """With neither a trainer nor a verb around it, as benchmarks build it."""
    for given, expected in (("math", "math"), ("auto", "torch")):
        config = Config.model_validate({**SMALL, "step": {"engine": "ddp", "attention": given}})
        card = types.SimpleNamespace(mean=0.0, std=1.0)
        model, objective = build_model(config.architecture), Pretraining(config, card, alone)
        step = TrainingStep(config, model, alone, objective, choose_backend("ddp"))
        assert step.describe()["attention"] == expected
        assert {block.attn.backend for block in model.blocks} == {expected}
        step.engine.release()


def test_fp8_mlps_learn_much_the_same(batch):
    """Emulated: factors with 3 mantissa bits in the MLPs' products move the loss by well under a percent, and turn the
    gradient, which before training hangs on small differences, by less than 25 degrees.
    """
    plain, coarse = build_model(SHAPE), build_model(SHAPE)
    coarse.use_fp8()
    exact, rough = plain.pretrain_patches(*batch).loss, coarse.pretrain_patches(*batch).loss
    assert exact != rough and rough.item() == pytest.approx(exact.item(), rel=1e-2)
    ours, theirs = (
        torch.cat([value.flatten() for value in gradients(model, batch).values()]) for model in (coarse, plain)
    )
    assert 0.9 < torch.nn.functional.cosine_similarity(ours, theirs, dim=0) < 1 - 1e-6


COUNT_WAITS = """
import collections, sys, tempfile
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from deepspeed.accelerator import get_accelerator
from ssast.benchmarks.throughput.measure import in_memory, nothing_to_read, pretrainer, run_steps, undisturbed
from ssast.engine.config import load_config
from ssast.engine.distributed.ranks import join_ranks
from ssast.engine.model import front_end

seen = collections.Counter()
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_fill_.Tensor", "aten::lift_fresh"
}

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        if name in WAITS:
            seen[name] += 1
        return operator(*args, **(kwargs or {}))

def fbank_uncounted(*args, fbank=front_end.fbank, **options):
    with _disable_current_modes():  # on a CPU, and there alone, it looks at the samples
        return fbank(*args, **options)

front_end.fbank = fbank_uncounted
ranks = join_ranks()
for stage, check in ((0, False), (1, False), (2, False), (3, False), (1, True)):
    settings = [f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true", "model.depth=1"]
    settings += ["model.input_frames=64", "mask.num_masked=20", "deepspeed.train_micro_batch_size_per_gpu=2"]
    settings += ["step.optimizer=torch-fused"]  # as on a GPU
    if check:
        settings += ["deepspeed.bf16.check_grad_overflow=true"]
    with tempfile.TemporaryDirectory() as folder:
        config = undisturbed(load_config("demo", settings), Path(folder))
        trainer = pretrainer(config, nothing_to_read(config), ranks)
        batches = iter(in_memory(trainer, ranks.device))
        run_steps(trainer, batches, 2)
        synchronize = get_accelerator().synchronize
        get_accelerator().synchronize = lambda *arguments: seen.update(["synchronize"])
        with Count():
            run_steps(trainer, batches, 2)
        get_accelerator().synchronize = synchronize
    print("counted", stage, dict(seen))
    seen.clear()
"""


@pytest.mark.slow
def test_no_step_of_deepspeed_waits_for_the_device():
    """Counted on the CPU: reading a number back, making a tensor of one, or asking for a wait. With the check that
    DeepSpeed makes unless told otherwise there is something to count.
    """

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT_WAITS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    *counted, with_check = [line for line in done.stdout.splitlines() if line.startswith("counted")]
    # of ZeRO 3 a number made in each step is left
    assert counted == ["counted 0 {}", "counted 1 {}", "counted 2 {}", "counted 3 {'aten::lift_fresh': 2}"]
    assert "_local_scalar_dense" in with_check


SECTION = {
    "Adam": {"lr": 2e-4, "betas": [0.95, 0.999], "weight_decay": 0.1},
    "AdamW": {"lr": 2e-4, "weight_decay": 0.1},
}


class FakeFusedAdam(torch.optim.Adam):
    """NVIDIA's, by its documented meaning: adam_w_mode decouples the weight decay."""

    def __init__(self, params, *, adam_w_mode: bool = True, **options) -> None:
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **options)


class FakeFusedLayerNorm(torch.nn.LayerNorm):
    pass


@pytest.fixture
def apex(monkeypatch) -> None:
    for name, feature in (
        ("optimizers", {"FusedAdam": FakeFusedAdam}),
        ("normalization", {"FusedLayerNorm": FakeFusedLayerNorm}),
    ):
        module = types.ModuleType(f"apex.{name}")
        vars(module).update(feature)
        monkeypatch.setitem(sys.modules, f"apex.{name}", module)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("backend", ["torch-fused", "apex"])
def test_optimizers_take_the_same_steps(batch, apex, kind, backend):
    losses = {}
    for name in ("torch", backend):
        model = build_model(SHAPE)
        optimizer, used = build_optimizer(
            [{"params": list(model.parameters())}], {"type": kind, "params": SECTION[kind]}, name, CPU
        )
        assert used == name
        losses[name] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model.pretrain_patches(*batch).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses[backend] == pytest.approx(losses["torch"], rel=1e-4)
    assert losses["torch"][-1] < losses["torch"][0] - 0.1


def test_apex_is_taken_where_it_is_there_and_asked_for_by_name_where_it_is_not(monkeypatch, apex):
    cuda = torch.device("cuda")
    assert choose_optimizer("auto", cuda) == "apex" and choose_optimizer("auto", CPU) == "torch-fused"
    model = build_model(SHAPE)
    names = list(model.state_dict())
    assert use_norms(model, "auto", device=cuda, compiled=True) == "torch"
    assert use_norms(model, "auto", device=cuda, compiled=False) == "apex"
    assert isinstance(model.norm, FakeFusedLayerNorm) and isinstance(model.blocks[1].norm2, FakeFusedLayerNorm)
    assert list(model.state_dict()) == names and model.norm.eps == 1e-6
    monkeypatch.delitem(sys.modules, "apex.optimizers")  # now as the project of that name on PyPI
    assert choose_optimizer("auto", cuda) == "torch-fused"
    with pytest.raises(UserError, match=r"step\.optimizer: there is no apex\.optimizers\.FusedAdam"):
        build_optimizer([{"params": list(model.parameters())}], {"type": "Adam", "params": {"lr": 1e-3}}, "apex", cuda)


def test_norm_backends_give_the_same_loss(batch, apex):
    plain, fused = build_model(SHAPE), build_model(SHAPE)
    use_norms(fused, "apex", device=CPU, compiled=False)
    assert plain.pretrain_patches(*batch).loss == fused.pretrain_patches(*batch).loss
    assert gradients(fused, batch).keys() == gradients(plain, batch).keys()


@pytest.mark.parametrize("clipping", [0.0, 0.1])
def test_plain_engine_accumulates_to_the_whole_batch(alone, batch, clipping):
    weights = []
    for accumulation in (1, 2):
        model = build_model(SHAPE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = PlainEngine(model, optimizer, accumulation=accumulation, clipping=clipping, all_used=True)
        for part in range(accumulation):
            rows = slice(part * 4 // accumulation, (part + 1) * 4 // accumulation)
            part = [tensor[rows] for tensor in batch]
            engine.backward(engine(lambda model, part=part: model.pretrain_patches(*part)).loss)
            norm = engine.step()
        assert norm is not None and norm > clipping
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_auto_batch_cuts_the_batch_into_what_fits(alone, monkeypatch):
    config = Config.model_validate({**SMALL, "deepspeed": {**SMALL["deepspeed"], "train_batch_size": 96}})
    for fitting, expected in ((1000, (96, 1)), (50, (48, 2)), (7, (6, 16)), (1, (1, 96))):
        monkeypatch.setattr(
            "ssast.engine.training.auto_batch.largest_micro_batch", lambda config, ranks, fitting=fitting: fitting
        )
        found = find_auto_batch(config, alone)
        assert (found.used, found.accumulation) == expected
        assert with_micro_batch(config, found, 1).batch_sizes(1) == expected
    assert str(AutoBatch(50, 48, 2)) == "micro-batch 48 x 2 (up to 50 clips fit)"


def test_auto_batch_follows_the_memory_there_is(alone, monkeypatch):
    config, found = Config.model_validate(SMALL), []
    for gib in (1, 4):
        monkeypatch.setattr("psutil.virtual_memory", lambda gib=gib: types.SimpleNamespace(available=gib << 30))
        found.append(find_auto_batch(config, alone).largest)
    assert 3 < found[1] / found[0] < 6
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=1 << 20))
    with pytest.raises(UserError, match="not even one clip"):
        find_auto_batch(config, alone)

import gzip
import json
import time
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ssast.benchmarks.throughput.timeline import (
    PARTS,
    busy_seconds,
    floor_seconds,
    read_trace,
    short_name,
    step_parts,
    top_kernels,
)
from ssast.engine.spans import span

MAIN, AUTOGRAD, LOADER, GLOO = 100, 101, 102, 103  # threads
GEMM = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_nn_align8>(cutlass::Params)"
ADAM = (
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, "
    "FusedAdamMathFunctor<float, 4> >(int)"
)
BF16 = "c10::BFloat16"


class Written:
    """Events as Kineto writes them, times in us."""

    def __init__(self):
        self.events = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}}]

    def add(self, cat, name, start, end, thread=MAIN, **args):
        self.events.append(
            {
                "ph": "X",
                "cat": cat,
                "name": name,
                "pid": 1,
                "tid": thread,
                "ts": start,
                "dur": end - start,
                "args": args,
            }
        )

    def span(self, part, start, end):
        self.add("user_annotation", f"ssast::{part}", start, end)

    def operator(self, name, start, end, thread=MAIN, dims=(), types=()):
        self.add("cpu_op", name, start, end, thread, **{"Input Dims": dims, "Input type": types})

    def launch(self, name, at, start, end, thread=MAIN, cat="kernel", stream=7):
        correlation = len(self.events)
        api = "cuda_runtime" if cat != "kernel" else "cuda_driver"
        self.add(api, "launch", at, at + 2, thread, correlation=correlation)
        self.add(cat, name, start, end, stream, correlation=correlation, stream=stream)

    def write(self, path):
        text = json.dumps({"schemaVersion": 1, "distributedInfo": {"rank": 0}, "traceEvents": self.events})
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return path


def gpu_step(written, begin, wait):
    """On the device from `begin` on: the loader's copy 3-6, zeros 7-8, the loader's cast 14-16. From `at` on: copy
    10-40, fill 44-46, gemm 50-150, loss 150-170, mm 180-380, NCCL 300-430, adam 420-500, add 500-505; the loader's copy
    100-120 hides.
    """
    at = begin + 10 + wait
    written.span("step", begin, at + 400)
    written.launch("Memcpy HtoD (Pinned -> Device)", begin + 2, begin + 3, begin + 6, LOADER, "gpu_memcpy", 13)
    written.launch("zeros_kernel", begin + 5, begin + 7, begin + 8)  # before any range
    written.span("data wait", begin + 10, at)
    written.launch("cast_kernel", begin + 12, begin + 14, begin + 16, LOADER, stream=13)
    written.span("copy", at, at + 20)
    written.launch("Memcpy HtoD (Pageable -> Device)", at + 5, at + 10, at + 40, cat="gpu_memcpy")
    written.span("encoder forward", at + 30, at + 60)
    written.operator("ssast::fbank", at + 31, at + 48)  # an operator of that name is no range
    written.operator("aten::linear", at + 33, at + 47, dims=[[512, 256], [768, 256], [768]], types=[BF16] * 3)
    written.operator("aten::addmm", at + 35, at + 45, dims=[[768], [512, 256], [256, 768], [], []], types=[BF16] * 3)
    written.launch("Memset (Device)", at + 36, at + 44, at + 46, cat="gpu_memset")
    written.launch(GEMM, at + 40, at + 50, at + 150)
    written.add("gpu_user_annotation", "ssast::encoder forward", at + 44, at + 150, 7)
    written.span("heads + loss", at + 60, at + 80)
    written.launch("loss_kernel", at + 70, at + 150, at + 170)
    written.span("backward", at + 80, at + 300)
    written.launch("Memcpy HtoD (Pinned -> Device)", at + 85, at + 100, at + 120, LOADER, "gpu_memcpy", 13)
    written.operator("aten::mm", at + 90, at + 100, AUTOGRAD, dims=[[64, 32], [32, 16]], types=["float", "float"])
    written.launch("sgemm_kernel", at + 95, at + 180, at + 380, AUTOGRAD)
    written.launch(
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(Args<4096ul>)", at + 110, at + 300, at + 430, AUTOGRAD, stream=20
    )
    written.span("optimizer", at + 300, at + 350)
    written.launch(ADAM, at + 310, at + 420, at + 500)
    written.launch("add_kernel", at + 360, at + 500, at + 505)  # outside any range


@pytest.fixture
def gpu_trace(tmp_path):
    written = Written()
    written.add("kernel", "launched before the profiler began", 121, 122, 7, correlation=-1)
    for begin, wait in ((0, 100), (1100, 300), (2000, 50)):
        gpu_step(written, begin, wait)
    return read_trace(written.write(tmp_path / "trace.json.gz"))


def test_parts_of_a_gpu_step(gpu_trace):
    parts = step_parts(gpu_trace)
    # The steps last from 7 to 1107 and to 2007; the third only marks the second's end. The device is idle (from the
    # step's begin) at 8-14 and 16-120, of which 10-110 waits for data, or 8-14 and 16-320, of which 10-310 does; in
    # both at 40-44, 46-50 and 170-180 of `at`; and at 615-1103 and 1106-1107, or 1915-2003 and 2006-2007.
    expected = dict.fromkeys(PARTS, 0.0) | {
        "data wait": ((4 + 94) + (4 + 294)) / 2,
        "copy": 3 + 1 + 2 + 30,
        "encoder forward": 2 + 100,
        "heads + loss": 20,
        "backward": 200,
        "communication": 420 - 380,
        "optimizer": 80 + 5,
        "host gaps": 2 + 10 + (4 + 4 + 10) + ((488 + 1) + (88 + 1)) / 2,
    }
    assert parts.steps == 2
    assert list(parts.seconds) == list(PARTS)
    assert {part: seconds * 1e6 for part, seconds in parts.seconds.items()} == pytest.approx(expected, rel=1e-12)
    assert parts.step_seconds == pytest.approx((1100 + 900) / 2 * 1e-6, rel=1e-12)
    assert sum(parts.seconds.values()) == pytest.approx(parts.step_seconds, rel=1e-9)
    assert busy_seconds(gpu_trace) == pytest.approx((36 + 102 + 20 + 200 + 40 + 85) * 1e-6, rel=1e-12)


def test_kernels_of_a_gpu_step(gpu_trace):
    rows = {row.name: row for row in top_kernels(gpu_trace)}
    seconds = {name: row.seconds * 1e6 for name, row in rows.items()}
    assert seconds == pytest.approx(
        {
            "sgemm_kernel": 200,
            "ncclDevKernel_AllReduce_Sum_f32_RING_LL": 130,
            "Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_nn_align8>": 100,
            "multi_tensor_apply_kernel<FusedAdamMathFunctor>": 80,
            "Memcpy HtoD (Pageable -> Device)": 30,
            "Memcpy HtoD (Pinned -> Device)": 23,
            "loss_kernel": 20,
            "add_kernel": 5,
            "Memset (Device)": 2,
            "cast_kernel": 2,
            "zeros_kernel": 1,
        }
    )
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert [row.name for row in top_kernels(gpu_trace, 2)] == list(rows)[:2]
    assert rows["ncclDevKernel_AllReduce_Sum_f32_RING_LL"].part == "communication"
    assert rows["Memcpy HtoD (Pinned -> Device)"].part == "copy"
    assert rows["Memcpy HtoD (Pinned -> Device)"].calls == 2

    # the work of addmm goes to its gemm alone, not to its fill; of other kernels nothing is known
    known = {row.name for row in rows.values() if row.flop is not None}
    assert known == {short_name(GEMM), "sgemm_kernel"}
    gemm, sgemm = rows["Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_nn_align8>"], rows["sgemm_kernel"]
    assert (gemm.calls, gemm.part, gemm.flop) == (1, "encoder forward", 2 * 512 * 256 * 768)
    assert gemm.bytes == 2 * (512 * 256 + 256 * 768 + 512 * 768 + 768)
    assert gemm.share == pytest.approx(100 / 483)
    assert (sgemm.part, sgemm.flop, sgemm.bytes) == ("backward", 2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16))

    # at 1 TFLOP/s it takes 201 us to compute, at 1 GB/s 1.4 ms to move
    assert floor_seconds(gemm, 1, 1e6) == pytest.approx(2 * 512 * 256 * 768 / 1e12)
    assert floor_seconds(replace(gemm, eight_bit=True), 1, 1e6) == pytest.approx(512 * 256 * 768 / 1e12)
    assert floor_seconds(gemm, 1, 1) == pytest.approx(gemm.bytes / 1e9)
    assert floor_seconds(rows["loss_kernel"], 1, 1) is None


def test_a_single_gpu_step_lasts_to_its_end(tmp_path):
    written = Written()
    gpu_step(written, 0, 100)
    parts = step_parts(read_trace(written.write(tmp_path / "trace.json")))
    assert parts.steps == 1
    assert parts.step_seconds == pytest.approx((110 + 505 - 7) * 1e-6)
    assert parts.seconds["data wait"] == pytest.approx((4 + 94) * 1e-6)


def test_exchanges_of_gloo_on_a_cpu_belong_to_the_range_that_waits_for_them(tmp_path):
    """All in us: gloo's thread works beside the main one, which waits for it in the backward pass."""
    written = Written()
    written.span("step", 0, 1000)
    written.span("data wait", 0, 100)
    written.span("backward", 100, 700)
    written.operator("aten::mm", 100, 200)
    written.operator("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 200, 490)
    written.operator("c10d::allreduce_", 210, 220)
    written.operator("aten::view", 212, 214)
    written.add("user_annotation", "gloo:all_reduce", 230, 430, GLOO)
    written.operator("aten::mm", 500, 560)
    written.span("communication", 700, 750)
    written.span("optimizer", 750, 900)
    written.operator("aten::add_", 760, 890)
    trace = read_trace(written.write(tmp_path / "trace.json"))
    parts = step_parts(trace)
    microseconds = {part: seconds * 1e6 for part, seconds in parts.seconds.items() if seconds}
    assert microseconds == pytest.approx(
        {"data wait": 100, "backward": 600, "communication": 50, "optimizer": 150, "host gaps": 100}
    )
    assert sum(parts.seconds.values()) == pytest.approx(parts.step_seconds, rel=1e-9)
    assert busy_seconds(trace) * 1e6 == pytest.approx(100 + 10 + 60 + 130)
    rows = {row.name: row for row in top_kernels(trace)}
    assert rows["c10d::allreduce_"].seconds * 1e6 == pytest.approx(8)  # without what it calls
    assert rows["aten::mm"].seconds * 1e6 == pytest.approx(160)


@pytest.fixture(scope="module")
def cpu_trace(tmp_path_factory):
    """Three steps of two layers and attention: 8 rows of 16 to 32 to 4; 2 clips, 3 heads, 5 tokens of 8."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(3):
            with span("step"):
                with span("data wait"):
                    time.sleep(0.005)
                x, q = torch.randn(8, 16), torch.randn(2, 3, 5, 8, requires_grad=True)  # in no range
                with span("encoder forward"):
                    y, attended = model(x), torch.nn.functional.scaled_dot_product_attention(q, q, q)
                with span("heads + loss"):
                    loss = y.square().mean() + attended.sum()
                with span("backward"):
                    loss.backward()
                with span("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad()
    path = tmp_path_factory.mktemp("cpu") / "trace.json.gz"
    recorded.export_chrome_trace(str(path))
    return read_trace(path)


def test_parts_of_a_recorded_cpu_step(cpu_trace):
    parts = step_parts(cpu_trace)
    assert parts.steps == 3 and not cpu_trace.on_device
    assert sum(parts.seconds.values()) == pytest.approx(parts.step_seconds, rel=1e-9)
    assert parts.seconds["data wait"] >= 0.005
    passed = ("data wait", "encoder forward", "heads + loss", "backward", "optimizer", "host gaps")
    assert {part for part, seconds in parts.seconds.items() if seconds > 0} == set(passed)
    assert busy_seconds(cpu_trace) < parts.step_seconds - parts.seconds["data wait"]


def test_work_of_a_recorded_cpu_step(cpu_trace):
    rows = {row.name: row for row in top_kernels(cpu_trace, count=1000)}
    first, second, product = 2 * 8 * 16 * 32, 2 * 8 * 32 * 4, 2 * 2 * 3 * 5 * 5 * 8
    assert rows["aten::addmm"].flop == first + second
    assert rows["aten::addmm"].bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32 + 32 + 8 * 32 + 32 * 4 + 8 * 4 + 4)
    assert rows["aten::mm"].flop == first + 2 * second  # nobody asks for the gradient of x
    assert rows["aten::mm"].calls == 3 and rows["aten::mm"].part == "backward"
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert rows[attention].flop == 2 * product and rows[attention + "_backward"].flop == 4 * product
    assert rows["aten::linear"].flop is None and rows["aten::gelu"].flop is None
    assert sum(row.share for row in rows.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "dims", "types", "flop", "moved", "eight_bit"),
    [
        ("aten::bmm", [[2, 3, 5], [2, 5, 4]], [BF16, BF16], 2 * 2 * 3 * 5 * 4, 2 * 2 * (15 + 20 + 12), False),
        (
            "aten::baddbmm",
            [[2, 3, 4], [2, 3, 5], [2, 5, 4]],
            ["float"] * 3,
            2 * 2 * 3 * 5 * 4,
            4 * 2 * (15 + 20 + 12 + 12),
            False,
        ),
        (
            "aten::_scaled_mm",
            [[32, 16], [16, 64]],
            ["c10::Float8_e5m2", "c10::Float8_e4m3fn"],
            65536,
            32 * 16 + 16 * 64 + 2 * 32 * 64,
            True,
        ),
        (
            "ssast::attention_forward",
            [[2, 3, 5, 8]] * 3,
            [BF16] * 3,
            2 * 2 * 2 * 3 * 25 * 8,
            4 * 2 * 2 * 3 * 5 * 8,
            False,
        ),
        ("aten::_scaled_dot_product_cudnn_attention_backward", [[2, 3, 5, 8]] * 4, [BF16] * 4, 9600, 7 * 480, False),
        (
            "aten::_scaled_dot_product_attention_math",
            [[2, 3, 5, 8]] * 3,
            [BF16] * 3,
            None,
            None,
            False,
        ),  # calls products
        ("aten::mm", [], [], None, None, False),  # recorded without shapes
    ],
)
def test_what_operators_need(tmp_path, name, dims, types, flop, moved, eight_bit):
    written = Written()
    written.span("step", 0, 100)
    written.span("encoder forward", 0, 100)
    written.operator(name, 10, 20, dims=dims, types=types)
    written.operator(name, 30, 40, dims=dims, types=types)
    (row,) = top_kernels(read_trace(written.write(tmp_path / "trace.json")))
    assert (row.flop, row.bytes, row.eight_bit) == (flop and 2 * flop, moved and 2 * moved, eight_bit)  # of both calls


def test_traces_that_say_nothing_of_steps(tmp_path):
    written = Written()
    written.operator("aten::mm", 0, 10)
    with pytest.raises(ValueError, match=r"t\.json: .*'ssast::step'"):
        read_trace(written.write(tmp_path / "t.json"))
    written.span("step", 0, 100)
    with pytest.raises(ValueError, match="'ssast::backward'"):
        read_trace(written.write(tmp_path / "t.json"))
    written.span("backward", 0, 50)
    written.launch("late", 200, 210, 220)
    with pytest.raises(ValueError, match="device"):
        read_trace(written.write(tmp_path / "t.json"))
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(written.write(tmp_path / "t.json.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.json\.gz"):
        read_trace(cut)


@pytest.mark.parametrize(
    ("full", "short"),
    [
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, "
            "at::native::binary_internal::MulFunctor<float> >, std::array<char*, 3ul> >(int, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel<MulFunctor>",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, "
            "at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda("
            "at::TensorIteratorBase&)::{lambda()#3}::operator()() const> >(int)",
            "elementwise_kernel<direct_copy_kernel_cuda>",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float> > >(R)",
            "reduce_kernel<MeanOps>",
        ),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int)",
            "vectorized_layer_norm_kernel",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128> >(P)", "flash_fwd_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"),
        ("_fbank_kernel", "_fbank_kernel"),
    ],
)
def test_short_names(full, short):
    assert short_name(full) == short

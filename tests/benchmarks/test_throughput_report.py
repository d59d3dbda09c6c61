"""The throughput report: its figures, its page and its pictures."""

import copy
import html
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from ssast.benchmarks.throughput.profile_report import write_throughput_report
from ssast.benchmarks.throughput.summary import read_profile, significant, summarise
from ssast.engine.errors import UserError
from ssast.engine.report import page

SHARES = {
    "data wait": 0.012,
    "copy": 0.004,
    "fbank": 0.006,
    "mask + embed": 0.011,
    "encoder forward": 0.285,
    "heads + loss": 0.037,
    "backward": 0.56,
    "communication": 0.028,
    "optimizer": 0.042,
    "host gaps": 0.015,
}
KERNEL = "void flash<Traits<64, 128>, a & b | c>::bwd(Params const*)"


def parts_of(step_seconds):
    return {
        "steps": 4,
        "step_seconds": step_seconds,
        "seconds": {name: share * step_seconds for name, share in SHARES.items()},
    }


def cpu_profile():
    """A tiny model on a CPU: no peak, no device state, nothing to compare with but the ceilings."""
    rng = np.random.default_rng(0)
    seconds = (0.2 * np.exp(0.03 * rng.normal(size=12))).tolist()
    kernels = [("aten::addmm", 0.06, 0.05, "encoder forward"), ("aten::_fft_r2c", 0.004, None, "fbank")]
    return {
        "format": 1,
        "written": "2026-11-22 20:00 UTC",
        "command": "ssast profile demo",
        "environment": {
            "command": "ssast profile demo",
            "devices": ["cpu"],
            "torch": "2.13.0",
            "git_commit": "abc",
            "gpu": None,
        },
        "config": {"run": {"name": "demo"}, "model": {"size": "tiny"}, "step": {"compile": "auto"}},
        "setup": {
            "device": "cpu",
            "device_name": "Xeon",
            "world_size": 1,
            "model": "tiny, depth 2, 8 x 16 patches of 16 x 16",
            "parameters": 1_234_567,
            "tokens": 130,
            "num_masked": 100,
            "seconds_per_clip": 2.5,
            "micro_batch": 8,
            "accumulation": 2,
            "clips_per_step": 16,
            "engine": "DeepSpeed ZeRO 1",
            "precision": "fp32",
            "compile": "off",
            "attention": "torch",
            "optimizer": "torch",
            "norm": "torch",
            "activation_checkpointing": "none",
            "fp8_mlp": False,
        },
        "flops": {
            "formula": "forward per clip = 2 P K D + ...",
            "forward_per_clip": 100_000_000,
            "train_per_clip": 300_000_000,
        },
        "peak": None,
        "ceiling_rates": {"matmul_tflops": 0.11, "copy_gb_per_s": 11.0, "dtype": "float32"},
        "steps": {"warmup": 3, "seconds": seconds, "data_wait_seconds": [0.002] * 12},
        "parts": parts_of(0.21),
        "kernels": [
            {"name": name, "calls": 24.0, "seconds": spent, "share": spent / 0.15, "floor_seconds": floor, "part": part}
            for name, spent, floor, part in kernels
        ],
        "memory": {
            "parameters": 5_000_000,
            "gradients": 5_000_000,
            "optimizer state": 10_000_000,
            "activations": 20_000_000,
            "other": 0,
            "peak": 40_000_000,
            "source": "tensors as counted",
        },
        "ceilings": {"model only": {"clips_per_s": 82.0}, "loader only": {"clips_per_s": 900.0}},
        "scaling": [{"ranks": 1, "clips_per_s": 80.0}],
        "variants": [],
        "device_state": [],
        "baselines": [],
        "auto_batch": None,
        "trace": "trace.json.gz",
        "notes": [],
    }


def gpu_profile():
    """Two GPUs, 100 steps of 0.25 s for 1024 clips: 4096 clips/s."""
    profile = cpu_profile()
    rng = np.random.default_rng(1)
    noise = 0.003 * rng.normal(size=100)
    noise[[17, 63]] += 0.03
    seconds = 0.25 + noise - noise.mean()
    profile["setup"] |= {
        "device": "cuda",
        "device_name": "NVIDIA H200",
        "world_size": 2,
        "model": "base, depth 12, 8 x 64 patches of 16 x 16",
        "parameters": 87_654_321,
        "tokens": 514,
        "num_masked": 400,
        "seconds_per_clip": 10.0,
        "micro_batch": 512,
        "accumulation": 1,
        "clips_per_step": 1024,
        "precision": "bf16",
        "compile": "blocks",
        "attention": "cudnn",
    }
    profile["environment"] |= {
        "gpu": {"name": "NVIDIA H200", "driver": "580.95", "power_limit_w": 700.0, "memory_gib": 139.8, "count": 2},
        "devices": ["NVIDIA H200", "NVIDIA H200"],
    }
    profile["config"]["run"]["name"] = "base <b>&</b> joint | two"
    profile["flops"] |= {"forward_per_clip": 98_500_000_000, "train_per_clip": 295_500_000_000}
    profile["peak"] = {"tflops": 989.4, "source": "datasheet, dense bf16, of NVIDIA H200"}
    profile["ceiling_rates"] = {"matmul_tflops": 783.0, "copy_gb_per_s": 4210.0, "dtype": "bfloat16"}
    profile["steps"] = {"warmup": 10, "seconds": seconds.tolist(), "data_wait_seconds": [0.001, 0.004] * 50}
    profile["parts"] = parts_of(0.26)
    names = [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_NNT", 0.08, 0.066, "backward"),
        (KERNEL, 0.03, 0.021, "backward"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopB_TNT", 0.05, 0.044, "encoder forward"),
        ("triton_poi_fused_gelu_3", 0.011, 0.0099, "encoder forward"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0.007, None, "communication"),
        ("multi_tensor_apply_kernel", 0.006, 0.0055, "optimizer"),
        *[(f"triton_red_fused_native_layer_norm_{i}", 0.004 / (i + 1), 0.003 / (i + 1), "backward") for i in range(20)],
    ]
    profile["kernels"] = [
        {
            "name": name,
            "calls": 12 * (i + 1),
            "seconds": spent,
            "share": spent / 0.2,
            "floor_seconds": floor,
            "part": part,
        }
        for i, (name, spent, floor, part) in enumerate(names)
    ]
    gib = 2**30
    memory = {
        "parameters": gib,
        "gradients": gib // 2,
        "optimizer state": gib,
        "activations": 77 * gib,
        "other": gib // 2,
    }
    profile["memory"] = {**memory, "peak": 80 * gib, "source": "torch.cuda memory snapshot"}
    profile["ceilings"] = {"model only": {"clips_per_s": 4300.0}, "loader only": {"clips_per_s": 31000.0}}
    profile["scaling"] = [{"ranks": 2, "clips_per_s": 4000.0}, {"ranks": 1, "clips_per_s": 2100.0}]
    profile["variants"] = [
        {"name": "ZeRO 0", "clips_per_s": 3900.0, "ratio": 0.97},
        {"name": "DDP", "clips_per_s": 4150.0, "ratio": 1.02},
    ]
    profile["device_state"] = [
        {
            "seconds": 0.1 * i,
            "clock_mhz": 1980 - 2.0 * i,
            "power_w": 690.0 + i % 7,
            "temperature_c": 60 + 0.05 * i,
            "utilisation": 99,
        }
        for i in range(120)
    ]
    what = "the public training code's step & its loops, fp32 <autocast>"
    profile["baselines"] = [
        {
            "name": "official way",
            "what": what,
            "clips_per_s": 156.0,
            "ratio": 13.1,
            "clips": 48,
            "peak_bytes": 60 * gib,
        },
        {
            "name": "torch.compile",
            "what": "plain bf16, compiled",
            "clips_per_s": 1650.0,
            "ratio": 1.24,
            "clips": 1024,
            "peak_bytes": None,
        },
    ]
    profile["auto_batch"] = {"largest": 640, "used": 512}
    profile["notes"] = ["Two steps waited for the file system."]
    return profile


def save(folder, profile):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps(profile))
    return folder


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    return write_throughput_report(save(tmp_path_factory.mktemp("cpu"), cpu_profile()))


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    return write_throughput_report(save(tmp_path_factory.mktemp("gpu"), gpu_profile()))


@pytest.fixture
def without_pixels(monkeypatch):
    """Draws the pictures without turning them into pixels, which takes most of the time."""
    monkeypatch.setattr(page, "png", lambda figure: b"")


def text_of(path):
    """The words of a page, as a reader sees them."""
    body = path.read_text(encoding="utf-8").split("<body>")[1]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", body)).split())


# ---- figures


def test_figures_of_two_gpus():
    summary = summarise(gpu_profile())
    assert summary["total"] == pytest.approx(
        {"clips_per_s": 4096, "audio_hours_per_s": 11.37778, "tokens_per_s": 2_105_344, "model_tflops": 1210.368}
    )
    assert summary["per_device"] == pytest.approx(
        {"clips_per_s": 2048, "audio_hours_per_s": 5.68889, "tokens_per_s": 1_052_672, "model_tflops": 605.184}
    )
    assert summary["mfu"]["value"] == pytest.approx(605.184 / 989.4)
    assert summary["mfu"]["formula"] == "0.2955 TFLOP/clip x 4,096 clips/s / (2 x 989.4 TFLOP/s)"
    assert summary["data_stall"] == pytest.approx(0.01)  # 2.5 of 250 ms
    assert summary["closest_ceiling"] == {
        "name": "model only",
        "clips_per_s": 4300.0,
        "reached": pytest.approx(4096 / 4300),
    }
    assert [row["efficiency"] for row in summary["scaling"]] == pytest.approx([1, 4000 / 4200])
    assert summary["device_state"]["clock_mhz"] == pytest.approx({"lowest": 1742, "median": 1861, "highest": 1980})
    assert summary["parts"]["traced_over_timed"] == pytest.approx(0.26 / 0.25)
    assert json.loads(json.dumps(summary)) == summary


def test_percentiles_and_kernels_of_a_known_series():
    profile = cpu_profile()
    profile["steps"] = {"warmup": 3, "seconds": [i / 1000 for i in range(101, 0, -1)], "data_wait_seconds": [0.0] * 101}
    summary = summarise(profile)
    steps = summary["steps"]
    assert [steps[key] for key in ("p50_ms", "p95_ms", "p99_ms", "slowest_ms")] == pytest.approx([51, 96, 100, 101])
    assert (steps["timed"], steps["warmup"]) == (101, 3)
    assert summary["total"]["clips_per_s"] == pytest.approx(101 * 16 / 5.151)
    first, second = summary["kernels"]
    assert (first["ms"], first["floor_ms"], first["times_floor"]) == pytest.approx((60, 50, 1.2))
    assert (second["floor_ms"], second["times_floor"]) == (None, None)


def test_no_peak_means_no_mfu():
    mfu = summarise(cpu_profile())["mfu"]
    assert mfu["value"] is None and mfu["peak_tflops"] is None and mfu["formula"] == "no peak is known for this device"


def test_parts_add_up_or_it_is_said(tmp_path, without_pixels):
    parts = summarise(gpu_profile())["parts"]
    assert sum(part["share"] for part in parts["parts"]) == pytest.approx(1) and parts["unexplained"] == pytest.approx(
        0, abs=1e-9
    )
    assert [part["name"] for part in parts["parts"]] == list(SHARES)
    profile = cpu_profile()
    del profile["parts"]["seconds"]["backward"]
    assert summarise(profile)["parts"]["unexplained"] == pytest.approx(0.56)
    assert "118 ms (56.0%) below" in text_of(write_throughput_report(save(tmp_path, profile)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(4096.4, "4,096"), (605.18, "605"), (45.26, "45.3"), (0.01234, "0.0123"), (0, "0"), (-9.996, "-10.0")],
)
def test_significant_digits(value, shown):
    assert significant(value) == shown


# ---- pages


def test_page_says_the_figures(gpu):
    text = text_of(gpu)
    assert "MFU 61.2% 61.2% 0.2955 TFLOP/clip x 4,096 clips/s / (2 x 989.4 TFLOP/s)" in text
    assert "clips/s 4,096 2,048 102,400 clips in 25.0 s" in text
    assert "datasheet, dense bf16, of NVIDIA H200" in text
    assert "backward 146 ms 56.0%" in text and "Closest ceiling: model only; this run reaches 95.3% of it" in text
    assert f"{KERNEL} backward 24 30.0 ms 11.5% 1.43" in text
    assert (
        "official way: the public training code's step & its loops, fp32 <autocast>; 48 clips a step, 60.0 GiB at the "
        "peak" in text
    )
    assert "ceiling: loader only 15,500 13.2%" in text and "variant: DDP 2,075 0.980 x" in text
    assert "baseline: official way 156 13.1 x" in text and "measured on one GPU, in turns" in text
    assert "512, of at most 640 that fit" in text and "Two steps waited for the file system." in text


def test_page_of_a_cpu_leaves_out_what_it_has_not(cpu):
    text = text_of(cpu)
    assert "MFU not known no peak is known for this device" in text and "Operators" in text
    assert not re.search("GPU|Scaling|The device|Kernels|baseline|variant|Notes|Peak of one", text)
    pictures = {path.name for path in (cpu.parent / "pictures").iterdir()}
    assert pictures == {f"report-{name}.png" for name in ("comparison", "kernels", "memory", "step", "step-times")}


def test_page_is_self_contained(gpu):
    markup = gpu.read_text(encoding="utf-8")
    sources = re.findall(r"<(?:img|source)[^>]* (?:src|srcset)=\"([^\"]*)", markup)
    pictures = ("comparison", "device", "kernels", "memory", "scaling", "step", "step-times")
    assert len(sources) == 2 * len(pictures) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(src|srcset|href)=[\"'](?!data:)|url\(|@import|<script|<link(?! rel=\"icon\")", markup)
    # the style sheet of a run's report came along
    assert "prefers-color-scheme: dark" in markup and "--card:" in markup
    assert {path.name for path in (gpu.parent / "pictures").iterdir()} == {f"report-{name}.png" for name in pictures}
    for name in pictures:
        picture = imread(gpu.parent / "pictures" / f"report-{name}.png")
        assert picture.shape[0] > 200 and picture.shape[1] == 840 and picture.std() > 0.05


def test_names_are_shown_as_they_are(gpu):
    markup = gpu.read_text(encoding="utf-8")
    assert "base &lt;b&gt;&amp;&lt;/b&gt; joint | two" in markup and "<b>" not in markup and "<Traits" not in markup


def test_json_holds_the_summary(gpu):
    assert json.loads(gpu.with_suffix(".json").read_text()) == summarise(gpu_profile())


def test_fp8_is_held_against_bf16_and_says_so(tmp_path, without_pixels):
    profile = gpu_profile()
    profile["setup"]["fp8_mlp"] = True
    path = write_throughput_report(save(tmp_path, profile))
    assert "MFU (bf16-equivalent) 61.2%" in text_of(path)


def test_a_run_above_its_ceiling_is_no_secret(tmp_path, without_pixels):
    profile = cpu_profile()
    profile["ceilings"]["model only"]["clips_per_s"] = 40.0
    text = text_of(write_throughput_report(save(tmp_path, profile)))
    assert re.search(
        r"Closest ceiling: model only; this run reaches 199\.\d% of it\..*More than 100%: the machine was not equally "
        r"fast",
        text,
    )


def test_pictures_of_an_earlier_report_go(tmp_path, without_pixels):
    write_throughput_report(save(tmp_path, gpu_profile()))
    assert (tmp_path / "pictures" / "report-device.png").exists()
    write_throughput_report(save(tmp_path, cpu_profile()))
    assert not (tmp_path / "pictures" / "report-device.png").exists()


def without(*keys):
    def change(profile):
        for key in keys[:-1]:
            profile = profile[key]
        del profile[keys[-1]]

    return change


def with_value(value, *keys):
    def change(profile):
        for key in keys[:-1]:
            profile = profile[key]
        profile[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("flops"), "'flops' is missing"),
        (without("memory", "optimizer state"), "'optimizer state' is missing"),
        (with_value(float("nan"), "steps", "seconds", 3), "NaN"),
        (with_value([], "steps", "seconds"), "damaged"),
        (with_value("8", "steps", "seconds"), "damaged"),
        (with_value(2, "format"), "format 1"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, change, named):
    profile = copy.deepcopy(cpu_profile())
    change(profile)
    with pytest.raises(UserError) as error:
        write_throughput_report(save(tmp_path, profile))
    assert named in str(error.value) and "profile.json" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("content", ["", '{"format": 1', "[]", "\x00"])
def test_what_is_no_profile_is_named_in_one_line(tmp_path, content):
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*profile\.json[^\n]*$"):
        read_profile(tmp_path)
    with pytest.raises(UserError, match=r"^[^\n]*cannot be read[^\n]*$"):
        read_profile(tmp_path / "absent")

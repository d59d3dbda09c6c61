"""What the device is, what it could do at best, and how it runs meanwhile."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from typing import Any

import torch

from ssast.benchmarks.cases import COPY, Setting, ceiling_cases
from ssast.benchmarks.timing import Job, measure
from ssast.engine.environment import device_names

# Dense bf16 TFLOP/s of the vendor's datasheets, without sparsity; the first that stands as words of its own in the
# device's name.
PEAKS = {
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.05,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
SAMPLE_MS = 200
CEILING_SECONDS = 1.0
_QUERY = "clocks.sm,power.draw,temperature.gpu,utilization.gpu"
_COLUMNS = ("clock_mhz", "power_w", "temperature_c", "utilisation")


def peak_tflops(device: torch.device) -> dict[str, Any] | None:
    """The denominator of MFU, and where it comes from; None for a CPU or a device that is not in the table."""
    return find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def find_peak(name: str) -> dict[str, Any] | None:
    for known, tflops in PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            return {"tflops": tflops, "source": f"datasheet, dense bf16, {known}"}
    return None


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    """Name, driver, power limit in watts, memory in GiB and number of the GPUs; None on a CPU."""
    if device.type != "cuda":
        return None
    found = _nvidia_smi("driver_version,power.limit", device) or ["", ""]
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": found[0] or None,
        "power_limit_w": _number(found[1]),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
    }


def device_name(device: torch.device) -> str:
    from ssast.benchmarks.rows import environment_columns

    return device_names()[device.index or 0] if device.type == "cuda" else environment_columns()["device"]


def ceiling_rates(device: torch.device) -> dict[str, Any]:
    """Measured here and now: the largest matrix product and copy of `ssast.benchmarks.kernels`."""
    rates: dict[str, Any] = {}
    setting = Setting(device, torch.bfloat16, production=False, with_triton=False, with_compiled=False)
    for case in ceiling_cases(setting):
        with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext():
            inputs, provider = case.make_inputs(0), case.providers[0]
            job = Job(provider.name, 1, lambda _, __, run=provider.run, given=inputs: run(**given))
            seconds = measure([job], device, CEILING_SECONDS)[provider.name].quantile(0.5)
        need = case.needs["forward"]
        if case.shape.startswith(COPY):
            rates["copy_gb_per_s"] = need.bytes / seconds / 1e9
        else:
            rates |= {"matmul_tflops": need.flop / seconds / 1e12, "dtype": case.dtype}
    return rates


class DeviceWatch(contextlib.AbstractContextManager):
    """Clocks, power, temperature and load of a GPU while entered, from nvidia-smi; nothing on a CPU or without that
    command.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.samples = device, []
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> DeviceWatch:
        if self.device.type == "cuda":
            command = [
                "nvidia-smi",
                "-i",
                _bus_id(self.device),
                f"--query-gpu={_QUERY}",
                "--format=csv,noheader,nounits",
            ]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen([*command, "-lms", str(SAMPLE_MS)], stdout=subprocess.PIPE, text=True)
                self._began = time.monotonic()
                self._reader = threading.Thread(target=self._read, daemon=True)
                self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join(timeout=5)

    def _read(self) -> None:
        for line in self._process.stdout:
            values = [_number(value) for value in line.split(",")]
            if len(values) == len(_COLUMNS) and None not in values:
                self.samples.append(
                    {"seconds": round(time.monotonic() - self._began, 3), **dict(zip(_COLUMNS, values, strict=True))}
                )


def _nvidia_smi(query: str, device: torch.device) -> list[str] | None:
    command = ["nvidia-smi", "-i", _bus_id(device), f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def _bus_id(device: torch.device) -> str:
    """Devices are numbered otherwise by nvidia-smi than by CUDA_VISIBLE_DEVICES."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

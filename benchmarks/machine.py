"""What machine this is: the columns of every row of results that say so, a GPU's peak, and how it runs meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ssast.engine.environment import describe_environment, device_names

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
SAMPLE_SECONDS = 0.2


def environment_columns() -> dict[str, Any]:
    """Date, commit, device, cores and versions."""
    described = describe_environment()
    commit = described["git_commit"] or ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit[:12] + ("+" if described["git_dirty"] else ""),
        "device": ", ".join(described["devices"]) if described["devices"] != ["cpu"] else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        **{package: described.get(package, "") for package in ("torch", "triton", "deepspeed")},
    }


def device_columns(device: torch.device) -> dict[str, Any]:
    """`environment_columns` of a measurement on one device: `kind` (cuda or cpu), its name, power limit and driver."""
    facts = gpu_facts(device) or {}
    return {
        "kind": device.type,
        "power_limit_w": facts.get("power_limit_w") or "",
        "driver": facts.get("driver") or "",
        **environment_columns(),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """As the vendor calls it."""
    return device_names()[device.index or 0] if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"


def peak_tflops(device: torch.device) -> dict[str, Any] | None:
    """The denominator of MFU, and where it comes from; None for a CPU or a device that is not in the table."""
    return find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def find_peak(name: str) -> dict[str, Any] | None:
    """`peak_tflops` by the device's name."""
    for model, tflops in PEAKS.items():
        if re.search(rf"\b{model}\b", name):
            return {"tflops": tflops, "source": f"datasheet, dense bf16, {model}"}
    return None


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    """Name, memory in GiB and number of the GPUs; driver and power limit in watts, as far as NVML says; None on a
    CPU.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    facts = {"name": properties.name, "driver": None, "power_limit_w": None}
    with nvml_handle(device) as (nvml, handle):
        if nvml is not None:
            facts["driver"] = nvml.nvmlSystemGetDriverVersion()
            with contextlib.suppress(nvml.NVMLError):  # some cards keep it to themselves
                facts["power_limit_w"] = nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
    return {
        **facts,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
    }


@contextlib.contextmanager
def nvml_handle(device: torch.device) -> Iterator[tuple[Any, Any]]:
    """NVIDIA's management library (the module of nvidia-ml-py) and its handle of a GPU; (None, None) where there is no
    such library or binding.
    """
    try:
        import pynvml
    except ImportError:
        yield None, None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None, None
        return
    try:
        # by its place on the bus: NVML does not heed CUDA_VISIBLE_DEVICES
        at: Any = torch.cuda.get_device_properties(device)
        bus_id = f"{at.pci_domain_id:08x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
        try:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        except pynvml.NVMLError:
            yield None, None
        else:
            yield pynvml, handle
    finally:
        pynvml.nvmlShutdown()


def read_sensors(nvml: Any, handle: Any) -> dict[str, float]:
    """SM clock in MHz, power in W, temperature in °C and utilisation in percent."""
    return {
        "clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "utilisation": nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }


class DeviceWatch(contextlib.AbstractContextManager):
    """Samples a GPU's sensors while entered; `samples` stays empty on a CPU and without NVML."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.samples: list[dict[str, float]] = []
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> DeviceWatch:
        if self.device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=5)

    def _sample(self) -> None:
        began = time.monotonic()
        with nvml_handle(self.device) as (nvml, handle):
            if nvml is None:
                return
            with contextlib.suppress(nvml.NVMLError):
                while not self._left.wait(SAMPLE_SECONDS):
                    self.samples.append({"seconds": round(time.monotonic() - began, 3), **read_sensors(nvml, handle)})

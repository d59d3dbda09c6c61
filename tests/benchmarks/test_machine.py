"""What is said of the machine; on a GPU, test_on_gpu.py sees the rest."""

import sys
from types import SimpleNamespace

import pytest
import torch

from ssast.benchmarks import machine

CPU = torch.device("cpu")


def test_rows_name_the_machine():
    columns = machine.device_columns(CPU)
    assert columns["kind"] == "cpu" and columns["power_limit_w"] == columns["driver"] == ""
    assert columns["torch"] and columns["device"] and columns["cores"] >= 1 and len(columns["date"]) == 10


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
    ],
)
def test_peaks_are_those_of_the_device_and_no_other(name, tflops):
    assert (machine.find_peak(name) or {"tflops": None})["tflops"] == tflops


@pytest.mark.parametrize("binding", ["missing", "without a driver"])
def test_without_nvml_nothing_is_said_and_nothing_fails(binding, monkeypatch):
    if binding == "missing":
        monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    elif torch.cuda.is_available():
        monkeypatch.setattr("pynvml.nvmlInit", lambda: (_ for _ in ()).throw(sys.modules["pynvml"].NVMLError(1)))
    with machine.nvml_handle(CPU) as found:
        assert found == (None, None)
    with machine.DeviceWatch(CPU) as watch:
        pass
    assert watch.samples == []


def test_sensors_are_in_watts_and_megahertz():
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, kind: {1: 1980}[kind],
        nvmlDeviceGetPowerUsage=lambda handle: 690_500,  # milliwatts
        nvmlDeviceGetTemperature=lambda handle, kind: {0: 61}[kind],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=99, memory=40),
    )
    sensors = machine.read_sensors(nvml, None)
    assert sensors == {"clock_mhz": 1980, "power_w": 690.5, "temperature_c": 61, "utilisation": 99}

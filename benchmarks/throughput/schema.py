"""What profile.json must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ssast.engine.errors import UserError, first_line

FILE = "profile.json"

Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """A part of profile.json. Keys beyond those that the report needs are let pass."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Setup(_Part):
    device: Literal["cuda", "cpu"]
    device_name: str
    world_size: Count
    model: str
    parameters: Count
    tokens: Count
    num_masked: Count
    seconds_per_clip: Positive
    micro_batch: Count
    accumulation: Count
    clips_per_step: Count
    engine: str
    precision: str
    compile: str
    attention: str
    optimizer: str
    norm: str
    activation_checkpointing: str
    fp8_mlp: bool

    @model_validator(mode="after")
    def _clips_of_all_ranks(self) -> _Setup:
        if self.clips_per_step != self.micro_batch * self.accumulation * self.world_size:
            raise ValueError("clips_per_step is not micro_batch x accumulation x world_size")
        return self


class _Flops(_Part):
    formula: str
    forward_per_clip: Count
    train_per_clip: Count


class _Peak(_Part):
    tflops: Positive
    source: str


class _CeilingRates(_Part):
    matmul_tflops: Positive
    copy_gb_per_s: Positive
    dtype: str


class _Steps(_Part):
    warmup: Annotated[int, Field(ge=0)]
    seconds: Annotated[list[Positive], Field(min_length=1)]
    data_wait_seconds: list[Amount]

    @model_validator(mode="after")
    def _one_wait_a_step(self) -> _Steps:
        if len(self.seconds) != len(self.data_wait_seconds):
            raise ValueError(f"{len(self.seconds)} seconds and {len(self.data_wait_seconds)} data_wait_seconds")
        return self


class _Parts(_Part):
    steps: Count
    step_seconds: Positive
    seconds: Annotated[dict[str, Amount], Field(min_length=1)]


class _Kernel(_Part):
    name: str
    calls: Amount
    seconds: Amount
    floor_seconds: Amount | None
    part: str


class _Memory(_Part):
    parameters: Bytes
    gradients: Bytes
    optimizer_state: Bytes = Field(alias="optimizer state")
    activations: Bytes
    other: Bytes
    peak: Bytes
    source: str


class _Rate(_Part):
    clips_per_s: Positive


class _Scaling(_Rate):
    ranks: Count


class _Variant(_Rate):
    name: str
    ratio: Positive


class _Baseline(_Variant):
    what: str
    clips: Count
    peak_bytes: Bytes | None


class _Sample(_Part):
    seconds: float
    clock_mhz: Amount
    power_w: Amount
    temperature_c: float
    utilisation: Amount


class _AutoBatch(_Part):
    largest: Count
    used: Count


class _Profile(_Part):
    format: Literal[1]
    written: str
    command: str
    environment: dict[str, Any]
    config: dict[str, Any]
    setup: _Setup
    flops: _Flops
    peak: _Peak | None
    ceiling_rates: _CeilingRates
    steps: _Steps
    parts: _Parts
    kernels: list[_Kernel]
    memory: _Memory
    ceilings: dict[str, _Rate]
    scaling: list[_Scaling]
    variants: list[_Variant]
    device_state: list[_Sample]
    baselines: list[_Baseline]
    auto_batch: _AutoBatch | None
    trace: str
    notes: list[str]


def read_profile(folder: Path) -> dict[str, Any]:
    """What profile.json in the folder holds.

    Raises:
        UserError: there is none, or something in it is missing or damaged; each thing is named.
    """
    path = folder / FILE
    again = "`ssast profile` writes it anew."
    try:
        profile = json.loads(path.read_bytes())
        _Profile.model_validate(profile)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Name a folder that `ssast profile` wrote.") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'all of it'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: {'; '.join(problems[:5])}{more}. {again}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}. {again}") from None
    return profile

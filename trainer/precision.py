"""Which number format the arithmetic uses, decided once and said aloud.

Weights and moments are fp32 always; bf16 and fp16 are autocast formats. bf16 needs no loss scaling, fp16 does.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.amp import GradScaler

AMPERE = 8  # first CUDA generation with bf16 in its matrix units


@dataclass(frozen=True, slots=True)
class Precision:
    """The format taken, the kind of device it was taken for, and why."""

    name: Literal["bf16", "fp16", "fp32"]
    device_type: str
    why: str

    def autocast(self) -> AbstractContextManager[None]:
        """A fresh autocast context; inert for fp32."""
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device_type, dtype=dtype, enabled=self.name != "fp32")

    def scaler(self) -> GradScaler | None:
        """A gradient scaler for fp16, whose `state_dict` belongs into every checkpoint; None otherwise."""
        return GradScaler(self.device_type) if self.name == "fp16" else None


def resolve(wanted: Literal["auto", "bf16", "fp16", "fp32"], device: torch.device) -> Precision:
    """Turn `auto` into a format and leave the others as they are.

    A CPU takes fp32 under `auto`, with bf16 instructions or without: without them bf16 autocast ran a tiny GPT 6 to
    40 times slower; with AVX512-BF16 it took as long as fp32 at width 128 and 0.65 of its time at width 256 (measured).
    That is not worth a run whose arithmetic changes with the machine it is resumed on; `bf16` can be asked for.
    """
    if wanted != "auto":
        return Precision(wanted, device.type, "asked for")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= AMPERE:
            return Precision("bf16", "cuda", f"auto: native from sm_80 on, this is sm_{major}{minor}")
        return Precision("fp32", "cuda", f"auto: sm_{major}{minor} has no native bf16")
    return Precision("fp32", device.type, f"auto: fp32 on {device.type}; ask for bf16 to have it")

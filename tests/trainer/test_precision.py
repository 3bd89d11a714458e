"""What precision is taken, why, and what autocast then does."""

from typing import Literal

import pytest
import torch

from tests.trainer.tiny import CPU
from trainer.precision import resolve


def test_auto_on_a_cpu_is_fp32_and_says_so() -> None:
    """A CPU quickstart runs in fp32 unless told otherwise."""
    precision = resolve("auto", CPU)
    assert precision.name == "fp32"
    assert "auto" in precision.why
    assert precision.scaler() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_new_gpu_is_bf16() -> None:
    """sm_80 and newer have native bf16."""
    device = torch.device("cuda")
    wanted = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    assert resolve("auto", device).name == wanted


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_uses_the_format_asked_for(name: Literal["bf16", "fp16", "fp32"], dtype: torch.dtype) -> None:
    """Matrix products run in the format; weights stay fp32; only fp16 has a scaler."""
    precision = resolve(name, CPU)
    layer = torch.nn.Linear(4, 4)
    with precision.autocast():
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert (precision.scaler() is not None) == (name == "fp16")

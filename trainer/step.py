"""One update: micro-batches, backward, clipping, AdamW, and all that is to be known of it in one device tensor.

The step never waits for the device. Whether an update is applied is decided on the device; one that is not (it is not
finite, or `trainer.guards` leaves it out) leaves weights, moments and step counts as they were, bit for bit. Losses are
nats a token, norms L2 and pre-clip.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import get_total_norm
from torch.optim import AdamW

from monitors import probes
from monitors.records import LAYER_GROUPS, ActivationStats, Prevention
from trainer.contract.config import PreventionConfig
from trainer.guards import Guards
from trainer.model import GPT, Forward, Statistics, blocks_by_group, layer_groups
from trainer.optim import set_lr
from trainer.precision import Precision


@dataclass(frozen=True, slots=True)
class StepDetails:
    """The dearer signals, per layer group. `small_norm` is the gradient norm over the first micro-batch alone."""

    grad_norms: dict[str, float]
    second_moment_ratio: dict[str, float]
    attention_logit_max: dict[str, float]
    activations: dict[str, ActivationStats]
    log_z: float
    small_norm: float | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One update as the step record wants it. `losses` are per sequence, in the order of the batch."""

    loss: float
    grad_norm: float
    clipped: bool
    skipped: bool
    prevention: Prevention | None
    losses: tuple[float, ...]
    update_ratio: dict[str, float]
    scale: float | None
    details: StepDetails | None

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite; the update may still have been left out."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class PendingResult:
    """A step's figures on their way to the host: one copy, waited for by `read` only."""

    def __init__(self, parts: Mapping[str, Tensor], guards: Guards, groups: "_Groups") -> None:
        self._sizes = {name: part.numel() for name, part in parts.items()}
        self._guards = guards
        self._groups = groups
        packed = torch.cat([part.detach().reshape(-1).float() for part in parts.values()])
        self._host = packed.to("cpu", non_blocking=True)  # torch pins the destination of such a copy
        self._copied = torch.cuda.Event() if packed.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def read(self) -> StepResult:
        """Wait for the copy, if need be, and unpack it."""
        if self._copied is not None:
            self._copied.synchronize()
        values = iter(self._host.tolist())
        part = {name: [next(values) for _ in range(size)] for name, size in self._sizes.items()}
        told = self._guards.tell(part)
        return StepResult(
            loss=part["loss"][0],
            grad_norm=part["grad_norm"][0],
            clipped=told.clipped,
            skipped=told.skipped,
            prevention=told.prevention,
            losses=tuple(part["losses"]),
            update_ratio=dict(zip(self._groups.names, part.get("update_ratio", ()), strict=False)),
            scale=part["scale"][0] if "scale" in part else None,
            details=self._details(part) if "grad_norms" in part else None,
        )

    def _details(self, part: Mapping[str, list[float]]) -> StepDetails:
        names, blocks = self._groups.names, tuple(self._groups.blocks)
        figures = zip(part["rms"], part["max_abs"], part["dead"], part["saturated"], strict=True)
        return StepDetails(
            grad_norms=dict(zip(names, part["grad_norms"], strict=True)),
            second_moment_ratio=dict(zip(names, part["second_moment_ratio"], strict=True)),
            attention_logit_max=dict(zip(blocks, part["logit_max"], strict=True)),
            activations={
                name: ActivationStats(rms=rms, max=peak, dead=dead, saturated=saturated)
                for name, (rms, peak, dead, saturated) in zip(blocks, figures, strict=True)
            },
            log_z=part["log_z"][0],
            small_norm=part["small_norm"][0] if "small_norm" in part else None,
        )


class _Groups(NamedTuple):
    """Layer groups of a model: names, parameter indices of each, and the blocks of those that have any."""

    names: tuple[str, ...]
    members: tuple[list[int], ...]
    blocks: dict[str, list[int]]


def _groups_of(model: GPT) -> _Groups:
    of = list(layer_groups(model).values())
    found = {group: [i for i, name in enumerate(of) if name == group] for group in LAYER_GROUPS}
    found = {group: members for group, members in found.items() if members}
    return _Groups(tuple(found), tuple(found.values()), blocks_by_group(model.config.layers))


class TrainStep:
    """Performs updates of `model` by `optimizer` (fused AdamW, its state in place).

    Args:
        forward: what is called instead of `model`, e.g. its compiled form.
        transform_losses: seam for fault injection: per-sequence losses in, per-sequence losses out, in the graph.
        after_backward: seam for fault injection: called with the model once its gradients are whole, before their norm.
    """

    def __init__(
        self, model: GPT, optimizer: AdamW, *, precision: Precision, clip_norm: float,
        prevention: PreventionConfig | None = None,
        micro_sequences: int | None = None, scaler: GradScaler | None = None,
        forward: Callable[..., Forward] | None = None,
        transform_losses: Callable[[Tensor], Tensor] | None = None,
        after_backward: Callable[[GPT], None] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.transform_losses = transform_losses
        self.after_backward = after_backward
        self._precision = precision
        self._micro_sequences = micro_sequences
        self._forward: Callable[..., Forward] = forward or model
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self.guards = Guards(prevention or PreventionConfig(), clip_norm, self._device)
        self._groups = _groups_of(model)
        self._slices = probes.SampledSlices(self._parameters, self._groups.members)

    def __call__(self, tokens: Tensor, lr: float, *, ratios: bool = True, details: bool = False) -> PendingResult:
        """Perform one update on (B, T+1) tokens at rate `lr`; nothing is waited for."""
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        parts, statistics = self._backward(self._to_device(tokens), details)
        if self.after_backward is not None:
            self.after_backward(self.model)
        if self.scaler is not None:
            parts["scale"] = self.scaler.scale(torch.ones((), device=self._device))
            self.scaler.unscale_(self.optimizer)
        if details and "small_norm" in parts and "scale" in parts:
            parts["small_norm"] = parts["small_norm"] / parts["scale"]
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if details:
            parts["grad_norms"] = probes.group_norms(grads, self._groups.members)
        parts["grad_norm"] = get_total_norm(grads)
        parts |= self.guards.judge(parts["grad_norm"], parts["loss"])
        self.guards.clip(self._parameters, parts)
        before = self._slices.take(self._parameters) if ratios else None
        self._update(parts["skipped"])
        if before is not None:
            parts["update_ratio"] = self._slices.ratio(before, self._slices.take(self._parameters))
        if details:
            parts |= self._detail_parts(grads, statistics)
        return PendingResult(parts, self.guards, self._groups)

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self._device.type == "cuda" and not tokens.is_cuda:
            tokens = tokens.pin_memory()
        return tokens.to(self._device, non_blocking=True)

    def _backward(self, tokens: Tensor, details: bool) -> tuple[dict[str, Tensor], list[Statistics]]:
        """Accumulate the gradient of the full-batch mean; each micro-batch counts by its share of the sequences."""
        total = tokens.shape[0]
        parts: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        statistics: list[Statistics] = []
        micro_batches = torch.split(tokens, self._micro_sequences or total)
        for batch in micro_batches:
            with self._precision.autocast():
                out = self._forward(batch[:, :-1], batch[:, 1:], details)
            found = out.losses if self.transform_losses is None else self.transform_losses(out.losses)
            objective = (found.mean() + out.penalty) * (len(batch) / total)
            (objective if self.scaler is None else self.scaler.scale(objective)).backward()  # type: ignore[no-untyped-call]
            if details and not losses and len(micro_batches) > 1:
                first = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
                parts["small_norm"] = first * (total / len(batch))
            losses.append(found.detach())
            statistics += [out.statistics] if out.statistics is not None else []
        parts["losses"] = torch.cat(losses)
        parts["loss"] = parts["losses"].mean()
        return parts, statistics

    def _update(self, skipped: Tensor) -> None:
        """AdamW's fused kernel does nothing, and takes its step counts back, where `found_inf` is 1."""
        fused: Any = self.optimizer  # the attributes through which torch's own scaler speaks to the kernel
        fused.grad_scale = None
        fused.found_inf = skipped
        self.optimizer.step()
        del fused.grad_scale, fused.found_inf
        if self.scaler is not None:
            self.scaler.update()

    def _detail_parts(self, grads: list[Tensor], statistics: list[Statistics]) -> dict[str, Tensor]:
        state = [self.optimizer.state[p] for p in self._parameters]
        group = self.optimizer.param_groups[0]
        blocks = probes.merge_statistics([s.blocks for s in statistics])
        figures = probes.group_statistics(blocks, list(self._groups.blocks.values()))
        moments = [s["exp_avg_sq"] for s in state]
        ratio = probes.second_moment_ratio(
            self._slices, grads, moments, state[0]["step"], group["betas"][1], group["eps"]
        )
        log_z = torch.stack([s.log_z for s in statistics]).mean()
        return {"second_moment_ratio": ratio, "log_z": log_z, **figures._asdict()}

"""The prevention ladder: how far a gradient is clipped, and which update is left out.

Everything is decided on the device, without asking it for a value. What a rung remembers is one small tensor, part of
the checkpoint, so that an interrupted run decides as an undisturbed one. Norms are L2, before clipping. A norm that is
not finite, or whose update was left out, is never learned from.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from monitors.records import Prevention, SkipReason
from trainer.contract.config import AdaptiveClipConfig, PreventionConfig, SkipUpdateConfig

GUARD = "guard."  # before the names of their tensors in a checkpoint
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_ZCLIP_EPS = 1e-6  # ZClip's


class BandVerdict(NamedTuple):
    """Device scalars: leave the update out, apply it though it is outside, top of the band."""

    skip: Tensor
    gave_in: Tensor
    limit: Tensor


class NormBand:
    """A robust band of ln(norm): median and MAD of the last norms whose updates were applied.

    Outside is what lies above the median by `sigma` robust standard deviations and by the factor `min_ratio`. Ratios,
    because norms scatter by factors and fall by orders of magnitude early on; medians, because a mean and a standard
    deviation that have seen one outlier are blind to the next. After `max_skips` outliers within the window the band
    is wrong, not the gradients: it gives in and starts anew.

    `window` holds the newest norm last: positive if its update was applied, negative if not, 0 where there is none.
    """

    def __init__(self, config: SkipUpdateConfig, device: torch.device) -> None:
        self.window = torch.zeros(config.window_steps, device=device)
        self._config = config

    def judge(self, norm: Tensor, sound: Tensor) -> BandVerdict:
        """Judge one norm and take it in; `sound` is False if norm or loss is not finite."""
        config, window = self._config, self.window
        applied = window > 0
        count = applied.sum()
        logs = torch.where(applied, window, 1.0).log()
        centre = _lower_median(logs, applied, count)
        scale = _MAD_TO_SIGMA * _lower_median((logs - centre).abs(), applied, count)
        reach = (config.sigma * scale).clamp(min=math.log(config.min_ratio))
        outside = sound & (count >= config.min_steps) & (norm.log() > centre + reach)
        gave_in = outside & ((window < 0).sum() >= config.max_skips)
        skip = outside & ~gave_in
        kept = torch.where(gave_in, 0.0, window)[1:]
        newest = torch.where(skip, -norm, norm).reshape(1)
        window.copy_(torch.where(sound, torch.cat((kept, newest)), window))
        return BandVerdict(skip, gave_in, (centre + reach).exp())


class ZClip:
    """A clip limit that follows the run: ZClip (arXiv 2504.02507), from its published definition.

    z = (g - mean) / sd over exponential moving averages, which start with those of the first `warm_up_steps` norms.
    Beyond `z_max` the norm is brought to mean + z_max^2 sd / z: the farther out, the nearer to the mean. The averages
    take in the norm so clipped.

    `moments` holds the number of norms of the warm-up, mean and variance.
    """

    def __init__(self, config: AdaptiveClipConfig, device: torch.device) -> None:
        self.moments = torch.zeros(3, device=device)
        self._config = config

    def limit(self, norm: Tensor) -> Tensor:
        """The limit for this norm; infinite where it is within z_max, or none is known yet."""
        count, mean, variance = self.moments.unbind()
        deviation = variance.sqrt()
        z = (norm - mean) / (deviation + _ZCLIP_EPS)
        z_max = self._config.z
        clips = (count >= self._config.warm_up_steps) & (z > z_max)
        return torch.where(clips, mean + z_max**2 * deviation / z, math.inf)

    def take(self, norm: Tensor, applied: Tensor) -> None:
        """Learn from a clipped norm, if its update was applied."""
        count, mean, variance = self.moments.unbind()
        alpha, warm_up = self._config.alpha, self._config.warm_up_steps
        warming = count < warm_up
        weight = torch.where(warming, 1 / (count + 1), 1 - alpha)
        moved = mean + weight * (norm - mean)
        # while it warms up, plain mean and variance (Welford); afterwards ZClip's, around the average as it is now
        spread = (norm - moved) * torch.where(warming, norm - mean, norm - moved)
        widened = variance + weight * (spread - variance)
        learned = torch.stack((count + warming, moved, widened))
        self.moments.copy_(torch.where(applied, learned, self.moments))


class Told(NamedTuple):
    """What became of an update, on the host."""

    clipped: bool
    skipped: bool
    prevention: Prevention | None


class Guards:
    """All rungs: clipping by `clip_norm`, refusal of what is not finite, and those that a configuration turns on."""

    def __init__(self, config: PreventionConfig, clip_norm: float, device: torch.device) -> None:
        self._clip_norm = clip_norm
        self._band = NormBand(config.skip_update, device) if config.skip_update is not None else None
        self._zclip = ZClip(config.adaptive_clip, device) if config.adaptive_clip is not None else None

    def judge(self, norm: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """What is to become of an update, and learn from it.

        Returns:
            `skipped`, 1 if it is to be left out; with skipping on `norm_band`, a `BandVerdict` stacked; with adaptive
            clipping on `clip_limit`, infinite where it sets none.
        """
        sound = norm.isfinite() & loss.isfinite()
        parts: dict[str, Tensor] = {}
        applied = sound
        if self._band is not None:
            verdict = self._band.judge(norm, sound)
            applied = sound & ~verdict.skip
            parts["norm_band"] = torch.stack([part.float() for part in verdict])
        if self._zclip is not None:
            limit = self._zclip.limit(norm)
            self._zclip.take(torch.minimum(norm, limit), applied)
            parts["clip_limit"] = limit
        return {"skipped": (~applied).float(), **parts}

    def clip(self, parameters: Iterable[nn.Parameter], parts: Mapping[str, Tensor]) -> None:
        """Scale the gradients down to the lower limit, given the parts of `judge` and their norm in `grad_norm`."""
        norm, adaptive = parts["grad_norm"], parts.get("clip_limit")
        if adaptive is None:
            clip_grads_with_norm_(parameters, self._clip_norm, norm)
        else:  # torch would ask the device for the value of a limit that is a tensor
            clip_grads_with_norm_(parameters, 1.0, norm / adaptive.clamp(max=self._clip_norm))

    def tell(self, part: Mapping[str, list[float]]) -> Told:
        """What `judge` has found, from the same parts once they are on the host."""
        (loss,), (norm,), skipped = part["loss"], part["grad_norm"], part["skipped"][0] != 0
        (adaptive,) = part.get("clip_limit", (math.inf,))
        limit = min(adaptive, self._clip_norm)
        skip, gave_in, top = part.get("norm_band", (0.0, 0.0, 0.0))
        clips = norm > limit
        if not (clips or skipped or gave_in):
            return Told(clipped=False, skipped=False, prevention=None)
        finite = math.isfinite(loss) and math.isfinite(norm)
        reason: SkipReason | None = None if not skipped else "norm" if finite else "non_finite"
        scaled = clips and not skipped
        prevention = Prevention(
            clip_factor=limit / norm if scaled else None,
            clipped_by=None if not scaled else "adaptive_clip" if adaptive < self._clip_norm else "clip_norm",
            skipped=reason,
            gave_in=gave_in != 0,
            norm_limit=top if skip or gave_in else None,
        )
        return Told(clipped=clips, skipped=skipped, prevention=prevention)

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, by its name in a checkpoint; the live tensors."""
        found: dict[str, Tensor] = {}
        if self._band is not None:
            found[f"{GUARD}skip_update"] = self._band.window
        if self._zclip is not None:
            found[f"{GUARD}adaptive_clip"] = self._zclip.moments
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Take over what a checkpoint holds; the rungs for which that is nothing, or a window of another length."""
        fresh = []
        for name, ours in self.tensors().items():
            theirs = tensors.get(name)
            if theirs is not None and theirs.shape == ours.shape:
                ours.copy_(theirs)
            else:
                ours.zero_()
                fresh.append(name.removeprefix(GUARD))
        return tuple(fresh)


def _lower_median(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The middle one of those values, the lower of two; infinite if there are none."""
    ordered = torch.where(among, values, math.inf).sort().values
    middle = torch.div((count - 1).clamp(min=0), 2, rounding_mode="floor")
    return ordered.gather(0, middle.reshape(1)).squeeze(0)

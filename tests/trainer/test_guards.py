"""The rungs of the prevention ladder against plain references, and what they may never do."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from tests.trainer.tiny import CPU
from trainer.contract.config import AdaptiveClipConfig, PreventionConfig, SkipUpdateConfig
from trainer.guards import Guards

_NEAR = 1e-4  # of a threshold: float32 on the device and float64 here may differ about it


@dataclass
class PlainBand:
    """The skip rung in a few lines of Python."""

    config: SkipUpdateConfig
    window: list[tuple[float, bool]] = field(default_factory=list)

    def judge(self, norm: float) -> str:
        """applied, skipped or gave_in."""
        config = self.config
        applied = [known for known, was_applied in self.window if was_applied]
        outcome = "applied"
        if len(applied) >= config.min_steps:
            centre = statistics.median_low(applied)
            spread = 1.4826 * statistics.median_low(abs(math.log(known / centre)) for known in applied)
            excess = math.log(norm / centre) - max(math.log(config.min_ratio), config.sigma * spread)
            assume(abs(excess) > _NEAR)
            if excess > 0:
                many = sum(not was_applied for _, was_applied in self.window) >= config.max_skips
                outcome = "gave_in" if many else "skipped"
        if outcome == "gave_in":
            self.window = []
        self.window = [*self.window, (norm, outcome != "skipped")][-config.window_steps :]
        return outcome


def _judged(guards: Guards, norm: float, loss: float = 2.0) -> str:
    """What the rung says of one norm."""
    values = {"loss": [loss], "grad_norm": [norm]}
    parts = guards.judge(torch.tensor(norm), torch.tensor(loss))
    told = guards.tell({name: part.reshape(-1).tolist() for name, part in parts.items()} | values)
    if told.prevention is not None and told.prevention.gave_in:
        return "gave_in"
    return "applied" if not told.skipped else "skipped" if math.isfinite(norm) and math.isfinite(loss) else "refused"


def _skipping(**changes: float) -> Guards:
    known = {"window_steps": 12, "min_steps": 4, "max_skips": 3}
    config = SkipUpdateConfig.model_validate({**known, **changes})
    return Guards(PreventionConfig(skip_update=config), 1.0, CPU)


_NORMS = st.lists(
    st.tuples(st.floats(-1.0, 1.0), st.sampled_from([1.0, 1.0, 1.0, 1.0, 2.0, 10.0, 1e6])), min_size=1, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(norms=_NORMS, sigma=st.sampled_from([1.0, 3.0, 6.0]), min_ratio=st.sampled_from([1.0, 1.5, 3.0]))
def test_the_band_is_the_one_of_the_plain_reference(
    norms: list[tuple[float, float]], sigma: float, min_ratio: float
) -> None:
    """Every decision on every sequence, and never more skips in a row than allowed."""
    config = SkipUpdateConfig(sigma=sigma, min_ratio=min_ratio, window_steps=12, min_steps=4, max_skips=3)
    guards, plain = Guards(PreventionConfig(skip_update=config), 1.0, CPU), PlainBand(config)
    ours = []
    for noise, size in norms:
        rounded = torch.tensor(math.exp(noise) * size).item()
        ours.append(_judged(guards, rounded))
        assert ours[-1] == plain.judge(rounded)
    assert "skipped " * 4 not in " ".join(ours) + " "


@settings(max_examples=30, deadline=None)
@given(
    norms=st.lists(st.floats(0.125, 8.0, width=32), min_size=1, max_size=30),
    bad=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([math.nan, math.inf])), max_size=5),
)
def test_what_is_not_finite_is_refused_and_never_learned(norms: list[float], bad: list[tuple[int, float]]) -> None:
    """With such steps in between, every other decision and the final windows are the same to the bit."""
    config = PreventionConfig(
        skip_update=SkipUpdateConfig(window_steps=12, min_steps=4, max_skips=3, sigma=1.0, min_ratio=1.2),
        adaptive_clip=AdaptiveClipConfig(warm_up_steps=5),
    )
    clean, disturbed = Guards(config, 1.0, CPU), Guards(config, 1.0, CPU)
    for index, norm in enumerate(norms):
        for _, value in (one for one in bad if one[0] == index):
            assert _judged(disturbed, value) == "refused"
            assert _judged(disturbed, norm, loss=value) == "refused"
        assert _judged(clean, norm) == _judged(disturbed, norm)
    for name, tensor in clean.tensors().items():
        assert torch.equal(tensor, disturbed.tensors()[name])
        assert tensor.isfinite().all()


def test_an_outlier_is_skipped_again_and_again() -> None:
    """What was skipped is not in the band: the third outlier is as far out as the first."""
    guards = _skipping()
    for _ in range(8):
        assert _judged(guards, 0.5) == "applied"
    assert [_judged(guards, norm) for norm in (5.0, 0.5, 5.0, 0.5, 5.0)] == ["skipped", "applied"] * 2 + ["skipped"]


@pytest.mark.parametrize("factor", [2.0, 1000.0])
def test_a_permanent_shift_does_not_stop_training(factor: float) -> None:
    """BERT's norm doubled for good: within the ratio. A thousandfold shift is skipped three times, then normal."""
    guards = _skipping()
    for _ in range(20):
        _judged(guards, 0.5)
    found = [_judged(guards, 0.5 * factor) for _ in range(30)]
    assert found == (["applied"] * 30 if factor == 2.0 else ["skipped"] * 3 + ["gave_in"] + ["applied"] * 26)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.5, 1.0, 1e3, 1e6]), min_size=100, max_size=100))
def test_at_most_a_bounded_share_is_ever_skipped(norms: list[float]) -> None:
    """Three within any twelve steps, unless the band gave in among them; then the band must be trusted anew."""
    guards = _skipping(min_ratio=1.1, sigma=0.1)
    found = [_judged(guards, norm) for norm in norms]
    stretches = [found[at : at + 12] for at in range(len(found) - 11)]
    assert all(stretch.count("skipped") <= 3 for stretch in stretches if "gave_in" not in stretch)
    assert all(set(found[at + 1 : at + 4]) <= {"applied"} for at, what in enumerate(found) if what == "gave_in")


def test_zero_norms_are_no_norms() -> None:
    """A gradient of nothing is applied, makes no band, and leaves the window finite."""
    guards = _skipping()
    assert {_judged(guards, 0.0) for _ in range(20)} == {"applied"}
    assert {_judged(guards, 5.0) for _ in range(5)} == {"applied"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.0625, 64.0, width=32), min_size=26, max_size=80))
def test_zclip_is_the_published_one(norms: list[float]) -> None:
    """Limit and averages of every step, against the definition in plain Python."""
    guards = Guards(PreventionConfig(adaptive_clip=AdaptiveClipConfig()), math.inf, CPU)
    mean = variance = 0.0
    for index, norm in enumerate(norms):
        limit = guards.judge(torch.tensor(norm), torch.tensor(2.0))["clip_limit"].item()
        if index < 25:
            assert limit == math.inf
            first = norms[: index + 1]
            mean, variance = statistics.fmean(first), statistics.pvariance(first)
            continue
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        assume(abs(z - 2.5) > _NEAR)
        taken = mean + 2.5 * math.sqrt(variance) / (z / 2.5) if z > 2.5 else norm
        assert limit == (pytest.approx(taken, rel=1e-3) if z > 2.5 else math.inf)
        mean = 0.97 * mean + 0.03 * taken
        variance = 0.97 * variance + 0.03 * (taken - mean) ** 2
        assert guards.tensors()["guard.adaptive_clip"].tolist() == [
            25,
            *(pytest.approx(x, rel=1e-2, abs=1e-3) for x in (mean, variance)),
        ]


def test_windows_come_back_and_what_does_not_fit_starts_anew() -> None:
    """The same rungs go on to the bit; one that is new, or has a window of another length, is named."""
    both = {"skip_update": {"window_steps": 12, "min_steps": 4, "max_skips": 3}, "adaptive_clip": {}}
    first = Guards(PreventionConfig.model_validate(both), 1.0, CPU)
    for norm in (0.5, 0.6, 0.4, 0.5, 0.7, 9.0):
        _judged(first, norm)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    again = Guards(PreventionConfig.model_validate(both), 1.0, CPU)
    assert again.restore(saved) == ()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in saved.items())
    longer = Guards(PreventionConfig.model_validate({**both, "skip_update": {}}), 1.0, CPU)
    assert longer.restore(saved) == ("skip_update",)
    assert longer.restore({}) == ("skip_update", "adaptive_clip")
    assert not any(tensor.any() for tensor in longer.tensors().values())
    assert Guards(PreventionConfig(), 1.0, CPU).restore(saved) == ()


def test_a_window_too_short_for_its_skips_is_refused() -> None:
    """Otherwise its own skips would disarm it."""
    with pytest.raises(ValidationError, match="window_steps 20 must be at least min_steps 16"):
        SkipUpdateConfig(window_steps=20, min_steps=16, max_skips=5)


def test_the_documentation_shows_the_defaults() -> None:
    """Every key of both rungs, with the value that `{}` stands for."""
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown = YAML(typ="safe").load("prevention:" + text.partition("```yaml\nprevention:")[2].partition("```")[0])
    assert shown["prevention"] == PreventionConfig.model_validate({"skip_update": {}, "adaptive_clip": {}}).model_dump()

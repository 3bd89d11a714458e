"""Samples and layer groups in the evidence: named where the records say so, missing where they do not."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from monitors.diagnosis import Diagnosis
from monitors.records import ActivationRecord, ActivationStats, Record, StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Finding, IncidentClass
from tests.monitors.curves import LR, healthy, step_record, watch
from tests.trainer.tiny import tiny_model, tiny_step, tiny_tokens
from trainer.contract.config import FaultConfig
from trainer.faults import effects
from trainer.step import TrainStep

_GROUPS = ("embed", "early", "mid", "late", "head")
_ONSET = 200


def _step(step: int, *, lifted: float = 0.0, **fields: Any) -> StepRecord:
    ratios = {group: 1e-3 * (1 + 0.05 * math.sin(step + len(group))) for group in _GROUPS}
    loss = fields.pop("loss", healthy(1)(step) + lifted)
    known: dict[str, Any] = {"update_ratio": ratios, "worst": (8 * step + 3, loss + 0.5)}
    return step_record(step, loss, **(known | fields))


def _spiking(fields: dict[int, dict[str, Any]]) -> Iterator[StepRecord]:
    """A spike of 2 nats from the onset on, with other fields at some steps."""
    for step in range(1, _ONSET + 3):
        yield _step(step, lifted=2.0 if step >= _ONSET else 0.0, **fields.get(step, {}))


def _last(found: Iterable[Finding], kind: str = "suspected") -> Finding:
    return [finding for finding in found if finding.kind == kind][-1]


def test_the_group_that_left_its_band_first_is_named_with_its_numbers() -> None:
    """The gradient of `mid` grows three steps before the loss does, that of all groups when it spikes."""
    norms = {step: {"grad_norms": dict.fromkeys(_GROUPS, 0.2 + 0.01 * (step % 3))} for step in range(1, _ONSET)}
    norms[_ONSET - 3] = {"grad_norms": dict.fromkeys(_GROUPS, 0.2) | {"mid": 3.0}}
    norms[_ONSET] = {"grad_norms": dict.fromkeys(_GROUPS, 90.0)}

    evidence = _last(watch(Diagnosis(), _spiking(norms))).evidence

    assert (evidence["layer_group"], evidence["layer_signal"]) == ("mid", "grad_norm")
    assert (evidence["layer_step"], evidence["layer_value"]) == (_ONSET - 3, 3.0)
    assert evidence["layer_usual"] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("norm", [90.0, None], ids=["all at once", "nothing recorded"])
def test_what_cannot_be_told_is_not_named(norm: float | None) -> None:
    """Every group left at the same step, as far out; or only the loss was recorded."""
    fields: dict[int, dict[str, Any]] = {step: {"update_ratio": {}, "worst": None} for step in range(1, _ONSET + 3)}
    if norm is not None:
        fields = {step: {"grad_norms": dict.fromkeys(_GROUPS, 0.2)} for step in range(1, _ONSET)}
        fields[_ONSET] = {"grad_norms": dict.fromkeys(_GROUPS, norm)}

    evidence = _last(watch(Diagnosis(), _spiking(fields))).evidence

    assert not {key for key in evidence if key.startswith("layer_")}
    assert ("samples" in evidence) is (norm is not None)


def test_an_old_departure_is_no_cause() -> None:
    """What left its band long before the spike, and came back, does not explain it."""
    fields: dict[int, dict[str, Any]] = {s: {"grad_norms": dict.fromkeys(_GROUPS, 0.2)} for s in range(1, _ONSET + 3)}
    fields[_ONSET - 60] = {"grad_norms": dict.fromkeys(_GROUPS, 0.2) | {"late": 9.0}}

    assert "layer_group" not in _last(watch(Diagnosis(), _spiking(fields))).evidence


def test_the_worst_samples_of_the_window_are_named() -> None:
    """By raw position, worst first, from two steps before the onset on; those of healthy steps long before are not."""
    fields = {_ONSET - 80: {"worst": (1, 99.0)}, _ONSET - 1: {"worst": (777, 12.5)}, _ONSET: {"worst": (800, 9.0)}}

    evidence = _last(watch(Diagnosis(), _spiking(fields))).evidence

    samples, losses = evidence["samples"], evidence["sample_losses"]
    assert isinstance(samples, list)
    assert isinstance(losses, list)
    assert samples[:2] == [777, 800]
    assert losses[:2] == [12.5, 9.0]


def test_what_comes_long_after_the_onset_does_not_replace_its_samples() -> None:
    """Findings made later about the same spike name its own worst samples, or none."""
    diagnosis, found = Diagnosis(), []
    for step in range(1, _ONSET + 120):
        fields: dict[str, Any] = {"worst": (4711, 20.0)} if step == _ONSET else {}
        fields |= {"worst": (9999, 50.0)} if step == _ONSET + 110 else {}
        found += diagnosis.observe(_step(step, lifted=2.0 if step >= _ONSET else 0.0, **fields))

    named = [f.evidence["samples"] for f in found if f.step >= _ONSET and "samples" in f.evidence]
    assert named
    assert all(isinstance(samples, list) and samples[0] == 4711 for samples in named)


def test_a_broken_layer_and_its_sample_survive_the_snapshot() -> None:
    """A NaN in the activations from one group on: the first of them in the order of the model is named."""

    def activations(step: int, broken: bool) -> ActivationRecord:
        rms = {"early": 1.0, "mid": math.nan if broken else 1.1, "late": math.inf if broken else 0.9}
        groups = {g: ActivationStats(rms=value, max=1.0, dead=0.0, saturated=0.0) for g, value in rms.items()}
        return ActivationRecord(seq=step, attempt=1, at_s=0.0, step=step, groups=groups)

    stream: list[Record] = []
    for step in range(1, _ONSET + 3):
        bad = step >= _ONSET
        fields: dict[str, Any] = {"loss": math.nan, "worst": (4711, math.nan), "skipped": True} if bad else {}
        stream += [_step(step, **fields), activations(step, bad)]
    diagnosis = Diagnosis()
    found = watch(diagnosis, stream[:-3])
    thawed = Diagnosis.from_state(DetectSettings(), json.loads(json.dumps(diagnosis.to_state(), allow_nan=False)))
    found += watch(thawed, stream[-3:])

    finding = _last(found, "classified")
    assert finding.cls is IncidentClass.SUDDEN_NAN
    assert (finding.evidence["layer_group"], finding.evidence["layer_signal"]) == ("mid", "activation_rms")
    assert finding.evidence["samples"] == [4711] * 3


# -- records of a real step with a fault in one layer ---------------------------------------------------------------

_FAULTS = {
    "nan_grad": ("mid", "grad_norm"),
    "saturate_layer": ("mid", "update_ratio_over_lr"),
    "bit_flip": ("mid", "activation_rms"),
}


def _real(step: TrainStep, kind: str) -> Iterator[Record]:
    """60 updates of a tiny model of three blocks that has learned; the fault is in the middle one at the 51st."""
    for number in range(100):
        step(tiny_tokens(8, seed=number % 5), LR)
    fault = FaultConfig.model_validate({"kind": kind, "layer": 1, "factor": 1000.0})
    for number in range(1, 61):
        if number == 51 and kind == "nan_grad":
            step.after_backward = lambda model: effects.poison_gradient(model, fault)
        elif number == 51:
            {"saturate_layer": effects.saturate_layer, "bit_flip": effects.flip_weight_bit}[kind](step.model, fault)
        result = step(tiny_tokens(8, seed=number % 5), LR, details=True).read()
        details = result.details
        assert details is not None
        yield ActivationRecord(seq=number, attempt=1, at_s=0.0, step=number, groups=details.activations)
        yield step_record(
            number, result.loss, grad_norm=result.grad_norm, skipped=result.skipped, update_ratio=result.update_ratio,
            grad_norms=details.grad_norms, attention_logit_max=details.attention_logit_max,
            second_moment_ratio=details.second_moment_ratio,
        )  # fmt: skip


@pytest.mark.parametrize("kind", _FAULTS)
def test_a_fault_in_one_layer_of_a_real_model_is_found_there(kind: str) -> None:
    """A NaN in its gradient, weights a thousand times as large, or a flipped exponent bit."""
    found = watch(Diagnosis(), _real(tiny_step(tiny_model()), kind))

    evidence = next(finding.evidence for finding in found if finding.step >= 51 and "layer_group" in finding.evidence)
    assert evidence["layer_group"] == _FAULTS[kind][0], evidence
    assert evidence["layer_step"] == 51

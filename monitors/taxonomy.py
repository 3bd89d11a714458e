"""The taxonomy: names of everything that can go wrong, and the findings by which the diagnosis reports it.

DESIGN 6 has the table. A class is a claim with its evidence; what is decided about it is the policy's business.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class IncidentClass(StrEnum):
    """Every class a policy rule may name in `on`."""

    TRANSIENT_SPIKE = "transient_spike"
    UNRECOVERED_SPIKE = "unrecovered_spike"
    SLOW_DIVERGENCE = "slow_divergence"
    IMMEDIATE_NAN = "immediate_nan"
    REPEATED_SPIKES_BY_SHARDS = "repeated_spikes_by_shards"
    REPEATED_SPIKES_BY_STATE = "repeated_spikes_by_state"
    PLATEAU_THEN_NAN = "plateau_then_nan"
    SUDDEN_NAN = "sudden_nan"
    NAN_AFTER_LOAD = "nan_after_load"
    INITIAL_LOSS_OFF = "initial_loss_off"
    LOSS_IMPLAUSIBLY_LOW = "loss_implausibly_low"
    VALIDATION_DIVERGENCE = "validation_divergence"
    UPDATE_RATIO_HIGH = "update_ratio_high"
    UPDATE_RATIO_LOW = "update_ratio_low"
    ACTIVATION_EXPLOSION = "activation_explosion"
    ACTIVATION_VANISHING = "activation_vanishing"
    THROUGHPUT_DROP = "throughput_drop"
    LR_MISMATCH = "lr_mismatch"
    LOSS_DISCONTINUITY = "loss_discontinuity"
    LEVEL_SHIFT = "level_shift"
    CRASH = "crash"
    HANG = "hang"
    PREEMPTION = "preemption"
    CHECKPOINT_OVERDUE = "checkpoint_overdue"
    DATA_ERROR = "data_error"


#: Only these hold up the promotion of checkpoints (DESIGN 9); the others are notices or facts of the process.
TAINTING = frozenset(
    {
        IncidentClass.TRANSIENT_SPIKE,
        IncidentClass.UNRECOVERED_SPIKE,
        IncidentClass.SLOW_DIVERGENCE,
        IncidentClass.IMMEDIATE_NAN,
        IncidentClass.REPEATED_SPIKES_BY_SHARDS,
        IncidentClass.PLATEAU_THEN_NAN,
        IncidentClass.SUDDEN_NAN,
        IncidentClass.NAN_AFTER_LOAD,
        IncidentClass.LOSS_IMPLAUSIBLY_LOW,
        IncidentClass.ACTIVATION_EXPLOSION,
    }
)

Evidence = dict[str, float | int | str | list[int] | list[float] | list[str]]


FindingKind = Literal["suspected", "classified", "closed", "dismissed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement of the diagnosis about one anomaly; `key` stays the same through its life.

    suspected: something left its band, the class is not settled (`cls` is the best guess).
    classified: the class is settled or has changed; the anomaly may still be going on (`end_step` None).
    closed: it is over; `end_step` is its last step.
    dismissed: it was nothing (an overlay's own trace, a planned change).
    """

    kind: FindingKind
    key: int
    cls: IncidentClass
    onset_step: int
    step: int
    why: str
    end_step: int | None = None
    evidence: Evidence = field(default_factory=dict)
    shards: tuple[int, ...] = ()

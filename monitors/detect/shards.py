"""Which shard did it: each shard's mean loss against what the batch was expected to have, and against its own kind.

A shard is convicted by several batches in which it alone stands out; one that merely shared a batch with it never is.
"""

from statistics import median

from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass

from monitors.records import StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence
from monitors.window import MAD_TO_SIGMA, Band

_MEMORY = 0.9  # of a shard's own offset: about ten reads


@dataclass(slots=True)
class ShardRecord:
    """What is known of one shard."""

    reads: int = 0
    offset: float = 0.0
    bad_reads: int = 0
    bad_sequences: int = 0
    bad_excess: float = 0.0
    lone_reads: int = Field(default=0, description="bad reads in which nothing else was in the batch")
    first_bad_step: int = 0


@dataclass(slots=True)
class ShardState:
    """What the detector remembers."""

    shards: dict[int, ShardRecord] = Field(default_factory=dict)
    convicted: list[int] = Field(default_factory=list)


class Conviction(BaseModel):
    """A shard, with the evidence against it."""

    shard: int
    onset_step: int
    why: str
    evidence: Evidence


class ShardDetector:
    """Folds the per-shard losses of step records."""

    def __init__(self, settings: DetectSettings, state: ShardState | None = None) -> None:
        self._settings = settings
        self.state = state or ShardState()

    def observe(self, record: StepRecord, band: Band | None) -> Conviction | None:
        """Take one step in."""
        if band is None or not record.shards:
            return None
        expected = band.trend(record.step)
        excesses = {shard: total / count - expected for shard, (count, total) in record.shards.items() if count}
        spread = self._spread(band)
        for shard, excess in excesses.items():
            others = [value for other, value in excesses.items() if other != shard]
            convicted = self._judge(record, shard, excess, others, spread)
            if convicted is not None:
                return convicted
        return None

    def rewind(self, quarantined: list[int]) -> None:
        """A new attempt: what was not proven is forgotten, offsets stay."""
        for known in self.state.shards.values():
            known.bad_reads = known.bad_sequences = known.lone_reads = 0
            known.bad_excess = 0.0
        self.state.convicted = quarantined

    def _judge(
        self, record: StepRecord, shard: int, excess: float, others: list[float], spread: float
    ) -> Conviction | None:
        settings = self._settings
        known = self.state.shards.setdefault(shard, ShardRecord())
        needed = max(settings.shard_nats, settings.shard_sigma * spread)
        over = excess - known.offset
        if over < needed:
            known.reads += 1
            known.offset = _MEMORY * known.offset + (1 - _MEMORY) * excess if known.reads > 1 else excess
            return None
        if any(other > 0.35 * over for other in others) or shard in self.state.convicted:
            return None  # the whole batch is up: the state, not this shard
        count = record.shards[shard][0]
        known.first_bad_step = known.first_bad_step if known.bad_reads else record.step
        known.bad_reads += 1
        known.bad_sequences += count
        known.bad_excess += over
        known.lone_reads += not others
        enough = known.bad_reads >= settings.shard_reads and known.bad_sequences >= settings.shard_sequences
        if not enough or known.lone_reads > known.bad_reads // 2:
            return None
        self.state.convicted.append(shard)
        mean = known.bad_excess / known.bad_reads
        why = (
            f"shard {shard} was {mean:.2f} nats above its own kind in {known.bad_reads} batches "
            f"({known.bad_sequences} sequences) in which no other shard stood out"
        )
        evidence: Evidence = {
            "shard_excess": round(mean, 6), "batches": known.bad_reads, "sequences": known.bad_sequences,
            "threshold": round(needed, 6),
        }  # fmt: skip
        return Conviction(shard=shard, onset_step=known.first_bad_step, why=why, evidence=evidence)

    def _spread(self, band: Band) -> float:
        """How far shards differ from each other by kind (code, maths, prose), and by chance."""
        offsets = [known.offset for known in self.state.shards.values() if known.reads >= 2]
        if len(offsets) < 4:
            return band.scale
        middle = median(offsets)
        return max(band.scale, MAD_TO_SIGMA * median(abs(offset - middle) for offset in offsets))

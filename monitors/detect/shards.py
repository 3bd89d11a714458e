"""Which shard did it: spikes are tied to shards by e-values (`monitors.detect.evalues`), never by company alone.

Two kinds of event speak. *Loud*: in the per-shard losses of one batch one shard alone stands out of its own history,
or of its kind while it has none, even without the batch's worst sequence; q is its chance to be read times its share
of the batch. *Onset*: a spike begins with no such shard; then the shards of the batch, or of one or two batches
before, are the suspects, and q is their chance to be read. That chance is the largest of the shares over the last 4,
32 and 256 batches, over the run, and of an average shard, each before the batch: where reads come in stretches, a bad
stretch of the run is no evidence.

A shard is convicted at S/alpha for S shards, so an innocent one is quarantined with probability at most alpha in a
run, however long. S is what the run declares; where it declares nothing, what was seen and at least 100, which makes
it alpha (1 + ln(S/100)). That holds as far as the chances are estimated right and no innocent shard is prone to bad
batches by nature; three hits, and a quarter of its reads, are asked for besides. Memory
is O(shards), the work of a step O(shards in its batch).
"""

import math
from collections.abc import Iterable, Mapping
from statistics import median

from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass

from monitors.detect.evalues import Hit, e_value
from monitors.records import StepRecord
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence
from monitors.window import MAD_TO_SIGMA, Band

_LEVELS = 8  # healthy reads whose median is a shard's own level
_HORIZONS = (4, 32, 256)  # batches
_FADE = (1 - 1 / 4, 1 - 1 / 32, 1 - 1 / 256)
_UNDECLARED_SHARDS = 100
_HITS = 16  # kept of a shard
_RECENT = 8  # batches; an onset may be dated back by five rows, the cause lies up to two before
_LAGS = (0.6, 0.2, 0.2)  # weights of a damage that shows at once, one or two batches later
_KNOWN_READS = 3  # healthy ones, from which on a shard has a history of its own: one may be an outlier
_KIND_NATS = 1.5  # code, maths and other languages lie within so much of the mean
_KIND_MOST_NATS = 2.5  # beyond, company of the same level is no excuse
_KIND_SHARDS = 3  # others of a like level are a kind
_NOISE_READS, _NOISE_STEPS = 256, 32
_ALIKE = 0.35  # share of the loudest's excess in the others that makes it the whole batch's
_RIVAL = 0.7  # or in the second loudest, that makes it nobody's
_SHOWS = 0.25  # of a poisoned shard's reads, since it first did


@dataclass(slots=True)
class ShardRecord:
    """What is known of one shard; shares of batches that had it are exponentially weighted, as of `row`."""

    reads: int = 0
    row: int = 0
    shares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    healthy: list[float] = Field(default_factory=list, description="levels over the trend of its newest healthy reads")
    loud: list[Hit] = Field(default_factory=list)
    onsets: tuple[list[Hit], list[Hit], list[Hit]] = Field(default_factory=lambda: ([], [], []))


@dataclass(slots=True)
class Batch:
    """What is remembered of a recent batch: by shard the chance that it was in it, and its number of reads."""

    step: int
    chances: dict[int, tuple[float, int]]
    explained: bool = False


@dataclass(slots=True)
class ShardState:
    """What the detector remembers."""

    shards: dict[int, ShardRecord] = Field(default_factory=dict)
    convicted: list[int] = Field(default_factory=list)
    declared: int = 0
    rows: int = 0
    width: float = Field(default=0.0, description="mean number of shards in a batch")
    count: float = Field(default=0.0, description="mean number of sequences of a shard in a batch")
    has_losses: bool = False
    noise: list[float] = Field(
        default_factory=list, description="newest excesses of single reads over their shard's level"
    )
    scale: float = Field(default=0.0, description="their robust sigma, 0: not known yet")
    levels: dict[int, float] = Field(default_factory=dict, description="of the shards read last, over the trend")
    recent: list[Batch] = Field(default_factory=list)
    loud_events: int = 0
    onset_events: int = 0


class Conviction(BaseModel):
    """A shard, with the evidence against it."""

    shard: int
    onset_step: int
    why: str
    evidence: Evidence


class ShardDetector:
    """Folds the shards of step records and the onsets of spikes."""

    def __init__(self, settings: DetectSettings, state: ShardState | None = None) -> None:
        self._settings = settings
        self.state = state or ShardState()

    def declare(self, num_shards: int) -> None:
        """How many shards the run's data has, as far as the trainer says so."""
        self.state.declared = max(self.state.declared, num_shards)

    def observe(self, record: StepRecord, band: Band | None) -> Conviction | None:
        """Take one step in; `band` is None while none is trusted."""
        if not record.shards:
            return None
        batch = self._read(record)
        losses = {s: total / n for s, (n, total) in record.shards.items() if n and s not in self.state.convicted}
        if math.isfinite(record.loss) and not any(map(math.isfinite, losses.values())):
            return None  # the trainer says which shards, not how they fared
        self.state.has_losses |= any(map(math.isfinite, losses.values()))
        loudest = self._loudest(record, losses, band)
        if loudest is None:
            return None
        shard, over = loudest
        batch.explained = True
        self.state.loud_events += 1
        known = self.state.shards[shard]
        chance, _ = batch.chances[shard]
        part = record.shards[shard][0] / sum(n for n, _ in record.shards.values())
        known.loud = _with(known.loud, Hit(record.step, self.state.loud_events, known.reads, chance * part))
        return self._judge(shard, known.loud, f"stood out of its batch, by {over:.2f} nats at last", over)

    def on_onset(self, onset_step: int) -> Conviction | None:
        """A spike has begun: its batch and the two before are suspected, unless a loud shard explains it."""
        state = self.state
        batches = {batch.step: batch for batch in state.recent if batch.step > onset_step - len(_LAGS)}
        if not batches or any(batch.explained for batch in batches.values()):
            return None
        state.onset_events += 1
        found: dict[int, list[Hit]] = {}
        for lag in range(len(_LAGS)):
            batch = batches.get(onset_step - lag)
            for shard, (chance, read) in (batch.chances if batch is not None else {}).items():
                hits = state.shards[shard].onsets[lag]
                hits[:] = _with(hits, Hit(onset_step, state.onset_events, read, chance))
                found[shard] = max(found.get(shard, []), hits, key=len)
        judged = (self._judge(shard, hits, "was read where spikes began", None) for shard, hits in found.items())
        guilty = [conviction for conviction in judged if conviction is not None]
        if len(guilty) > 1:  # always read together: which of them it is cannot be told yet
            for conviction in guilty:
                state.convicted.remove(conviction.shard)
            return None
        return guilty[0] if guilty else None

    def loud_in(self, steps: range) -> list[int]:
        """Shards that stood out of their batches in these steps, each once, in the order of steps."""
        found = [(hit.step, shard) for shard, known in self.state.shards.items() for hit in known.loud[-4:]]
        return list(dict.fromkeys(shard for step, shard in sorted(found) if step in steps))

    def rewind(self, step: int, quarantined: list[int]) -> None:
        """A new attempt from `step` updates: hits beyond it are taken back, so that no batch speaks twice.

        The events stay counted: for every shard they are misses then, which only makes it harder to convict.
        """
        state = self.state
        state.recent = [batch for batch in state.recent if batch.step <= step]
        for known in state.shards.values():
            known.loud = [hit for hit in known.loud if hit.step <= step]
            for hits in known.onsets:
                hits[:] = [hit for hit in hits if hit.step <= step]
        state.convicted = quarantined

    # -- exposure -------------------------------------------------------------------------------------------------

    def _read(self, record: StepRecord) -> Batch:
        """Count who was read, and by which chance each shard is in this batch, from the batches before it alone."""
        state = self.state
        present = [shard for shard, (count, _) in record.shards.items() if count and shard not in state.convicted]
        average = len(present) if not state.width else state.width
        chances = {}
        for shard in present:
            known = state.shards.get(shard)
            if known is None:
                known = state.shards[shard] = ShardRecord(row=state.rows)
            age = state.rows - known.row
            a, b, c = (known.shares[0] * _FADE[0] ** age, known.shares[1] * _FADE[1] ** age,
                       known.shares[2] * _FADE[2] ** age)  # fmt: skip
            typical = average / max(state.declared, len(state.shards))
            chance = min(1.0, max(typical, known.reads / max(state.rows, 1), a, b, c))
            known.shares = (1 - (1 - a) * _FADE[0], 1 - (1 - b) * _FADE[1], 1 - (1 - c) * _FADE[2])
            known.row, known.reads = state.rows, known.reads + 1
            chances[shard] = (chance, known.reads)
        state.rows += 1
        state.width += (len(present) - state.width) / min(state.rows, _HORIZONS[-1])
        mean_count = sum(n for n, _ in record.shards.values()) / len(record.shards)
        state.count += (mean_count - state.count) / min(state.rows, _HORIZONS[-1])
        batch = Batch(record.step, chances, explained=any(shard in record.shards for shard in state.convicted))
        state.recent = [*state.recent[-_RECENT + 1 :], batch]
        return batch

    # -- who stands out -------------------------------------------------------------------------------------------

    def _loudest(self, record: StepRecord, losses: Mapping[int, float], band: Band | None) -> tuple[int, float] | None:
        """The one shard that stands out of this batch, and its excess in nats; None if none does, or several do."""
        state = self.state
        broken = [shard for shard, loss in losses.items() if not math.isfinite(loss)]
        if broken or not math.isfinite(record.loss):
            return (broken[0], math.inf) if len(broken) == 1 and state.has_losses else None
        if band is None or not losses:
            return None
        expected = band.trend(record.step)
        overs = {shard: loss - expected - self._own_level(shard) for shard, loss in losses.items()}
        shard = max(overs, key=overs.__getitem__)
        loud = {s for s, over in overs.items() if self._is_loud(s, over, record.shards[s][0], len(overs), band)}
        self._remember({s: (over, losses[s] - expected) for s, over in overs.items()}, loud)
        if shard not in loud:
            return None
        over = overs[shard]
        if not self._without_its_worst(record, shard, len(overs), band):
            return None  # one hard sample, not the shard
        others = [other for s, other in overs.items() if s != shard]
        if others and median(others) > self._settings.spike_sigma * band.scale:
            return None  # a damaged model finds some data harder than other: that is no fault of the data
        if others and (max(others) > _RIVAL * over or median(others) > _ALIKE * over):
            return None  # the whole batch is up, or another as much: not this shard's doing
        return shard, over

    def _own_level(self, shard: int) -> float:
        """Nats over the trend that are usual for it; 0 until it has a history."""
        healthy = self.state.shards[shard].healthy
        return median(healthy) if len(healthy) >= _KNOWN_READS else 0.0

    def _is_loud(self, shard: int, over: float, count: int, width: int, band: Band) -> bool:
        """Beyond its own history, or, while it has none, beyond its kind. Fewer sequences than usual are noisier."""
        settings, state = self._settings, self.state
        scale = max(band.scale, state.scale or band.scale * math.sqrt(width))
        scale *= max(1.0, math.sqrt(state.count / count))
        if over < max(settings.shard_nats, settings.shard_sigma * scale):
            return False
        if len(state.shards[shard].healthy) >= _KNOWN_READS:
            return True
        alike = sorted((level for other, level in state.levels.items() if other != shard), reverse=True)
        kind = alike[_KIND_SHARDS - 1] if len(alike) >= _KIND_SHARDS else 0.0
        return over >= max(_KIND_NATS, min(_KIND_MOST_NATS, 1.5 * kind))

    def _without_its_worst(self, record: StepRecord, shard: int, width: int, band: Band) -> bool:
        """Whether it is loud still if the worst sequence of the batch, wherever that lay, is taken out of it."""
        count, total = record.shards[shard]
        if record.worst is None or count < 2:
            return True
        rest = (total - record.worst[1]) / (count - 1) - band.trend(record.step) - self._own_level(shard)
        return self._is_loud(shard, rest, count - 1, width, band)

    def _remember(self, overs: Mapping[int, tuple[float, float]], loud: set[int]) -> None:
        state = self.state
        for shard, (over, level) in overs.items():
            state.levels.pop(shard, None)
            state.levels[shard] = level
            if shard in loud:
                continue
            known = state.shards[shard]
            if len(known.healthy) >= _KNOWN_READS:
                state.noise.append(over)
            known.healthy = [*known.healthy, level][-_LEVELS:]
        for shard in list(state.levels)[: max(0, len(state.levels) - _NOISE_READS)]:
            del state.levels[shard]
        del state.noise[:-_NOISE_READS]
        if len(state.noise) >= _NOISE_STEPS and (not state.scale or state.rows % _NOISE_STEPS == 0):
            middle = median(state.noise)
            state.scale = MAD_TO_SIGMA * median(abs(value - middle) for value in state.noise)

    # -- judgement ------------------------------------------------------------------------------------------------

    def _judge(self, shard: int, hits: list[Hit], what: str, over: float | None) -> Conviction | None:
        state, settings = self.state, self._settings
        known = state.shards[shard]
        value = self._evidence_against(known)
        shards = max(state.declared, len(state.shards), 0 if state.declared else _UNDECLARED_SHARDS)
        threshold = shards / settings.shard_alpha
        reads = known.reads - hits[0].read + 1
        if value < threshold or len(hits) < settings.shard_reads or len(hits) < _SHOWS * reads:
            return None
        state.convicted.append(shard)
        why = (
            f"shard {shard} {what}: {len(hits)} times in {reads} reads, which chance does to one of {shards} innocent "
            f"shards in fewer than {settings.shard_alpha:.1%} of runs"
        )
        evidence: Evidence = {
            "shards": [shard], "spikes": len(hits), "reads": reads, "chance_of_a_read": round(hits[-1].chance, 6),
            "log10_e_value": round(math.log10(value), 3), "log10_threshold": round(math.log10(threshold), 3),
            "spike_steps": [hit.step for hit in hits],
        }  # fmt: skip
        if over is not None and math.isfinite(over):
            evidence["shard_excess"] = round(over, 6)
        return Conviction(shard=shard, onset_step=hits[0].step, why=why, evidence=evidence)

    def _evidence_against(self, known: ShardRecord) -> float:
        """Both kinds of event mixed half and half; where no losses are told, onsets are all there is."""
        onsets = sum(weight * e_value(hits) for weight, hits in zip(_LAGS, known.onsets, strict=True))
        return 0.5 * e_value(known.loud) + 0.5 * onsets if self.state.has_losses else onsets


def _with(hits: Iterable[Hit], hit: Hit) -> list[Hit]:
    return [*hits, hit][-_HITS:]

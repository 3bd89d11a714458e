"""Spikes of the loss: left its band, came back, or stayed out. The band is frozen while one goes on.

The step axis is the truth: waiting is counted in steps, and in rows where a log has few of them. A single row must
stand out of what the run's own tail has shown, because one rank's losses are heavy-tailed by nature.
"""

from dataclasses import replace
from statistics import median

from pydantic import Field
from pydantic.dataclasses import dataclass

from monitors.detect.chance import NoiseTail
from monitors.detect.series import Series
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence, Finding, FindingKind, IncidentClass
from monitors.window import Band, Row, fit

_REFIT_ROWS = 8  # a window of 128 rows moves little in so many; it keeps the work of a row constant
_MIN_ROWS_TO_JUDGE = 8  # in logs of every 100th step the horizon in steps is one row
_SPREAD_ROWS = 12
_JUMP_ROWS = 8
_DOUBT_SIGMA = 3.0
_PAIR_ROWS = 1_000  # of an outlier that goes on, the first row may be one in so many
_LONE_ROWS = 30_000  # by chance at most one lone row in so many is taken for a spike
_LONE_ROWS_QUIET = 3_000_000  # the same where its gradient was as ever
_NORM_FLOOR = 0.05  # smallest scatter of ln(norm)


@dataclass(slots=True)
class Event:
    """A spike in progress."""

    key: int
    onset_step: int
    detected_step: int
    band: Band
    first: Row
    before: float = Field(default=0.0, description="excess of the rows before it: a climb has some already")
    rows: list[Row] = Field(default_factory=list, description="the newest of it")
    peak: float = 0.0
    last_out_step: int = 0
    settled: IncidentClass | None = None
    shards: list[int] = Field(default_factory=list)

    def jumped(self) -> bool:
        """Whether its first rows, of which it remembers all while it is young, already made half of the way up."""
        begin = max(row.loss - self.band.trend(row.step) for row in self.rows[:_JUMP_ROWS])
        return self.rows[0] == self.first and begin - self.before >= 0.5 * (self.peak - self.before)


@dataclass(slots=True)
class SpikeState:
    """What the detector remembers."""

    window: list[Row] = Field(default_factory=list)
    doubtful: list[Row] = Field(default_factory=list, description="newest rows between 3 sigma and the threshold")
    fitted: Band | None = Field(default=None, description="to the window, renewed every few rows")
    fitted_rows: int = Field(default=0, description="taken in since")
    tail: NoiseTail = Field(default_factory=NoiseTail)
    event: Event | None = None
    closed_steps: list[int] = Field(default_factory=list)
    repeated_reported: int = -1
    last_eval: tuple[int, float] | None = None
    norms: Series = Field(default_factory=Series, description="gradient norms of healthy rows")
    norm_z: float | None = Field(default=None, description="of the newest row's gradient norm, None where not known")
    armed_step: int | None = Field(default=None, description="since when the norm has been far out of its band")


class SpikeDetector:
    """Folds finite losses."""

    def __init__(self, settings: DetectSettings, state: SpikeState | None = None) -> None:
        self._settings = settings
        self.state = state or SpikeState()
        self._leveled: tuple[Band, Band] | None = None  # the fitted one, and the same with no rise in it

    def band(self, *, climbing: bool = False) -> Band | None:
        """What is expected now, None before enough was seen; in a climb that is known of, the climb."""
        state = self.state
        if state.event is not None:
            return state.event.band
        if len(state.window) < 4:
            return None
        if state.fitted is None or state.fitted_rows >= min(_REFIT_ROWS, len(state.window) // 8):
            state.fitted, state.fitted_rows = fit(state.window, self._settings.scale_floor), 0
        if climbing:
            return state.fitted
        if self._leveled is None or self._leveled[0] is not state.fitted:
            self._leveled = state.fitted, state.fitted.level_or_falling()
        return self._leveled[1]

    def observe(
        self, row: Row, next_key: int, *, planned_change: bool, climbing: bool, norm: float | None = None
    ) -> list[Finding]:
        """Take one finite loss in, with its gradient norm if that is known; `next_key` names a new event."""
        self._arm(row.step, norm)
        if self.state.event is not None:
            return self._during(self.state.event, row)
        band = self.band(climbing=climbing)
        z = band.z(row.step, row.loss) if band is not None else 0.0
        if band is None or not self._leaves(band, row, z):
            self._accept(row, z)
            if norm is not None:
                self.state.norms.add(norm)
            return []
        return self._begin(row, band, next_key, planned_change)

    def rewind(self, history: list[Row]) -> None:
        """A new attempt: the window is what survives, nothing is in progress."""
        state = self.state
        state.window = history[-self._settings.window_rows :]
        state.event, state.fitted, state.doubtful = None, None, []
        state.norms, state.norm_z, state.armed_step = Series(), None, None
        last = history[-1].step if history else 0
        state.closed_steps = [step for step in state.closed_steps if step <= last]

    def _accept(self, row: Row, z: float) -> None:
        state = self.state
        state.doubtful = [*state.doubtful[-4:], row] if z > _DOUBT_SIGMA else []
        if len(state.window) >= self._settings.window_rows:  # before, the band itself is wrong more often than rows are
            state.tail.add(z)
        state.window.append(row)
        state.fitted_rows += 1
        if len(state.window) > self._settings.window_rows:
            del state.window[: -self._settings.window_rows]

    def _leaves(self, band: Band, row: Row, z: float) -> bool:
        settings, state = self._settings, self.state
        if z <= _DOUBT_SIGMA and z <= settings.spike_sigma:
            return False
        if len(state.window) < settings.min_rows:
            excess = row.loss - band.trend(row.step)
            return z > settings.spike_sigma and excess > settings.cold_share * abs(band.level)
        doubts = [band.z(doubt.step, doubt.loss) for doubt in state.doubtful]
        if z > _DOUBT_SIGMA and any(
            d > settings.spike_sigma and not state.tail.is_chance(d, _PAIR_ROWS) for d in doubts
        ):
            return True  # an outlier that the next row does not take back
        if z <= settings.spike_sigma:
            return False
        return any(d > settings.spike_sigma for d in doubts) or not state.tail.is_chance(z, self._lone_rows())

    def _arm(self, step: int, norm: float | None) -> None:
        """The gradient norm leads the loss: where it was as ever a lone row is doubted; alone it says nothing."""
        state = self.state
        offset = state.norms.offset(norm) if norm is not None else None
        state.norm_z = None if offset is None else offset / max(state.norms.spread, _NORM_FLOOR)
        if state.norm_z is None or state.norm_z <= _DOUBT_SIGMA:
            state.armed_step = None
        elif state.armed_step is None and state.norm_z > self._settings.spike_sigma:
            state.armed_step = step

    def _lone_rows(self) -> int:
        """How rare by chance a lone row must be; that its gradient was as ever speaks for chance."""
        quiet = self.state.norm_z is not None and self.state.norm_z <= _DOUBT_SIGMA
        return _LONE_ROWS_QUIET if quiet else _LONE_ROWS

    def _begin(self, row: Row, band: Band, key: int, planned_change: bool) -> list[Finding]:
        state = self.state
        contiguous = [doubt for doubt in state.doubtful if state.window and doubt in state.window[-5:]]
        onset = contiguous[0].step if contiguous else row.step
        before = median([past.loss - band.trend(past.step) for past in state.window[-_JUMP_ROWS:]])
        state.window = [kept for kept in state.window if kept.step < onset] or state.window
        state.doubtful, state.fitted = [], None
        evidence = self._evidence(band, row)
        if planned_change:
            state.window = [row]
            why = f"loss {row.loss:.3f} where {band.trend(row.step):.3f} was expected, right after a planned change"
            shift = IncidentClass.LEVEL_SHIFT
            return [
                Finding("classified", key, shift, onset, row.step, why, row.step, evidence),
                Finding("closed", key, shift, onset, row.step, why, row.step, evidence),
            ]
        state.event = Event(
            key=key, onset_step=onset, detected_step=row.step, band=band, first=row, rows=[row],
            before=max(0.0, before), last_out_step=row.step, peak=row.loss - band.trend(row.step),
        )  # fmt: skip
        why = self._why(state.event, row)
        return [Finding("suspected", key, IncidentClass.TRANSIENT_SPIKE, onset, row.step, why, None, evidence)]

    def _during(self, event: Event, row: Row) -> list[Finding]:
        settings = self._settings
        event.rows = [*event.rows[-511:], row]
        event.peak = max(event.peak, row.loss - event.band.trend(row.step))
        if event.band.z(row.step, row.loss) > settings.return_sigma + 1:
            event.last_out_step = row.step
        if self._returned(event, row):
            return self._close(event, row)
        if event.settled is not None:
            return self._give_in(event, row)
        if self._still_open(event, row):
            return []
        excess = self._recent_excess(event)
        if self._grew(event, excess):
            event.settled = IncidentClass.SLOW_DIVERGENCE
            why = f"loss has grown without a jump from step {event.onset_step} on, by {excess:.3f} so far"
            return [self._finding("classified", event, row, why)]
        if excess < max(3 * event.band.scale, settings.unrecovered_nats) or self._validation_disagrees(event):
            return self._shift(event, row)
        event.settled = IncidentClass.UNRECOVERED_SPIKE
        why = f"{self._why(event, row)}; not back after {row.step - event.onset_step} steps, {excess:.3f} above trend"
        return [self._finding("classified", event, row, why)]

    def _returned(self, event: Event, row: Row) -> bool:
        """Within the band over the last `return_steps` steps, by the median so that a tail does not hold it up."""
        begin = row.step - self._settings.return_steps
        rows = [past for past in event.rows if past.step > begin]
        rows = rows if len(rows) >= 2 else event.rows[-2:]
        if rows[0].step - begin > max(2, self._settings.return_steps // 2) and len(rows) > 2:
            return False
        if event.rows[0].step > begin and len(event.rows) < 3 and rows[0] is event.rows[0]:
            return False
        zs = sorted(event.band.z(past.step, past.loss) for past in rows)
        inside = sum(z <= self._settings.return_sigma + 1 for z in zs)
        return median(zs) <= self._settings.return_sigma and inside >= 0.8 * len(zs)

    def _still_open(self, event: Event, row: Row) -> bool:
        settings = self._settings
        elapsed = row.step - event.onset_step
        if elapsed < settings.recover_steps or len(event.rows) < _MIN_ROWS_TO_JUDGE:
            return True
        if elapsed >= settings.recover_steps_max and len(event.rows) >= 2 * _MIN_ROWS_TO_JUDGE:
            return False
        if elapsed >= settings.recover_steps_max and elapsed >= 4 * settings.recover_steps_max:
            return False
        now, before = self._recent_excess(event), self._earlier_excess(event)
        return now < 0.5 * event.peak and now < before - 0.25 * event.band.scale

    def _grew(self, event: Event, excess: float) -> bool:
        """Small noise sees a climb leave its band at once: what counts is that it went on growing, row by row."""
        third = len(event.rows) // 3
        if event.rows[0] != event.first or third < 2 or event.jumped():
            return False
        begin = median(past.loss - event.band.trend(past.step) for past in event.rows[:third])
        grown = excess - begin > begin - event.before
        return excess >= self._settings.drift_nats and grown and event.peak < 2 * excess

    def _recent_excess(self, event: Event) -> float:
        recent = event.rows[-max(3, len(event.rows) // 5) :]
        return median(past.loss - event.band.trend(past.step) for past in recent)

    def _earlier_excess(self, event: Event) -> float:
        third = max(3, len(event.rows) // 5)
        earlier = event.rows[-2 * third : -third] or event.rows[:1]
        return median(past.loss - event.band.trend(past.step) for past in earlier)

    def _validation_disagrees(self, event: Event) -> bool:
        """An evaluation since the onset that is no worse than the training loss was expected to be."""
        known = self.state.last_eval
        return known is not None and known[0] > event.onset_step + 1 and known[1] < event.band.trend(known[0])

    def _close(self, event: Event, row: Row) -> list[Finding]:
        state = self.state
        cls = event.settled or IncidentClass.TRANSIENT_SPIKE
        state.event = state.fitted = None
        if event.last_out_step == event.onset_step:  # one row alone: the run's own tail, by which the next is judged
            state.tail.add(event.band.z(event.first.step, event.first.loss))
        state.window = [*state.window, *(past for past in event.rows if past.step > event.last_out_step)]
        state.window = state.window[-self._settings.window_rows :]
        why = f"{self._why(event, row)}; back in its band from step {event.last_out_step + 1} on"
        if cls is IncidentClass.TRANSIENT_SPIKE:
            state.closed_steps = [*state.closed_steps[-199:], event.onset_step]
        return [self._finding("closed", event, row, why, cls=cls, end_step=event.last_out_step)]

    def _shift(self, event: Event, row: Row) -> list[Finding]:
        self._rebase(event)
        why = f"{self._why(event, row)}; it stays a little higher and goes on from there"
        shift = IncidentClass.LEVEL_SHIFT
        return [
            self._finding("classified", event, row, why, cls=shift),
            self._finding("closed", event, row, why, cls=shift, end_step=row.step),
        ]

    def _give_in(self, event: Event, row: Row) -> list[Finding]:
        """A spike that nobody acted on becomes the new level after a long time, so that the run is watched again."""
        if row.step - event.onset_step < 8 * self._settings.recover_steps_max:
            return []
        self._rebase(event)
        why = f"{self._why(event, row)}; never back, watched again from its new level on"
        closed = self._finding("closed", event, row, why, end_step=row.step)
        return [replace(closed, evidence={**closed.evidence, "gave_in": 1})]

    def _rebase(self, event: Event) -> None:
        self.state.event = self.state.fitted = None
        self.state.window = event.rows[-max(_SPREAD_ROWS, self._settings.min_rows) :]

    def _finding(
        self, kind: FindingKind, event: Event, row: Row, why: str, *, cls: IncidentClass | None = None,
        end_step: int | None = None,
    ) -> Finding:  # fmt: skip
        evidence: Evidence = {**self._evidence(event.band, row), "peak_excess": round(event.peak, 6)}
        settled = cls or event.settled or IncidentClass.TRANSIENT_SPIKE
        return Finding(
            kind,
            event.key,
            settled,
            event.onset_step,
            row.step,
            why,
            end_step,
            evidence,
            tuple(event.shards),
        )

    def _evidence(self, band: Band, row: Row) -> Evidence:
        state = self.state
        norm: Evidence = {} if state.norm_z is None else {"grad_norm_z": round(state.norm_z, 2)}
        if state.armed_step is not None:
            norm["grad_norm_out_since"] = state.armed_step
        return {
            "loss": row.loss, "expected": round(band.trend(row.step), 6), "sigma": round(band.scale, 6),
            "z": round(band.z(row.step, row.loss), 2), "threshold_sigma": self._settings.spike_sigma, **norm,
        }  # fmt: skip

    def _why(self, event: Event, row: Row) -> str:
        first = event.first
        return (
            f"loss left its band at step {event.onset_step}: {first.loss:.3f} where {event.band.trend(first.step):.3f} "
            f"was expected ({event.band.z(first.step, first.loss):.1f} sigma), peak +{event.peak:.3f}"
        )

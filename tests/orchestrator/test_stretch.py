"""A stretch of equal updates folded at once leaves the policy where their records one by one would have left it."""

from typing import Any, Literal

from hypothesis import example, given, settings
from hypothesis import strategies as st

from monitors.records import CommitRecord, DataRange, EvalRecord, StartedRecord, StepRecord, StepTime
from monitors.settings import DetectSettings
from monitors.taxonomy import Evidence, Finding, IncidentClass
from orchestrator.policy.decisions import Decision, SendCommand, StartAttempt
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import (
    AttemptExited,
    AttemptSpawned,
    Event,
    FindingMade,
    RecordReceived,
    RunOpened,
    StepsPassed,
)
from orchestrator.policy.rows import HISTORY_STEPS, each_step
from orchestrator.policy.shipped import shipped_policy
from orchestrator.policy.state import RunFacts
from trainer.contract.commands import EvaluateNow
from trainer.contract.manifest import commit_id
from trainer.contract.plan import ResumePlan, overlay_factor

_BATCH = 8
_FACTS = RunFacts(
    run_id="sim", total_steps=100_000, warmup_steps=10, batch_samples=_BATCH, good_after_steps=20, checkpoint_every=30
)
_POLICY = shipped_policy().model_copy(update={"detect": DetectSettings(recover_steps_max=60)})
_CLASSES = (
    IncidentClass.TRANSIENT_SPIKE,
    IncidentClass.UNRECOVERED_SPIKE,
    IncidentClass.SLOW_DIVERGENCE,
    IncidentClass.LOSS_IMPLAUSIBLY_LOW,
    IncidentClass.LR_MISMATCH,
    IncidentClass.THROUGHPUT_DROP,
)


class _Run:
    """One engine and the trainer of its newest plan. `at_once`: stretches are one event, else one a step."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once = at_once
        self.engine = Engine(_POLICY, _FACTS)
        self.decided: list[Decision] = []
        self.plan: ResumePlan | None = None
        self.asked: list[int] = []
        self.positions: dict[str, tuple[int, int]] = {}
        self.step = self.position = self.seq = self.key = 0
        self.at_s = 0.0
        opened = RunOpened(at_s=0.0, run_id="sim", config_digest="c", policy_digest="p", code_version="1")
        self.feed(opened)
        self.start()

    def feed(self, event: Event) -> None:
        decisions = self.engine.fold(event)
        self.decided += decisions
        for decision in decisions:
            match decision:
                case StartAttempt():
                    self.plan = decision.plan
                case SendCommand(command=EvaluateNow() as command):
                    self.asked.append(command.id)
                case _:
                    pass  # what the trainer would do about it changes no step of this test

    @property
    def attempt(self) -> int:
        assert self.plan is not None
        return self.plan.attempt

    def record(self, **fields: Any) -> dict[str, Any]:
        self.seq += 1
        return {"seq": self.seq, "attempt": self.attempt, "at_s": self.at_s, **fields}

    def start(self) -> None:
        assert self.plan is not None
        loaded = self.plan.candidates[0] if self.plan.candidates else None
        self.step, self.position = self.positions[loaded] if loaded else (0, 0)
        self.asked.clear()
        self.feed(AttemptSpawned(at_s=self.at_s, attempt=self.attempt, pid=1))
        started = self.record(
            step=self.step, position=self.position, tokens=self.step * 32, loaded=loaded, precision="bf16",
            device="cpu", parameters=1, vocab_size=7, batch_samples=_BATCH, sample_tokens=33, total_steps=100_000,
            total_samples=10**6, shards=("a",), peak_lr=1e-3, warmup_steps=10,
        )  # fmt: skip
        self.feed(RecordReceived(at_s=self.at_s, record=StartedRecord.model_validate(started)))
        if loaded is None:
            self.feed(RecordReceived(at_s=self.at_s, record=self.save(0, 0)))

    def save(self, step: int, position: int) -> CommitRecord:
        name = commit_id(step, self.attempt, self.attempt)
        self.positions[name] = (step, position)
        fields = self.record(step=step, commit=name, position=position, tokens=step * 32, bytes=1, seconds=0.1)
        return CommitRecord.model_validate(fields)

    def steps(self, count: int, save_every: int, *, skipped: bool) -> None:
        first = self.step + 1
        self.at_s += 1.0
        last = self.step + count
        due = [s for s in range(first, last + 1) if s % save_every == 0]
        saves = tuple(self.save(s, self.position + (s - self.step) * _BATCH) for s in due)
        if self.at_once:
            self.feed(self.stretch(first, last, skipped, saves))
        for number in range(first, last + 1) if not self.at_once else ():
            begin = self.position + (number - first) * _BATCH
            self.feed(self.stretch(number, number, True, ()) if skipped else self.one(number, begin))
            for save in (one for one in saves if one.step == number):
                self.feed(RecordReceived(at_s=self.at_s, record=save))
        self.position, self.step = self.position + count * _BATCH, last

    def lr(self, step: int) -> float:
        return 1e-3 * overlay_factor(tuple(self.engine.state.overlays), step)

    def stretch(self, first: int, last: int, skipped: bool, saves: tuple[CommitRecord, ...]) -> StepsPassed:
        end = self.position + (last - self.step) * _BATCH
        return StepsPassed(
            at_s=self.at_s, attempt=self.attempt, first_step=first, step=last, end=end, samples=_BATCH, tokens=32,
            step_s=0.5, loss=2.0, grad_norm=0.5, lr=1e-3, skipped=skipped, saves=saves,
        )  # fmt: skip

    def one(self, step: int, begin: int) -> RecordReceived:
        record = StepRecord(
            seq=step, attempt=self.attempt, at_s=self.at_s, step=step, loss=2.0, grad_norm=0.5, lr=1e-3, tokens=32,
            step_time_s=StepTime(data=0.0, compute=0.5, other=0.0), data=DataRange(begin=begin, end=begin + _BATCH),
        )  # fmt: skip
        return RecordReceived(at_s=self.at_s, record=record)

    def finding(self, cls: IncidentClass, kind: Literal["suspected", "classified", "closed"], back: int) -> None:
        self.key += kind == "suspected" or not self.key
        onset = max(1, self.step - back)
        end = self.step if kind == "closed" else None
        evidence: Evidence = {"gave_in": 1} if kind == "closed" and cls is IncidentClass.UNRECOVERED_SPIKE else {}
        found = Finding(kind, self.key, cls, onset, self.step, "said", end, evidence)
        self.feed(FindingMade(at_s=self.at_s, attempt=self.attempt, finding=found))

    def evaluate(self, loss: float) -> None:
        command = self.asked.pop() if self.asked else None
        fields = self.record(step=self.step, loss=loss, perplexity=1.0, seconds=0.1, command=command)
        self.feed(RecordReceived(at_s=self.at_s, record=EvalRecord.model_validate(fields)))

    def crash(self) -> None:
        self.feed(AttemptExited(at_s=self.at_s, attempt=self.attempt, cause="killed"))
        if self.engine.state.alive:
            self.start()

    def memory(self) -> dict[str, Any]:
        state = self.engine.state
        told = state.model_dump(exclude={"history", "trained_s"})
        rows = each_step(state.history, state.step - HISTORY_STEPS)
        return {**told, "trained_s": round(state.trained_s, 6), "history": [row.model_dump() for row in rows]}


_STEPS = st.tuples(st.just("steps"), st.integers(1, 90) | st.just(520), st.integers(5, 90), st.booleans())
_FINDING = st.tuples(
    st.just("finding"),
    st.sampled_from(_CLASSES),
    st.sampled_from(["suspected", "classified", "closed"]),
    st.integers(0, 60),
)
_OTHER = st.tuples(st.just("evaluate"), st.sampled_from([2.0, 3.0])) | st.just(("crash",))


_SPIKE, _CLIMB = IncidentClass.UNRECOVERED_SPIKE, IncidentClass.SLOW_DIVERGENCE
_TRAINED, _LONG = ("steps", 300, 10, False), ("steps", 520, 45, False)
_SPIKED = [
    _TRAINED,
    ("evaluate", 2.0),
    _TRAINED,
    ("finding", _SPIKE, "suspected", 1),
    ("finding", _SPIKE, "classified", 5),
]


@settings(max_examples=40)
@example([_TRAINED, ("finding", _CLIMB, "classified", 5), *([_LONG] * 5)])  # an overlay ends
@example([*_SPIKED, ("steps", 90, 10, False), ("crash",), _LONG])  # an evaluation never comes; a recovery is judged
@example([*_SPIKED, ("evaluate", 3.0), ("crash",), _LONG, ("finding", _CLIMB, "classified", 5)])
@example([*_SPIKED, ("evaluate", 2.0), ("finding", _SPIKE, "closed", 60), ("steps", 900, 45, False)])  # damage stays
@given(st.lists(_STEPS | _FINDING | _OTHER, min_size=2, max_size=10))
def test_a_stretch_is_its_steps(script: list[tuple[Any, ...]]) -> None:
    """Whatever goes on meanwhile: same decisions in the same order, same memory, same past step by step."""
    runs = [_Run(at_once=True), _Run(at_once=False)]
    for operation, *arguments in script:
        for run in runs:
            if not run.engine.state.alive:
                continue
            match operation:
                case "steps":
                    run.steps(arguments[0], arguments[1], skipped=arguments[2] and arguments[0] < 50)
                case "finding":
                    run.finding(*arguments)
                case "evaluate":
                    run.evaluate(*arguments)
                case _:
                    run.crash()

    assert runs[0].decided == runs[1].decided
    assert runs[0].memory() == runs[1].memory()

"""A simulated trainer for the engine: obeys decisions, makes records, goes wrong on request. No process, no clock."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from monitors.records import (
    CommitFailedRecord,
    CommitRecord,
    DataRange,
    EvalRecord,
    PlanAppliedRecord,
    Prevention,
    StartedRecord,
    StepRecord,
    StepTime,
)
from orchestrator.policy.decisions import (
    Decision,
    EndRun,
    Notify,
    PruneCheckpoints,
    SendCommand,
    StartAttempt,
    StopAttempt,
    WriteVerdict,
)
from orchestrator.policy.engine import Engine
from orchestrator.policy.events import AttemptExited, AttemptSpawned, Event, RecordReceived, RunOpened, Ticked
from orchestrator.policy.model import Policy
from orchestrator.policy.shipped import in_force
from orchestrator.policy.state import Incident, RunFacts
from trainer.contract.commands import ApplyPlan, EvaluateNow
from trainer.contract.plan import ResumePlan, overlay_factor

BATCH = 8
PEAK_LR = 1e-3
KEEP_LOCAL = 2

Loss = Callable[["World", int], float]
"""(world, step) -> loss of that step; NaN for a non-finite one."""


def healthy(world: "World", step: int) -> float:
    """A loss that falls smoothly with a little noise."""
    return 2.0 + 3.0 / (1 + step / 40) + random.Random(step).gauss(0, 0.01)


@dataclass
class World:
    """A run in memory: engine, simulated trainer and store."""

    policy: Policy | None = None
    facts: RunFacts = field(
        default_factory=lambda: RunFacts(
            run_id="sim",
            total_steps=600,
            warmup_steps=10,
            batch_samples=BATCH,
            good_after_steps=20,
            checkpoint_every=10,
        )
    )
    loss: Loss = healthy
    dies_at: dict[tuple[int, int], str] = field(default_factory=dict, metadata={"what": "(attempt, step) -> cause"})
    lr_error: Callable[["World", int], float] = lambda world, step: 1.0
    dies_loading: set[int] = field(default_factory=set, metadata={"what": "attempts that die before they have loaded"})
    lag_steps: int = 0  # a trainer that is told to leave is in the middle of some more steps
    store_is_there: Callable[["World", int], bool] = lambda world, step: True
    prevention: Callable[["World", int], Prevention | None] = lambda world, step: None
    validation: Callable[["World", int], float] = lambda world, step: 2.0 + 3.0 / (1 + step / 40)

    def __post_init__(self) -> None:
        self.engine = Engine(in_force(self.policy), self.facts)
        self.at_s = 0.0
        self.commits: dict[str, tuple[int, int, int]] = {}
        self.verdicts: list[tuple[str, str]] = []
        self.notices: list[Notify] = []
        self.plans: list[ResumePlan] = []
        self.lrs: dict[int, float] = {}
        self.ended: EndRun | None = None
        self.plan: ResumePlan | None = None
        self.stopping: StopAttempt | None = None
        self.step = self.position = self.tokens = self.seq = 0
        self.condemned: set[str] = set()
        self.stored: set[str] = set()
        self.waiting: list[tuple[str, int]] = []
        self.keeper_seq = 0

    def open(self) -> None:
        """Launch."""
        opened = RunOpened(at_s=self.at_s, run_id="sim", config_digest="c", policy_digest="p", code_version="1")
        self.feed(opened)

    def feed(self, event: Event) -> None:
        """One event through the engine, decisions obeyed at once."""
        for decision in self.engine.fold(event):
            self.obey(decision)

    def record(self, **fields: object) -> dict[str, object]:
        """Common fields of a record."""
        assert self.plan is not None
        self.seq += 1
        return {"seq": self.seq, "attempt": self.plan.attempt, "at_s": self.at_s, **fields}

    def obey(self, decision: Decision) -> None:
        """What the shell and the trainer would do."""
        match decision:
            case StartAttempt():
                self.plan, self.stopping, self.seq = decision.plan, None, 0
                self.plans.append(decision.plan)
                self.at_s = max(self.at_s, decision.not_before_s)
            case StopAttempt():
                self.stopping = decision
            case WriteVerdict():
                self.verdicts.append((decision.commit, decision.verdict))
            case PruneCheckpoints():
                for commit in decision.commits:
                    del self.commits[commit]
                    self.stored.discard(commit)
            case Notify():
                self.notices.append(decision)
            case EndRun():
                self.ended = decision
            case SendCommand(command=EvaluateNow() as command):
                self.evaluate(command.id)
            case SendCommand(command=ApplyPlan() as command):
                assert self.plan is not None
                update = command.update.model_dump()
                self.plan = ResumePlan.model_validate({**self.plan.model_dump(), **update})
                applied = PlanAppliedRecord.model_validate(
                    self.record(step=self.step, position=self.position, command=command.id)
                )
                self.feed(RecordReceived(at_s=self.at_s, record=applied))

    def evaluate(self, command: int | None = None) -> None:
        """A validation loss."""
        loss = self.validation(self, self.step)
        fields = self.record(step=self.step, loss=loss, perplexity=1.0, seconds=0.1, command=command)
        self.feed(RecordReceived(at_s=self.at_s, record=EvalRecord.model_validate(fields)))

    def load(self) -> None:
        """Begin the attempt of the plan."""
        assert self.plan is not None
        plan = self.plan
        self.feed(AttemptSpawned(at_s=self.at_s, attempt=plan.attempt, pid=1))
        bad = [commit for commit in plan.candidates if commit in self.condemned]
        loaded = next((commit for commit in plan.candidates if commit not in self.condemned), None)
        self.step, self.position, self.tokens = self.commits[loaded] if loaded else (0, 0, 0)
        for name, attempt in [one for one in self.waiting if self.commits[one[0]][0] > self.step]:
            self.waiting.remove((name, attempt))  # the new fence does not name it
            self._give_up(name, attempt)
        self.plan = plan.anchored(self.step, self.position)
        started = self.record(
            step=self.step, position=self.position, tokens=self.tokens, loaded=loaded, precision="fp32", device="cpu",
            parameters=1, vocab_size=64, batch_samples=BATCH, sample_tokens=33, total_steps=self.facts.total_steps,
            total_samples=10_000, shards=("a", "b"), shard_samples=(5000, 5000), peak_lr=PEAK_LR, warmup_steps=10,
            condemned=[{"commit": commit, "why": "crc"} for commit in bad], replay=plan.replay is not None,
        )  # fmt: skip
        self.feed(RecordReceived(at_s=self.at_s, record=StartedRecord.model_validate(started)))
        if loaded is None and plan.fresh:
            self.commit()

    def commit(self) -> None:
        """Save the state of now: to the local disk, and to the store if that is there."""
        assert self.plan is not None
        name = f"{self.step:012d}-e{self.plan.epoch}-{self.plan.attempt}"
        self.commits[name] = (self.step, self.position, self.tokens)
        self.waiting.append((name, self.plan.attempt))
        self._say_commit(name, self.plan.attempt, "disk")
        if self.store_is_there(self, self.step):
            self.upload()
        elif len(self.waiting) > KEEP_LOCAL:
            self._give_up(*self.waiting.pop(0))

    def upload(self) -> None:
        """Everything that waits reaches the store."""
        for name, attempt in self.waiting:
            self.stored.add(name)
            self._say_commit(name, attempt, "store")
        self.waiting.clear()

    def _say_commit(self, name: str, attempt: int, tier: str) -> None:
        step, position, tokens = self.commits[name]
        self.keeper_seq += 1
        fields = {
            "seq": self.keeper_seq, "attempt": attempt, "at_s": self.at_s, "tier": tier, "step": step, "commit": name,
            "position": position, "tokens": tokens, "bytes": 1, "seconds": 0.1,
        }  # fmt: skip
        self.feed(RecordReceived(at_s=self.at_s, record=CommitRecord.model_validate(fields)))

    def _give_up(self, name: str, attempt: int) -> None:
        step, _, _ = self.commits.pop(name)
        self.keeper_seq += 1
        record = CommitFailedRecord(
            seq=self.keeper_seq, attempt=attempt, at_s=self.at_s, step=step, commit=name, error="passed over", gone=True
        )
        self.feed(RecordReceived(at_s=self.at_s, record=record))

    def take_step(self) -> None:
        """One update."""
        assert self.plan is not None
        plan = self.plan
        begin = self.position
        position, taken = begin, 0
        while taken < BATCH:
            if not any(skip.begin <= position < skip.end for skip in plan.skips):
                taken += 1
            position += 1
        self.step, self.position = self.step + 1, position
        self.tokens += BATCH * 32
        self.at_s += 1.0
        loss = self.loss(self, self.step)
        lr = PEAK_LR * overlay_factor(plan.overlays, self.step)
        self.lrs[self.step] = lr
        prevention = self.prevention(self, self.step)
        skipped = loss != loss or (prevention is not None and prevention.skipped is not None)
        record = StepRecord(
            seq=self.seq + 1, attempt=plan.attempt, at_s=self.at_s, step=self.step, loss=loss, grad_norm=0.5,
            clipped=False, lr=lr * self.lr_error(self, self.step), lr_planned=lr, tokens=BATCH * 32,
            step_time_s=StepTime(data=0.0, compute=1.0, other=0.0), data=DataRange(begin=begin, end=position),
            skipped=skipped, prevention=prevention, replay=plan.replay is not None,
        )  # fmt: skip
        self.seq += 1
        self.feed(RecordReceived(at_s=self.at_s, record=record))
        if plan.replay is None and self.step % 10 == 0 and self.plan is plan and self.stopping is None:
            self.commit()
        if plan.replay is None and self.step % 20 == 0 and self.stopping is None:
            self.evaluate()
        self.feed(Ticked(at_s=self.at_s))

    def exit(self, cause: str) -> None:
        """The attempt is dead."""
        assert self.plan is not None
        attempt, self.stopping = self.plan.attempt, None
        self.feed(AttemptExited(at_s=self.at_s, attempt=attempt, cause=cause))

    def run(self, max_attempts: int = 60) -> EndRun:
        """Until the run ends.

        Raises:
            AssertionError: more attempts than any sound policy needs.
        """
        if self.plan is None:
            self.open()
        while self.ended is None:
            assert len(self.plans) <= max_attempts, "the run never comes to its end"
            self._attempt()
        return self.ended

    def _attempt(self) -> None:
        assert self.plan is not None
        if self.plan.attempt in self.dies_loading:
            self.feed(AttemptSpawned(at_s=self.at_s, attempt=self.plan.attempt, pid=1))
            self.exit("cuda_oom")
            return
        self.load()
        plan_attempt = self.plan.attempt
        last = self.plan.replay.to_step if self.plan.replay else self.facts.total_steps
        while self.plan.attempt == plan_attempt and self.stopping is None and self.step < last:
            self.take_step()
            cause = self.dies_at.pop((plan_attempt, self.step), None)
            if cause is not None:
                self.exit(cause)
                return
        if self.stopping is not None:
            for _ in range(self.lag_steps):
                self.take_step()
            if self.stopping.how == "save":
                self.commit()
            self.exit("preempted" if self.stopping.how == "save" else "left")
        elif self.plan.attempt == plan_attempt:
            self.exit("replay_done" if self.plan.replay else "finished")

    def incident(self, cls: str) -> Incident:
        """The one incident of a class."""
        found = [incident for incident in self.engine.incidents() if incident.cls == cls]
        assert len(found) == 1, [(i.cls, i.why) for i in self.engine.incidents()]
        return found[0]

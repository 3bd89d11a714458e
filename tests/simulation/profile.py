"""What is simulated: the run, its pace, and how often what goes wrong. Seconds unless a name says otherwise.

Rates: one node of 8 GPUs (a fault of the hardware in 48 days, as Meta measured jobs of 8 GPUs; the others are our own
assumptions) and the job of Llama 3 405B (419 unexpected interruptions in 54 days on 16,384 GPUs, a tenth of them hangs
as ByteRobust counted) as stress.
"""

from dataclasses import dataclass, field
from typing import Literal

from orchestrator.policy.state import RunFacts
from tests.simulation.data import Layout

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S
Fault = Literal[
    "death", "host_oom", "outage", "hang", "disk_full", "data_error", "config_error", "data_away", "supervisor_kill",
    "reboot", "host_lost", "stop", "preemption", "clock_jump", "torn_read", "stale_listing", "lost_response",
    "checkpoint_request", "damaged_checkpoint", "disease",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of run. `every_s` is the mean time between faults of a kind; what is not in it never happens."""

    name: str
    every_s: dict[Fault, float]
    weeks: float = 8.0
    step_s: float = 6.0
    stall_s: float = 2.0
    disk_s: float = 5.0
    upload_s: float = 20.0
    restart_s: float = 60.0
    hang_limit_s: float = 120.0
    batch: int = 64
    warmup_steps: int = 2000
    good_after_steps: int = 100
    layout: Layout = field(default=Layout(block_samples=25_000, num_shards=250))
    goodput_mean: float | None = None
    goodput_p01: float | None = None

    @property
    def faults_end_s(self) -> float:
        """After this nothing goes wrong any more: what is left must come to its end by itself."""
        return 0.94 * self.weeks * WEEK_S

    @property
    def total_steps(self) -> int:
        """So many that they are not done before the faults end."""
        return int(0.96 * self.weeks * WEEK_S / self.step_s)

    @property
    def facts(self) -> RunFacts:
        """What the engine is told; the interval between checkpoints is chosen by the trainer."""
        return RunFacts(
            run_id="sim", total_steps=self.total_steps, warmup_steps=self.warmup_steps, batch_samples=self.batch,
            good_after_steps=self.good_after_steps, checkpoint_every=None,
        )  # fmt: skip


_LLAMA_S = 54 * DAY_S / 419
_NODE: dict[Fault, float] = {"death": 1 / (1 / (48 * DAY_S) + 1 / (2 * DAY_S)), "hang": 20 * DAY_S}
_STRESS: dict[Fault, float] = {"death": _LLAMA_S / 0.9, "hang": _LLAMA_S / 0.1}
_ELSE: dict[Fault, float] = {
    "host_oom": 10 * DAY_S, "outage": 5 * DAY_S, "disk_full": 30 * DAY_S, "data_error": 60 * DAY_S,
    "config_error": 120 * DAY_S, "data_away": 30 * DAY_S, "supervisor_kill": 7 * DAY_S, "reboot": 28 * DAY_S,
    "host_lost": 56 * DAY_S, "stop": 14 * DAY_S, "preemption": 14 * DAY_S, "clock_jump": 14 * DAY_S,
    "torn_read": 3 * DAY_S, "stale_listing": 3 * DAY_S, "lost_response": 3 * DAY_S, "checkpoint_request": 20 * DAY_S,
    "damaged_checkpoint": 30 * DAY_S, "disease": 4 * DAY_S,
}  # fmt: skip
_HARD: dict[Fault, float] = {**{fault: every_s / 2 for fault, every_s in _ELSE.items()}, "supervisor_kill": 2 * DAY_S}

PROFILES: tuple[Profile, ...] = (
    Profile("stress, process faults", _STRESS, goodput_mean=0.96, goodput_p01=0.95),
    Profile("node, everything", {**_NODE, **_ELSE}),
    Profile("node, process faults", _NODE, goodput_mean=0.994),
    Profile("stress, everything", {**_STRESS, **_HARD}),
)

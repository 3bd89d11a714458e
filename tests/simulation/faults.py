"""What goes wrong from outside, each kind by its own Poisson process; all chance is the world's one generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.policy.events import CheckpointRequested
from tests.simulation.profile import Fault
from trainer.contract.manifest import data_key

if TYPE_CHECKING:
    from tests.simulation.world import World

#: Causes of a death that a restart answers, with their weights; `unknown` is what an adopted one leaves behind.
DEATHS = {"gpu": 10, "killed": 4, "nccl": 4, "native_crash": 3, "error": 4, "cuda_oom": 2, "store": 1}
_MINUTE_S = 60.0


class Faults:
    """The hands that break things."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._do: dict[Fault, Callable[[], None]] = {
            "death": self._death,
            "host_oom": lambda: self._die("host_oom"),
            "data_error": lambda: self._die("data"),
            "config_error": lambda: self._die("config"),
            "data_away": self._data_away,
            "hang": self._hang,
            "outage": self._outage,
            "disk_full": self._disk_full,
            "supervisor_kill": self._kill_supervisor,
            "reboot": lambda: self._reboot(world.rng.uniform(60, 300)),
            "host_lost": lambda: self._reboot(world.rng.uniform(600, 3600)),
            "stop": lambda: self._ask("operator"),
            "preemption": lambda: self._ask("preemption"),
            "clock_jump": self._clock_jump,
            "torn_read": lambda: self._arm("torn"),
            "stale_listing": lambda: self._arm("stale"),
            "lost_response": lambda: self._arm("silent"),
            "checkpoint_request": self._checkpoint,
            "damaged_checkpoint": self._damage,
            "disease": world.diseases.strike,
        }

    def begin(self) -> None:
        """Have the first of each kind come."""
        for fault in self._world.profile.every_s:
            self._next(fault)

    def _next(self, fault: Fault) -> None:
        world = self._world
        at_s = world.clock.now_s + world.rng.expovariate(1.0 / world.profile.every_s[fault])
        if at_s < world.profile.faults_end_s:
            world.clock.at(at_s, lambda: self._strike(fault))

    def _strike(self, fault: Fault) -> None:
        self._world.trace(f"fault {fault}")
        self._do[fault]()
        self._next(fault)

    def _death(self) -> None:
        self._die(self._world.rng.choices(list(DEATHS), list(DEATHS.values()))[0])

    def _die(self, cause: str) -> None:
        trainer = self._world.trainer
        if trainer is not None and trainer.alive and trainer.released:
            self._world.note_fault("death", cause)
            trainer.end(cause)

    def _data_away(self) -> None:
        self._world.data_away_until_s = self._world.clock.now_s + self._world.rng.uniform(1, 30) * _MINUTE_S
        self._world.note_fault("data_away", until_s=self._world.data_away_until_s)
        self._die("data_unreachable")

    def _hang(self) -> None:
        world = self._world
        if world.trainer is not None and world.trainer.training and not world.trainer.leaving:
            world.note_fault("hang")
            world.trainer.hang()
            if world.shell is not None:
                world.shell.watch(world.trainer)

    def _outage(self) -> None:
        world = self._world
        world.look()
        backend = world.backend
        until_s = world.clock.now_s + world.rng.uniform(1, 30) * _MINUTE_S
        backend.away_until_s = max(backend.away_until_s, until_s)
        world.note_fault("outage", until_s=backend.away_until_s)

    def _disk_full(self) -> None:
        world = self._world
        world.disk_full_until_s = world.clock.now_s + world.rng.uniform(1, 60) * _MINUTE_S
        world.note_fault("disk_full", until_s=world.disk_full_until_s)

    def _kill_supervisor(self) -> None:
        """At once, or at one of the next places where something is half done."""
        world = self._world
        world.note_fault("supervisor_kill")
        if world.rng.random() < 0.5:
            world.kill_at_point = world.kill_points + world.rng.randint(1, 12)
        else:
            world.kill_supervisor()

    def _reboot(self, down_s: float) -> None:
        world = self._world
        world.note_fault("reboot", until_s=world.clock.now_s + down_s)
        world.reboot(down_s)

    def _ask(self, by: str) -> None:
        self._world.note_fault(by)
        self._world.ask_to_stop("operator" if by == "operator" else "preemption")

    def _clock_jump(self) -> None:
        world = self._world
        world.note_fault("clock_jump")
        world.clock.wrong_by_s += world.rng.choice((-1, 1)) * 10 ** world.rng.uniform(0, 5)

    def _arm(self, what: str) -> None:
        backend = self._world.backend
        self._world.note_fault(what)
        setattr(backend, what, 1)

    def _checkpoint(self) -> None:
        self._world.tell(CheckpointRequested(at_s=self._world.clock.wall_s))

    def _damage(self) -> None:
        """Bits of the newest checkpoint in the store are wrong, and this machine has no copy: found when it is read."""
        world = self._world
        stored = sorted(world.backend.truth("commits"))
        if stored:
            name = stored[-1].removeprefix("commits/").removesuffix(".json")
            key = data_key(name, "r0.safetensors")
            world.backend.truth("data")[key] = b"x" * len(name)
            world.keeper.uploaded.pop(name, None)
            world.note_fault("damaged_checkpoint", name)

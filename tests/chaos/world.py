"""A run on real processes and a real S3 server, and what can be seen of it from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import JournalError
from orchestrator.journal import Journal
from orchestrator.policy.state import RunStatus
from orchestrator.process.child import identify
from orchestrator.process.lock import holders
from tests.runs import tiny_config, write_corpus
from tests.s3 import ACCESS_KEY, KEY_ENV, SECRET_ENV, SECRET_KEY, Weed, with_bucket
from trainer.contract.paths import KEEPER_ROLES, KeeperRole, RunPaths

WITHIN_S = 120.0
_LOOK_EVERY_S = 0.02
_LEAVING_S = 0.3  # what a trainer that was asked to leave still does in that time is no progress
#: A shard of garbage, each time it is read, and a policy whose horizons fit a run of some thousand steps.
POISON: list[dict[str, Any]] = [{"kind": "bad_shard", "shard": 5, "once": False}]
_CUT = {"factor": 0.5, "hold_steps": 15, "ramp_steps": 20}
_BACK = {"roll_back": {"margin_steps": 10}, "skip_data": "12 batches", "lower_lr": _CUT}
POLICY: dict[str, Any] = {
    "version": 1,
    "detect": {"recover_steps": 10, "recover_steps_max": 20},
    "guards": {
        "max_skipped_share": 1.0, "max_discarded_share": 1.0, "max_quarantined_share": 0.2, "relapse_steps": 60,
        "always_skipped_batches": 100_000, "always_discarded_steps": 100_000,
    },
    "budgets": {"training": {"rollbacks": 1000}, "process": {"restarts": 1000, "per": "6h"}},
    "rules": [{"on": "unrecovered_spike", "when": {"validation_confirms": True}, "ladder": [_BACK] * 20}],
}  # fmt: skip
#: So many steps that no run of chaos comes to its end by itself.
_STEPS = 10_000_000
_STEP_S = 0.02  # slower than the model is, so that the undisturbed run is over sooner than this one


@dataclass(frozen=True, slots=True)
class Sample:
    """What the supervisor holds."""

    pid: int
    descriptors: int
    rss_bytes: int


@dataclass
class World:
    """One run that is disturbed. `disk`: where the run directory lies, perhaps a small one."""

    root: Path
    disk: Path
    faults: list[dict[str, Any]] = field(default_factory=lambda: list(POISON))
    policy: dict[str, Any] = field(default_factory=lambda: dict(POLICY))
    supervisor: subprocess.Popen[bytes] | None = None
    exits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.weed = Weed(self.root / "s3")
        self.weed.start()
        server = with_bucket(self.weed.endpoint_url, None)
        corpus = write_corpus(self.root / "corpus")
        slow = {"kind": "slow", "steps": [0, _STEPS], "factor": _STEP_S, "once": False}
        self.config = tiny_config(
            corpus, steps=_STEPS, faults=[slow, *self.faults], launch={"threads": 1, "standby": True},
            store=server.config(timeout_s=10.0).model_dump(mode="json"), run_dir=str(self.disk / "run"),
        )  # fmt: skip
        (self.root / "policy.yaml").write_text(json.dumps(self.policy))
        self.config["policy"] = "policy.yaml"
        self.file = self.root / "run.yaml"
        self.file.write_text(json.dumps(self.config))
        self.paths = RunPaths(self.disk / "run")

    # -- processes --------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """What a user, or systemd, does after any end."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", KEY_ENV: ACCESS_KEY, SECRET_ENV: SECRET_KEY}
        with (self.root / "launches.out").open("ab") as output:
            self.supervisor = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "launch", str(self.file)],
                cwd=self.root, env=environment, stdout=output, stderr=output,
            )  # fmt: skip

    def relaunch_if_ended(self) -> None:
        """Any end but one by a fault of the run's own is followed by the same command."""
        assert self.supervisor is not None
        if self.supervisor.poll() is not None:
            self.exits.append(self.supervisor.returncode)
            self.launch()

    def trainer(self) -> int | None:
        """The process that trains, if there is one."""
        for row in self.rows("SELECT pid, starttime FROM attempts WHERE ended_at_s IS NULL ORDER BY attempt DESC"):
            found = identify(row["pid"])
            if found is not None and found.starttime == row["starttime"]:
                return int(row["pid"])
        return None

    def keeper(self, role: KeeperRole) -> int | None:
        """The process of a role, if there is one."""
        return next(iter(holders(self.paths.keeper_lock(role))), None)

    def members(self) -> dict[int, str]:
        """Every living process whose output goes into the run directory: pid -> the file's name."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    output = Path(os.readlink(entry / "fd" / "1"))
                    if output.is_relative_to(self.paths.root):
                        found[int(entry.name)] = output.name
        return found

    def strays(self) -> list[str]:
        """Processes of the run that should not be there: a second one of a kind."""
        names = sorted(self.members().values())
        kinds = ["attempt" if name.startswith("attempt-") else name for name in names]
        return [kind for kind in set(kinds) if kinds.count(kind) > 1]

    def sample(self) -> Sample | None:
        """What the supervisor holds now."""
        if self.supervisor is None or self.supervisor.poll() is not None:
            return None
        proc = Path(f"/proc/{self.supervisor.pid}")
        with suppress(OSError):
            pages = int((proc / "statm").read_text().split()[1])
            return Sample(self.supervisor.pid, len(list((proc / "fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE"))
        return None

    # -- what the run says ------------------------------------------------------------------------------------------

    def rows(self, query: str) -> list[Any]:
        """Of the journal, also while it is written; none while it cannot be read."""
        try:
            with closing(Journal.read_only(self.paths.database)) as journal:
                return list(journal.select(query))
        except JournalError:
            return []

    def status(self) -> RunStatus | None:
        """As the supervisor wrote it last."""
        found = self.rows("SELECT value FROM meta WHERE key = 'status'")
        return RunStatus.model_validate_json(found[0]["value"]) if found else None

    def await_progress(self) -> None:
        """A step that was done after now, and a checkpoint beyond any before it, whatever must be launched for that.

        Raises:
            AssertionError: the run has ended by itself, or is stuck.
        """
        begun_s, status = time.time() + _LEAVING_S, self.status()
        before = status.last_commit_step if status is not None and status.last_commit_step is not None else -1
        self.until(lambda: self._has_advanced(begun_s, before), "a step and a checkpoint")

    def _has_advanced(self, begun_s: float, before: int) -> bool:
        self.relaunch_if_ended()
        status = self.status()
        assert status is None or status.state not in ("halted", "failed", "finished"), status
        newest = self.rows("SELECT at_s FROM steps ORDER BY rowid DESC LIMIT 1")
        committed = status.last_commit_step if status is not None else None
        return bool(newest and newest[0]["at_s"] > begun_s and committed is not None and committed > before)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Look until something is so.

        Raises:
            AssertionError: it is not within two minutes.
        """
        end_s = time.monotonic() + WITHIN_S
        while not condition():
            assert time.monotonic() < end_s, f"{what}: not within {WITHIN_S:.0f} s\n{self.tail()}"
            time.sleep(_LOOK_EVERY_S)

    def tail(self) -> str:
        """The end of what the launches printed, and of the supervisor's log."""
        logs = [self.root / "launches.out", *(self.paths.root / "logs").glob("supervisor*.jsonl")]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs if log.exists())

    # -- the end ----------------------------------------------------------------------------------------------------

    def stop(self) -> int:
        """Ask the run to stop with a checkpoint; returns the step of that."""
        assert self.supervisor is not None
        self.supervisor.send_signal(signal.SIGINT)
        assert self.supervisor.wait(WITHIN_S) == 5, self.tail()
        status = self.status()
        assert status is not None
        assert status.last_commit_step == status.step
        return status.step

    def close(self) -> None:
        """End whatever is left of it."""
        pids = [*self.members(), *(pid for role in KEEPER_ROLES for pid in holders(self.paths.keeper_lock(role)))]
        if self.supervisor is not None and self.supervisor.poll() is None:
            self.supervisor.kill()
            self.supervisor.wait()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.weed.kill()

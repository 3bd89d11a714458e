"""A small real trainer for tests of the supervisor: the whole contract, no torch, and faults on request.

Run as `children.py BEHAVIOUR`, a JSON object: `steps`, `step_s`, `commit_every`, `faults` (step -> what happens in
attempt 1), `every_attempt` (the faults come back), `ignore_term`, `orphan_s`.
"""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from monitors.records import CommitRecord, DataRange, FinishedRecord, Record, StartedRecord, StepRecord, StepTime
from trainer.contract.commands import CheckpointNow, CommandReader, Leave
from trainer.contract.exit_codes import ExitCode
from trainer.contract.liveness import LivenessWriter, Phase
from trainer.contract.manifest import commit_id, parse_commit_id
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan, read_plan

BATCH = 4


class Trainer:
    """One attempt."""

    def __init__(self, behaviour: dict[str, Any]) -> None:
        self.behaviour = behaviour
        self.paths = RunPaths(Path(os.environ["LONGWATCH_RUN_DIR"]))
        self.attempt = int(os.environ["LONGWATCH_ATTEMPT"])
        self.plan: ResumePlan = read_plan(self.paths.plan(self.attempt))
        self.seq = 0
        self.asked = False
        self.file = self.paths.records(self.attempt).open("ab", buffering=0)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.directory = os.open(self.paths.root, os.O_RDONLY)
        self.heard_s = time.monotonic()

    def emit(self, kind: type[Any], **fields: Any) -> None:
        """Write a record, then ring."""
        self.seq += 1
        record: Record = kind(seq=self.seq, attempt=self.attempt, at_s=time.time(), **fields)
        line = record.model_dump_json().encode()
        self.file.write(line + b"\n")
        try:
            self.socket.sendto(line, f"/proc/self/fd/{self.directory}/records.sock")
            self.heard_s = time.monotonic()
        except BlockingIOError:
            self.heard_s = time.monotonic()
        except OSError:
            pass

    def run(self) -> int:
        """Train, obey, and say how it ended."""
        signal.signal(signal.SIGTERM, self._term)
        stacks = self.paths.stacks(self.attempt).open("ab")
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        commands = CommandReader(self.paths.commands(self.attempt))
        step = parse_commit_id(self.plan.candidates[0]).step if self.plan.candidates else 0
        loaded = self.plan.candidates[0] if self.plan.candidates else None
        steps = int(self.behaviour.get("steps", 10))
        self.emit(
            StartedRecord, step=step, position=step * BATCH, tokens=0, loaded=loaded, precision="fp32", device="cpu",
            parameters=1, vocab_size=2, batch_samples=BATCH, sample_tokens=2, total_steps=steps, total_samples=1000,
            shards=("a",), peak_lr=1e-3, warmup_steps=0,
        )  # fmt: skip
        with LivenessWriter(self.paths.liveness(self.attempt)) as page:
            page.enter(Phase.TRAIN)
            while step < steps:
                step += 1
                self.fault(step, page)
                time.sleep(float(self.behaviour.get("step_s", 0.01)))
                self.step(step)
                page.beat(step)
                if step % int(self.behaviour.get("commit_every", 5)) == 0:
                    self.commit(step)
                for command in commands.poll():
                    if isinstance(command, CheckpointNow):
                        self.commit(step)
                    if isinstance(command, Leave) and not command.save:
                        return self.leave(step, "left", ExitCode.LEFT)
                if self.asked:
                    self.commit(step)
                    return self.leave(step, "preempted", ExitCode.PREEMPTED)
                if time.monotonic() - self.heard_s > float(self.behaviour.get("orphan_s", 60)):
                    self.commit(step)
                    return self.leave(step, "orphaned", ExitCode.ORPHANED)
        return self.leave(step, "finished", ExitCode.FINISHED)

    def _term(self, signum: int, frame: object) -> None:
        self.asked = not self.behaviour.get("ignore_term", False)

    def step(self, step: int) -> None:
        """One step record."""
        self.emit(
            StepRecord, step=step, loss=1.0 / step, grad_norm=1.0, clipped=False, lr=1e-3, tokens=step * 8,
            step_time_s=StepTime(data=0.0, compute=0.01, other=0.0),
            data=DataRange(begin=(step - 1) * BATCH, end=step * BATCH),
        )  # fmt: skip

    def commit(self, step: int) -> None:
        """Say that a checkpoint is committed (these tests need none that could be loaded)."""
        name = commit_id(step, self.plan.epoch, self.attempt)
        self.emit(CommitRecord, step=step, commit=name, position=step * BATCH, tokens=0, bytes=1, seconds=0.0)

    def leave(self, step: int, reason: str, code: ExitCode) -> int:
        """The exit file and the last record."""
        self.emit(FinishedRecord, step=step, reason=reason)
        self.exit_file({"code": int(code), "reason": reason, "error": None})
        return int(code)

    def exit_file(self, body: dict[str, Any]) -> None:
        """Write it as the contract says."""
        path = self.paths.exit_file(self.attempt)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(body))
        temporary.replace(path)

    def fault(self, step: int, page: LivenessWriter) -> None:
        """What the behaviour asks for at this step."""
        what = self.behaviour.get("faults", {}).get(str(step), "")
        if not what or (self.attempt > 1 and not self.behaviour.get("every_attempt")):
            return
        match what.split(":"):
            case ["sigkill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["sigstop"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["hang"]:
                while True:
                    time.sleep(3600)
            case ["spin", phase]:
                page.enter(Phase(phase))
                end_s = time.monotonic() + 1.2
                while time.monotonic() < end_s:
                    pass
                page.enter(Phase.TRAIN)
            case ["raise", message]:
                self.exit_file({"code": 70, "reason": "error", "error": {"type": "RuntimeError", "message": message}})
                os._exit(70)
            case ["grandchild"]:
                lock = int(os.environ["LONGWATCH_LOCK_FD"])
                subprocess.Popen(["sleep", "600"], pass_fds=(lock,), start_new_session=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                raise ValueError(what)


def released() -> bool:
    """Wait for the supervisor's byte."""
    with os.fdopen(int(os.environ["LONGWATCH_RELEASE_FD"]), "rb", buffering=0) as pipe:
        return pipe.read(1) == b"1"


if __name__ == "__main__":
    if not released():
        sys.exit(int(ExitCode.LEFT))
    sys.exit(Trainer(json.loads(sys.argv[1])).run())

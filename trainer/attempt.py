"""One attempt as a process: its log, liveness page, signals and records around the loop, and how it says it ended.

This is the trainer's process boundary: the one place where every exception is caught, told and turned into an exit
code. Torch-free until `run`.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Self

import structlog

from monitors.records import ErrorRecord
from trainer.contract.exit_codes import ExitCode
from trainer.contract.liveness import LivenessWriter, Phase
from trainer.contract.paths import RunPaths
from trainer.contract.plan import read_plan
from trainer.errors import Failure, describe
from trainer.logs import log_to
from trainer.reporter import Reporter
from trainer.runfile import read_config
from trainer.signals import StopFlag, stacks_on_request

log = structlog.get_logger(__name__)


class Attempt:
    """Owns what must be released however the attempt ends."""

    def __init__(self, paths: RunPaths, number: int) -> None:
        self._paths = paths
        self._number = number
        self._parent_pid = os.getppid()
        self._step = 0
        with contextlib.ExitStack() as stack:
            self._liveness = stack.enter_context(LivenessWriter(paths.liveness(number)))
            self._reporter = stack.enter_context(Reporter(paths, number))
            stack.enter_context(stacks_on_request(paths.stacks(number)))
            stack.enter_context(log_to(paths.log(number)))
            self._stop = stack.enter_context(StopFlag().installed())
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self) -> ExitCode:
        """Build, load, train; never raises but for an exit of the interpreter itself."""
        try:
            code, failure = self._train(), None
        except Exception as error:  # the process boundary: told, logged, and mapped to an exit code
            failure = describe(error)
            code = failure.code
            with contextlib.suppress(OSError):  # what cannot be written on a full disk is said by the code alone
                log.exception("attempt_failed", code=int(code), type=failure.type)
                self._tell(failure)
        with contextlib.suppress(OSError):
            write_exit_file(self._paths.exit_file(self._number), code, failure, self._step)
        return code

    def _train(self) -> ExitCode:
        config = read_config(self._paths.run_yaml)
        plan = read_plan(self._paths.plan(self._number))
        log.info("attempt_begins", run_id=plan.run_id, attempt=plan.attempt, because=plan.because)
        from trainer.loop import Loop
        from trainer.setup import Workplace, build

        self._liveness.enter(Phase.LOAD)
        at = Workplace(config, plan, self._paths, self._reporter, self._liveness, self._stop, self._parent_pid)
        loop = Loop(at, build(at))
        try:
            return loop.run()
        finally:
            self._step = loop.step
            loop.close()

    def _tell(self, failure: Failure) -> None:
        self._reporter.emit(
            ErrorRecord,
            step=self._step,
            where=failure.where,
            type=failure.type,
            message=failure.message,
            frames=failure.frames,
            traceback=failure.traceback,
        )


def write_exit_file(path: Path, code: ExitCode, failure: Failure | None, step: int) -> None:
    """Say how the attempt ended, whole or not at all, for a supervisor that is not our parent."""
    error = None
    if failure is not None:
        error = {
            "step": step,
            "where": failure.where,
            "type": failure.type,
            "message": failure.message,
            "frames": list(failure.frames),
        }
    body = {"code": int(code), "reason": code.name.lower(), "error": error}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(body))
    os.replace(fresh, path)

"""`python -m trainer.keeping ROLE --run-dir DIR`: the writer or the uploader of a run, as the supervisor starts it.

Asked to leave (SIGTERM) it does what is still to be done first. Without a supervisor it goes on, because a trainer may
go on too, and leaves when there has been nothing to do for as long as an orphaned trainer stays. It leaves at once when
its lock file is no longer the one that it began with: the run directory was removed, and another may lie there now.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import structlog

from trainer.contract.config import RunConfig
from trainer.contract.liveness import LivenessWriter, Phase
from trainer.contract.paths import KEEPER_ROLES, KeeperRole, RunPaths
from trainer.contract.store import open_store
from trainer.faults.upload import FaultyUploads
from trainer.keeping.outbox import Outbox
from trainer.keeping.uploader import Uploader
from trainer.keeping.writer import Writer
from trainer.logs import log_to
from trainer.reporter import Reporter
from trainer.runfile import read_config
from trainer.signals import StopFlag

log = structlog.get_logger(__name__)

POLL_S = 0.02
_NICE = 5  # sending may take its time; training and the disk go first where cores are few


def main(argv: Sequence[str] | None = None) -> int:
    """Keep snapshots until asked to leave."""
    parser = argparse.ArgumentParser(prog="python -m trainer.keeping", description=__doc__)
    parser.add_argument("role", choices=KEEPER_ROLES)
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.role == "uploader":
        os.nice(_NICE)
    paths = RunPaths(arguments.run_dir.absolute())
    role: KeeperRole = arguments.role
    with ExitStack() as stack:
        stack.enter_context(log_to(paths.keeper_log(role)))
        stop = stack.enter_context(StopFlag().installed())
        displaced = watch_place(paths.keeper_lock(role))
        liveness = stack.enter_context(LivenessWriter(paths.keeper_liveness(role)))
        liveness.enter(Phase.SAVE)
        config = read_config(paths.run_yaml)
        turn = open_desk(role, paths, config, lambda: liveness.beat(0), stack)
        serve(turn, lambda: bool(stop), displaced, lambda: liveness.beat(0), config.deadlines.orphan_s)
    return 0


def open_desk(
    role: KeeperRole, paths: RunPaths, config: RunConfig, beat: Callable[[], None], stack: ExitStack
) -> Callable[[], bool]:
    """One turn of a role's work; what it holds open is closed with the stack."""
    reporter = stack.enter_context(closing(Reporter.of_keeper(paths, role)))
    keep = config.checkpoint.keep_local
    if role == "writer":
        return stack.enter_context(closing(Writer(paths, reporter, beat, keep=keep, clock=time.monotonic))).turn
    store = stack.enter_context(closing(open_store(config.store, paths.root, config.name)))
    faults = FaultyUploads(config.faults, paths, store, reporter)
    outbox = stack.enter_context(closing(Outbox(paths, faults.store, time.monotonic)))
    uploader = Uploader(paths, faults.store, reporter, beat, faults, outbox.turn, keep=keep, clock=time.monotonic)
    return lambda: outbox.turn() | uploader.turn()


def watch_place(lock: Path) -> Callable[[], bool]:
    """Whether the file of this name has become another since now, or is gone."""

    def identity() -> tuple[int, int] | None:
        try:
            found = lock.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    begun = identity()
    return lambda: begun is None or identity() != begun


def serve(
    turn: Callable[[], bool], leaving: Callable[[], bool], displaced: Callable[[], bool], beat: Callable[[], None],
    orphan_s: float,
) -> None:  # fmt: skip
    """Turn after turn, until asked to leave and nothing is to be done, displaced, or forgotten for too long."""
    parent = os.getppid()
    busy_s = time.monotonic()
    while True:
        if displaced():
            log.warning("leaving", why="the run directory was removed")
            return
        beat()
        asked = leaving()  # before the turn: what came in before the question is still done
        if turn():
            busy_s = time.monotonic()
            continue
        if asked:
            return
        if os.getppid() != parent and time.monotonic() - busy_s > orphan_s:
            log.info("leaving", why="there is no supervisor, and nothing to do")
            return
        time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main())

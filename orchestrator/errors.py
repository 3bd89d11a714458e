"""The supervisor's tree of errors. Each carries its facts as fields; messages state the fact, then the remedy."""

from pathlib import Path


class OrchestratorError(Exception):
    """Base of every error that the supervisor raises by itself; `exit_code` is what `launch` ends with."""

    exit_code = 1


class RunHeldError(OrchestratorError):
    """Another supervisor runs this run."""

    def __init__(self, path: Path, holder: str) -> None:
        self.path = path
        self.holder = holder
        super().__init__(f"the run is held by {holder} ({path}); use `longwatch status`, or stop that one first")


class NetworkFilesystemError(OrchestratorError):
    """The run directory lies where locks and fsync can't be trusted."""

    exit_code = 2

    def __init__(self, path: Path, filesystem: str) -> None:
        self.path = path
        self.filesystem = filesystem
        super().__init__(
            f"{path} is on a network filesystem ({filesystem}), where locks and fsync can't be trusted; "
            "put run_dir on a local disk (checkpoints may go anywhere)"
        )


class JournalError(OrchestratorError):
    """The journal can't be used."""

    def __init__(self, path: Path, message: str) -> None:
        self.path = path
        super().__init__(message)


class JournalMissingError(JournalError):
    """There is no journal."""

    exit_code = 2

    def __init__(self, path: Path) -> None:
        super().__init__(path, f"{path} does not exist; launch the run first, or name its directory")


class JournalWriteError(JournalError):
    """SQLite could not do what was asked: a full or read-only disk, or a lock that did not come free."""

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(path, f"journal {path}: {why}; check that its disk is writable and has space")


class JournalCorruptError(JournalError):
    """The file is damaged."""

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(path, f"journal {path} is damaged ({why}); restore it from a copy, or launch with --fresh")


class JournalForeignError(JournalError):
    """The file is a database, but not of ours."""

    exit_code = 2

    def __init__(self, path: Path) -> None:
        super().__init__(path, f"{path} is not a Longwatch journal; choose another run_dir")


class JournalVersionError(JournalError):
    """The file was written by another version."""

    exit_code = 2

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(path, f"journal {path}: {why}; use the version of Longwatch that wrote it")


class ChildLockHeldError(OrchestratorError):
    """A process of an earlier attempt still lives: a second trainer beside it is never started."""

    def __init__(self, pids: tuple[int, ...]) -> None:
        self.pids = pids
        named = ", ".join(str(pid) for pid in pids) or "unknown"
        super().__init__(f"processes of an earlier attempt are still alive (pids {named}); end them first")


class SpawnError(OrchestratorError):
    """The trainer's command could not be executed."""

    exit_code = 2

    def __init__(self, program: str, why: str) -> None:
        self.program = program
        super().__init__(f"the trainer could not be started: {program}: {why}; correct launch.command in run.yaml")


class RunSupersededError(OrchestratorError):
    """The store says that somebody else writes this run, or that it went further than this run directory knows."""

    def __init__(self, epoch: int, why: str) -> None:
        self.epoch = epoch
        super().__init__(f"nothing was started, because the run's fence could not be claimed: {why}")


class RunElsewhereError(OrchestratorError):
    """Another machine shows signs of life: it holds the run."""

    exit_code = 2

    def __init__(self, url: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"the run in {url} is held by {holder}, which shows signs of life, so nothing was started; "
            "stop it there, or take the run from it with --take-over (it can commit nothing from then on)"
        )


class ShippedJournalError(OrchestratorError):
    """The journal in the store can't be used."""

    def __init__(self, url: str, why: str) -> None:
        self.why = why
        super().__init__(
            f"the journal in {url} can't be used: {why}; bring the run directory of the machine that wrote it, "
            "or start from scratch with --fresh (nothing in the store is deleted)"
        )


class SnapshotUnusableError(OrchestratorError):
    """The engine's state in the journal can't be read by this version."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        super().__init__(
            f"the state in {path} can't be read ({why}); go on with the version of Longwatch that wrote it"
        )


class NotRunningError(OrchestratorError):
    """No supervisor answers for this run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        super().__init__(f"no supervisor is running for {run_dir}; start it with `longwatch launch`")


class ControlError(OrchestratorError):
    """The supervisor refused a request, or did not answer it."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the request was not carried out: {why}; look at `longwatch status`")

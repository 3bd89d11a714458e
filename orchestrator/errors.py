"""The supervisor's tree of errors. Each carries its facts as fields; messages state the fact, then the remedy."""

from pathlib import Path


class OrchestratorError(Exception):
    """Base of every error that the supervisor raises by itself."""


class RunHeldError(OrchestratorError):
    """Another supervisor runs this run."""

    def __init__(self, path: Path, holder: str) -> None:
        self.path = path
        self.holder = holder
        super().__init__(f"the run is held by {holder} ({path}); use `longwatch status`, or stop that one first")


class NetworkFilesystemError(OrchestratorError):
    """The run directory lies where locks and fsync can't be trusted."""

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

    def __init__(self, path: Path) -> None:
        super().__init__(path, f"{path} is not a Longwatch journal; choose another run_dir")


class JournalVersionError(JournalError):
    """The file was written by another version."""

    def __init__(self, path: Path, why: str) -> None:
        self.why = why
        super().__init__(path, f"journal {path}: {why}; use the version of Longwatch that wrote it")

"""Names of the files in a run directory that supervisor and trainer share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: The processes that keep snapshots: the writer puts them on disk, the uploader sends them to the store.
KeeperRole = Literal["writer", "uploader"]
NEEDED = "needed.json"  # in the local tier
KEEPER_ROLES: tuple[KeeperRole, ...] = ("writer", "uploader")


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where everything of a run lies on local disk (DESIGN 4). Creates nothing by itself."""

    root: Path

    @property
    def database(self) -> Path:
        """SQLite journal, owned by the supervisor."""
        return self.root / "run.db"

    @property
    def run_yaml(self) -> Path:
        """The configuration as resolved at launch; what the trainer reads."""
        return self.root / "run.yaml"

    @property
    def policy_yaml(self) -> Path:
        """The policy as resolved at launch."""
        return self.root / "policy.yaml"

    @property
    def data_book(self) -> Path:
        """The run's shards by number; positions in the data refer to it."""
        return self.root / "data.json"

    @property
    def data_cache(self) -> Path:
        """Blocks of remote shards, owned by whoever reads them; may be deleted at any time."""
        return self.root / "data-cache"

    @property
    def lock(self) -> Path:
        """flock of the one supervisor."""
        return self.root / "lock"

    @property
    def child_lock(self) -> Path:
        """flock held, through an inherited descriptor, as long as any process of an attempt lives."""
        return self.root / "child.lock"

    @property
    def records_socket(self) -> Path:
        """Unix datagram socket on which the supervisor receives records."""
        return self.root / "records.sock"

    @property
    def control_socket(self) -> Path:
        """Unix stream socket for the command line."""
        return self.root / "control.sock"

    @property
    def arena(self) -> Path:
        """Link to the shared memory in which snapshots outlive the trainer."""
        return self.root / "arena"

    @property
    def local_tier(self) -> Path:
        """Checkpoints on this disk, before and beside those in the store."""
        return self.root / "checkpoints"

    @property
    def needed_commits(self) -> Path:
        """Commits that must not leave the local disk before the store has them: a JSON list, by the supervisor."""
        return self.local_tier / NEEDED

    @property
    def outbox(self) -> Path:
        """Segments of the journal that wait for the uploader."""
        return self.root / "outbox"

    def keeper_lock(self, role: KeeperRole) -> Path:
        """flock held by the one process of that role."""
        return self.root / f"{role}.lock"

    def keeper_records(self, role: KeeperRole) -> Path:
        """Every record that processes of that role wrote, over all attempts."""
        return self.root / "records" / f"{role}.jsonl"

    def keeper_liveness(self, role: KeeperRole) -> Path:
        """The liveness page of that role."""
        return self.root / "liveness" / role

    def keeper_output(self, role: KeeperRole) -> Path:
        """Standard output and error of that role."""
        return self.root / "logs" / f"{role}.out"

    def keeper_log(self, role: KeeperRole) -> Path:
        """Structured log of that role."""
        return self.root / "logs" / f"{role}.jsonl"

    @property
    def standby_output(self) -> Path:
        """Standard output and error of the standby."""
        return self.root / "logs" / "standby.out"

    def plan(self, attempt: int) -> Path:
        """The resume plan of an attempt."""
        return self.root / "plans" / f"attempt-{attempt}.json"

    def commands(self, attempt: int) -> Path:
        """Append-only mailbox, supervisor to trainer."""
        return self.root / "commands" / f"attempt-{attempt}.jsonl"

    def records(self, attempt: int, rank: int = 0) -> Path:
        """Every record an attempt wrote, one JSON object a line."""
        return self.root / "records" / f"{attempt}-{rank}.jsonl"

    def liveness(self, attempt: int, rank: int = 0) -> Path:
        """The liveness page, memory-mapped by both sides."""
        return self.root / "liveness" / f"{attempt}-{rank}"

    def exit_file(self, attempt: int, rank: int = 0) -> Path:
        """Written by the trainer when it leaves by itself: code and error record."""
        return self.root / "exits" / f"{attempt}-{rank}.json"

    def output(self, attempt: int) -> Path:
        """Standard output and error of an attempt."""
        return self.root / "logs" / f"attempt-{attempt}.out"

    def log(self, attempt: int) -> Path:
        """Structured log of an attempt."""
        return self.root / "logs" / f"attempt-{attempt}.jsonl"

    def stacks(self, attempt: int) -> Path:
        """faulthandler dumps of an attempt."""
        return self.root / "stacks" / f"attempt-{attempt}.txt"

    def fault_counts(self, role: KeeperRole | None = None) -> Path:
        """How often each injected fault has fired in this run, over all attempts: in the trainer, or in a keeper."""
        return self.root / ("faults.json" if role is None else f"faults-{role}.json")

    def create(self) -> None:
        """Make the directory tree, private to the user (0700)."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)
        for name in ("plans", "commands", "records", "liveness", "exits", "logs", "stacks", "report", "outbox"):
            (self.root / name).mkdir(exist_ok=True, mode=0o700)

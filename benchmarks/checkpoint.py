"""How long a save holds up training, and when it is durable: Longwatch beside memcpy, torch.save and DCP.

`python -m benchmarks.checkpoint [--megabytes N] [--rounds N]`. One state, all cases in turn in every round; between two
cases everything that the one before has set going has come to its end.
"""

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.common import Stats, measure, report
from orchestrator.process.keepers import Keepers
from trainer.checkpoint import Author, Snapshotter
from trainer.contract import arena, fence
from trainer.contract.config import RunConfig
from trainer.contract.paths import KEEPER_ROLES, RunPaths
from trainer.contract.store import open_store
from trainer.keeping.tier import LocalTier

MEMCPY, OURS, FSYNCED = "memcpy", "longwatch", "torch.save, fsync"
_TARGETS = {
    "stall_to_memcpy": 1.15,
    "worst_stall_to_memcpy": 2.0,
    "fsynced_torch_save_to_stall": 6.0,
    "stall_to_best_dcp": 1.0,
    "durable_to_best_dcp": 1.0,
    "memory_beside_slots_mb": 512,
}
_PATIENCE_S = 120.0
_POLL_S = 0.002


def make_state(num_bytes: int) -> dict[str, Tensor]:
    """bf16 weights and fp32 moments of a GPT-like model, in tensors of several sizes."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = {}
    per_weight = 10  # bytes: two of bf16, twice four of moments
    width, left, number = 768, num_bytes, 0
    while left > 0:
        for rows in (4 * width, width, 1):
            count = min(rows * width, max(1, left // per_weight))
            weight = torch.randn(count)
            state[f"model.{number}.weight"] = weight.bfloat16()
            state[f"optim.{number}.exp_avg"] = weight * 0.1
            state[f"optim.{number}.exp_avg_sq"] = weight.square()
            left -= per_weight * count
            number += 1
            if left <= 0:
                break
    return state


@dataclass
class Bench:
    """One state and the places where its saves go. `durable` collects seconds until each save was on disk."""

    root: Path
    state: dict[str, Tensor]
    durable: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._copies = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._process_stager = DefaultStager(StagingOptions(False, True, False, False))
        self._number = 0
        self._open_longwatch()

    def _open_longwatch(self) -> None:
        self.paths = RunPaths(self.root / "run")
        self.paths.create()
        config = RunConfig.model_validate(
            {"name": "bench", "steps": 10**6, "data": {"train": "none"}, "store": {"url": str(self.root / "store")}}
        )
        self.paths.run_yaml.write_text(config.model_dump_json(by_alias=True))
        with closing(open_store(config.store, self.paths.root, config.name)) as store:
            store.make_place()
            fence.claim(store, fence.Fence(run_id=config.name, epoch=1, nonce="0" * 16, host="here", pid=os.getpid()))
        self._tier = LocalTier(self.paths.local_tier)
        self._keepers = Keepers(self.paths, {}, silence_s=600.0)
        self._keepers.start()
        self._snapshotter = Snapshotter(self.paths.arena, Author("bench", 1, 1, ""))
        self._snapshotter.reserve(self.state)

    def memcpy(self) -> float:
        """The same bytes into buffers that are there."""
        begun_s = time.perf_counter()
        for name, tensor in self.state.items():
            self._copies[name].copy_(tensor)
        return time.perf_counter() - begun_s

    def longwatch(self) -> float:
        """Snapshot; then wait until it is on the local disk and in the store, and the arena is free."""
        self._number += 1
        begun_s = time.perf_counter()
        taken = self._snapshotter.snapshot(self.state, {}, step=self._number, position=0, tokens=0)
        stall_s = time.perf_counter() - begun_s
        manifest = self._tier.path(f"commits/{taken.commit}.json")
        _until(manifest.exists)
        self._durable(OURS, begun_s)
        _until(lambda: not self._keepers.has_pending() and not self._tier.inventory().waiting)
        for part in ("commits", "data"):
            shutil.rmtree(self.root / "store" / "bench" / part)
        return stall_s

    def torch_save(self, *, fsync: bool) -> float:
        """One file, all of it in the loop's way."""
        path = self.root / "state.pt"
        begun_s = time.perf_counter()
        with path.open("wb") as file:
            torch.save(self.state, file)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        stall_s = time.perf_counter() - begun_s
        path.unlink()
        return stall_s

    def dcp_save(self) -> float:
        """Synchronous, with its own fsync."""
        where = self._place()
        begun_s = time.perf_counter()
        dcp_save(self.state, storage_writer=FileSystemWriter(where), no_dist=True)
        stall_s = time.perf_counter() - begun_s
        shutil.rmtree(where)
        return stall_s

    def dcp_async(self, name: str, writer: Callable[[Path], Any], **options: Any) -> float:
        """Asynchronous; the next case waits until it is done."""
        where = self._place()
        begun_s = time.perf_counter()
        answer = async_save(self.state, storage_writer=writer(where), **options)
        stall_s = time.perf_counter() - begun_s
        done: Future[Any] = answer if isinstance(answer, Future) else answer.upload_completion
        done.result(_PATIENCE_S)
        self._durable(name, begun_s)
        shutil.rmtree(where)
        return stall_s

    def cases(self) -> dict[str, Callable[[], float]]:
        """All of them by name."""

        def thread(name: str, writer: Callable[[Path], Any], **options: Any) -> Callable[[], float]:
            return lambda: self.dcp_async(name, writer, no_dist=True, **options)

        process = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS, "async_stager": self._process_stager}
        names = ("dcp async", "dcp async, fsspec", "dcp async, kept stager", "dcp async, process")
        return {
            MEMCPY: self.memcpy,
            OURS: self.longwatch,
            "torch.save": lambda: self.torch_save(fsync=False),
            FSYNCED: lambda: self.torch_save(fsync=True),
            "dcp": self.dcp_save,
            names[0]: thread(names[0], FileSystemWriter),
            names[1]: thread(names[1], lambda where: FsspecWriter(f"file://{where}")),
            names[2]: thread(names[2], FileSystemWriter, async_stager=self._stager),
            names[3]: lambda: self.dcp_async(names[3], FileSystemWriter, **process),
        }

    def memory_beside_slots_mb(self) -> float:
        """Most that writer and uploader ever held of their own, and the trainer's part of a save."""
        return sum(_peak_private_bytes(self._keepers.pid(role) or 0) for role in KEEPER_ROLES) / 1e6

    def close(self) -> None:
        """End everything."""
        self._snapshotter.close()
        self._keepers.stop(_PATIENCE_S)
        arena.remove(self.paths.arena)
        self._stager.close()
        self._process_stager.close()

    def _place(self) -> Path:
        self._number += 1
        return self.root / f"dcp-{self._number}"

    def _durable(self, name: str, begun_s: float) -> None:
        self.durable.setdefault(name, []).append(time.perf_counter() - begun_s)


def _until(condition: Callable[[], bool]) -> None:
    end_s = time.perf_counter() + _PATIENCE_S
    while not condition():
        if time.perf_counter() > end_s:
            raise TimeoutError("a save did not come to its end")
        time.sleep(_POLL_S)


def _peak_private_bytes(pid: int) -> int:
    """Peak resident set of a process less what is shared memory now; above what it needs privately, never below."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return 1024 * (int(fields["VmHWM"].split()[0]) - int(fields["RssShmem"].split()[0]))


def judge(stalls: dict[str, Stats], durable: dict[str, Stats], memory_mb: float) -> dict[str, float]:
    """The figures that have a target; all but the memory are ratios."""
    base, ours = stalls[MEMCPY].median, stalls[OURS]
    dcp_stalls = [stats.median for name, stats in stalls.items() if name.startswith("dcp")]
    dcp_durable = [stats.median for name, stats in durable.items() if name.startswith("dcp")]
    return {
        "stall_to_memcpy": ours.median / base,
        "worst_stall_to_memcpy": ours.max / base,
        "fsynced_torch_save_to_stall": stalls[FSYNCED].median / ours.median,
        "stall_to_best_dcp": ours.median / min(dcp_stalls),
        "durable_to_best_dcp": durable[OURS].median / min(dcp_durable),
        "memory_beside_slots_mb": memory_mb,
    }


def is_met(figures: dict[str, float]) -> bool:
    """Whether every target is; one of them is a floor, the others are ceilings."""
    floor = "fsynced_torch_save_to_stall"
    return figures[floor] >= _TARGETS[floor] and all(
        figures[name] <= limit for name, limit in _TARGETS.items() if name != floor
    )


def table(stalls: dict[str, Stats], durable: dict[str, Stats]) -> str:
    """Milliseconds, as markdown."""
    lines = ["| case | stall ms: min / median / max | to memcpy | durable ms: median (max) |", "|---|---|---|---|"]
    base = stalls[MEMCPY].median
    for name, stats in stalls.items():
        three = " / ".join(f"{1e3 * value:.0f}" for value in (stats.min, stats.median, stats.max))
        late = durable.get(name)
        lasting = f"{1e3 * late.median:.0f} ({1e3 * late.max:.0f})" if late else ""
        lines.append(f"| {name} | {three} | {stats.median / base:.2f} | {lasting} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk that is to be measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one core copies, the other is left to what goes on in the background
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        # DCP's process mode wants one
        rendezvous = f"file://{Path(directory).resolve()}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        bench = Bench(Path(directory).resolve(), make_state(arguments.megabytes * 10**6))
        try:
            cases = bench.cases()
            measure(cases, 1)  # allocations, process starts and caches are not what is measured
            bench.durable.clear()
            stalls = measure(cases, arguments.rounds)
            durable = {name: Stats.of(values) for name, values in bench.durable.items()}
            figures = judge(stalls, durable, bench.memory_beside_slots_mb())
        finally:
            bench.close()
            dist.destroy_process_group()
    num_bytes = sum(tensor.nbytes for tensor in bench.state.values())
    seconds = {name: {"stall_s": stats.as_figure()} for name, stats in stalls.items()}
    for name, stats in durable.items():
        seconds[name]["durable_s"] = stats.as_figure()
    rounded = {name: round(value, 3) for name, value in figures.items()}
    everything = {**rounded, "state_mb": num_bytes / 1e6, "rounds": arguments.rounds, "cases": seconds}
    report("checkpoint", everything, _TARGETS, is_met(figures), table(stalls, durable))


if __name__ == "__main__":
    main()

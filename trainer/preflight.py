"""`python -m trainer.preflight --config FILE [--json]`: what can be known to be wrong before training starts.

Looks at data, store and disk, names every problem at once with its remedy, and exits 2 if there is one. Torch-free,
so that the supervisor can ask in a fraction of a second; changes nothing but a probe object that it removes again,
and the store's own directory where there is none yet.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trainer.contract.config import DataConfig, RunConfig
from trainer.contract.exit_codes import ExitCode
from trainer.contract.paths import RunPaths
from trainer.contract.sizes import nearest_existing, state_bytes
from trainer.contract.store import StoreError, open_store
from trainer.data.book import bring_up, changes, read_book
from trainer.data.errors import DataError
from trainer.data.manifest import DataManifest, Place, load_manifest, verify

_MAX_CONFIG_BYTES = 1 << 20
_SPACED_STEPS = (100, 300, 1_000, 3_000, 10_000)  # one good checkpoint about so far back is kept
_LOCAL = ("", "file", "local")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and what to do about it."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}" if self.remedy else f"{self.where}: {self.what}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check, say what is wrong, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.preflight", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run.yaml")
    parser.add_argument("--json", action="store_true", help='print {"problems": [...]} instead of lines')
    parser.add_argument("--book", type=Path, help="data.json of a run that goes on")
    arguments = parser.parse_args(argv)
    found = check_file(arguments.config, arguments.book)
    problems = found.problems
    if arguments.json:
        data = None if found.data is None else asdict(found.data)
        sys.stdout.write(json.dumps({"problems": [asdict(problem) for problem in problems], "data": data}) + "\n")
    else:
        sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return ExitCode.CONFIG if problems else ExitCode.FINISHED


@dataclass(frozen=True, slots=True)
class Data:
    """The training data as a supervisor keeps it: the book of shards, the order asked for, what is new in words."""

    book: dict[str, Any]
    order: dict[str, Any]
    changes: list[str]


@dataclass(frozen=True, slots=True)
class Found:
    """Every problem of a run, and its training data if that can be used."""

    problems: list[Problem]
    data: Data | None = None


def check_file(path: Path, book: Path | None = None) -> Found:
    """Look at the run that a file describes; `book` is that of a run which goes on."""
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_CONFIG_BYTES:
            return _unusable(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes", "name a run.yaml")
        config = RunConfig.model_validate(YAML(typ="safe", pure=True).load(raw))
    except OSError as error:
        return _unusable(f"{path}: {error.strerror}", "name a run.yaml that can be read")
    except YAMLError as error:
        return _unusable(f"{path} is not YAML: {error}", "correct it")
    except ValidationError as error:
        return Found(
            [
                Problem("config", f"{'.'.join(str(part) for part in row['loc'])}: {row['msg']}", "correct it")
                for row in error.errors()
            ]
        )
    base = path.absolute().parent
    problems = check(config, base, Path(config.run_dir) if config.run_dir is not None else base)
    data, refused = _data_of(config, book)
    return Found([*problems, *(p for p in refused if p not in problems)], data)


def _unusable(what: str, remedy: str) -> Found:
    return Found([Problem("config", what, remedy)])


def _data_of(config: RunConfig, path: Path | None) -> tuple[Data | None, list[Problem]]:
    try:
        known = None if path is None else read_book(path)
        book = bring_up(config.data, known)
    except DataError as error:
        return None, [Problem("data", error.what, error.remedy)]
    order = book.spec(config.data, config.batch.sequence_tokens)
    news = [] if known is None else changes(known, book)
    return Data(book.model_dump(mode="json"), order.model_dump(mode="json"), news), []


def check(config: RunConfig, base_dir: Path, run_dir: Path) -> list[Problem]:
    """Every problem of a configuration. Relative stores are below `base_dir`."""
    return [*data_problems(config), *store_problems(config, base_dir), *disk_problems(config, base_dir, run_dir)]


def data_problems(config: RunConfig) -> list[Problem]:
    """Shards that are missing, truncated or not what the manifest says; too little data; too small a vocabulary."""
    problems = [Problem("data", error.what, error.remedy) for error in verify(config.data)]
    for url, section in config.data.places():
        manifest = _manifest_of(url, section)
        if manifest is not None:
            problems += _fit_problems(url, manifest, config)
    return problems


def _manifest_of(url: str, section: DataConfig) -> DataManifest | None:
    """None if it cannot be read, which `verify` has said already."""
    try:
        return load_manifest(Place.of(url, section.storage_options), section)
    except DataError:
        return None


def _fit_problems(url: str, manifest: DataManifest, config: RunConfig) -> list[Problem]:
    problems = []
    length = config.batch.sequence_tokens
    if not any(shard.tokens > length for shard in manifest.shards):
        what = f"{url}: no shard holds even one sample of {length + 1} tokens"
        problems.append(Problem("data", what, "prepare more data, or lower batch.sequence_tokens"))
    ours = config.model.vocab_size
    if ours is not None and ours < manifest.vocab_size:
        what = f"model.vocab_size {ours} is less than the {manifest.vocab_size} of {url}"
        problems.append(Problem("data", what, "raise it, or leave it out"))
    return problems


def store_problems(config: RunConfig, base_dir: Path) -> list[Problem]:
    """A store that is not there, not writable, full, or that ignores create-only writes."""
    try:
        store = open_store(config.store, base_dir, config.name)
        try:
            store.make_place()
            store.probe()
        finally:
            store.close()
    except StoreError as error:
        return [Problem("store", str(error), "")]
    return []


def disk_problems(config: RunConfig, base_dir: Path, run_dir: Path) -> list[Problem]:
    """A run directory that cannot be written, or too little room for checkpoints."""
    existing = nearest_existing(run_dir)
    if not existing.is_dir():
        return [Problem("disk", f"{existing} is a file, so {run_dir} cannot be made", "set run_dir to another place")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [Problem("disk", f"{existing} is not writable", "change its owner, or set run_dir to another place")]
    one = state_bytes(config)
    spaced = sum(steps < config.steps for steps in _SPACED_STEPS)
    # each save passes through the run directory: the newest stay there, one is being written, one is held in reserve
    needed = {existing.stat().st_dev: (existing, one * (config.checkpoint.keep_local + 2))}
    protocol, _, rest = config.store.url.rpartition("://")
    if protocol in _LOCAL:
        place = nearest_existing(base_dir / rest)
        # beside the good ones: those at spaced distances, step 0 and the newest; on one disk the local ones are links
        stored = one * (config.checkpoint.keep_good + spaced + 2)
        same = place.stat().st_dev in needed
        needed[place.stat().st_dev] = (place, stored + (2 * one if same else 0))
    held = _held((RunPaths(run_dir).local_tier, base_dir / rest / config.name if protocol in _LOCAL else None))
    problems = []
    for device, (place, in_all) in needed.items():
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        num_bytes = max(2 * one, in_all - held.get(device, 0))  # those of a run that goes on make room for new ones
        if free < num_bytes:
            what = f"{place} has {free / 1e9:.2f} GB free, checkpoints need about {num_bytes / 1e9:.2f} GB"
            problems.append(
                Problem("disk", what, "free some, or keep fewer (keep_good and keep_local under checkpoint)")
            )
    return problems


def _held(directories: Sequence[Path | None]) -> dict[int, int]:
    """Bytes of all files below these directories by device; a file with several names counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for directory in directories:
        for at, _, names in os.walk(directory) if directory is not None else ():
            for name in names:
                with suppress(FileNotFoundError):  # removed meanwhile
                    stat = Path(at, name).stat()
                    sizes[stat.st_dev, stat.st_ino] = stat.st_size
    held: dict[int, int] = {}
    for (device, _), size in sizes.items():
        held[device] = held.get(device, 0) + size
    return held


if __name__ == "__main__":
    sys.exit(main())

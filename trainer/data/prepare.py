"""`python -m trainer.data.prepare SOURCE... --out URL`: token shards from text. Torch-free.

Owns the command line and what it shows; `shards` does the work. Progress goes to stderr: a bar on a terminal, plain
lines elsewhere. Exit codes: 0 prepared (or already so), 2 sources, options or output cannot be used.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from trainer.data.errors import DataError, PrepareError
from trainer.data.manifest import DataManifest
from trainer.data.output import Output
from trainer.data.shards import Job, Progress, run
from trainer.data.sources import DEFAULT_SUFFIXES, collect
from trainer.data.tokenize import open_tokenizer

_SHARD_TOKENS = 1 << 25  # 64 MiB of uint16: one request of a store, and memory for two
_LINE_EVERY_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare what the command line says; returns the exit code."""
    arguments = _parser().parse_args(argv)
    begun_s = time.monotonic()
    try:
        job = _job(arguments)
        with _shown(sum(source.bytes for source in job.sources)) as progress:
            manifests = run(job, progress)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    outs = {"train": job.out.url, "validation": job.validation_out.url if job.validation_out is not None else ""}
    sys.stdout.write(_summary(manifests, outs, time.monotonic() - begun_s, as_json=arguments.json))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longwatch data prepare",
        description="Turn text into token shards with a manifest. Killed midway, the same command goes on.",
        epilog="Example: longwatch data prepare corpus/ --out data/train --validation-fraction 0.01",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="text or .jsonl files, directories, patterns; any fsspec URL")
    add("--out", required=True, metavar="URL", help="directory for the shards")
    add("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json; default: bytes (vocabulary 257)")
    add("--eot", metavar="TOKEN", help="token that opens each document; default: the tokenizer's own end of text")
    add("--shard-tokens", type=_positive, default=_SHARD_TOKENS, metavar="N", help="tokens a shard (%(default)s)")
    add("--validation-fraction", type=_fraction, default=0.0, metavar="F", help="share of documents to hold out")
    add("--validation-out", metavar="URL", help="where to (default: validation beside --out)")
    add(
        "--suffix", action="append", metavar=".EXT", help=f"files of directories; default: {' '.join(DEFAULT_SUFFIXES)}"
    )
    add("--field", default="text", help="field of a .jsonl line that holds the text (%(default)s)")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and less than 1")
    return value


def _job(arguments: argparse.Namespace) -> Job:
    """The job that the arguments mean."""
    fraction, held_out = arguments.validation_fraction, arguments.validation_out
    if held_out is not None and not fraction:
        raise PrepareError("--validation-out without --validation-fraction", "say which share is to be held out")
    if fraction and held_out is None:
        parent, slash, _ = arguments.out.rstrip("/").rpartition("/")
        held_out = f"{parent}{slash}validation"
    if held_out is not None and held_out.rstrip("/") == arguments.out.rstrip("/"):
        raise PrepareError(f"{held_out}: is --out as well", "name another directory with --validation-out")
    return Job(
        sources=collect(arguments.sources, arguments.suffix or DEFAULT_SUFFIXES),
        tokenizer=open_tokenizer(arguments.tokenizer, arguments.eot),
        out=Output(arguments.out),
        validation_out=Output(held_out) if held_out is not None else None,
        validation_fraction=fraction,
        shard_tokens=arguments.shard_tokens,
        field=arguments.field,
    )


@contextmanager
def _shown(total_bytes: int) -> Iterator[Progress]:
    """Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(total_bytes)
        return
    columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=total_bytes)
        yield lambda done, _: bar.update(task, completed=done)


def _lines(total_bytes: int) -> Progress:
    shards = 0
    due_s = time.monotonic() + _LINE_EVERY_S

    def show(done_bytes: int, shard: str | None) -> None:
        nonlocal shards, due_s
        shards += shard is not None
        if time.monotonic() >= due_s:
            share = 100 * done_bytes / max(1, total_bytes)
            sys.stderr.write(f"prepared {done_bytes / 1e6:.0f} MB of {total_bytes / 1e6:.0f} ({share:.0f} %)\n")
            due_s = time.monotonic() + _LINE_EVERY_S

    return show


def _summary(manifests: dict[str, DataManifest], outs: dict[str, str], seconds: float, *, as_json: bool) -> str:
    rows = {
        name: {"url": outs[name], "shards": len(made.shards), "tokens": made.tokens, "digest": made.digest}
        for name, made in manifests.items()
    }
    vocab_size = manifests["train"].vocab_size
    if as_json:
        return json.dumps(rows | {"vocab_size": vocab_size, "seconds": round(seconds, 3)}) + "\n"
    lines = [
        f"{name}: {row['tokens']:,} tokens in {row['shards']} shards at {row['url']}" for name, row in rows.items()
    ]
    return "\n".join([*lines, f"vocabulary {vocab_size}, {seconds:.1f} s"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

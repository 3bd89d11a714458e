"""The canary: marked secrets go in by every door, and are looked for in everything that comes out (DESIGN 14)."""

import base64
import io
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from orchestrator.cli.app import run as longwatch
from orchestrator.journal import Journal
from tests.integration.test_training_faults import _policy as scaled_policy
from tests.runs import Run, tiny_config, wait_until
from tests.s3 import S3Server, client, seaweedfs

pytestmark = pytest.mark.training

_STORE_KEY, _STORE_SECRET = "AKCANARYSTORE7Q2X", "SKCANARY+store/5d1f/zz=="
_DATA_KEY, _DATA_SECRET = "AKCANARYDATA9Z4W", "SKCANARY+data/8e2b/yy=="
_WRONG_SECRET, _LAUNCH, _PAGER = "SKCANARY+wrong/3a9c/xx==", "canary+launch/77f1/ww==", "canary+pager/0b2d/vv=="
_MARKERS = (_STORE_KEY, _STORE_SECRET, _DATA_KEY, _DATA_SECRET, _WRONG_SECRET, _LAUNCH, _PAGER)
_ENVIRONMENT = {"CANARY_STORE_KEY": _STORE_KEY, "CANARY_STORE_SECRET": _STORE_SECRET, "CANARY_PAGER": _PAGER}
_LOOKS = (
    ["status"], ["incidents"], ["checkpoints"], ["checkpoints", "verify", "--all"],
    ["checkpoints", "prune", "--dry-run"], ["ledger"], ["ledger", "--check"], ["ledger", "--steps", "1:9"],
)  # fmt: skip


def _forms(secret: str) -> Iterator[bytes]:
    """A secret as it is, as in a URL, as hex, and in base64 wherever in a longer text it began."""
    raw = secret.encode()
    yield from (raw, quote(secret, safe="").encode(), quote_plus(secret).encode(), raw.hex().encode())
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(b"\0" * offset + raw)
            complete = (offset + len(raw)) // 3 * 4  # what follows changes the last, incomplete group
            yield whole[-(-offset * 8 // 6) : complete]


def _found(content: bytes) -> list[str]:
    return [marker for marker in _MARKERS if any(form in content for form in _forms(marker))]


@pytest.mark.parametrize("marker", _MARKERS)
def test_the_search_finds_every_form(marker: str) -> None:
    """A canary that cannot sing is none."""
    header = base64.b64encode(f"user:{marker}:more".encode())
    for text in (f"x={marker}&", f"?s={quote(marker, safe='')}", marker.encode().hex()):
        assert _found(text.encode()) == [marker]
    assert [_found(base64.b64encode(f"{'u' * pad}{marker}more".encode())) for pad in range(3)] == [[marker]] * 3
    assert _found(header) == [marker]
    assert _found(marker[:-6].encode()) == []


def _config(server: S3Server, **changes: object) -> dict[str, object]:
    """Store and data on the server, each with a key of its own; the data's are named by `launch.env` alone."""
    data = {
        "train": "s3://checkpoints/corpus",
        "validation": "s3://checkpoints/corpus",
        "vocab_size": 64,
        "block_samples": 16,
        "window_blocks": 2,
        "storage_options": {
            "key": {"env": "CANARY_DATA_KEY"},
            "secret": {"env": "CANARY_DATA_SECRET"},
            "client_kwargs": {"endpoint_url": server.endpoint_url},
        },
    }
    env = {"CANARY_TOKEN": _LAUNCH, "CANARY_DATA_KEY": _DATA_KEY, "CANARY_DATA_SECRET": _DATA_SECRET}
    store = {
        "url": "s3://checkpoints",
        "endpoint_url": server.endpoint_url,
        "key_env": "CANARY_STORE_KEY",
        "secret_env": "CANARY_STORE_SECRET",
        "timeout_s": 20,
    }
    faults = [
        {"kind": "store_error", "steps": [15, 35], "once": False},
        {"kind": "lr_bomb", "steps": [60, 63], "factor": 300.0},
    ]
    launch = {"threads": 1, "env": env}
    config = tiny_config(Path("unused"), steps=100, data=data, store=store, launch=launch, faults=faults)
    return config | {"metrics": {"port": 0}} | changes


def _policy(told: Path) -> dict[str, object]:
    """Every notification goes to a hook that has the secret, uses it, says nothing of it and fails."""
    hook = ["sh", "-c", f'printf %s "$CANARY_PAGER" | wc -c >> {told}; echo "no route to pager" >&2; exit 3']
    return scaled_policy(notify={"command": hook, "level": "info"})


class _Witness:
    """Keeps everything that could be seen from outside."""

    def __init__(self) -> None:
        self.seen: dict[str, bytes] = {}

    def processes(self) -> bool:
        """What `ps` would show of every process there is; True, so that it can be part of a condition."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                self.seen[f"arguments of {process.name}"] = (process / "cmdline").read_bytes()
            except OSError:
                continue  # gone
        return True

    def command(self, run: Run, *arguments: str, secret: str = _STORE_SECRET, expect: int = 0) -> None:
        """What a verb prints."""
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            for name, value in {**_ENVIRONMENT, "CANARY_STORE_SECRET": secret}.items():
                patch.setenv(name, value)
            patch.chdir(run.root)
            code = longwatch(arguments)
        assert code == expect, (arguments, said.getvalue())
        self.seen[f"output of {' '.join(arguments)} with {secret[:12]}"] = said.getvalue().encode()

    def files(self, directory: Path) -> None:
        """Every file, whatever its name."""
        for path in directory.rglob("*"):
            if path.is_file():
                self.seen[str(path)] = str(path).encode() + path.read_bytes()

    def objects(self, server: S3Server) -> None:
        """Every object of the store."""
        with closing(client(server.endpoint_url)) as s3:
            for page in s3.get_paginator("list_objects_v2").paginate(Bucket=server.bucket):
                for item in page.get("Contents", ()):
                    body = s3.get_object(Bucket=server.bucket, Key=item["Key"])["Body"].read()
                    self.seen[f"object {item['Key']}"] = item["Key"].encode() + body

    def leaks(self) -> dict[str, list[str]]:
        """Where which marker was found."""
        return {where: found for where, content in self.seen.items() if (found := _found(content))}


def _train(run: Run, witness: _Witness, server: S3Server) -> None:
    """One launch from beginning to end, watched all the time."""
    witness.command(run, "check", str(run.file))
    process = run.start()
    wait_until(lambda: witness.processes() and len(run.records(1, "commit")) > 1, "training")
    with closing(Journal.read_only(run.paths.database)) as journal:
        url = journal.meta("metrics_url")
    assert url
    witness.seen["metrics"] = urllib.request.urlopen(url, timeout=10).read()
    wait_until(lambda: witness.processes() and process.poll() is not None, "the end")
    witness.seen["output of launch"] = run.wait(process).encode()


def test_no_secret_comes_out_anywhere(tmp_path: Path, corpus: Path) -> None:
    """A store that denies, one that fails for a while, a divergence, a hook that fails: nothing tells a secret."""
    witness = _Witness()
    with seaweedfs(tmp_path / "s3", {_STORE_KEY: _STORE_SECRET, _DATA_KEY: _DATA_SECRET}) as server:
        with closing(client(server.endpoint_url)) as s3:
            for shard in sorted(corpus.iterdir()):
                s3.upload_file(str(shard), server.bucket, f"corpus/{shard.name}")
        run = Run(tmp_path / "run", _config(server), _policy(tmp_path / "told"), environment=_ENVIRONMENT)
        witness.command(run, "check", str(run.file), secret=_WRONG_SECRET, expect=2)
        witness.command(run, "launch", str(run.file), secret=_WRONG_SECRET, expect=2)

        _train(run, witness, server)

        assert run.records(1, "commit_failed")
        assert "unrecovered_spike" in [incident["class"] for incident in run.incidents()]
        assert str(len(_PAGER)) in (tmp_path / "told").read_text().split(), "the hook had no secret to lose"
        for look in _LOOKS:
            witness.command(run, *look, str(run.paths.root))
            witness.command(run, *look, str(run.paths.root), "--json")
        witness.command(run, "checkpoints", "export", "100", str(run.paths.root), "--out", "w.safetensors")
        witness.command(run, "checkpoints", str(run.paths.root), secret=_WRONG_SECRET, expect=1)
        witness.command(run, "doctor")
        witness.files(run.paths.root)
        witness.objects(server)

    assert sum(name.startswith("object tiny/data/") for name in witness.seen) > 3
    assert any("supervisor.jsonl" in name for name in witness.seen)
    assert any(b"trainer" in content for name, content in witness.seen.items() if name.startswith("arguments"))
    assert witness.leaks() == {}


def test_a_trainer_that_is_denied_tells_no_secret(tmp_path: Path, corpus: Path) -> None:
    """Its saves are refused by the store: the errors reach records, journal, log and incidents, the keys do not."""
    witness = _Witness()
    with seaweedfs(tmp_path / "s3", {_STORE_KEY: _STORE_SECRET}) as server:
        store = _config(server)["store"]
        trainer = f"CANARY_STORE_SECRET=$CANARY_WRONG exec {sys.executable} -m trainer"
        env = {"CANARY_WRONG": _WRONG_SECRET, "CANARY_TOKEN": _LAUNCH}
        launch = {"threads": 1, "env": env, "command": ["sh", "-c", trainer]}
        config = tiny_config(corpus, steps=40, store=store, launch=launch)
        halting = {"on": "crash", "do": ["notify", "halt"]}
        run = Run(tmp_path / "run", config, scaled_policy(halting), environment=_ENVIRONMENT)
        process = run.start()
        wait_until(lambda: witness.processes() and process.poll() is not None, "the end")
        witness.seen["output of launch"] = process.communicate()[0].encode()
        for look in (["status"], ["incidents"], ["checkpoints"]):
            witness.command(run, *look, str(run.paths.root), "--json")
        witness.files(run.paths.root)
        witness.objects(server)

    assert any(b"denied" in content for content in witness.seen.values())
    assert witness.leaks() == {}

"""The manifest: read or derived, its digest, and `verify`, which names everything that is wrong at once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_data.shards import config, corpus
from trainer.data.errors import DataError
from trainer.data.manifest import MANIFEST_NAME, UNFINISHED_NAME, Place, load_manifest, verify
from trainer.data.prepare import main


def _manifest(root: Path, **changes: Any) -> Any:
    return load_manifest(Place.of(str(root), {}), config(root, **changes))


@pytest.fixture(name="prepared")
def _prepared(tmp_path: Path) -> Path:
    """Shards with a manifest."""
    (tmp_path / "text.txt").write_text("Longwatch keeps a run alive. " * 200)
    assert main([str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"), "--shard-tokens", "2000"]) == 0
    return tmp_path / "data"


def test_derived_from_names_and_headers(tmp_path: Path) -> None:
    """Without manifest.json: shards in the order of their names, the vocabulary from the configuration."""
    manifest = _manifest(corpus(tmp_path))
    assert [shard.name for shard in manifest.shards] == [f"shard-{n}.bin" for n in range(4)]
    assert [shard.tokens for shard in manifest.shards] == [1000, 777, 1300, 40]
    assert manifest.vocab_size == 1000


def test_the_digest_follows_the_data_and_not_its_place(tmp_path: Path) -> None:
    """A moved directory is the same data; another shard or vocabulary is not."""
    one, two = _manifest(corpus(tmp_path / "a")), _manifest(corpus(tmp_path / "b"))
    assert one.digest == two.digest
    assert _manifest(corpus(tmp_path / "c", (1000, 778, 1300, 40))).digest != one.digest
    assert _manifest(tmp_path / "a", vocab_size=1001).digest != one.digest


def test_without_a_vocabulary_it_cannot_be_derived(tmp_path: Path) -> None:
    """The remedy names the key."""
    with pytest.raises(DataError, match=r"data\.vocab_size"):
        _manifest(corpus(tmp_path), vocab_size=None)


def test_healthy_data_has_no_problems(prepared: Path, tmp_path: Path) -> None:
    """Prepared or derived, checked lightly or deeply."""
    assert verify(config(prepared), deep=True) == []
    assert verify(config(corpus(tmp_path / "brought"))) == []


def test_everything_wrong_is_said_at_once(prepared: Path) -> None:
    """One shard missing, one truncated: both are named."""
    shards = sorted(prepared.glob("*.bin"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    problems = verify(config(prepared, validation=None))
    assert [problem.shard and Path(problem.shard).name for problem in problems] == [shards[0].name, shards[1].name]
    assert all(problem.remedy for problem in problems)


def test_a_flipped_bit_is_found_by_the_deep_check(prepared: Path) -> None:
    """The size is right, the checksum is not."""
    shard = sorted(prepared.glob("*.bin"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert verify(config(prepared, validation=None)) == []
    assert "checksum" in str(verify(config(prepared, validation=None), deep=True)[0])


def test_a_manifest_that_does_not_match(prepared: Path) -> None:
    """It speaks of other shards than there are."""
    path = prepared / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["shards"][0]["tokens"] += 1
    path.write_text(json.dumps(content))
    assert "manifest says" in str(verify(config(prepared, validation=None))[0])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"vocab_size": 9, "shards": []}'])
def test_a_damaged_manifest(prepared: Path, content: str) -> None:
    """Said by name, whatever is in it."""
    (prepared / MANIFEST_NAME).write_text(content)
    (problem,) = verify(config(prepared, validation=None))
    assert MANIFEST_NAME in str(problem)


def test_an_empty_directory_and_none_at_all(tmp_path: Path) -> None:
    """Both are named, with what to run."""
    (tmp_path / "empty").mkdir()
    problems = verify(config(tmp_path / "empty", validation=str(tmp_path / "absent")))
    assert ["no token shards" in str(problems[0]), "no such directory" in str(problems[1])] == [True, True]


def test_a_half_prepared_directory_is_no_data(tmp_path: Path) -> None:
    """Its shards are not all there, though each of them is whole."""
    (corpus(tmp_path) / UNFINISHED_NAME).write_text("{}")
    assert "not finished" in str(verify(config(tmp_path, validation=None))[0])


def test_an_unknown_protocol(tmp_path: Path) -> None:
    """A typo in a URL is a problem, not a traceback."""
    assert "s4" in str(verify(config("s4://bucket/data", validation=None))[0])


def test_a_shard_that_cannot_be_read(tmp_path: Path) -> None:
    """Here it is a directory, which no user can read as a file."""
    corpus(tmp_path)
    (tmp_path / "shard-1.bin").unlink()
    (tmp_path / "shard-1.bin").mkdir()
    assert "shard-1.bin" in str(verify(config(tmp_path, validation=None))[0])


def test_what_preflight_and_prepare_import_leaves_torch_out() -> None:
    """So that a check takes a fraction of a second."""
    modules = "trainer.data.cursor, trainer.data.prepare, trainer.data.manifest"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

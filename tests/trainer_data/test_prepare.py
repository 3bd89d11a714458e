"""Preparation: the same bytes whenever it is killed; documents stay whole; bad input is named."""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from trainer.contract.config import DataConfig
from trainer.data.manifest import MANIFEST_NAME, UNFINISHED_NAME, Place, load_manifest, verify
from trainer.data.prepare import main
from trainer.data.sources import PIECE_BYTES
from trainer.data.tokenize import BYTE_EOT

DEADLINE_S = 60.0


def _tokens(root: Path) -> list[int]:
    """All tokens of a prepared directory, in order."""
    manifest = load_manifest(Place.of(str(root), {}), DataConfig(train=str(root)))
    parts = [np.frombuffer((root / s.name).read_bytes()[s.offset :], dtype=s.dtype) for s in manifest.shards]
    return [int(token) for token in np.concatenate(parts)]


def _documents(tokens: list[int]) -> list[bytes]:
    """The documents that byte tokens hold."""
    text = "".join(chr(token) for token in tokens)
    return [part.encode("latin-1") for part in text.split(chr(BYTE_EOT))[1:]]


def _files(root: Path) -> dict[str, str]:
    """Digest of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


def _write(root: Path, **texts: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return root


def test_bytes_with_an_opening_token_before_each_document(tmp_path: Path) -> None:
    """Files in the order of their names; every byte is kept, an empty file is no document."""
    _write(tmp_path / "in", b="zwei\n", a="eins, ümläut", c="")
    (tmp_path / "in" / "d.txt").write_bytes(bytes(range(256)))
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    expected = ["eins, ümläut".encode(), b"zwei\n", bytes(range(256))]
    assert _documents(_tokens(tmp_path / "out")) == expected
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert (manifest["vocab_size"], manifest["tokenizer"]) == (257, "bytes")


def test_shards_are_full_but_the_last_and_verify(tmp_path: Path) -> None:
    """Cut at exactly so many tokens, checked to the last bit."""
    _write(tmp_path / "in", a="x" * 2500)
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--shard-tokens", "1000"]) == 0
    manifest = load_manifest(Place.of(str(tmp_path / "out"), {}), DataConfig(train=str(tmp_path / "out")))
    assert [shard.tokens for shard in manifest.shards] == [1000, 1000, 501]
    assert verify(DataConfig(train=str(tmp_path / "out")), deep=True) == []


def test_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a pattern, a directory in depth by suffix, jsonl, gzip; a file that is named twice counts once."""
    monkeypatch.chdir(tmp_path)
    deep = tmp_path / "dir" / "deep"
    deep.mkdir(parents=True)
    (deep / "x.py").write_text("code")
    (deep / "x.md").write_text("left out")
    (deep / ".hidden.py").write_text("left out")
    rows = [{"text": "one"}, {"text": ""}, {"text": "two", "more": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "old.txt.gz").write_bytes(gzip.compress(b"zipped", mtime=0))
    (tmp_path / "p1.txt").write_text("first")
    (tmp_path / "p2.txt").write_text("second")
    given = ["rows.jsonl", "old.txt.gz", "p*.txt", "dir", "p1.txt"]
    assert main([*given, "--suffix", ".py", "--out", "out"]) == 0
    assert _documents(_tokens(tmp_path / "out")) == [b"one", b"two", b"zipped", b"first", b"second", b"code"]


def test_a_text_longer_than_a_piece_is_one_document(tmp_path: Path) -> None:
    """Pieces are a matter of memory: nothing is added or lost where they meet, with and without line breaks."""
    rng = random.Random(3)
    lines = "".join(f"{rng.random()}\n" for _ in range(70_000))
    unbroken = "ä" * (PIECE_BYTES // 2 + 11)
    _write(tmp_path / "in", a=lines, b=unbroken)
    assert len(lines) > PIECE_BYTES
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert _documents(_tokens(tmp_path / "out")) == [lines.encode(), unbroken.encode()]


def test_held_out_documents_are_whole_and_always_the_same(tmp_path: Path) -> None:
    """By their content: a document and its copy go to one side, wherever they lie and however they are called."""
    texts = {f"t{n:03d}": f"document {n} " * 5 for n in range(200)}
    _write(tmp_path / "in", **texts, copy=texts["t007"])
    options = ["--validation-fraction", "0.2", "--shard-tokens", "700"]
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "data" / "train"), *options]) == 0
    train, held = (_documents(_tokens(tmp_path / "data" / side)) for side in ("train", "validation"))
    assert sorted([*train, *held]) == sorted([*(t.encode() for t in texts.values()), texts["t007"].encode()])
    assert not set(train) & set(held)
    assert 20 <= len(held) <= 60


def test_a_tokenizer_file(tmp_path: Path) -> None:
    """Its ids, its own end-of-text token before each document, its vocabulary."""
    tokenizer = _tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    _write(tmp_path / "in", a="hello big world", b="hello")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    assert main(arguments) == 0
    ids = {word: n for n, word in enumerate(["<|endoftext|>", "hello", "world", "big", "?"])}
    words = ["<|endoftext|>", "hello", "big", "world", "<|endoftext|>", "hello"]
    assert _tokens(tmp_path / "out") == [ids[word] for word in words]
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["vocab_size"] == 5
    assert manifest["tokenizer"].startswith("tokenizers:")


def _tokenizer(path: Path, special: list[str]) -> Path:
    """A word-level tokenizer of five words at most."""
    vocabulary = {word: n for n, word in enumerate([*special, "hello", "world", "big", "?"])}
    added = [{"id": vocabulary[w], "content": w, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for w in special]  # fmt: skip
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
               "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
               "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}}  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_the_result_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but JSON on stdout."""
    _write(tmp_path / "in", a="text")
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (result["train"]["tokens"], result["train"]["shards"], result["vocab_size"]) == (5, 1, 257)


def test_any_filesystem_of_fsspec(tmp_path: Path) -> None:
    """The same shards on memory:// as on disk."""
    _write(tmp_path / "in", a="some text " * 50)
    memory = MemoryFileSystem()
    try:
        for out in (str(tmp_path / "out"), "memory://prepare-test/out"):
            assert main([str(tmp_path / "in"), "--out", out, "--shard-tokens", "100"]) == 0
        found = {p.rsplit("/", 1)[-1]: hashlib.sha256(memory.cat_file(p)).hexdigest()
                 for p in memory.ls("/prepare-test/out", detail=False)}  # fmt: skip
        assert found == _files(tmp_path / "out")
    finally:
        memory.rm("/prepare-test", recursive=True)


# -- again, and after a kill -------------------------------------------------------------------------------------------


@pytest.fixture(name="books", scope="module")
def _books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some MB in long and short documents, text and jsonl."""
    root = tmp_path_factory.mktemp("books")
    rng = random.Random(1)
    for number in range(6):
        (root / f"long-{number}.txt").write_text("".join(f"{rng.random()}\n" for _ in range(60_000)))
    rows = (json.dumps({"text": f"{rng.random()} " * rng.randrange(1, 60)}) for _ in range(3000))
    (root / "rows.jsonl").write_text("\n".join(rows))
    return root


def _arguments(books: Path, out: Path) -> list[str]:
    return [str(books), "--out", str(out / "train"), "--shard-tokens", "60000", "--validation-fraction", "0.3"]


def test_killed_and_run_again_it_ends_with_the_same_bytes(books: Path, tmp_path: Path) -> None:
    """SIGKILL after some shards, twice: finished shards are not written again, the result is that of one go."""
    assert main(_arguments(books, tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    for wanted in (5, 40):
        before = _inodes(out)
        _run_until(_arguments(books, out), lambda wanted=wanted: len(_inodes(out)) >= wanted)
        assert (out / "train" / UNFINISHED_NAME).exists()
        _same_but_the_last_of_each_side(before, _inodes(out))
    before = _inodes(out)
    assert main(_arguments(books, out)) == 0
    _same_but_the_last_of_each_side(before, _inodes(out))
    for side in ("train", "validation"):
        assert _files(out / side) == _files(tmp_path / "whole" / side)


def _run_until(arguments: list[str], reached: Any) -> None:
    """Run it in a process of its own and kill it there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.data.prepare", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    end_s = time.monotonic() + DEADLINE_S
    try:
        while not reached():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < end_s
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -9


def _inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.glob("*/*.bin")}


def _same_but_the_last_of_each_side(before: dict[str, int], after: dict[str, int]) -> None:
    """A kill between a shard and the state that tells of it costs that one shard."""
    sides = (sorted(name for name in before if name.startswith(side)) for side in ("train", "validation"))
    kept = [name for names in sides for name in names[:-1]]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_run_again_after_its_end_it_does_nothing(tmp_path: Path) -> None:
    """Exit 0, no file touched."""
    _write(tmp_path / "in", a="text " * 100)
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--shard-tokens", "100"]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


# -- what cannot be prepared -------------------------------------------------------------------------------------------


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says when it ends with 2: one line, with a remedy behind the semicolon."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "; " in said
    return said


def test_another_set_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished or half finished, of other sources or of other options; nothing is changed."""
    _write(tmp_path / "in", a="text " * 100)
    out = tmp_path / "out"
    assert main([str(tmp_path / "in"), "--out", str(out)]) == 0
    before = _files(out)
    assert "other sources" in _refused(capsys, str(tmp_path / "in"), "--out", str(out), "--shard-tokens", "50")
    (tmp_path / "in" / "b.txt").write_text("more")
    assert "other sources" in _refused(capsys, str(tmp_path / "in"), "--out", str(out))
    assert _files(out) == before
    (out / MANIFEST_NAME).rename(out / UNFINISHED_NAME)
    (out / UNFINISHED_NAME).write_text(json.dumps({"prepared_from": "0" * 64, "sides": {}}))
    assert "unfinished" in _refused(capsys, str(tmp_path / "in"), "--out", str(out))


def test_strange_files_in_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong --out is told before anything is written there."""
    _write(tmp_path / "in", a="text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert "thesis.tex" in _refused(capsys, str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_sources_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No such path, a pattern without a match, a directory without a suffix that counts."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.exe").write_text("x")
    out = ["--out", str(tmp_path / "out")]
    assert "does not exist" in _refused(capsys, str(tmp_path / "absent"), *out)
    assert "no source files" in _refused(capsys, str(tmp_path / "no*.txt"), *out)
    assert "no source files" in _refused(capsys, str(tmp_path / "empty"), *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "byte 17 is not JSON"),
        ("a.jsonl", b'{"body": "other field"}\n', "--field"),
        ("a.jsonl", b'["text"]\n', "no text"),
        ("a.txt.gz", b"this is no gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut off " * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt", b"", "no document"),
    ],
)
def test_sources_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    """The file, the place in it, and what to do."""
    (tmp_path / name).write_bytes(content)
    assert said in _refused(capsys, str(tmp_path / name), "--out", str(tmp_path / "out"))


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file where the directory should be; a protocol that does not exist."""
    _write(tmp_path / "in", a="text")
    (tmp_path / "file").write_text("")
    assert "file" in _refused(capsys, str(tmp_path / "in"), "--out", str(tmp_path / "file" / "out"))
    assert "s4" in _refused(capsys, str(tmp_path / "in"), "--out", "s4://bucket/out")


def test_tokenizers_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not there, not a tokenizer, without a token to open documents with."""
    _write(tmp_path / "in", a="hello")
    start = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tokenizer"]
    assert "cannot be read" in _refused(capsys, *start, str(tmp_path / "absent.json"))
    (tmp_path / "bad.json").write_text("{}")
    assert "no tokenizer" in _refused(capsys, *start, str(tmp_path / "bad.json"))
    plain = str(_tokenizer(tmp_path / "plain.json", []))
    assert "--eot" in _refused(capsys, *start, plain)
    assert main([*start, plain, "--eot", "?"]) == 0


def test_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A place for held-out documents without a share, or the same place for both."""
    _write(tmp_path / "in", a="text")
    out = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--validation-out"]
    assert "--validation-fraction" in _refused(capsys, *out, str(tmp_path / "held"))
    assert "--out as well" in _refused(capsys, *out, str(tmp_path / "out"), "--validation-fraction", "0.1")


def test_a_share_that_leaves_one_side_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One document cannot be divided."""
    _write(tmp_path / "in", a="text")
    out = str(tmp_path / "out" / "train")
    assert "no document" in _refused(capsys, str(tmp_path / "in"), "--out", out, "--validation-fraction", "0.5")

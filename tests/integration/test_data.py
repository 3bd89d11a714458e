"""Data that changes while a run goes on, and data that runs out, on real processes."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from tests import s3
from tests.runs import Run, edit_state, tiny_config, wait_until, write_corpus
from tests.trainer.attempts import TinyRun
from trainer.contract.config import DataConfig
from trainer.contract.exit_codes import ExitCode
from trainer.contract.plan import Segment
from trainer.data.book import read_book, timeline_of
from trainer.data.stream import DataStream

pytestmark = pytest.mark.training


def _with_sources(config: dict[str, Any], steps: int, **sources: tuple[Path, float]) -> dict[str, Any]:
    train = [{"source": name, "url": str(url), "weight": weight} for name, (url, weight) in sources.items()]
    return {**config, "steps": steps, "data": {**config["data"], "train": train}}


def _shards_of(run: Run, segments: tuple[Segment, ...], begin: int, end: int) -> dict[int, int]:
    """Shard -> sequences of a raw range, by the order's own arithmetic."""
    data = DataConfig.model_validate_json(json.dumps(run.config["data"]))
    book = read_book(run.paths.data_book)
    assert book is not None
    shards = timeline_of(segments, book, data).shards_of(np.arange(begin, end))
    return {int(shard): int((shards == shard).sum()) for shard in np.unique(shards)}


def test_a_source_is_added_to_a_run_that_goes_on(tmp_path: Path, corpus: Path) -> None:
    """From where the run stands on; what was read keeps its order, over a crash back across the boundary too."""
    config = tiny_config(corpus, steps=24, evaluate={"every_steps": 1000}, checkpoint={"every_steps": 10})
    first = Run(tmp_path, config)
    first.launch()
    more = write_corpus(tmp_path / "more", num_shards=2, seed=9)
    die = {"kind": "sigkill", "steps": [33, 33]}
    changed = _with_sources(config, 48, train=(corpus, 3.0), more=(more, 1.0))
    again = Run(tmp_path, {**changed, "faults": [die]})

    output = again.launch()

    assert "source more is new, with 2 shards" in output
    assert "data changed" in output
    segments = tuple(Segment.model_validate(row) for row in again.plan(3)["segments"])
    assert [segment.from_position for segment in segments] == [0, 24 * 8]
    steps = again.surviving_steps()
    assert sorted(steps) == list(range(1, 49))
    for row in steps.values():
        expected = _shards_of(again, segments, row["data"]["begin"], row["data"]["end"])
        assert {int(shard): count for shard, (count, _) in row["shards"].items()} == expected
    started = again.records(2, "started")[0]
    assert (started["shards"][0], started["shards"][-1]) == ("train/shard-000.bin", "more/shard-001.bin")
    assert any(int(shard) >= 8 for row in steps.values() for shard in row["shards"])
    assert not any(int(shard) >= 8 for step, row in steps.items() if step <= 24 for shard in row["shards"])


def test_more_steps_reorder_nothing(tmp_path: Path, corpus: Path) -> None:
    """The second launch goes on behind the first; there is one segment, and consecutive ranges tile."""
    config = tiny_config(corpus, steps=12, evaluate={"every_steps": 1000})
    Run(tmp_path, config).launch()
    again = Run(tmp_path, {**config, "steps": 24})
    again.launch()
    (segment,) = again.plan(2)["segments"]
    assert segment["from_position"] == 0
    assert again.plan(1)["segments"] == [segment]
    assert [row["data"]["begin"] for row in again.surviving_steps().values()] == [8 * n for n in range(24)]


@pytest.mark.long
def test_nothing_left_to_read_halts_the_run(tmp_path: Path, corpus: Path) -> None:
    """Every shard convicted in its turn: one attempt finds out, a person is paged; no restart, which could not help."""
    config = tiny_config(corpus, steps=12, evaluate={"every_steps": 1000})
    run = Run(tmp_path, config)
    run.launch()
    edit_state(run, quarantines=[{"shard": shard, "from_position": 96} for shard in range(8)])
    again = Run(tmp_path, {**config, "steps": 24})

    output = again.launch(expect=3)

    assert "all 8 shards are quarantined at raw position 96; unquarantine some, or add other data" in output
    assert [attempt["cause"] for attempt in again.attempts()] == ["finished", "data"]
    incident = again.incident("data_error")
    assert "halt" in incident["decision"]
    assert max(again.surviving_steps()) == 12


def test_a_checkpoint_of_another_order_is_refused_and_not_condemned(tmp_path: Path, corpus: Path) -> None:
    """A plan whose order differs before the cursor: a data error that says so; the state itself is sound."""
    run = TinyRun(tmp_path, {"steps": 6})
    assert run.finish(1) == ExitCode.FINISHED
    stream = DataStream(run.config.data, sample_tokens=run.config.batch.sequence_tokens)
    (segment,) = stream.segments
    assert run.finish(2, segments=(segment.model_copy(update={"seed": 99}),)) == ExitCode.DATA
    (error,) = run.records(2, "error")
    assert "was trained on another order of the data" in error["message"]
    assert "the checkpoint itself is sound" in error["message"]


@contextmanager
def _server(port: int) -> Iterator[None]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        yield
    finally:
        server.stop()


def _run_on_s3(root: Path, corpus: Path, port: int, steps: int, **data: Any) -> Run:
    """A run whose training data lies on the server of this port."""
    endpoint = f"http://127.0.0.1:{port}"
    config = tiny_config(corpus, steps=steps)
    config["data"] |= {
        "train": "s3://data/corpus",
        "read_ahead_blocks": 1,
        "cache_bytes": 0,
        "storage_options": {
            "endpoint_url": endpoint,
            "key": {"env": s3.KEY_ENV},
            "secret": {"env": s3.SECRET_ENV},
            "config_kwargs": {"retries": {"total_max_attempts": 1}},
        },
        **data,
    }
    return Run(root, config, environment={s3.KEY_ENV: s3.ACCESS_KEY, s3.SECRET_ENV: s3.SECRET_KEY})


def _upload(corpus: Path, port: int) -> None:
    """moto keeps it for as long as this process lives, whatever happens to its server."""
    with closing(s3.client(f"http://127.0.0.1:{port}")) as client:
        client.create_bucket(Bucket="data")
        for shard in sorted(corpus.iterdir()):
            client.upload_file(str(shard), "data", f"corpus/{shard.name}")


def test_data_that_is_away_for_a_while_is_no_incident(tmp_path: Path, corpus: Path) -> None:
    """The server of the shards goes away under a running training and comes back: training waits, that is all."""
    (port,) = s3.free_ports(1)
    run = _run_on_s3(tmp_path, corpus, port, 300)
    with _server(port):
        _upload(corpus, port)
        process = run.start()
        wait_until(lambda: len(run.records(1, "step")) > 20, "training")
    try:
        wait_until(lambda: "data_unreachable" in run.paths.log(1).read_text(), "the outage to be noticed")
        with _server(port):
            run.wait(process)
    finally:
        run.kill_everything(process)
    assert len(run.attempts()) == 1
    assert not [incident for incident in run.incidents() if incident["class"] in ("data_error", "crash", "hang")]
    assert sorted(run.surviving_steps()) == list(range(1, 301))


@pytest.mark.long
def test_data_that_is_away_for_longer_costs_a_restart_and_no_step(tmp_path: Path, corpus: Path) -> None:
    """The attempt saves what it has and leaves; the next one waits in its turn, and goes on where it was."""
    (port,) = s3.free_ports(1)
    run = _run_on_s3(tmp_path, corpus, port, 200, timeout_s=1)
    with _server(port):
        _upload(corpus, port)
        process = run.start()
        wait_until(lambda: len(run.records(1, "step")) > 20, "training")
    try:
        wait_until(lambda: len(run.attempts()) > 1, "the restart")
        with _server(port):
            run.wait(process)
    finally:
        run.kill_everything(process)
    causes = [attempt["cause"] for attempt in run.attempts()]
    assert causes[-1] == "finished"
    assert set(causes[:-1]) == {"data_unreachable"}
    assert {incident["class"] for incident in run.incidents()} >= {"data_error"}
    steps = [row["step"] for number in range(1, len(causes) + 1) for row in run.records(number, "step")]
    assert steps == list(range(1, 201)), "a step was lost, or done twice"


def test_asked_to_leave_while_the_data_is_away(tmp_path: Path, corpus: Path) -> None:
    """The wait ends, the state is saved, and the run is stopped in good order."""
    (port,) = s3.free_ports(1)
    run = _run_on_s3(tmp_path, corpus, port, 300)
    with _server(port):
        _upload(corpus, port)
        process = run.start()
        wait_until(lambda: len(run.records(1, "step")) > 20, "training")
    try:
        wait_until(lambda: "data_unreachable" in run.paths.log(1).read_text(), "the outage to be noticed")
        process.send_signal(signal.SIGTERM)
        run.wait(process, expect=75)
    finally:
        run.kill_everything(process)
    assert [attempt["cause"] for attempt in run.attempts()] == ["preempted"]
    assert max(row["step"] for row in run.records(1, "commit")) == max(run.surviving_steps())

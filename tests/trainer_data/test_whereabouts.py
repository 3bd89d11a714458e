"""What `longwatch data where` prints for people."""

from trainer.data.whereabouts import lines_of


def test_a_sample_that_is_never_read_is_said_to_be_so() -> None:
    """A heading with nothing below it would leave open whether it was looked for."""
    lines = lines_of(
        {
            "shard": 8, "name": "b/shard-0.bin", "source": "b", "samples": [3, 4], "reads": [],
            "done": {"step": 26, "position": 104}, "looked_until": {"step": 26, "position": 104},
        }
    )  # fmt: skip

    assert lines[1] == "  not read, neither so far nor in what is planned"
    assert len(lines) == 3

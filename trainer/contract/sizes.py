"""How large a run's state will be, and on which disk a directory that is yet to be made will lie."""

from pathlib import Path

from trainer.contract.config import RunConfig

_STATE_BYTES = 12  # of a parameter in a checkpoint: weight and two moments in fp32


def state_bytes(config: RunConfig) -> int:
    """About how large one checkpoint will be."""
    return _STATE_BYTES * parameters_of(config)


def parameters_of(config: RunConfig) -> int:
    """About how many parameters the model has: 12 * layers * width^2 and the embedding."""
    model = config.model
    vocab = model.vocab_size or config.data.vocab_size or 256
    return 12 * model.layers * model.width**2 + vocab * model.width


def nearest_existing(path: Path) -> Path:
    """The directory itself, or the one above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path

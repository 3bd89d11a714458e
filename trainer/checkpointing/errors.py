"""What can be wrong with a checkpoint or with saving one."""


class CheckpointError(Exception):
    """A commit that must not be loaded: damaged, or not consistent in itself."""

    def __init__(self, commit: str, why: str) -> None:
        self.commit = commit
        self.why = why
        super().__init__(f"checkpoint {commit} cannot be used: {why}; an older one may do")


class NonFiniteStateError(Exception):
    """A state with NaN or an infinity in it, which is never committed."""

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        super().__init__(f"tensor {tensor} is not finite; a state like this is never committed")


class StateMismatchError(Exception):
    """Tensors that do not fit the model or the optimizer they are restored into."""


class SnapshotRefusedError(Exception):
    """A snapshot that was not taken; training goes on and asks again later."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(why)

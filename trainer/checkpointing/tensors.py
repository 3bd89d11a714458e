"""Tensors as a checkpoint sees them: names, dtypes, and their way into and out of model and optimizer.

Names are "model.<fqn>" and "optim.<fqn>.<key>". `Optimizer.load_state_dict` is not used: it casts moments to the
dtype of the parameter (float32 moments of bfloat16 weights come back as bfloat16).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trainer.checkpointing.errors import StateMismatchError

MODEL = "model."
OPTIMIZER = "optim."
_COMPILED = "_orig_mod."  # what torch.compile puts before the names of the module it wraps


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by name; tied ones once, names as without torch.compile."""
    return {name.replace(_COMPILED, ""): parameter for name, parameter in model.named_parameters()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once."""
    return {f"{MODEL}{name}": tensor for name, tensor in _state(model).items()}


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the "model." tensors into a model that has exactly these, in shape and dtype.

    Raises:
        StateMismatchError: it does not; nothing was changed then.
    """
    state = _state(model)
    found = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
    if odd := sorted(state.keys() ^ found.keys()):
        raise StateMismatchError(f"model and checkpoint differ in {_some(odd)}; the configuration's model has changed")
    for name, tensor in found.items():
        if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
            ours = f"{dtype_name(state[name].dtype)}{tuple(state[name].shape)}"
            theirs = f"{dtype_name(tensor.dtype)}{tuple(tensor.shape)}"
            raise StateMismatchError(f"{name} is {ours} in the model, {theirs} in the checkpoint")
    with torch.no_grad():
        for name, tensor in found.items():
            state[name].copy_(tensor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state in its own dtypes. Empty before the first update.

    Raises:
        StateMismatchError: a state entry is no tensor, so it would be lost.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):  # the same bytes after any history
            if not isinstance(value, Tensor):
                raise StateMismatchError(f"optimizer state {key} of {name} is no tensor but {type(value).__name__}")
            tensors[f"{OPTIMIZER}{name}.{key}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put the "optim." tensors back, in the dtypes they were saved in. None at all: a state before any update.

    Step counts go to the CPU unless the optimizer is fused or capturable, which keep them beside the parameter.

    Raises:
        StateMismatchError: a tensor belongs to no parameter, or a parameter has none; nothing was changed then.
    """
    states = _states_by_parameter(parameters, tensors)
    managed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if states and (bare := sorted(n for n, p in parameters.items() if id(p) in managed and n not in states)):
        raise StateMismatchError(f"the checkpoint has no optimizer state for {_some(bare)}")
    beside = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    optimizer.state.clear()
    for name, entries in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.to(parameter.device if key != "step" or id(parameter) in beside else "cpu", copy=True)
            for key, value in entries.items()
        }


def _states_by_parameter(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if not full_name.startswith(OPTIMIZER):
            continue
        name, _, key = full_name.removeprefix(OPTIMIZER).rpartition(".")
        if name not in parameters:
            raise StateMismatchError(f"the checkpoint has optimizer state for {name}, which the model does not have")
        if key != "step" and tensor.shape != parameters[name].shape:
            raise StateMismatchError(f"{full_name} has shape {tuple(tensor.shape)}, its parameter another")
        states.setdefault(name, {})[key] = tensor
    return states


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Live tensors by clean name. Tied ones once: `named_parameters` drops repetitions, `state_dict` does not."""
    saved = model.state_dict().keys()
    named: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    return {name.replace(_COMPILED, ""): tensor for name, tensor in named if name in saved}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""An optimizer's state by the names of its parameters: collected, checked against a run's own, and loaded."""

from collections.abc import Mapping
from typing import Any

import torch

from twinflow.train.checkpoint.state_checks import check_form, check_names, check_tensor, is_8bit, placed

_BLOCK, _MAP_VALUES = 256, 256  # of both libraries' 8-bit states
_NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes' state_dict has its 8-bit parts


def kind_of(value: Any) -> str:
    """Package and class, as 8-bit optimizers of two libraries have one name."""
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"


def collect_optimizer(optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Its `state_dict()`, and what tells whether another optimizer may load it.

    Args:
        trained: name -> parameter of the student.

    Raises:
        ValueError: it trains something else.
    """
    return {"kind": kind_of(optimizer), "parameters": _names(optimizer, trained), "state_dict": optimizer.state_dict()}


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless a saved state is one that this optimizer can continue from."""
    mine = optimizer.state_dict()
    check_names(saved, {"kind": 0, "parameters": 0, "state_dict": 0}, "optimizer")
    if saved["kind"] != kind_of(optimizer):
        raise ValueError(f"restore: optimizer must be {kind_of(optimizer)}, got {saved['kind']!r} in the checkpoint")
    if saved["parameters"] != _names(optimizer, trained):
        raise ValueError(
            "restore: optimizer must train the saved parameters in the saved order, got others in the checkpoint"
        )
    check_names(saved["state_dict"], mine, "optimizer")
    groups, states = saved["state_dict"]["param_groups"], saved["state_dict"]["state"]
    check_form(groups, mine["param_groups"], "optimizer.param_groups")
    if [group["params"] for group in groups] != [group["params"] for group in mine["param_groups"]]:
        raise ValueError("restore: optimizer.param_groups must number the parameters in order, got another numbering")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in saved["parameters"] for name in group]
    if not isinstance(states, dict) or not states.keys() <= set(range(len(parameters))):
        raise ValueError("restore: optimizer.state must have numbers of parameters, got others in the checkpoint")
    for number, state in states.items():
        _check_state(state, parameters[number], f"optimizer.state of {names[number]}")


def load_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Continues from a checked state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = saved["state_dict"]["state"]
    mine = {number: _placed_state(state, parameters[number]) for number, state in states.items()}
    groups = placed(saved["state_dict"]["param_groups"], saved["state_dict"]["param_groups"])
    optimizer.load_state_dict({"state": mine, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in trained.items()}
    groups = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    if any("" in group for group in groups):
        raise ValueError("RunState: optimizer must train trainable parameters of the student, got another one")
    return groups


def _placed_state(state: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    def like(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: like(part) for name, part in value.items()}
        of_parameter = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == parameter.shape
        return parameter if of_parameter else value

    return placed(state, like(state))


def _check_state(state: Any, parameter: torch.Tensor, path: str) -> None:
    """A parameter's state: sizes that a kernel would trust are those of the parameter."""
    if not isinstance(state, dict):
        raise ValueError(f"restore: {path} must be a dict, got {type(state).__name__} in the checkpoint")
    nested = state.get(_NESTED, {})
    if not isinstance(nested, dict):
        raise ValueError(f"restore: {path} must have its 8-bit parts in a dict, got {type(nested).__name__}")
    flat = {str(name): value for name, value in [*state.items(), *nested.items()] if name != _NESTED}
    for name, value in flat.items():
        if name == "step" and type(value) in (int, float):
            continue
        blocks = -(-parameter.numel() // _BLOCK)
        sizes = {"step": (), "qmap": (_MAP_VALUES,), "absmax": (blocks,)}
        kind = name.rstrip("0123456789")
        check_tensor(value, sizes.get(kind, tuple(parameter.shape)), None, f"{path}, {name}")
        if is_8bit(value):
            check_tensor(value.scale, (parameter.numel() // _BLOCK,), torch.float32, f"{path}, {name}")
        elif kind in sizes and value.dtype != torch.float32:
            raise ValueError(f"restore: {path}, {name} must be torch.float32, got {value.dtype} in the checkpoint")
        if not value.is_floating_point() and value.dtype != torch.uint8:
            raise ValueError(f"restore: {path}, {name} must be floating or 8-bit, got {value.dtype} in the checkpoint")
        if value.dtype == torch.uint8 and not {f"qmap{name[-1:]}", f"absmax{name[-1:]}"} <= flat.keys():
            raise ValueError(f"restore: {path}, {name} must come with its map and scales, got it alone")

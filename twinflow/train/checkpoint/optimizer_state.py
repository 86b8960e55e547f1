"""An optimizer's state by the names of its parameters: collected, checked against a run's own, and loaded."""

from collections.abc import Mapping
from typing import Any

import torch

from twinflow.errors import require
from twinflow.train.checkpoint.state_checks import (
    check_form,
    check_names,
    check_tensor,
    is_8bit,
    placed,
    require_saved,
)

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
    """Raises ArgumentError unless a saved state is one that this optimizer can continue from."""
    mine = optimizer.state_dict()
    check_names(saved, {"kind": 0, "parameters": 0, "state_dict": 0}, "optimizer")
    kind, parameters = kind_of(optimizer), _names(optimizer, trained)
    require_saved(saved["kind"] == kind, "optimizer", kind, repr(saved["kind"]))
    wanted = "the saved parameters in the saved order"
    require_saved(saved["parameters"] == parameters, "optimizer", wanted, "others", verb="train")
    check_names(saved["state_dict"], mine, "optimizer")
    groups, states = saved["state_dict"]["param_groups"], saved["state_dict"]["state"]
    check_form(groups, mine["param_groups"], "optimizer.param_groups")
    alike = [group["params"] for group in groups] == [group["params"] for group in mine["param_groups"]]
    wanted = "the parameters in order"
    require_saved(alike, "optimizer.param_groups", wanted, "another numbering", verb="number")
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in parameters for name in group]
    known = isinstance(states, dict) and states.keys() <= set(range(len(weights)))
    require_saved(known, "optimizer.state", "numbers of parameters", "others", verb="have")
    for number, state in states.items():
        _check_state(state, weights[number], f"optimizer.state of {names[number]}")


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
    foreign, wanted = any("" in group for group in groups), "trainable parameters of the student"
    require(not foreign, "RunState", "optimizer", wanted, "another one", verb="train")
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
    require_saved(isinstance(state, dict), path, "a dict", type(state).__name__)
    nested = state.get(_NESTED, {})
    require_saved(isinstance(nested, dict), path, "its 8-bit parts in a dict", type(nested).__name__, verb="have")
    flat = {str(name): value for name, value in [*state.items(), *nested.items()] if name != _NESTED}
    for name, value in flat.items():
        if name == "step" and type(value) in (int, float):
            continue
        blocks = -(-parameter.numel() // _BLOCK)
        sizes = {"step": (), "qmap": (_MAP_VALUES,), "absmax": (blocks,)}
        kind, place = name.rstrip("0123456789"), f"{path}, {name}"
        plain = kind in sizes and not is_8bit(value)
        check_tensor(value, sizes.get(kind, tuple(parameter.shape)), torch.float32 if plain else None, place)
        if is_8bit(value):
            check_tensor(value.scale, (parameter.numel() // _BLOCK,), torch.float32, place)
        bytewise = value.dtype == torch.uint8
        require_saved(bytewise or value.is_floating_point(), place, "floating or 8-bit", value.dtype)
        whole = not bytewise or {f"qmap{name[-1:]}", f"absmax{name[-1:]}"} <= flat.keys()
        require_saved(whole, place, "with its map and scales", "it alone", verb="come")

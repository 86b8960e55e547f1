"""`selective_recompute()`: blocks that keep a chosen part of their activations, and recompute the rest in backward."""

import functools
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from twinflow.errors import ArgumentError, require
from twinflow.memory.blocks import (
    Attached,
    adapter_rank,
    checkpoint_switches,
    checkpoint_wrapped,
    named_blocks,
    repeated_blocks,
    replace_forward,
)
from twinflow.memory.saved_products import KeptProducts, compile_policy

_Codes = dict[tuple[object, str], CodeType]

SAVED = ("input", "attention", "products", "all")  # from least memory to most


class SelectiveRecompute(Attached):
    """What `selective_recompute` attached to a model.

    Attributes:
        blocks: names of the blocks, in order of execution.
        saved: the level of each.
    """

    def __init__(self, forwards: dict[str, "_Forward"]) -> None:
        super().__init__([forward.remove for forward in forwards.values()])
        self.blocks = tuple(forwards)
        self.saved = tuple(forward.level for forward in forwards.values())


def selective_recompute(
    model: nn.Module, saved: str | Sequence[str] = "products", *, blocks: Sequence[str | nn.Module] | None = None
) -> SelectiveRecompute:
    """Keeps a chosen part of each block's activations for the backward, and recomputes the rest there.

    Gradients are those of plain autograd, bit for bit. Beside its inputs a block keeps, by level:

    - `input`: nothing; its whole forward runs again;
    - `attention`: the outputs of attention and of batched products;
    - `products`: those and the product with every base weight; elementwise work and products of adapters run again;
    - `all`: everything, as without this.

    Attach it after adapters are added, whose products are told from the base's by their rank. Blocks may be compiled
    before or after; torch.compile then keeps attention at `input` too, as with torch's own checkpointing.

    Args:
        model: the network, or a module around it: a `FlowModel`, or peft's wrapper.
        saved: one of `SAVED` for all blocks, or one for each.
        blocks: modules of the model or their names, in order of execution; None: `repeated_blocks(model)`.

    Returns:
        The handle that removes it.

    Raises:
        ValueError: an unknown level, another number of levels than of blocks, no blocks, blocks that have it already,
            or gradient checkpointing of the model's own, which would run blocks a third time.
    """
    chosen = repeated_blocks(model) if blocks is None else named_blocks(model, blocks, "selective_recompute")
    levels = _levels(saved, len(chosen))
    switches = checkpoint_switches(model)
    _refuse_switched(switches)
    for name, block in chosen.items():
        wrapper, before = checkpoint_wrapped(model, name), _attached(block)
        if wrapper is not None:
            _refuse_other(f"a CheckpointWrapper at {wrapper}", "attach to the model without it")
        fresh = before is None or not before.active
        require(fresh, "selective_recompute", "blocks", "without it yet", name, "remove() it first")
    codes: _Codes = {}
    given = zip(chosen.items(), levels, strict=True)
    return SelectiveRecompute({name: _Forward(name, block, level, switches, codes) for (name, block), level in given})


def _levels(saved: str | Sequence[str], count: int) -> list[str]:
    levels = [saved] * count if isinstance(saved, str) else list(saved)
    for level in levels:
        require(level in SAVED, "selective_recompute", "saved", f"of {', '.join(SAVED)}", repr(level))
    wanted = f"one level or {count}, one a block"
    require(len(levels) == count, "selective_recompute", "saved", wanted, len(levels))
    return levels


def _refuse_other(got: str, hint: str) -> NoReturn:
    raise ArgumentError("selective_recompute", "model", "its own gradient checkpointing off", got, hint, verb="have")


def _refuse_switched(switches: list[nn.Module]) -> None:
    for module in switches:
        if module.gradient_checkpointing:
            _refuse_other("it on", "call disable_gradient_checkpointing() first")


class _Forward:
    """A block's forward that recomputes, in place of its own.

    Args:
        switches: modules whose own gradient checkpointing must stay off.
        codes: what `_recomputing` shares between the blocks of a model.
    """

    def __init__(self, name: str, block: nn.Module, level: str, switches: list[nn.Module], codes: _Codes) -> None:
        self.name, self.level, self.switches = name, level, switches
        self.rank = adapter_rank(block)
        self.active = True
        self._undo = replace_forward(block, _recomputing(self, _unbound(block), codes))

    def remove(self) -> None:
        """Leaves the block as it was; where something has been put around this since, passes calls on."""
        self.active = False
        self._undo()

    def eager(self, run: MethodType, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One recomputed call; every tensor is handed on by position, as only those go through saved-tensor hooks."""
        leaves, spec = pytree.tree_flatten((args, kwargs))

        def call(*leaves: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(leaves), spec)
            return run(*args, **kwargs)

        draws = _draws(run.__self__, leaves)
        if self.level == "input":
            return checkpoint(call, *leaves, use_reentrant=False, preserve_rng_state=draws)
        with KeptProducts(self.name, self.level, self.rank) as kept:
            return checkpoint(call, *leaves, use_reentrant=False, preserve_rng_state=draws, context_fn=kept.contexts)

    def compiled(self, run: MethodType, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The same as torch.compile traces it."""
        if self.level == "input":
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        policy = functools.partial(compile_policy, self.level, self.rank)
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _recomputing(attached: _Forward, own: Callable[..., Any], codes: _Codes) -> Callable[..., Any]:
    """The forward of a block that recomputes.

    torch.compile counts compilations by code object, up to 8: each class and level has one, as classes have without.
    """

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not attached.active or not torch.is_grad_enabled():
            return own(module, *args, **kwargs)
        _refuse_switched(attached.switches)
        run = own.__get__(module)  # torch.compile traces no MethodType()
        if attached.level == "all":
            return run(*args, **kwargs)
        if torch.compiler.is_compiling():
            return attached.compiled(run, args, kwargs)
        return attached.eager(run, args, kwargs)

    code = codes.setdefault((getattr(own, "__code__", own), attached.level), forward.__code__.replace())
    function: Any = functools.update_wrapper(
        FunctionType(code, globals(), own.__name__, None, forward.__closure__), own
    )
    function.attached = attached
    return function


def _attached(block: nn.Module) -> _Forward | None:
    """What is attached to a block, or to the one that it is a copy of."""
    return getattr(getattr(vars(block).get("forward"), "__func__", None), "attached", None)


def _unbound(block: nn.Module) -> Callable[..., Any]:
    """The block's forward as a function of module and arguments."""
    forward: Any = block.forward
    if getattr(forward, "__self__", None) is block:
        return forward.__func__

    @functools.wraps(forward)
    def call(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def _draws(block: Any, leaves: list[Any]) -> bool:
    """Whether random states must be the same in both forwards; there are none on meta.

    A CUDA graph that is being captured has no states to read: there, only a block with dropout asks, and is refused.
    """
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
        return False
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return True
    return any(m.p > 0 and m.training for m in block.modules() if isinstance(m, nn.modules.dropout._DropoutNd))

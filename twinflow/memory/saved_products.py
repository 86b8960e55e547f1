"""What a block keeps of its forward for the backward: attention outputs and base-weight matrix products.

`KeptProducts` gives `torch.utils.checkpoint` two dispatch modes. The first holds the outputs of the chosen operations;
the second, in the recomputed forward, hands them out instead of running the operation, by order of occurrence. torch's
own `create_selective_checkpoint_contexts` holds outputs where no saved-tensor hook sees them, so that none could be
offloaded, and refuses products that are changed in place and a second backward: it serves compiled blocks alone.
"""

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

# Where an operation's matrix of weights stands among its arguments; None: the product is kept however thin it is.
_WEIGHT = {
    "mm": 1, "addmm": 2, "_addmm_activation": 2, "linear": 1, "mkldnn_linear": 1, "convolution": 1, "_convolution": 1,
    "mv": None, "addmv": None, "_int_mm": None, "_scaled_mm": None, "_scaled_mm_v2": None, "_grouped_mm": None,
    "_scaled_grouped_mm": None, "_weight_int8pack_mm": None, "_weight_int4pack_mm": None,
    "_weight_int4pack_mm_for_cpu": None, "_weight_int4pack_mm_with_scales_and_zeros": None,
    "int8_linear_matmul": None, "int8_scaled_mm": None, "gemv_4bit": None,
}  # fmt: skip
_HELD = object()
_BATCHED = ("bmm", "baddbmm")  # linear attention, and attention that is not fused
_ATTENTION = ("attention", "attn")


@functools.cache
def _kind(op: Any) -> tuple[str, str] | None:
    """(`attention` or `product`, the operation's name without namespace and overload); None: recomputed."""
    name = op.overloadpacket.__name__ if isinstance(op, torch._ops.OpOverload) else str(op)
    if "backward" in name:
        return None
    if name in _BATCHED or any(part in name for part in _ATTENTION):
        return "attention", name
    return ("product", name) if name in _WEIGHT else None


def keeps(level: str, rank: int, op: Any, args: tuple) -> bool:
    """Whether a saved set holds the output of an operation.

    Args:
        level: `attention` or `products`.
        rank: largest rank of the block's adapters; products with a matrix as thin as that are theirs, and cheap.
    """
    kind = _kind(op)
    if kind is None or (kind[0] == "product" and level != "products"):
        return False
    place = _WEIGHT.get(kind[1])
    if kind[0] == "attention" or place is None or not rank:
        return True
    weight = args[place]
    if "convolution" not in kind[1]:
        return min(weight.shape) > rank
    return min(weight.shape[0], weight.shape[1] * args[8]) > rank  # by groups: a depthwise one has shape[1] = 1


def compile_policy(level: str, rank: int, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The same choice, as torch's own selective checkpointing asks for it."""
    return CheckpointPolicy.MUST_SAVE if keeps(level, rank, op, args) else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass
class _Product:
    """One kept operation: its outputs, or `_HELD` for each tensor of them once autograd holds it, from `first` on."""

    op: Any
    shapes: tuple[tuple[int, ...], ...]
    outputs: list[Any]
    spec: pytree.TreeSpec
    first: int = 0
    changed: bool = False  # the forward changes it in place: its value before that is a copy


class _Keep(torch.autograd.Function):
    """Holds tensors as an operation's saved tensors, so that saved-tensor hooks around the block see them."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        raise AssertionError("kept products are never differentiated")


class KeptProducts:
    """The kept operations of one forward of one block; level and rank as of `keeps`."""

    def __init__(self, block: str, level: str, rank: int) -> None:
        self.block, self.keeps = block, functools.partial(keeps, level, rank)
        self.products: list[_Product] = []
        self._node: torch.Tensor | None = None

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The modes of the forward and of its recomputation."""
        return _Keeping(self), _Returning(self)

    def __enter__(self) -> "KeptProducts":
        return self

    def __exit__(self, failed: object, *error: object) -> None:
        """Hands what is kept to autograd, now that the hooks around the block are the active ones again.

        The outputs carry the block's graph, which holds this object: only aliases without it outlive the forward.
        """
        tensors: list[torch.Tensor] = []
        for product in self.products:
            product.first = len(tensors)
            tensors += [value.detach() for value in product.outputs if isinstance(value, torch.Tensor)]
            product.outputs = [_HELD if isinstance(value, torch.Tensor) else value for value in product.outputs]
        if tensors and not failed:
            self._node = _Keep.apply(torch.empty(0, device="cpu", requires_grad=True), *tensors)

    def saved(self) -> tuple[torch.Tensor, ...]:
        """The kept tensors, as the hooks around the block give them back."""
        node: Any = None if self._node is None else self._node.grad_fn
        return () if node is None else node.saved_tensors


class _Keeping(TorchDispatchMode):
    """Runs everything, and holds the outputs of the chosen operations."""

    def __init__(self, kept: KeptProducts) -> None:
        super().__init__()
        self._kept = kept
        self._by_storage: dict[int, tuple[_Product, int]] = {}

    def __exit__(self, *error: Any) -> None:
        self._by_storage.clear()
        super().__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self._by_storage and op._schema.is_mutable:
            self._copy_before(op, args, kwargs or {})
        result = op(*args, **(kwargs or {}))
        if self._kept.keeps(op, args):
            product = _Product(op, _shapes(args), *pytree.tree_flatten(result))
            self._kept.products.append(product)
            for i, value in enumerate(product.outputs):
                if isinstance(value, torch.Tensor):
                    self._by_storage[value.untyped_storage()._cdata] = product, i
        return result

    def _copy_before(self, op: Any, args: tuple, kwargs: dict) -> None:
        """Copies a kept output that is about to be changed in place, as by `relu_`."""
        for i, argument in enumerate(op._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, torch.Tensor):
                continue
            product, place = self._by_storage.pop(value.untyped_storage()._cdata, (None, 0))
            if product is not None:
                product.outputs[place], product.changed = product.outputs[place].clone(), True


class _Returning(TorchDispatchMode):
    """Returns what was kept, by order of occurrence, and runs the rest."""

    def __init__(self, kept: KeptProducts) -> None:
        super().__init__()
        self._kept = kept
        self._saved: tuple[torch.Tensor, ...] = ()
        self._next = 0

    def __enter__(self) -> "_Returning":
        self._saved, self._next = self._kept.saved(), 0
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._saved = ()
        super().__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not self._kept.keeps(op, args):
            return op(*args, **(kwargs or {}))
        product = self._expected(op, _shapes(args))
        self._next += 1
        # An alias each time: autograd writes the graph of this recomputation into what is returned.
        take = torch.Tensor.clone if product.changed else torch.Tensor.detach
        saved = iter(self._saved[product.first :])
        return pytree.tree_unflatten([take(next(saved)) if v is _HELD else v for v in product.outputs], product.spec)

    def _expected(self, op: Any, shapes: tuple) -> _Product:
        products = self._kept.products
        product = products[self._next] if self._next < len(products) else None
        if product is None or (product.op, product.shapes) != (op, shapes):
            wanted = "nothing more" if product is None else f"{product.op} of {_listed(product.shapes)}"
            raise RuntimeError(
                f"selective_recompute: {self._kept.block} must run in backward what it ran in forward, {wanted}, got "
                f"{op} of {_listed(shapes)}; does it depend on something that has changed since?"
            )
        return product


def _shapes(args: tuple) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(value.shape) for value in args if isinstance(value, torch.Tensor))


def _listed(shapes: tuple) -> str:
    return " and ".join(str(shape) for shape in shapes)

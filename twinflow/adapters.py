"""`FollowingLinear`: float32 adapter weights that compute in the dtype of what they are given, as under autocast.

peft casts an adapter layer's input to the weights' dtype instead. On a bf16 base that is a float32 copy of every input,
kept for backward, and float32 matrix products: by its data sheet an A100 does 19.5 TFLOP/s of them, and 312 in bf16.
"""

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

PLACES = ("lora_A", "lora_B")


class FollowingLinear(nn.Linear):
    """A linear layer whose weights are cast to its input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def compute_in_input_dtype(layer: BaseTunerLayer) -> None:
    """Makes every plain LoRA of a linear layer follow its input's dtype; other kinds of adapters keep peft's casts."""
    modules = [module for place in PLACES for module in getattr(layer, place, nn.ModuleDict()).values()]
    if getattr(layer, "lora_variant", None) or not all(type(m) in (nn.Linear, FollowingLinear) for m in modules):
        return
    for module in modules:
        module.__class__ = FollowingLinear
    layer.cast_input_dtype_enabled = False  # type: ignore[attr-defined]

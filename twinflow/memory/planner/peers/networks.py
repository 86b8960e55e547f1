"""`PeerRun`: one step of several networks on the meta device; `frozen_copy()`: a network that is not trained."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.planner.architectures import Architecture
from twinflow.memory.planner.simulation.autocast import MetaAutocast
from twinflow.memory.planner.simulation.fused_attention import replaced, workspace
from twinflow.memory.planner.simulation.meta_student import META, meta_network, quantise, random_condition
from twinflow.memory.planner.simulation.run import Simulation, mark_block
from twinflow.memory.planner.simulation.storage_tracker import Cost, StorageTracker, tensors
from twinflow.memory.planner.workload import Workload
from twinflow.memory.recompute import selective_recompute
from twinflow.models import FlowModel

_PLAIN = "without gradient"
Condition = dict[str, torch.Tensor]


def frozen_copy(architecture: Architecture, base: str) -> FlowModel:
    """A network that is not trained."""
    network = meta_network(architecture, base)
    network.requires_grad_(False)
    quantise(network, base)
    return network


def width_of(network: FlowModel) -> int:
    """Size of the features between a network's blocks."""
    config = network.config
    return config.dim if "dim" in config else config.num_attention_heads * config.attention_head_dim


class LiveDerivative(StorageTracker):
    """`StorageTracker` for forward-mode derivatives on the meta device.

    A derivative that is zero is a tensor without memory, whose results torch sizes by meta tensors of its own. On a
    card these take nothing; here they are told from the others by the functions that make them.

    Attributes:
        deriving: whether a derivative runs.
    """

    deriving = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.deriving and _is_sizing():
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_sizing() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(("torch._refs", "torch._prims")):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class PeerRun(Simulation):
    """Runs a step of several networks, every block checkpointed.

    Args:
        networks: name -> network on the meta device.
        heads: a discriminator's, if any.

    Attributes:
        regions: the timeline of the last run; names begin with a network's, or are `between`.
        latents, noise: (B, C, H, W), bf16. cond, uncond: conditions of B rows.
        times: (B, 1, 1, 1), float32.
    """

    _live: LiveDerivative

    def __init__(
        self,
        workload: Workload,
        networks: Mapping[str, FlowModel],
        heads: nn.Module | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.networks, self.heads = networks, heads
        self._modules: dict[str, nn.Module] = {**networks, **({} if heads is None else {"heads": heads})}
        super().__init__(workload, self._modules.values(), cost)
        any_network, rows = next(iter(networks.values())), workload.batch
        self.latents = torch.empty(rows, *workload.latent, device=META, dtype=torch.bfloat16)
        self.noise, self.times = torch.empty_like(self.latents), torch.empty(rows, 1, 1, 1, device=META)
        self.cond, self.uncond = (random_condition(any_network, rows, workload.tokens) for _ in range(2))

    def run(self, step: Callable[["PeerRun"], None]) -> None:
        """Follows one step."""
        torch.func.jvp(torch.neg, (self.times,), (self.times,))  # torch loads its rules now, while nothing is replaced
        live = LiveDerivative(workspace, self._cost)
        with self._following(live, ExitStack(), self._attach):
            live.watch((self.latents, self.noise, self.times, self.cond, self.uncond))
            step(self)

    def _attach(self, stack: ExitStack) -> None:
        for name, network in self.networks.items():
            stack.callback(selective_recompute(network.network, "input").remove)
            for block_name, block in repeated_blocks(network.network).items():
                mark_block(stack, partial(self._mark_of, name), block_name, block)

    def call(self, name: str, x_t: torch.Tensor, times: torch.Tensor, cond: Condition) -> torch.Tensor:
        """A network's velocity in float32, with a graph where gradients are on.

        Args:
            name: of the network.
            x_t: (B, C, H, W). times: (B, 1, 1, 1). cond: of B rows.
        """
        t = times.flatten()
        with self._calling(f"{name} {'forward' if torch.is_grad_enabled() else _PLAIN}"):
            velocity = self.networks[name](x_t, t, t, cond)
        self._holding = self._holding or velocity.requires_grad
        return velocity.float()

    def features(self, name: str, x_t: torch.Tensor, times: torch.Tensor, cond: Condition) -> torch.Tensor:
        """What a network's last block makes of images, (B, N, C); arguments as of `call`."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, outputs: Any) -> None:
            found.append(max(tensors(outputs), key=torch.numel))

        *_, last = repeated_blocks(self.networks[name].network).values()
        handle = last.register_forward_hook(keep)
        self.call(name, x_t, times, cond)
        handle.remove()
        return found[0]

    def judge(self, features: torch.Tensor) -> torch.Tensor:
        """The heads' logits, with a graph."""
        assert self.heads is not None
        with self._calling("heads forward", network=False):
            return self.heads(features)

    def tangent(
        self, name: str, x_t: torch.Tensor, times: torch.Tensor, cond: Condition, d: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The derivative of a network's velocity along (dx_t, dt), in forward mode and without graph.

        No fused attention has one, so that attention makes its scores. The pass runs under autocast even on bf16
        weights: there LayerNorm's derivative is float32, which a bf16 product would refuse.

        Args:
            name, x_t, times, cond: as of `call`.
            d: derivatives of x_t and times.
        """

        def velocity(x_t: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            return self.networks[name](x_t, times.flatten(), times.flatten(), cond)

        self._live.deriving = True
        self._mark_of(name, _PLAIN)
        scores = replaced(F, "scaled_dot_product_attention", lambda fused: _attention_with_scores)
        with torch.no_grad(), scores, MetaAutocast():
            derivative = torch.func.jvp(velocity, (x_t, times), d)[1]
        self._live.deriving = False
        self._mark("between")
        return derivative.float()

    def forget(self, name: str) -> None:
        """Lets go of gradients, of `heads` or of a network block by block, so that its repeated ones are known."""
        if name in self.networks:
            for block_name, block in repeated_blocks(self.networks[name].network).items():
                self._mark_of(name, "update", block_name)
                block.zero_grad()
        self._mark_of(name, "update")
        self._modules[name].zero_grad()

    def _mark_of(self, network: str, kind: str, block: str | None = None) -> None:
        self._mark(f"{network} {'derivative' if self._live.deriving else kind}", block)


def _attention_with_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> torch.Tensor:
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, **more)[0]

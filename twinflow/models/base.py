"""`FlowModel`: the student F(x_t, t, r, cond) around an unmodified diffusers transformer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twinflow.conditioning import MODES, SIGN_TABLE, TimeConditioning, TimeEmbedder
from twinflow.errors import ArgumentError, ArgumentTypeError, require
from twinflow.models.autoencoders import Autoencoder
from twinflow.models.modulation import Deferral, Modulation
from twinflow.models.prompts import prompt_groups, prompt_lengths, row_index, trim
from twinflow.objective.plan import NetworkCall, Plan

CFG_TIMES = ("published", "t")


@dataclass(frozen=True)
class Published:
    """A published model, for the planner.

    Args:
        name: on the command line.
        config: settings of the transformer that differ from its class's defaults.
        latent_channels: C of the latents.
        text_tokens: usual length of the prompts.
        lora_rank: as it is usually trained; None: all weights.
        text_encoder_gb: its text encoders in bf16, GB (1e9 bytes).
        repositories: of the hub that have this transformer.
    """

    name: str
    config: dict[str, Any]
    latent_channels: int
    text_tokens: int
    lora_rank: int | None
    text_encoder_gb: float
    repositories: tuple[str, ...] = ()


class FlowModel(nn.Module):
    """A diffusers transformer as a student: unpacked latents in, noise-ward velocity out.

    A family says how its transformer is called (`velocity`), where its time goes in (`time_embedder`), which entries a
    condition must have (`condition_settings`) and how a pipeline encodes prompts (`encode_prompt`).

    Args:
        transformer: the diffusers module, perhaps inside peft's wrapper; used as it is.
        conditioning: how it is told r and the sign of the times, one of `twinflow.conditioning.MODES`; None: plain flow
            matching, bit-equal to the stock transformer.
        cfg_time: time that guidance queries tell a `midpoint` model: `published` t/2, or `t`.

    Raises:
        ValueError: an unknown mode, or one that the transformer cannot have.
    """

    # The transformer.
    family: ClassVar[str]
    transformer_class: ClassVar[str]  # diffusers' name of it
    component: ClassVar[str] = "transformer"  # its name in pipelines
    second_embedder: ClassVar[str]  # path that the second time embedder of the `dual` modes gets; saved files have it
    lora_targets: ClassVar[tuple[str, ...]]  # the published code's choice
    condition_settings: ClassVar[dict[str, str]]  # entry of a condition -> setting that is its width
    prompt_multiple: ClassVar[int] = 1  # prompts are padded to it inside the transformer
    modulation: ClassVar[Modulation | None] = None  # None: its blocks have no layers that read the time embedding
    # (setting that counts blocks, list that holds them) in order of execution; none: the planner does not know it.
    block_lists: ClassVar[tuple[tuple[str, str], ...]] = ()
    special_blocks: ClassVar[str] = ""  # setting that lists the numbers of blocks unlike the others
    published: ClassVar[tuple["Published", ...]] = ()  # models that the planner knows by name
    tiny: ClassVar[dict[str, Any]] = {}  # settings of a tiny transformer, which tests and benchmarks train on a CPU

    # Its pipeline.
    pipeline_class: ClassVar[str | None] = None  # diffusers' text-to-image pipeline; None: there is none to export for
    samples_in_pipelines: ClassVar[bool] = True  # whether the stock pipeline draws with few-step weights
    comfyui: ClassVar[bool] = False  # whether exports for ComfyUI are known to be read
    guidance_argument: ClassVar[str] = "guidance_scale"  # the pipeline's argument of classifier-free guidance
    guidance_off: ClassVar[float] = 0.0  # its value without guidance
    stock_sigmas: ClassVar[str] = "array"  # how the pipelines send their default grid, see `TwinFlowScheduler`
    guidance: ClassVar[float | None] = None  # scale that the transformer takes as an input (distilled); None: none
    # Whether the pipeline walks in tokens of 2x2 latents, in which fresh noise lies otherwise.
    packs_latents: ClassVar[bool] = False
    shift_patch: ClassVar[int] = 2  # latents along an edge of a token, where the shift of its times goes by tokens
    shares_generator: ClassVar[bool] = False  # whether its fresh noise comes from the generator of the first noise
    autoencoder: ClassVar[type[Autoencoder]] = Autoencoder  # its kind, which says how latents are made
    # Whether its pipeline encodes negative prompts otherwise than prompts, as `encode_negative_prompt` does.
    negative_prompts_differ: ClassVar[bool] = False
    latent_factor: ClassVar[int] = 8  # pixels per latent along an edge, published

    def __init__(self, transformer: nn.Module, *, conditioning: str | None = None, cfg_time: str = "published") -> None:
        super().__init__()
        require(cfg_time in CFG_TIMES, "load", "cfg_time", f"one of {', '.join(CFG_TIMES)}", repr(cfg_time))
        self.transformer = transformer
        self.cfg_time = cfg_time
        self.conditioning: TimeConditioning | None = None
        self.deferral: Deferral | None = None  # set by `twinflow.memory.defer_modulation`
        if conditioning is not None:
            self.condition(conditioning)

    @property
    def network(self) -> nn.Module:
        """The diffusers module itself, without peft's wrapper."""
        return without_peft(self.transformer)

    @property
    def config(self) -> Any:
        """The diffusers module's configuration."""
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.network.dtype  # type: ignore[return-value]

    def condition(self, mode: str) -> None:
        """Tells the transformer both times from now on.

        Args:
            mode: one of `twinflow.conditioning.MODES`.

        Raises:
            ValueError: an unknown mode, a model that is conditioned already, or one that takes no conditioning.
        """
        require(mode in MODES, "load", "conditioning", f"None or one of {', '.join(MODES)}", repr(mode))
        before = self.conditioning
        if before is not None:
            raise ArgumentError("load", "conditioning", "set once", f"{mode!r} after {before.mode!r}")
        self.conditioning = TimeConditioning(self.network, self.time_embedder(), mode)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
        """The velocity, noise-ward.

        Args:
            x_t: latents (B, C, H, W), cast to the transformer's dtype.
            t, r: signed times (B,), float32 or float64.
            cond: `prompt_embeds` (B, L, D), and what else the family needs, each with B rows.

        Returns:
            (B, C, H, W), in the transformer's dtype or wider.

        Raises:
            TypeError, ValueError: latents or condition are of another model.
        """
        self._check(x_t, cond)
        x_t = x_t.to(self.dtype)
        lengths = prompt_lengths(cond)
        groups = prompt_groups(lengths, self.prompt_multiple)
        if len(groups) == 1:
            return self._call(x_t, t, r, trim(cond, *groups[0]), lengths)
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            wanted = "of one length where the model is sharded, as ranks call it equally often"
            raise ArgumentError(type(self).__name__, "prompts of a batch", wanted, f"lengths {lengths}")
        velocity = torch.zeros_like(x_t)
        for rows, tokens in groups:
            index = row_index(rows, x_t.device)
            part = self._call(x_t[index], t[index], r[index], trim(cond, rows, tokens), [lengths[k] for k in rows])
            velocity = velocity.index_copy(0, index, part.to(velocity.dtype))
        return velocity

    def _call(
        self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: dict[str, Any], lengths: list[int]
    ) -> torch.Tensor:
        bound: AbstractContextManager = nullcontext()
        if self.conditioning is not None:
            bound = self.conditioning.times(self.embedded_times(t), self.embedded_times(r))
        with bound:
            if self.deferral is None:
                return self.velocity(x_t, t, cond, lengths)
            return self.deferral.call(lambda: self.velocity(x_t, t, cond, lengths), x_t)

    def guidance_times(self, t: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The times that a guidance query at (t, r = t) is asked with."""
        if self.cfg_time == "t" and self.conditioning is not None and "midpoint" in self.conditioning.mode:
            return t, torch.zeros_like(r)
        return t, r

    def begin_step(self, plan: Plan) -> None:
        """Refuses a step whose times this model would not hear of; begins one.

        Raises:
            ValueError: no conditioning where the plan asks for r != t or t < 0, or conditioning that is not trained.
        """
        if self.conditioning is None:
            if any(t != r or t < 0 for call in plan.calls for t, r in zip(call.t, call.r, strict=True)):
                got = f"a {self.family} model without conditioning"
                hint = f"load it with conditioning= one of {', '.join(MODES)}"
                raise ArgumentError("TwinFlowLoss", "student", "told target time and sign", got, hint)
        elif any(p.requires_grad for p in self.parameters()):
            trained = all(p.requires_grad for p in self.conditioning.parameters())
            which = f"the conditioning ({', '.join(self.conditioning.names)})"
            got = "it frozen (peft freezes it when an adapter is added)"
            hint = "call student.conditioning.requires_grad_()"
            require(trained, "TwinFlowLoss", which, "grad", got, hint, "require")
        if self.deferral is not None:
            self.deferral.begin_step(plan)

    def rehearsal(self, by_micro_batch: bool) -> AbstractContextManager[Callable[[NetworkCall], None]] | None:
        """Lets a step's calls be rehearsed where the model computes something of all of them in advance.

        Inside, each call of the plan is announced, then made with any latents, in the plan's order; it returns zeros.

        Args:
            by_micro_batch: each micro-batch's loss is differentiated before the next micro-batch's.

        Returns:
            What gives the function to announce a call with; None: nothing is to be rehearsed.
        """
        return None if self.deferral is None else self.deferral.rehearsal(by_micro_batch)

    def end_step(self) -> None:
        """Forgets what was computed in advance."""
        if self.deferral is not None:
            self.deferral.end_step()

    def modulation_layers(self) -> dict[str, nn.Module]:
        """Name within `network` -> layer that reads the time embedding, in order of execution; none: empty."""
        return {} if self.modulation is None else self.modulation.of(self.network)

    @classmethod
    def pipeline(cls) -> Any:
        """diffusers' class of its text-to-image pipeline."""
        import diffusers

        return getattr(diffusers, cls.pipeline_class or "DiffusionPipeline")

    @classmethod
    def conditioning_roots(cls) -> tuple[str, ...]:
        """Top-level submodules that conditioning may add to the transformer."""
        second = getattr(cls, "second_embedder", "")
        return (second.partition(".")[0], SIGN_TABLE) if second else (SIGN_TABLE,)

    # What a family says of itself.

    def time_embedder(self) -> TimeEmbedder:
        """Where the transformer's time goes in."""
        raise NotImplementedError

    def embedded_times(self, t: torch.Tensor) -> torch.Tensor:
        """The signed times whose features the transformer gets: t itself, unless the family has another clock."""
        return t

    def condition_widths(self) -> dict[str, int]:
        """Entries that a condition must have, and the size of their last axis."""
        return {name: getattr(self.config, setting) for name, setting in self.condition_settings.items()}

    def latent_channels(self) -> int:
        """C of the latents."""
        return self.config.in_channels // (4 if self.packs_latents else 1)

    def latent_multiple(self) -> int:
        """What H and W must be multiples of."""
        return 2 if self.packs_latents else self.config.patch_size

    def longest_edge(self) -> int | None:
        """Most latents along an edge for which the transformer has positions; None: any number."""
        return None

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        """One call of the transformer, told t as stock pipelines tell it.

        Args:
            x_t: latents, in the transformer's dtype.
            t: signed times.
            cond: the condition, prompts trimmed to the longest.
            lengths: tokens of each prompt; they differ only within `prompt_multiple`.
        """
        raise NotImplementedError

    def encode_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        """The condition of some prompts by a stock pipeline's encoders.

        Args:
            pipe: the diffusers pipeline.
            prompts: B texts; an empty one is the unconditional prompt, as of `encode_negative_prompt`.
            options: passed on to its `encode_prompt`.
        """
        raise NotImplementedError

    def encode_negative_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        """The condition that the stock pipeline guides away from, with negative prompts of words; "": it is given none.

        Args:
            pipe, prompts, options: as for `encode_prompt`, whose condition it is unless the family has another.
        """
        return self.encode_prompt(pipe, prompts, **options)

    @staticmethod
    def at_size(cond: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The condition of images of a height and a width, px; the same where the transformer is not told them."""
        return cond

    @staticmethod
    def comfyui_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A whole model's weights under the names that ComfyUI reads, where `comfyui` says that it reads them.

        Args:
            tensors: name in diffusers -> weight, without the sign table: ComfyUI asks for no negative time.

        Raises:
            ValueError: a weight has no place there.
        """
        return tensors

    def _check(self, x_t: torch.Tensor, cond: dict[str, Any]) -> None:
        where, channels, multiple = type(self).__name__, self.latent_channels(), self.latent_multiple()
        if x_t.dim() != 4 or x_t.shape[1] != channels:
            raise ArgumentError(where, "x_t", f"latents (B, {channels}, H, W)", f"shape {tuple(x_t.shape)}")
        if x_t.shape[2] % multiple or x_t.shape[3] % multiple:
            raise ArgumentError(where, "x_t", f"of height and width divisible by {multiple}", tuple(x_t.shape[2:]))
        widths = self.condition_widths()
        if not isinstance(cond, dict):
            raise ArgumentTypeError(where, "cond", f"a dict with {', '.join(widths)}", type(cond).__name__)
        for name, width in widths.items():
            if name not in cond:
                raise ArgumentError(where, "cond", repr(name), ", ".join(cond) or "nothing", verb="have")
            dims, got = 3 if name == "prompt_embeds" else 2, tuple(cond[name].shape)
            if len(got) != dims or got[-1] != width:
                wanted = f"(B, L, {width})" if dims == 3 else f"(B, {width})"
                raise ArgumentError(where, f"cond[{name!r}]", wanted, got, "is it another family's embedding?")
            if got[0] != len(x_t):
                raise ArgumentError(where, f"cond[{name!r}]", f"of {len(x_t)} rows, as x_t", got[0])


def without_peft(module: Any) -> Any:
    """The module inside peft's wrapper, or the module itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def rows_of(value: float, batch: int, like: torch.Tensor) -> torch.Tensor:
    """A number as (batch,) float32 on a tensor's device."""
    return torch.full((batch,), value, dtype=torch.float32, device=like.device)

"""Students, latents and conditions of the real transformer classes, and the stock calls they are held to."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import FluxPipeline, QwenImagePipeline
from helpers.tiny_pipelines import latent_shape, tiny_transformer
from torch import nn

from twinflow.models import FlowModel, load

FAMILIES = ("qwen_image", "sd3", "sana", "flux", "flux_guidance", "z_image")
MASKED = ("qwen_image", "sana", "z_image")  # the families whose stock call hides the padding of prompts
TOKENS = 7


def make_student(family: str, conditioning: str | None = None, dtype=torch.float32, **options) -> FlowModel:
    """A student around the family's tiny transformer."""
    return load(tiny_transformer(family).to(dtype), conditioning=conditioning, **options)


def make_condition(student: FlowModel, rows: int, tokens: int = TOKENS, dtype=torch.float32) -> dict:
    """Random embeddings of every kind that the family needs, all tokens valid."""
    shapes = {
        name: (rows, tokens, width) if name == "prompt_embeds" else (rows, width)
        for name, width in student.condition_widths().items()
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def make_batch(family: str, student: FlowModel, rows: int, dtype=torch.float32) -> tuple:
    """Latents, cond and uncond."""
    x = torch.randn(latent_shape(family, rows)).to(dtype)
    return x, make_condition(student, rows, dtype=dtype), make_condition(student, rows, dtype=dtype)


def stock_velocity(family: str, network: nn.Module, x_t, t, cond, mask=None) -> torch.Tensor:
    """The noise-ward velocity by the transformer alone, called with the stock pipeline's own packing and positions."""
    prompt, (rows, channels, height, width) = cond["prompt_embeds"], x_t.shape
    if family == "sd3":
        pooled = cond["pooled_prompt_embeds"]
        return network(x_t, timestep=t * 1000, encoder_hidden_states=prompt, pooled_projections=pooled)[0]
    if family == "sana":
        time = t * 1000 * network.config.timestep_scale
        return network(x_t, encoder_hidden_states=prompt, encoder_attention_mask=mask, timestep=time)[0]
    if family == "z_image":
        prompts = list(prompt) if mask is None else [row[row_mask] for row, row_mask in zip(prompt, mask, strict=True)]
        outputs = network(list(x_t.unsqueeze(2)), 1 - t, prompts)[0]
        return -torch.stack(outputs).squeeze(2)
    if family == "qwen_image":
        packed = QwenImagePipeline._pack_latents(x_t.unsqueeze(2), rows, channels, height, width)
        shapes = [[(1, height // 2, width // 2)]] * rows
        tokens = network(
            packed, timestep=t, encoder_hidden_states=prompt, encoder_hidden_states_mask=mask, img_shapes=shapes
        )[0]
        return QwenImagePipeline._unpack_latents(tokens, height * 8, width * 8, 8).squeeze(2)
    packed = FluxPipeline._pack_latents(x_t, rows, channels, height, width)
    guidance = torch.full((rows,), 3.5) if network.config.guidance_embeds else None
    tokens = network(
        packed, timestep=t, guidance=guidance, pooled_projections=cond["pooled_prompt_embeds"],
        encoder_hidden_states=prompt, txt_ids=torch.zeros(prompt.shape[1], 3).to(x_t),
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", x_t.dtype),
    )[0]  # fmt: skip
    return FluxPipeline._unpack_latents(tokens, height * 8, width * 8, 8)


def randomised(student: FlowModel) -> FlowModel:
    """Conditioning as after training: every new parameter counts."""
    with torch.no_grad():
        for parameter in student.conditioning.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return student


def features(time: torch.Tensor, scale: float) -> torch.Tensor:
    """Sinusoidal features (B, 256) of times (B,), in float64."""
    angle = time.double()[:, None] * scale * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([angle.cos(), angle.sin()], 1)


class _Attentions(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.masks: list = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.masks.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return function(*args, **kwargs)


@contextmanager
def attention_masks() -> Iterator[list]:
    """The mask (or None) of every attention inside."""
    with _Attentions() as mode:
        yield mode.masks


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return ((a - b).norm() / b.norm()).item()


def spread(student):
    """Conditioning and adapters as after training: every new parameter counts, and gets a gradient."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name or name.split(".")[1] in student.conditioning.names:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return student


class Graphs:
    """A backend that counts its graphs."""

    def __init__(self):
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

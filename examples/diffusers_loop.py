"""A whole training loop on a diffusers pipeline: images with captions in, a few-step LoRA and samples out.

    accelerate launch examples/diffusers_loop.py --pipeline stabilityai/stable-diffusion-3.5-medium --data my_images

The data folder holds images with a caption of the same name in a .txt file. Pipelines with an AutoencoderKL (SD3, FLUX,
Z-Image) work as they are; for others only `encode_images` changes. Conditions are made once, for all images.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from twinflow import EMATeacher, TwinFlowLoss, attach
from twinflow.export import export
from twinflow.lora import add_lora
from twinflow.memory import apply_memory
from twinflow.models import load


@torch.no_grad()
def encode_images(pipe: DiffusionPipeline, files: list[Path], size: int) -> torch.Tensor:
    """Images -> latents (N, C, H, W), scaled as the transformer expects them."""
    pixels = torch.cat([pipe.image_processor.preprocess(Image.open(f).convert("RGB"), size, size) for f in files])
    latents = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    return (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="a diffusers pipeline: hub name or folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of images with .txt captions")
    parser.add_argument("--out", type=Path, default="output")
    parser.add_argument("--size", type=int, default=1024, help="pixels per side")
    parser.add_argument("--batch", type=int, default=4, help="images per step and process")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--memory", default="checkpoint", help="memory preset; `twinflow plan` shows them")
    args = parser.parse_args()
    accelerator, dtype = Accelerator(), getattr(torch, args.dtype)
    torch.manual_seed(accelerator.process_index)
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=dtype).to(accelerator.device)
    student = add_lora(load(pipe.transformer), args.rank)
    apply_memory(student, args.memory)

    files = sorted(f for f in args.data.iterdir() if f.with_suffix(".txt").exists() and f.suffix != ".txt")
    captions = [f.with_suffix(".txt").read_text().strip() for f in files]
    latents = encode_images(pipe, files, args.size)
    with torch.no_grad():
        conds, uncond = student.encode_prompt(pipe, captions), student.encode_negative_prompt(pipe, [""])

    teacher, criterion = EMATeacher(student, 0.99), TwinFlowLoss()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], args.lr, weight_decay=0.0)
    model, optimizer = accelerator.prepare(student, optimizer)
    for step in range(args.steps):
        rows = torch.randint(len(files), (args.batch,))
        cond = {name: leaf[rows] for name, leaf in conds.items()}
        out = criterion.backward(model, latents[rows], cond, uncond, teacher=teacher, backward=accelerator.backward)
        accelerator.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            accelerator.print(f"step {step}: loss {out.loss.item():.4f}")
    if accelerator.is_main_process:
        export(student, args.out, teacher=teacher)
        pipe = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=dtype).to(accelerator.device)
        attach(pipe, args.out)
        options = dict(height=args.size, width=args.size, guidance_scale=student.guidance or 0.0)  # FLUX embeds one
        pipe(captions[0], num_inference_steps=2, **options).images[0].save(args.out / "sample.png")
        accelerator.print(f"written: {args.out}")


if __name__ == "__main__":
    main()

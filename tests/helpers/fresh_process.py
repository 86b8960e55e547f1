"""A program of its own for the end-to-end tests: draws with exports in stock pipelines, as a user would.

python fresh_process.py jobs.json drawn.safetensors
"""

import json
import sys

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from twinflow.scheduler import TwinFlowScheduler


def draw(pipe: DiffusionPipeline, job: dict, steps: int, output_type: str) -> torch.Tensor:
    pipe.scheduler.set_generator(torch.Generator().manual_seed(job["seed"]))
    latents = load_file(job["latents"])["z"]
    prompts = list(job["prompts"])  # some pipelines write into the list
    given = job["arguments"] | {"prompt": prompts, "latents": latents, "output_type": output_type}
    return pipe(num_inference_steps=steps, **given).images.contiguous()


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    drawn = {}
    for job in sorted(jobs, key=lambda job: job["attach"]):
        pipe = DiffusionPipeline.from_pretrained(job["pipeline"])
        pipe.set_progress_bar_config(disable=True)
        if job["attach"]:
            import twinflow

            twinflow.attach(pipe, job["export"])
        else:
            pipe.load_lora_weights(job["export"])
            pipe.scheduler = TwinFlowScheduler()
            unasked = {"twinflow.pipelines.attach", "twinflow.conditioning", "twinflow.models"} & sys.modules.keys()
            assert not unasked, unasked
        for steps in (1, 2):
            drawn[f"{job['name']}.{steps}.latents"] = draw(pipe, job, steps, "latent")
            drawn[f"{job['name']}.{steps}.images"] = draw(pipe, job, steps, "pt")
    save_file(drawn, sys.argv[2])


if __name__ == "__main__":
    main()

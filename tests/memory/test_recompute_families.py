"""Selective recomputation of the real classes: gradients bit for bit, and what is rerun of all that could be."""

from collections import Counter

import pytest
import torch
from helpers.batches import assert_same, gradients
from helpers.family_batches import FAMILIES
from helpers.recompute_cases import Operations
from helpers.recompute_families import RANK, R, T, step, student_and_batch
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig, get_peft_model

from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.recompute import SAVED, selective_recompute
from twinflow.models import load

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
BLOCKS = {
    "qwen_image": [f"transformer_blocks.{i}" for i in (0, 1)],
    "sd3": [f"transformer_blocks.{i}" for i in (0, 1)],
    "sana": [f"transformer_blocks.{i}" for i in (0, 1)],
    "flux": [f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in (0, 1)],
    "z_image": ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"],
    "unet": [
        "down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0", "down_blocks.1.resnets.0",
        "mid_block.resnets.0", "mid_block.attentions.0.transformer_blocks.0", "mid_block.resnets.1",
        "up_blocks.0.resnets.0", "up_blocks.0.resnets.1",
        "up_blocks.1.resnets.0", "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.resnets.1", "up_blocks.1.attentions.1.transformer_blocks.0",
    ],
}  # fmt: skip
BLOCKS["flux_guidance"] = BLOCKS["flux"]


def mixed(student):
    names = repeated_blocks(student)
    return [SAVED[i % len(SAVED)] for i in range(len(names))]


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_in_order_of_execution(family):
    student, batch = student_and_batch(family)
    found = repeated_blocks(student)
    assert list(found) == [f"transformer.{name}" for name in BLOCKS[family]]
    ran = []
    for name, block in found.items():
        block.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        student(batch[0], T, R, batch[1])
    assert ran == list(found)


@pytest.mark.parametrize("how", ["peft", "diffusers"])
def test_blocks_inside_wrappers(how):
    network = tiny_transformer("sd3")
    config = LoraConfig(r=2, target_modules=["to_q"])
    network = get_peft_model(network, config) if how == "peft" else network
    names = [f"{'base_model.model.' if how == 'peft' else ''}{name}" for name in BLOCKS["sd3"]]
    assert list(repeated_blocks(network)) == names
    student = load(network, conditioning="sign")
    assert list(repeated_blocks(student)) == [f"transformer.{name}" for name in names]
    assert list(repeated_blocks(student.network)) == BLOCKS["sd3"]
    student.network.transformer_blocks[1] = torch.compile(student.network.transformer_blocks[1])
    assert list(repeated_blocks(student.network)) == [BLOCKS["sd3"][0], f"{BLOCKS['sd3'][1]}._orig_mod"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", BLOCKS)
def test_gradients_are_those_of_plain_autograd(family, lora):
    student, batch = student_and_batch(family, lora)
    plain = step(student, batch)
    for saved in (*SAVED, mixed(student)):
        with selective_recompute(student, saved):
            assert_same(step(student, batch), plain)
    assert_same(step(student, batch), plain)


def backward_operations(student, batch):
    out = student(batch[0], T, R, batch[1]).sum()
    with Operations() as seen:
        out.backward()
    return seen.counts


def is_attention(op):
    return "attention" in str(op) or "bmm" in str(op)


def is_adapter(op, shapes):
    """Whether a product has a matrix of the adapters' rank."""
    sizes = shapes[1][:2] if "convolution" in str(op) else shapes[-1]
    return RANK in sizes


@pytest.mark.parametrize("family", BLOCKS)
def test_what_runs_again(family):
    """All that diffusers' own checkpointing reruns, less attention, less the base's products."""
    student, batch = student_and_batch(family, lora=True)
    found = {"plain": backward_operations(student, batch)}
    if family != "unet":  # whose own checkpointing is of other blocks
        student.network.enable_gradient_checkpointing()
        found["own"] = backward_operations(student, batch)
        student.network.disable_gradient_checkpointing()
    for saved in SAVED:
        with selective_recompute(student, saved):
            found[saved] = backward_operations(student, batch)
    products = {
        name: Counter({
            (op, shapes): count for (op, shapes), count in (counts - found["plain"]).items()
            if op.overloadpacket.__name__ in PRODUCTS or is_attention(op)
        })
        for name, counts in found.items()
    }  # fmt: skip
    rerun = products["input"]
    assert rerun == products.get("own", rerun)
    without = Counter({key: n for key, n in rerun.items() if not is_attention(key[0])})
    assert products["attention"] == without and without != rerun
    assert products["products"] == Counter({key: n for key, n in without.items() if is_adapter(*key)})
    assert products["products"] and products["products"] != without
    assert not products["all"]


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    student, batch = student_and_batch(family, lora=True)

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            out = student(batch[0], T, R, batch[1])
        out.float().square().sum().backward()
        return out.detach(), gradients(student)

    plain = cast()
    for saved in ("products", mixed(student)):
        with selective_recompute(student, saved):
            assert_same(cast(), plain)

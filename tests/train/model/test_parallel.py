"""`wrap` in one process, what it refuses, and `clip`."""

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers.family_batches import make_batch, make_student
from helpers.memory_cases import student_of
from helpers.ranked_steps import on_two_ranks, settings_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.distributed import any_rank
from twinflow.lora import add_lora
from twinflow.memory import PRESETS, defer_modulation
from twinflow.memory.quantised_base import quantised_form
from twinflow.train.model.memory import put_memory
from twinflow.train.model.parallel import check_sharded, clip, launcher_kind, wrap


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator that may be told of another launcher."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process(accelerator):
    student = student_of("sd3", lora=True)
    called, teacher = wrap(settings_of(), student, accelerator)
    assert called is student and isinstance(teacher, EMATeacher) and teacher.decay == 0.9
    assert launcher_kind(accelerator) == "one" and any_rank(True) and not any_rank(False)


@pytest.mark.parametrize(
    "kind, environment, message",
    [
        ("MULTI_CPU", {}, None),
        ("MULTI_CPU", {"FSDP_VERSION": "1"}, "fsdp_version must be 2, got 1"),
        ("MULTI_CPU", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params must be false"),
        ("MULTI_GPU", {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use memory_preset checkpoint"),
        ("DEEPSPEED", {}, "must be launched for DDP or FSDP2, got DEEPSPEED"),
    ],
)
def test_launchers(accelerator, monkeypatch, kind, environment, message):
    accelerator.state.distributed_type = DistributedType[kind]
    if environment:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        assert launcher_kind(accelerator) == "ddp"
        return
    with pytest.raises(ValueError, match=f"^train: .*{message}"):
        launcher_kind(accelerator)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_that_can_be_sharded(preset):
    """Those that keep weights as they are and on the device, and saved activations there too."""
    student = student_of("sd3", lora=True)
    settings = settings_of(memory_preset=preset)
    if preset in ("batch", "rows", "80gb", "attention", "checkpoint"):
        check_sharded(settings, student, PRESETS[preset])
        return
    with pytest.raises(
        ValueError, match=f"^train: memory_preset must be batch, .* got '{preset}', which (keeps|has an|moves)"
    ):
        check_sharded(settings, student, PRESETS[preset])


def test_what_cannot_be_sharded():
    student = student_of("sd3", lora=True)
    for given, message in (
        (dict(optimizer="adamw8bit"), "optimizer must be adamw or radam"),
        (dict(ema_device="cpu", model_type="full"), "ema_device must be accelerator"),
    ):
        with pytest.raises(ValueError, match=f"^train: {message} under FSDP2, got "):
            check_sharded(settings_of(**given), student)
    check_sharded(settings_of(ema_device="cpu"), student)  # says nothing of a LoRA
    with pytest.raises(ValueError, match=r"got .24gb., which keeps"):
        put_memory(settings_of(memory_preset="24gb"), student, torch.device("cpu"), None, sharded=True)
    assert quantised_form(student) is None, "refused before it is packed"
    with defer_modulation(student), pytest.raises(ValueError, match="which keeps modulation weights whole"):
        check_sharded(settings_of(), student)


def unused_adapters(accelerator: Accelerator, kind: str) -> None:
    """The adapters of the text in Qwen-Image's last block train nothing; steps go on without them."""
    student, config = add_lora(make_student("qwen_image"), 2, conditioning="dual+sign"), TwinFlowConfig()
    called, teacher = wrap(settings_of(), student, accelerator)
    assert launcher_kind(accelerator) == kind
    for seed in range(2):
        torch.manual_seed(seed)
        TwinFlowLoss(config).backward(called, *make_batch("qwen_image", student, 2), teacher=teacher)
    idle = [n for n, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert any("to_add_out" in name for name in idle), idle


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_adapters_without_gradient(kind):
    settings_of()
    on_two_ranks(kind, unused_adapters, kind)


def expected_norm(gradients, bound: float) -> torch.Tensor:
    norm = torch.cat([g.flatten().double() for g in gradients]).norm()
    for gradient in gradients:
        gradient *= min(1.0, bound / (norm.item() + 1e-6)) if bound else 1.0
    return norm.float()


def parameters_with_gradients(net: nn.Module) -> list[nn.Parameter]:
    torch.manual_seed(1)
    net(torch.randn(4, 5)).square().sum().backward()
    return list(net.parameters())


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh())
    net[1].unused = nn.Parameter(torch.ones(3))
    return net


@pytest.mark.parametrize("bound", [0.0, 0.1, 100.0])
def test_clip(bound):
    parameters = parameters_with_gradients(network())
    wanted = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = expected_norm(wanted, bound)
    found = clip(iter(parameters), bound)
    assert found.shape == () and len(wanted) == 4 < len(parameters)
    torch.testing.assert_close(found, norm)
    for p, gradient in zip((p for p in parameters if p.grad is not None), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert clip([nn.Parameter(torch.ones(2))], 1.0) == 0 and clip([], 1.0) == 0


def clip_sharded(accelerator: Accelerator) -> None:
    """Uneven and empty shards, parameters without gradient, and whole parameters beside them."""
    for bound in (0.0, 0.1):
        plain = parameters_with_gradients(network())
        wanted = [p.grad.clone() for p in plain if p.grad is not None] + [torch.full((3,), 2.0)]
        norm = expected_norm(wanted, bound)
        net = network()
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        beside = nn.Parameter(torch.zeros(3))
        beside.grad = torch.full((3,), 2.0)
        parameters = [*parameters_with_gradients(net), beside]
        found = clip(parameters, bound)
        assert type(found) is torch.Tensor and found.shape == ()
        torch.testing.assert_close(found, norm)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient, value in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient, value)
    flags = [any_rank(False), any_rank(accelerator.process_index == 1), any_rank(True), any_rank(False)]
    assert flags == [False, True, True, False] and os.environ["RANK"] == str(accelerator.process_index)


def test_clip_of_shards():
    on_two_ranks("fsdp2", clip_sharded)

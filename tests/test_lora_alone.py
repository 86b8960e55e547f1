"""What an adapter may hold beside LoRA weights: what no stock pipeline would load is refused before it is trained."""

import pytest
import torch
from helpers.export_cases import scrambled, stock_pipeline, velocity
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig, get_peft_model

from twinflow import EMATeacher, FrozenTeacher
from twinflow.export import export
from twinflow.models import load

ALONE = {
    "rslora": dict(use_rslora=True), "dora": dict(use_dora=True), "ranks": dict(rank_pattern={"to_q": 8}),
    "its own biases": dict(lora_bias=True), "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
}  # fmt: skip
MORE = {
    "biases": (dict(bias="lora_only"), "bias of the trained adapter must be 'none', got 'lora_only'"),
    "all biases": (dict(bias="all"), "bias of the trained adapter must be 'none', got 'all'"),
    "layers": (dict(modules_to_save=["proj_out"]), "modules_to_save of the trained adapter must be unset, got"),
    "parameters": (dict(target_parameters=["proj_out.weight"]), "target_parameters of the trained adapter must be un"),
}  # fmt: skip
CHANGED = {
    "pissa": dict(init_lora_weights="pissa"), "quick pissa": dict(init_lora_weights="pissa_niter_2"),
    "olora": dict(init_lora_weights="olora"),
}  # fmt: skip


def adapted(how="diffusers", **options):
    network = tiny_transformer("sd3").requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=r".*attn\.to_[qkv]", **options)
    if how == "peft":
        return load(get_peft_model(network, config))
    network.add_adapter(config)
    return load(network)


@pytest.mark.parametrize("name", ALONE)
def test_what_a_lora_file_holds_is_exported_and_loaded(name, tmp_path):
    student = scrambled(adapted(**ALONE[name]))
    export(student, tmp_path, teacher=EMATeacher(student, 0.9))
    pipe = stock_pipeline("sd3")
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(load(pipe.transformer), "sd3"), velocity(student, "sd3"))


@pytest.mark.parametrize("name", MORE)
def test_more_than_a_lora_is_refused_when_the_teacher_is_made(name, tmp_path):
    """peft's own files hold it, so that under its wrapper only the export refuses."""
    options, message = MORE[name]
    student = adapted(**options)
    before = set(student.state_dict())
    for teacher in (lambda s: EMATeacher(s, 0.9), FrozenTeacher):
        with pytest.raises(
            ValueError, match=f"{'EMA' if teacher is not FrozenTeacher else 'Frozen'}Teacher: {message}"
        ):
            teacher(student)
    assert set(student.state_dict()) == before
    for how in ("diffusers", "peft"):
        with pytest.raises(ValueError, match=f"export: {message}"):
            export(adapted(how, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["diffusers", "peft"])
@pytest.mark.parametrize("name", CHANGED)
def test_an_initialisation_that_changes_the_base_is_refused(name, how, tmp_path):
    """The base is another one beneath it: a frozen teacher would be no base, and a stock base draws something else."""
    student = adapted(how, **CHANGED[name])
    message = "init_lora_weights of the trained adapter must be True, or one that leaves the base's weights"
    for run in (lambda: EMATeacher(student, 0.9), lambda: FrozenTeacher(student), lambda: export(student, tmp_path)):
        with pytest.raises(ValueError, match=message):
            run()

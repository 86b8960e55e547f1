"""Where exports go: what they replace, what they leave, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.export_cases import contents, lora_student, whole_student
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig

from twinflow import EMATeacher, FrozenTeacher
from twinflow.export import export
from twinflow.formats.manifest import CONDITIONING, LORA, MANIFEST, Manifest, read_manifest
from twinflow.models import load


def test_an_export_replaces_an_earlier_one_and_leaves_other_files(tmp_path):
    (tmp_path / "sample.png").write_bytes(b"picture")
    export(lora_student(mode="dual"), tmp_path)
    assert set(contents(tmp_path)) == {"sample.png", LORA, CONDITIONING, MANIFEST}
    export(lora_student(mode="midpoint"), tmp_path)
    assert set(contents(tmp_path)) == {"sample.png", LORA, MANIFEST}
    export(whole_student(mode="midpoint"), tmp_path)
    model = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert set(contents(tmp_path)) == {"sample.png", MANIFEST, *model}
    assert read_manifest(tmp_path) == Manifest("sd3", "midpoint", "full")


def test_files_of_another_origin_beside_an_earlier_export_are_kept(tmp_path):
    export(lora_student(), tmp_path)
    (tmp_path / "config.json").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"earlier export, got .*config\.json"):
        export(whole_student(), tmp_path)
    export(lora_student(mode="midpoint"), tmp_path)
    assert contents(tmp_path)["config.json"] == b"mine"


def student_without_names_in_comfyui() -> torch.nn.Module:
    """Its adapter has weights that ComfyUI's layout has no place for, which shows while files are written."""
    student = load(tiny_transformer("qwen_image"), conditioning="dual")
    student.transformer.requires_grad_(False)
    student.network.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["to_q"]))
    return student


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failing_export_leaves_the_folder_as_it_was(earlier, tmp_path):
    folder = tmp_path / "out"
    if earlier:
        export(lora_student(), folder)
    before = contents(folder) if earlier else None
    with pytest.raises(ValueError, match=r"format must be 'diffusers' for an adapter with .*lora_magnitude_vector"):
        export(student_without_names_in_comfyui(), folder, format="comfyui")
    assert (contents(folder) if folder.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])


def exporting(make: Callable[[], object] = lora_student, **options: object) -> Callable[[Path], None]:
    return lambda folder: export(make(), folder, **options)


def with_teacher(make: Callable[[object], object]) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        student = lora_student()
        export(student, folder, teacher=make(student))

    return call


def over(name: str, make: Callable[[], object]) -> Callable[[Path], None]:
    """Exports to where another file is: in the folder, or in its place."""

    def call(folder: Path) -> None:
        if name:
            folder.mkdir()
        (folder / name if name else folder).write_bytes(b"mine")
        export(make(), folder)

    return call


BAD = {
    "plain module": (exporting(lambda: torch.nn.Linear(2, 2)), TypeError, r"by twinflow\.models\.load, got Linear"),
    "generic": (
        exporting(lambda: load(torch.nn.Linear(2, 2), family="generic")), ValueError, r"got 'generic'; save its"
    ),
    "format": (exporting(format="kohya"), ValueError, r"one of diffusers, comfyui, got 'kohya'"),
    "family": (exporting(format="comfyui"), ValueError, r"a student of qwen_image, z_image, got sd3"),
    "no base": (exporting(merge_base=True), ValueError, r"merge_base must be False .*got True"),
    "no adapter": (exporting(whole_student, merge_base=True), ValueError, r"merge_base must be False .*got True"),
    "frozen teacher": (with_teacher(FrozenTeacher), TypeError, r"an EMATeacher or None, got FrozenTeacher"),
    "another's teacher": (
        with_teacher(lambda _: EMATeacher(lora_student(), 0.9)), ValueError, r"teacher must be made from the student"
    ),
    "nothing trained": (
        exporting(lambda: lora_student().requires_grad_(False)), ValueError, r"must train one adapter, got none"
    ),
    "a file": (over("", lora_student), ValueError, r"must be a folder, got the file"),
    "another LoRA": (over(LORA, lora_student), ValueError, rf"earlier export, got .*{LORA}"),
    "another model": (over("config.json", whole_student), ValueError, r"earlier export, got .*config\.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_writes_nothing(case, tmp_path):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(tmp_path / "out")
    assert {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} <= {b"mine"}

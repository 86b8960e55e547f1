"""`twinflow doctor`: what is here, what is missing, and what installs it."""

import json
import os
import sys
from importlib import metadata

import pytest
import torch

from twinflow.cli import doctor, main
from twinflow.environment import PACKAGES

_VERSION = metadata.version


def report(capsys):
    status = main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def without(monkeypatch):
    """Makes libraries be of another version, or not be there."""

    def change(**versions):
        def version(name):
            if versions.get(name, "") is None:
                raise metadata.PackageNotFoundError(name)
            return versions.get(name) or _VERSION(name)

        monkeypatch.setattr(metadata, "version", version)

    return change


def test_this_machine_can_train(capsys):
    status, found = report(capsys)
    assert status == 0 and found["ready"] and found["problems"] == []
    versions = {library["name"]: library["version"] for library in found["libraries"]}
    assert versions["torch"] == metadata.version("torch") and versions.keys() == {package.name for package in PACKAGES}
    assert all(library["version"] for library in found["libraries"] if library["needed"])
    assert {kernel[0] for kernel in found["kernels"]} > {"velocity_loss", "ema_update_", "rollout_step_"}
    assert os.getcwd() in found["disks"] and all(free > 0 for free in found["disks"].values())


def test_the_text_reads_well_when_piped(capsys, monkeypatch, without):
    without(pyarrow=None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "secret" not in out and "hub      logged in" in out
    lines = out.rstrip().split("\n")
    assert lines[-1] == "twinflow train can start here"
    assert any(line.split()[:2] == ["torch", metadata.version("torch")] for line in lines)
    (line,) = [line for line in lines if line.startswith("pyarrow")]
    assert line.split(maxsplit=2) == ["pyarrow", "-", "captions in parquet files: pip install pyarrow"]


def test_what_is_missing_is_named_with_its_cure(capsys, monkeypatch, without):
    without(peft=None, diffusers="0.9.1", wandb=None)
    declared = ["torch>=2.8", 'diffusers>=0.42; extra == "diffusers"', 'twinflow[diffusers]; extra == "train"']
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    status, found = report(capsys)
    assert status == 1 and not found["ready"]
    assert found["problems"] == [
        "diffusers must be >=0.42, got 0.9.1: pip install -U 'diffusers>=0.42'",
        "peft is missing: pip install 'twinflow[train]'",
    ]
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing  peft is missing: pip install 'twinflow[train]'" in out
    assert out.rstrip().endswith("twinflow train cannot start here")


def test_a_broken_library_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    status, found = report(capsys)
    (problem,) = found["problems"]
    assert status == 1 and problem.startswith("accelerate cannot be imported (")
    assert problem.endswith(": pip install --force-reinstall accelerate")


@pytest.mark.parametrize(
    "version, declared, fits",
    [("0.42.1", ">=0.42", True), ("0.42", ">=0.42.0", True), ("0.9.1", ">=0.42", False), ("2.13.0+cpu", ">=2.8", True),
     ("2.8.0a0+5228986c39.nv25.6", ">=2.8", True), ("1.0.0rc1", ">=1.0", True), ("4.57", ">=5", False)],
)  # fmt: skip
def test_versions_of_vendors_count_as_the_release(version, declared, fits):
    assert doctor._satisfies(version, declared) is fits


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_driver_without_a_torch_for_it_is_a_problem(capsys, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 550.54.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, found = report(capsys)
    assert status == 1 and found["driver"] == "550.54.15"
    assert "torch sees no GPU though the driver is 550.54.15" in found["problems"][0]


@pytest.mark.gpu
def test_gpus_are_listed_with_their_memory(capsys):
    _, found = report(capsys)
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert 0 < found["gpus"][0]["free_gb"] <= found["gpus"][0]["total_gb"]
    assert found["driver"] and found["cuda"]


def test_little_room_is_said(capsys, monkeypatch):
    usage = doctor.shutil.disk_usage
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**9))
    _, found = report(capsys)
    assert f"there are only 1.0 GB free in {os.getcwd()}" in found["warnings"]

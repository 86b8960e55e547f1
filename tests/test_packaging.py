"""What a user's install does: a pure wheel where it is asked for, a clear refusal without a compiler, a full sdist."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "output", "results", "__pycache__")


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the tree, so that builds leave nothing in the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=LEFT_OUT))


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TWINFLOW_") and k not in ("PYTHONPATH", "CXX")}
    return kept | changes


def wheel(source: Path, folder: Path, *options: str, **changes: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *options, "-w", str(folder), str(source)]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def unpacked(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def package_files(folder: Path) -> list[str]:
    """Every module and data file of both packages; the native module aside."""
    files = (path for name in ("twinflow", "twinflow_kernels") for path in (folder / name).rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files if path.suffix not in (".so", ".pyc"))


USE = """
import sys, warnings, torch
# a developer's editable install must not lend its compiled module
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import twinflow_kernels
    x = torch.ones(2, 3)
    for _ in range(2):
        twinflow_kernels.rollout_step_(x, torch.ones(2, 3), torch.tensor([0.25, 0.5]))
print(twinflow_kernels.__file__)
print(x.tolist())
print([str(w.message) for w in caught if "twinflow" in str(w.message)])
"""


def use(folder: Path, **changes: str) -> list[str]:
    """Imports the package from a folder, takes two rollout steps, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE], env=environment(PYTHONPATH=str(folder), **changes), cwd=folder,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, values, warned = done.stdout.splitlines()
    assert file.startswith(str(folder)) and values == "[[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]"
    return eval(warned)


def test_without_native_code(source, tmp_path):
    """TWINFLOW_BUILD_NATIVE=0 builds a pure wheel without a compiler; it works and warns once per operation."""
    path = wheel(source, tmp_path / "dist", "--no-build-isolation", TWINFLOW_BUILD_NATIVE="0", PATH="")
    assert path.name.endswith("-py3-none-any.whl")
    folder = unpacked(path, tmp_path / "installed")
    assert package_files(folder) == package_files(source)
    (warning,) = use(folder)
    assert "rollout_step_ on cpu falls back to plain PyTorch: built without native code" in warning


def test_no_compiler_is_a_clear_refusal(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "out", "--build-temp", tmp_path / "temp"],
        cwd=source, env=environment(PATH=str(tmp_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    for text in ("no C++17 compiler found", "apt-get install g++", "TWINFLOW_BUILD_NATIVE=0"):
        assert text in done.stderr
    assert not list((tmp_path / "out").rglob("*.so")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"TWINFLOW_BUILD_NATIVE": "no"}, "TWINFLOW_BUILD_NATIVE must be one of 0, 1, got 'no'"),
        ({"TWINFLOW_BUILD_CUDA": "yes"}, "TWINFLOW_BUILD_CUDA must be one of auto, 0, 1, got 'yes'"),
        ({"TORCH_CUDA_ARCH_LIST": "sm_90", "CUDA_HOME": "here"}, "TORCH_CUDA_ARCH_LIST must list versions such as"),
    ],
)
def test_wrong_settings_are_refused(source, tmp_path, changes, message):
    if "CUDA_HOME" in changes:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text("#!/bin/sh\n")
        nvcc.chmod(0o755)
        changes = changes | {"CUDA_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "out",
        "--build-temp",
        tmp_path / "temp",
    ]
    done = subprocess.run(command, cwd=source, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("from_sdist", [False, True])
def test_isolated_build(source, tmp_path, from_sdist):
    """`pip wheel .` and the sdist build the native module in an environment that has no torch."""
    if from_sdist:
        command = [sys.executable, "-m", "build", "--sdist", "-o", str(tmp_path / "sdist"), str(source)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (source,) = (tmp_path / "sdist").glob("*.tar.gz")
    folder = unpacked(wheel(source, tmp_path / "dist"), tmp_path / "installed")
    assert list((folder / "twinflow_kernels").glob("_C*.so"))
    assert package_files(folder) == package_files(ROOT)
    assert not list(folder.rglob("*.pyc"))
    assert use(folder, TWINFLOW_BACKEND="cpu") == []


@pytest.mark.skipif(Path(sys.prefix).name != ".venv", reason="not the environment that the Makefile makes")
def test_constraints_are_what_is_installed():
    """Nothing chosen by chance: each package has its pin, and each pin its package (pip and twinflow aside)."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in pins}
    # torch says where it was built for, as in 2.13.0+cpu.
    found = {canonicalize_name(d.metadata["Name"]): Version(d.version).public for d in distributions()}
    assert pinned == {name: version for name, version in found.items() if name not in ("pip", "twinflow")}

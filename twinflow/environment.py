"""The machine: versions of packages, GPUs and their driver, the processor. Importing this imports no torch."""

import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Package:
    """A library that some command uses.

    Args:
        name: in the package index, and in Python where `module` is not given.
        purpose: a few words.
        extra: of twinflow, which brings it; None: it is installed by name.
        needed: whether `twinflow train` cannot do without.
        module: its name in Python.
    """

    name: str
    purpose: str
    extra: str | None
    needed: bool = False
    module: str | None = None

    @property
    def install_command(self) -> str:
        """The command that installs it."""
        return f"pip install {self.name}" if self.extra is None else f"pip install 'twinflow[{self.extra}]'"


PACKAGES = (
    Package("torch", "everything", None, needed=True),
    Package("numpy", "everything", None, needed=True),
    Package("triton", "kernels on a GPU", None),
    Package("diffusers", "models and pipelines", "train", needed=True),
    Package("transformers", "text encoders", "train", needed=True),
    Package("peft", "LoRA", "train", needed=True),
    Package("accelerate", "devices and precision", "train", needed=True),
    Package("safetensors", "weights on disk", "train", needed=True),
    Package("rich", "tables and progress", "train", needed=True),
    Package("pillow", "images", "train", needed=True, module="PIL"),
    Package("matplotlib", "pictures of a plan", "train", needed=True),
    Package("bitsandbytes", "8-bit AdamW, nf4 bases", "quant"),
    Package("torchao", "int8 bases", "quant"),
    Package("tensorboard", "report_to tensorboard", "tensorboard"),
    Package("wandb", "report_to wandb", "wandb"),
    Package("pyarrow", "captions in parquet files", None),
)  # fmt: skip


def pip_install(module: str) -> str:
    """The command that installs what a module of Python belongs to.

    Args:
        module: its name, with or without submodules.
    """
    root = module.partition(".")[0]
    known = (package.install_command for package in PACKAGES if root in (package.name, package.module))
    return next(known, f"pip install {root}")


def package_version(name: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as its maker writes it."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.machine()


def device_name(device: "torch.device") -> str:
    """The name of a GPU, or of the processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def gpu_memory() -> list[dict[str, Any]]:
    """`name`, `total_gb` and `free_gb` (1e9 bytes) of each GPU that torch sees."""
    import torch

    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "total_gb": total / 1e9, "free_gb": free / 1e9})
    return gpus


def gpu_driver() -> str | None:
    """The version of NVIDIA's driver; None: there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def describe_environment(processes: int = 1) -> dict[str, str | int | float]:
    """What a run is made with, for `environment.json`: versions, system, threads, and the GPUs with their memory.

    Args:
        processes: of the run.
    """
    import torch

    environment: dict[str, str | int | float] = {"python": sys.version.split()[0], "system": platform.platform()}
    versions = {name: package_version(name) for name in ("twinflow", *(package.name for package in PACKAGES))}
    environment |= {name: version for name, version in versions.items() if version is not None}
    environment |= {"processes": processes, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        environment["cuda"] = torch.version.cuda or "unknown"
        for number, gpu in enumerate(gpu_memory()):
            environment[f"gpu {number}"] = f"{gpu['name']}, {gpu['total_gb']:.1f} GB"
    return environment

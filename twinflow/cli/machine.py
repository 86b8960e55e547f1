"""`Machine`: what `twinflow doctor` finds here: libraries, GPUs, kernels, room, and what is in the way of training."""

import importlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from twinflow.cli.packages import PACKAGES, Package, install

_LITTLE_GB = 5.0  # GB (1e9 bytes): a checkpoint and a cache need more


@dataclass(frozen=True)
class Library:
    """A library: its version (None: it is missing), what it is for, what is wrong with it ("": nothing), the cure."""

    name: str
    version: str | None
    purpose: str
    needed: bool
    wrong: str
    cure: str


@dataclass
class Machine:
    """What was found.

    Args:
        python, system, twinflow: versions.
        cuda: that torch is built for; None: for none.
        libraries: each of `PACKAGES`.
        gpus: name, GB (1e9 bytes) in all and free, of each that torch sees.
        driver: of the GPUs; None: none is installed.
        kernels: operation, device, backend and reason.
        disks: folder -> GB (1e9 bytes) free.
        logged_in: whether there is a token for the hub.
        problems: what keeps training from starting here.
        warnings: what is worth knowing.
    """

    python: str
    system: str
    twinflow: str
    cuda: str | None = None
    libraries: list[Library] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    driver: str | None = None
    kernels: list[tuple[str, str, str, str]] = field(default_factory=list)
    disks: dict[str, float] = field(default_factory=dict)
    logged_in: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        return {"ready": not self.problems, **asdict(self)}


def inspect_machine() -> Machine:
    """Looks at this machine; imports what training imports, and asks no network."""
    found = Machine(platform.python_version(), platform.platform(), metadata.version("twinflow"))
    found.driver = _driver()
    for package in PACKAGES:
        library = _library(package)
        found.libraries.append(library)
        if library.wrong and package.needed:
            found.problems.append(f"{library.name} {library.wrong}: {library.cure}")
        elif library.wrong and library.version is not None:
            found.warnings.append(f"{library.name} {library.wrong}: {library.cure}")
    if not any(library.name == "torch" and library.wrong for library in found.libraries):
        _see_gpus(found)
        _see_kernels(found)
    _see_disks(found)
    found.logged_in = _logged_in()
    return found


def _library(package: Package) -> Library:
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return Library(package.name, None, package.purpose, package.needed, "is missing", install(package))
    wrong, cure = "", install(package)
    wanted = _wanted().get(package.name, "")
    if wanted and _older(version, wanted):
        wrong, cure = f"must be {wanted} or later, got {version}", f"pip install -U '{package.name}>={wanted}'"
    elif package.needed:
        try:
            importlib.import_module(package.module or package.name)
        except Exception as error:  # whatever a broken installation does
            brief = " ".join(str(error).split())[:120]
            wrong, cure = f"cannot be imported ({brief})", f"pip install --force-reinstall {package.name}"
    return Library(package.name, version, package.purpose, package.needed, wrong, cure if wrong else "")


def _wanted() -> dict[str, str]:
    """Library -> least version, as twinflow declares it."""
    try:
        declared = metadata.requires("twinflow") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in declared)
    return {match[1]: match[2] for match in found if match}


def _older(version: str, wanted: str) -> bool:
    numbers = [[int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]] for text in (version, wanted)]
    width = max(map(len, numbers))
    return [*numbers[0], *[0] * (width - len(numbers[0]))] < [*numbers[1], *[0] * (width - len(numbers[1]))]


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _see_gpus(found: Machine) -> None:
    import torch

    found.cuda = torch.version.cuda
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found.gpus.append({"name": name, "total_gb": total / 1e9, "free_gb": free / 1e9})
    elif found.driver is not None:
        built = f"for CUDA {found.cuda}" if found.cuda else "without CUDA"
        cure = "update the driver" if found.cuda else "pip install --force-reinstall torch"
        found.problems.append(
            f"torch sees no GPU though the driver is {found.driver}; it is built {built}: {cure} "
            "(https://pytorch.org/get-started/locally has builds for other versions)"
        )
    else:
        found.warnings.append("there is no CUDA GPU: only tiny models can be trained here")


def _see_kernels(found: Machine) -> None:
    try:
        from twinflow_kernels.__main__ import choices
    except Exception as error:  # a build that does not fit this machine
        brief = " ".join(str(error).split())[:120]
        found.problems.append(f"twinflow_kernels cannot be imported ({brief}): pip install --force-reinstall twinflow")
        return
    found.kernels = choices()


def _see_disks(found: Machine) -> None:
    for path in (Path.cwd(), _hub_cache()):
        place = next(folder for folder in (path, *path.parents) if folder.is_dir())
        free = shutil.disk_usage(place).free / 1e9
        found.disks[str(path)] = free
        if free < _LITTLE_GB:
            found.warnings.append(f"there are only {free:.1f} GB free in {path}")
    if not os.access(Path.cwd(), os.W_OK):
        found.warnings.append(f"nothing can be written in {Path.cwd()}: output_dir must be elsewhere")


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(HF_HUB_CACHE)


def _logged_in() -> bool:
    """Whether there is a token; it is not looked at."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        return False
    return get_token() is not None

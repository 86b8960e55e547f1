"""`twinflow doctor`: whether training can start on this machine, and the command that installs what is missing."""

import argparse
import importlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from twinflow.cli.parser import EXAMPLES, Parser
from twinflow.environment import PACKAGES, Package, gpu_driver, gpu_memory, package_version

_LITTLE_GB = 5.0  # GB (1e9 bytes): a checkpoint and a cache need more


def add_options(parser: Parser) -> None:
    """Declares the options."""
    parser.description = (
        "Lists versions, GPUs, kernels, free disk space and what is missing, with the command that installs it. The "
        "status is 0 if training could start here and 1 if something that it needs is missing."
    )
    parser.epilog = f"{EXAMPLES}\n  twinflow doctor\n  twinflow doctor --json > machine.json"
    parser.add_argument("--json", action="store_true", help="print JSON; memory and disk space in GB (1e9 bytes)")


def run(options: argparse.Namespace) -> int:
    """Prints the diagnosis; 1 where training could not start."""
    machine = diagnose()
    print(json.dumps(machine.to_dict(), indent=1) if options.json else "\n".join(_report(machine)))
    return 1 if machine.problems else 0


@dataclass(frozen=True)
class Library:
    """A library: its version (None: it is missing), what is wrong with it ("": nothing), and the cure, a command."""

    name: str
    version: str | None
    purpose: str
    needed: bool
    wrong: str
    cure: str


@dataclass
class Machine:
    """The diagnosis.

    Args:
        python, system, twinflow: versions.
        cuda: version that torch is built for; None: it is built without.
        libraries: each of `PACKAGES`.
        gpus: as from `gpu_memory`.
        driver: NVIDIA's; None: none is installed.
        kernels: (operation, device, backend, reason) each.
        disks: folder -> GB (1e9 bytes) free.
        logged_in: whether there is a token for the hub.
        problems: what keeps training from starting.
        warnings: what may surprise later.
    """

    python: str
    system: str
    twinflow: str | None
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
        """The diagnosis as JSON holds it."""
        return {"ready": not self.problems, **asdict(self)}


def diagnose() -> Machine:
    """Inspects this machine; imports what training imports, and uses no network."""
    machine = Machine(platform.python_version(), platform.platform(), package_version("twinflow"))
    machine.driver = gpu_driver()
    for package in PACKAGES:
        library = _inspect(package)
        machine.libraries.append(library)
        if library.wrong and package.needed:
            machine.problems.append(f"{library.name} {library.wrong}: {library.cure}")
        elif library.wrong and library.version is not None:
            machine.warnings.append(f"{library.name} {library.wrong}: {library.cure}")
    if not any(library.name == "torch" and library.wrong for library in machine.libraries):
        _inspect_gpus(machine)
        _inspect_kernels(machine)
    _inspect_disks(machine)
    machine.logged_in = _logged_in()
    return machine


def _inspect(package: Package) -> Library:
    version, wrong, cure = package_version(package.name), "", package.install_command
    declared = _declared_versions().get(package.name)
    if version is None:
        wrong = "is missing"
    elif declared is not None and not _satisfies(version, declared):
        wrong, cure = f"must be {declared}, got {version}", f"pip install -U '{package.name}{declared}'"
    elif package.needed:
        try:
            importlib.import_module(package.module or package.name)
        except Exception as error:  # whatever a broken installation does
            wrong = f"cannot be imported ({_brief(error)})"
            cure = f"pip install --force-reinstall {package.name}"
    return Library(package.name, version, package.purpose, package.needed, wrong, cure if wrong else "")


def _declared_versions() -> dict[str, str]:
    """Library -> versions that twinflow declares, such as ">=0.42"."""
    from packaging.requirements import Requirement

    try:
        requirements = map(Requirement, metadata.requires("twinflow") or [])
    except metadata.PackageNotFoundError:
        return {}
    return {each.name: str(each.specifier) for each in requirements if each.specifier}


def _satisfies(version: str, specifier: str) -> bool:
    """Whether a release is among some; 2.8.0a0+git, as vendors build it, counts as 2.8.0."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(specifier).contains(Version(version).base_version)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _inspect_gpus(machine: Machine) -> None:
    import torch

    machine.cuda, machine.gpus = torch.version.cuda, gpu_memory()
    if machine.gpus:
        return
    if machine.driver is None:
        machine.warnings.append("there is no CUDA GPU: only tiny models can be trained here")
        return
    built = f"for CUDA {machine.cuda}" if machine.cuda else "without CUDA"
    cure = "update the driver" if machine.cuda else "pip install --force-reinstall torch"
    machine.problems.append(
        f"torch sees no GPU though the driver is {machine.driver}; it is built {built}: {cure} "
        "(https://pytorch.org/get-started/locally has builds for other versions)"
    )


def _inspect_kernels(machine: Machine) -> None:
    try:
        from twinflow_kernels.__main__ import choices
    except Exception as error:  # a build that does not fit this machine
        cure = "pip install --force-reinstall twinflow"
        machine.problems.append(f"twinflow_kernels cannot be imported ({_brief(error)}): {cure}")
        return
    machine.kernels = choices()


def _inspect_disks(machine: Machine) -> None:
    for path in (Path.cwd(), _hub_cache()):
        place = next(folder for folder in (path, *path.parents) if folder.is_dir())
        free = shutil.disk_usage(place).free / 1e9
        machine.disks[str(path)] = free
        if free < _LITTLE_GB:
            machine.warnings.append(f"there are only {free:.1f} GB free in {path}")
    if not os.access(Path.cwd(), os.W_OK):
        machine.warnings.append(f"{Path.cwd()} cannot be written to: output_dir must be elsewhere")


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


def _report(machine: Machine) -> Iterator[str]:
    # Plain text, not rich's tables: rich may be what is missing.
    versions = [("python", machine.python, machine.system), ("twinflow", machine.twinflow or "-", "")]
    yield from _aligned([*versions, *map(_row, machine.libraries)])
    yield ""
    for gpu in machine.gpus:
        yield f"GPU      {gpu['name']}, {gpu['free_gb']:.1f} of {gpu['total_gb']:.1f} GB free"
    yield f"CUDA     {machine.cuda or 'none'} in torch, driver {machine.driver or 'none'}"
    for folder, free in machine.disks.items():
        yield f"disk     {free:.1f} GB free in {folder}"
    yield f"hub      {'logged in' if machine.logged_in else 'no token; for gated models run `hf auth login`'}"
    kernels = [kernel for kernel in machine.kernels if kernel[2] != "-"]
    if kernels:
        yield ""
        yield from _aligned([("kernel", "device", "backend", "why"), *kernels])
    yield ""
    for warning in machine.warnings:
        yield f"warning  {warning}"
    for problem in machine.problems:
        yield f"missing  {problem}"
    yield "twinflow train can start here" if not machine.problems else "twinflow train cannot start here"


def _row(library: Library) -> tuple[str, str, str]:
    if library.version is None and not library.needed:
        return library.name, "-", f"{library.purpose}: {library.cure}"
    state = "; ".join(part for part in (library.wrong, library.cure) if part)
    return library.name, library.version or "-", state or library.purpose


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

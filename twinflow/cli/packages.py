"""`PACKAGES`: the libraries that commands use, and `pip_install()`: how each is installed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A library.

    Args:
        name: in the index, and in Python where `module` is not given.
        purpose: what it is for, in a few words.
        extra: of twinflow, which brings it; None: it is installed by name.
        needed: whether `twinflow train` cannot do without.
        module: its name in Python.
    """

    name: str
    purpose: str
    extra: str | None
    needed: bool = False
    module: str | None = None


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
    for package in PACKAGES:
        if root in (package.name, package.module):
            return install(package)
    return f"pip install {root}"


def install(package: Package) -> str:
    """The command that installs a library."""
    return f"pip install {package.name}" if package.extra is None else f"pip install 'twinflow[{package.extra}]'"

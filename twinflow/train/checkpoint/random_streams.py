"""The random streams of a process: torch's, CUDA's, python's, numpy's and generators of its own."""

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from twinflow.train.checkpoint.state_checks import check_names, check_tensor

_NUMPY_WORDS = 624


def collect_streams(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Where all streams stand; of CUDA's that of the current device."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def check_streams(saved: Any, generators: Mapping[str, torch.Generator]) -> None:
    """Raises ValueError unless these are states that the streams take; tried on others."""
    check_names(saved, dict.fromkeys(("torch", "cuda", "python", "numpy", "generators")), "random")
    check_names(saved["generators"], dict(generators), "generators")
    _try("torch", lambda: torch.Generator().set_state(saved["torch"]))
    for name, generator in generators.items():
        _try(
            f"generators[{name!r}]",
            lambda g=generator, n=name: torch.Generator(g.device).set_state(saved["generators"][n]),
        )
    if saved["cuda"] is not None and torch.cuda.is_available():
        _try("cuda", lambda: torch.Generator("cuda").set_state(saved["cuda"]))
    _try("python", lambda: random.Random().setstate(saved["python"]))
    _try("numpy", lambda: _check_numpy(saved["numpy"]))


def put_streams(saved: dict[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Continues from checked states."""
    for name, generator in generators.items():
        generator.set_state(saved["generators"][name].clone())
    torch.set_rng_state(saved["torch"].clone())
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].clone())
    elif saved["cuda"] is not None:
        warnings.warn("restore: the run was saved on a GPU and goes on without; its steps will differ", stacklevel=3)
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])


def _try(name: str, change: Any) -> None:
    try:
        change()
    except Exception as error:  # each library refuses in its own way
        raise ValueError(f"restore: random stream {name} must take its saved state, got a refusal: {error}") from None


def _check_numpy(state: Any) -> None:
    key, position = np.asarray(state["state"]["key"]), state["state"]["pos"]
    check_tensor(torch.from_numpy(key.copy()), (_NUMPY_WORDS,), torch.uint32, "numpy")
    if type(position) is not int or not 0 <= position <= _NUMPY_WORDS:  # numpy would read past its memory
        raise ValueError(f"position {position}")
    np.random.RandomState().set_state(state)

"""`pipeline_folder()`, `configurations()`: the diffusers pipeline that a run starts from, on this machine."""

import textwrap
from collections.abc import Callable
from pathlib import Path

from twinflow.errors import ArgumentError
from twinflow.formats.variants import lacks_weights, variant_on_the_hub

_PAGE = "https://huggingface.co/{}"


def _error(wanted: str, got: str, hint: str = "") -> ArgumentError:
    return ArgumentError("train", "pretrained_model_name_or_path", wanted, got, hint)


def pipeline_folder(name: str) -> Path:
    """The folder of a pipeline: itself, or where a hub name was downloaded to.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        ValueError: no such folder or name, a gated model without access, or no network; the message says what to do.
    """
    return _local(name) or _downloaded(name, _pipeline)


def configurations(name: str) -> Path:
    """A folder that has at least the pipeline's JSON files, without its weights where they are not here.

    Raises:
        ValueError: as for `pipeline_folder`.
    """
    return _local(name) or _downloaded(name, _json_files)


def _local(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise _error("a diffusers pipeline", f"{path} without model_index.json")
        return path
    if path.is_file():
        raise _error("a pipeline's folder or a hub name", f"the file {path}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise _error("a folder that exists or a hub name as owner/name", repr(name))
    return None


def _pipeline(name: str) -> str:
    from diffusers import DiffusionPipeline

    folder = DiffusionPipeline.download(name)
    variant = variant_on_the_hub(name) if lacks_weights(Path(folder)) else None
    return str(folder if variant is None else DiffusionPipeline.download(name, variant=variant))


def _json_files(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json"])


def _downloaded(name: str, download: Callable[[str], str]) -> Path:
    from huggingface_hub import errors

    page = _PAGE.format(name)
    try:
        return Path(download(name))
    except Exception as error:
        cause = _cause(error, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError))
        if isinstance(cause, errors.GatedRepoError):
            how = f"accept its terms at {page}, then run `hf auth login`"
            raise _error("a model you may have", f"{name!r}, which is gated: {how}") from None
        if isinstance(cause, errors.RepositoryNotFoundError):
            how = f"see {page}; if it is private, run `hf auth login`"
            raise _error("a model that exists", f"{name!r}: {how}") from None
        if isinstance(error, (OSError, ConnectionError)) or cause is not None:
            brief = textwrap.shorten(str(error), 200, placeholder=" ...")
            how = "give the folder of a copy, or log in with `hf auth login` where it is private"
            got = f"{name!r} ({page}) and no way to it: {brief}"
            raise _error("a model that is here or can be downloaded", got, how) from None
        raise


def _cause(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first of these kinds among an error and what led to it."""
    while error is not None:
        if isinstance(error, kinds):
            return error
        error = error.__cause__ or error.__context__
    return None

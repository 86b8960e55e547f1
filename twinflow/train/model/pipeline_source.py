"""`pipeline_folder()`, `configurations()`: the diffusers pipeline that a run starts from, on this machine."""

import textwrap
from collections.abc import Callable
from pathlib import Path

_WHERE = "train: pretrained_model_name_or_path must be"
_PAGE = "https://huggingface.co/{}"


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
            raise ValueError(f"{_WHERE} a diffusers pipeline, got {path} without model_index.json")
        return path
    if path.is_file():
        raise ValueError(f"{_WHERE} a pipeline's folder or a hub name, got the file {path}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{_WHERE} a folder that exists or a hub name as owner/name, got {name!r}")
    return None


def _pipeline(name: str) -> str:
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.download(name))


def _json_files(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json"])


def _downloaded(name: str, download: Callable[[str], str]) -> Path:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = _PAGE.format(name)
    try:
        return Path(download(name))
    except Exception as error:
        found = _cause(error, (GatedRepoError, RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError))
        if isinstance(found, GatedRepoError):
            raise ValueError(
                f"{_WHERE} a model you may have, got {name!r}, which is gated: accept its terms at {page}, then run "
                "`hf auth login`"
            ) from None
        if isinstance(found, RepositoryNotFoundError):
            raise ValueError(
                f"{_WHERE} a model that exists, got {name!r}: see {page}; if it is private, run `hf auth login`"
            ) from None
        if isinstance(error, (OSError, ConnectionError)) or found is not None:
            brief = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise ValueError(
                f"{_WHERE} a model that is here or can be downloaded, got {name!r} ({page}) and no way to it: {brief}; "
                "give the folder of a copy, or log in with `hf auth login` where it is private"
            ) from None
        raise


def _cause(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first of these kinds among an error and what led to it."""
    while error is not None:
        if isinstance(error, kinds):
            return error
        error = error.__cause__ or error.__context__
    return None

"""`checkpoint_to_resume()`: where a run goes on, or why it may not."""

from pathlib import Path

from twinflow.train.checkpoint.checkpoint import latest_checkpoint
from twinflow.train.config.describe import changed
from twinflow.train.config.resolve import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings


def checkpoint_to_resume(settings: TrainSettings, complaints: list[str]) -> Path | None:
    """The checkpoint that a run goes on from; None: it begins.

    Args:
        settings: of the run, as it is asked for now.
        complaints: gets a line for each newer checkpoint that is damaged.

    Raises:
        ValueError: settings that would make it another run, checkpoints where it is to begin, or no such folder.
    """
    run, asked = RunFolder(settings.output_dir), settings.resume_from_checkpoint
    if asked == "no":
        found = latest_checkpoint(run.root)
        if found is not None:
            raise ValueError(
                f"train: output_dir must have no checkpoints where resume_from_checkpoint is no, got {found}; choose "
                "another folder or remove them"
            )
        return None
    if asked == "latest":
        found = latest_checkpoint(run.root, complaints)
        begun = run
    else:
        found = Path(asked).expanduser()
        if not found.is_dir():
            raise ValueError(f"train: resume_from_checkpoint must be latest, no or a folder, got {asked!r}")
        begun = RunFolder(found.absolute().parent)
    if found is not None and begun.config.is_file():
        differences = changed(read_config(begun.config, {}), settings)
        if differences:
            raise ValueError(
                f"train: a run must go on with what it began with in {begun.root}, got other settings: "
                f"{'; '.join(differences)}; set them back, or choose another output_dir"
            )
    return found

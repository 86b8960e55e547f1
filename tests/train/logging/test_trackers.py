"""TensorBoard and wandb: what is sent is there, read back from their own files, after a resume as well."""

import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from accelerate.state import AcceleratorState, PartialState
from helpers.looked_at_runs import PROMPTS, records, samples, start
from PIL import Image

from twinflow.train import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.logging.trackers import SCATTER_STEPS, Trackers, scalars
from twinflow.train.logging.trajectory import COLOURS, TITLE, Trajectory, figure

STEPS = 20


@pytest.fixture(autouse=True, scope="module")
def accelerate_state():
    """The processes that accelerate's trackers ask about, as a run has made them."""
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def measured():
    return [start(0), *records(STEPS)]


def settings(run: RunFolder, report_to: str):
    given = {"pretrained_model_name_or_path": "model", "output_dir": str(run.root), "report_to": report_to,
             "tracker_run_name": "a run"}  # fmt: skip
    return read_config(None, given)


def events(run: RunFolder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.logs), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def wandb_records(folder: Path) -> list:
    """The protocol buffers of wandb's offline file: blocks of 32 KiB, in them pieces with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def history(folder: Path) -> list[dict]:
    rows = [record.history for record in wandb_records(folder) if record.HasField("history")]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item} for row in rows]


def test_tensorboard_has_every_value(tmp_path, measured):
    run = RunFolder(tmp_path)
    tracker = Trackers(settings(run, "tensorboard"), run)
    tracker.log(measured)
    tracker.images(run.samples_at(None), samples(run, None, "base", (30,)))
    tracker.images(run.samples_at(STEPS), samples(run, STEPS))
    tracker.close(), tracker.close()
    found = events(run)
    for name in ("loss/total", "loss/rcgm", "optimizer/grad_norm", "optimizer/learning_rate", "speed/s_per_step",
                 "speed/rows_per_s", "evaluation/loss"):  # fmt: skip
        expected = [(r["step"], np.float32(scalars(r)[name])) for r in measured if name in scalars(r)]
        assert [(e.step, np.float32(e.value)) for e in found.Scalars(name)] == expected and expected, name
    assert "memory/peak_gb" not in found.Tags()["scalars"], "there is none without CUDA"
    assert [image.step for image in found.Images("samples/ema")] == [STEPS]
    assert [image.step for image in found.Images("samples/base")] == [0]
    (text,) = found.Tensors("samples/ema/text_summary")
    assert PROMPTS[1].format(1) in text.tensor_proto.string_val[0].decode() and "seed 42" in str(text.tensor_proto)
    assert [image.step for image in found.Images("trajectory")] == [STEPS]


def test_tensorboard_goes_on_after_the_checkpoint(tmp_path, measured):
    """The values of steps that are taken again take the place of the old ones."""
    run = RunFolder(tmp_path)
    for after in (0, 10):
        tracker = Trackers(settings(run, "tensorboard"), run, after)
        tracker.log([{**r, "loss": r["loss"] + after} for r in measured if r["step"] > after])
        tracker.close()
    steps = [r for r in measured if r["kind"] == "step"]
    expected = [(r["step"], np.float32(r["loss"] + 10 * (r["step"] > 10))) for r in steps]
    assert [(e.step, np.float32(e.value)) for e in events(run).Scalars("loss/total")] == expected


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory, measured):
    """Twice the same run, offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run = RunFolder(tmp_path_factory.mktemp("run"))
        for after in (0, 10):
            tracker = Trackers(settings(run, "wandb"), run, after)
            tracker.log([r for r in measured if r["step"] > after])
            tracker.images(run.samples_at(after + 1), samples(run, after + 1))
            tracker.close(), tracker.close()
            time.sleep(1.0 - after / 10)  # wandb names its folders by the second
        wandb.teardown()  # as at the end of a process: its service writes the last bytes
    return run


def test_wandb_has_every_value_and_the_same_run_goes_on(wandb_run, measured):
    folders = sorted((wandb_run.root / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    runs = [record.run for folder in folders for record in wandb_records(folder) if record.HasField("run")]
    identity = wandb_run.wandb_id.read_text().strip()
    assert len(folders) == 2 and {run.run_id for run in runs} == {identity} and runs[0].display_name == "a run"
    found = sorted((row for folder in folders for row in history(folder)), key=lambda row: row["_timestamp"])
    for name in ("loss/total", "loss/rcgm", "optimizer/grad_norm", "speed/rows_per_s", "evaluation/loss"):
        expected = [(r["step"], scalars(r)[name]) for a in (0, 10) for r in measured
                    if name in scalars(r) and r["step"] > a]  # fmt: skip
        assert [(row["global_step"], row[name]) for row in found if name in row] == expected and expected, name
    captions = [row["samples/ema.captions"] if "samples/ema.captions" in row else row["samples/ema"]["captions"]
                for row in found if any(key.startswith("samples/ema") for key in row)]  # fmt: skip
    assert len(captions) == 2 and PROMPTS[0].format(0) in captions[0][0] and "1 step," in captions[0][0]


def test_the_scatter_in_wandb_has_both_signs(wandb_run, measured):
    tables = [json.loads(path.read_text()) for path in (wandb_run.root / "wandb").rglob("*.table.json")]
    assert len(tables) == 2
    table = max(tables, key=lambda table: len(table["data"]))
    assert table["columns"] == ["global_step", "sigma", "r", "time_sign"]
    pairs = [(r["step"], t, after) for r in measured for t, after in r.get("trajectory", ())]
    expected = sorted([step, abs(t), abs(r), -1 if t < 0 else 1] for step, t, r in pairs)
    assert table["data"] == expected and {row[3] for row in expected} == {1, -1}
    config = [record for path in (wandb_run.root / "wandb").glob("offline-run-*") for record in wandb_records(path)]
    assert any(TITLE in str(record) for record in config)


def test_the_figure_has_both_colours_and_the_title_says_what_it_is(measured):
    assert TITLE.endswith("(experimental/theory unverified)")
    trajectory = Trajectory()
    trajectory.add(measured)
    for kept in ((1, -1), (1,), (-1,)):
        picture = figure(point for point in trajectory.points if point.time_sign in kept).astype(int)
        for sign, colour in COLOURS.items():
            wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
            shown = (abs(0.5 * np.array(wanted) + 127.5 - picture).max(-1) < 12).sum()
            assert shown > 60 if sign in kept else shown < 10, (kept, sign, shown)


def test_figures_are_drawn_once_in_many_steps_and_never_without_twinflow(tmp_path):
    record = {"kind": "step", "loss": 1.0, "terms": {}, "trajectory": [[0.5, 0.25], [-0.5, -0.5]]}
    for name, pairs in (("with", record["trajectory"]), ("without", [])):
        run = RunFolder(tmp_path / name)
        tracker = Trackers(settings(run, "tensorboard"), run)
        for first in range(1, 2 * SCATTER_STEPS + 101, 10):
            tracker.log([{**record, "trajectory": pairs, "step": step} for step in range(first, first + 10)])
        tracker.close()
        tags = events(run).Tags()["images"]
        drawn = [image.step for image in events(run).Images("trajectory")] if tags else []
        assert drawn == ([SCATTER_STEPS, 2 * SCATTER_STEPS, 2 * SCATTER_STEPS + 100] if pairs else []), name


def test_a_long_trajectory_is_sampled_fairly():
    """Rows of a step have fixed roles: every k-th point would be one role's."""
    trajectory = Trajectory(most=400)
    trajectory.add({"step": step, "trajectory": [[0.1, 0], [0.2, 0], [0.3, 0], [-0.4, -0.4]]} for step in range(1000))
    points = trajectory.points
    assert trajectory.seen == 4000 and len(points) == 400 and points == sorted(points)
    assert 70 < sum(point.time_sign < 0 for point in points) < 130
    assert 140 < sum(point.global_step < 500 for point in points) < 260
    again = Trajectory(most=400)
    again.add({"step": step, "trajectory": [[0.1, 0], [0.2, 0], [0.3, 0], [-0.4, -0.4]]} for step in range(1000))
    assert again.points == points


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_said_before_anything_is_written(tmp_path, monkeypatch, name):
    """A folder of its name, such as wandb leaves where it runs, is not the library."""
    kept = [path for path in sys.path if not (Path(path or ".") / name).is_dir()]
    (tmp_path / "work" / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*kept, str(tmp_path / "work")])
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^train: report_to must name .*, got {name}: pip install {name}$"):
        Trackers(settings(run, name), run)
    assert not run.root.exists()


def test_no_account_in_wandb_is_a_line(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path)), monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = RunFolder(tmp_path / "run")
    wandb.teardown()  # it reads its environment once
    with pytest.raises(ValueError, match=r"^train: report_to wandb must have an account \(`wandb login`, ") as raised:
        Trackers(settings(run, "wandb"), run)
    wandb.teardown()
    assert "\n" not in str(raised.value) and not run.wandb_id.exists()


def test_nothing_is_asked_for_by_default(tmp_path):
    Trackers(settings(RunFolder(tmp_path), "none"), RunFolder(tmp_path)).close()
    assert not list(tmp_path.iterdir())


def test_images_are_no_larger_than_a_board_needs(tmp_path):
    run = RunFolder(tmp_path)
    record = samples(run, 5)
    Image.new("L", (3000, 1500), 50).save(run.samples_at(5) / "grid.png")
    tracker = Trackers(settings(run, "tensorboard"), run)
    tracker.images(run.samples_at(5), record)
    tracker.close()
    (image,) = events(run).Images("samples/ema")
    assert (image.width, image.height) == (2048, 1024)

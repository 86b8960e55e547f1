"""The report's page: what is on it, that nothing from a file becomes markup, and runs of which much is missing."""

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.looked_at_runs import PROMPTS, samples, start, whole_run
from helpers.train_runs import read_metrics
from PIL import Image

from twinflow.report import write_report
from twinflow.train import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.logging.metrics_file import append_records

STEPS = 40
HOSTILE = """</script></style></title>--><x-evil onload="1">&amp;"'`\u2028<!--<script>"""


class Page(HTMLParser):
    """Elements, their texts, and what the scripts are given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.changed: list[str] = []
        self._open: list[tuple[str, dict]] = []
        self.feed(text)
        self.data = json.loads(self.texts["script"][0])
        self.plain = " ".join(
            text for tag, texts in self.texts.items() if tag not in ("script", "style") for text in texts
        )

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "input", "img"):
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self._open:
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open:
            tag, _ = self._open[-1]
            self.texts.setdefault(tag, []).append(data)
            if tag == "th" and any(attrs.get("class") == "changed" for _, attrs in self._open):
                self.changed.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("whole") / "run", STEPS)


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run.root, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    return RunFolder(tmp_path / "run")


def page_of(run: RunFolder) -> Page:
    return Page(write_report(run).read_text())


def test_one_page_with_everything(run):
    path = write_report(run)
    assert path == run.report and path.stat().st_size < 1_000_000
    assert sorted(p.name for p in run.root.iterdir()) == [
        "config.json", "environment.json", "metrics.jsonl", "report.html", "samples"]  # fmt: skip
    page = Page(path.read_text())
    heads = ["Samples", "Loss", "Progress", "Trajectory: sigma against r (experimental/theory unverified)", "Config",
             "Environment"]  # fmt: skip
    assert page.texts["h2"] == heads and page.texts["h1"] == ["run"]
    records = [r for r in read_metrics(run.metrics).records if r["kind"] == "step"]
    losses = page.data["run"]["columns"]["loss"]["mean"]
    assert losses == [float(f"{r['loss']:.4g}") for r in records] and page.data["run"]["last"] == [*range(1, STEPS + 1)]
    assert page.data["run"]["resumes"] == [STEPS // 2] and f"resumed after step {STEPS // 2}" in page.plain
    assert {chart["id"] for chart in page.data["charts"]} == {"loss", "norm", "rate", "time"}
    assert {dot[3] for dot in page.data["scatter"]["points"]} == {1, -1}
    assert "Step 40 of 40" in page.plain and "not measured without CUDA" in page.plain and "torch" in page.texts["th"]


def test_settings_that_are_not_the_default_are_marked(run):
    page = page_of(run)
    assert {"learning_rate", "use_ema", "recipe", "max_train_steps"} <= set(page.changed)
    assert not {"lora_rank", "adam_beta1", "estimate_order", "validation_seed"} & set(page.changed)
    assert "lora_rank" in page.texts["th"]
    assert f"{len(page.changed)} settings are not the default" in page.plain


def test_samples_are_a_table_over_time_beside_the_base_model(run):
    found = page_of(run).data["samples"]
    assert [(own["step"], own["weights"]) for own in found["sets"]] == [(20, "EMA weights"), (40, "EMA weights")]
    assert [row["prompt"] for row in found["rows"]] == [PROMPTS[0].format(0), PROMPTS[1].format(1)]
    assert [column["title"] for column in found["columns"]] == ["1 step", "2 steps"]
    assert [(column["title"], column["under"]) for column in found["baseColumns"]] == [
        ("Base model", "30 steps, guidance 0")]  # fmt: skip
    for step, images in ((None, found["base"]), (20, found["sets"][0]["images"])):
        for row, cells in enumerate(images):
            for cell, count in zip(cells, (30,) if step is None else (1, 2), strict=True):
                shown = Image.open(io.BytesIO(base64.b64decode(cell["uri"].partition(",")[2])))
                with Image.open(run.samples_at(step) / f"{row}-{count}.png") as drawn:
                    assert (np.asarray(shown.convert("RGB")) == np.asarray(drawn)).all(), "small images are exact"


def test_nothing_is_loaded_from_elsewhere(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(value.startswith(("data:", "#")) for _, name, value in page.attributes if name in ("src", "href"))
    style = page.texts["style"][0]
    assert "url(" not in style and "@import" not in style
    (policy,) = (
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "src" in value
    )
    digest = base64.b64encode(hashlib.sha256(page.texts["script"][1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and policy.endswith(f"script-src 'sha256-{digest}'")
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|import|innerHTML|eval|insertAdjacentHTML)\b", page.texts["script"][1]
    )


def test_texts_from_files_stay_texts(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    config = {"pretrained_model_name_or_path": HOSTILE, "tracker_run_name": HOSTILE, "validation_prompts": HOSTILE,
              "instance_data_dir": HOSTILE}  # fmt: skip
    run.config.write_text(read_config(None, config).to_json())
    run.environment.write_text(json.dumps({HOSTILE: HOSTILE, "more": {HOSTILE: [HOSTILE]}}))
    step = {"kind": "step", "step": 1, "loss": 1.0, "terms": {HOSTILE: 1.0}, "trajectory": [[0.5, 0.1]]}
    append_records(run.metrics, [{**start(0), "at": HOSTILE}, step])
    record = samples(run, 1)
    for image in record["images"]:
        image |= {"prompt": HOSTILE, "style": HOSTILE}
    (run.samples_at(1) / "samples.json").write_text(json.dumps({**record, "weights": HOSTILE}))
    (run.samples / f"a{HOSTILE.replace('/', '')}").mkdir()
    text = write_report(run).read_text()
    page = Page(text)
    given = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(given) == page.data and not set("<>&") & set(given), "`</script x` ends a script as well"
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1 and "x-evil" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.texts["h1"] and page.data["samples"]["rows"][0]["prompt"] == HOSTILE
    assert page.data["samples"]["sets"][0]["weights"] == HOSTILE and HOSTILE in page.texts["td"]


MISSING = {
    "metrics.jsonl": "No step has been measured yet.", "config.json": "config.json does not exist",
    "environment.json": "environment.json does not exist", "samples": "No samples yet",
    "samples/base": None, "samples/step-000040": None,
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said(copied, name):
    path = copied.root / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(copied)
    assert MISSING[name] is None or MISSING[name] in page.plain
    assert len(page.texts["h2"]) == 6


def test_a_run_without_twinflow_evaluations_or_terms(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(read_config(None, {"pretrained_model_name_or_path": "model"}).to_json())
    step = {"kind": "step", "loss": 1.0, "terms": {"velocity": 1.0}, "trajectory": [], "peak_gb": 38.25}
    append_records(run.metrics, [start(0), *({**step, "step": k} for k in (1, 2))])
    page = page_of(run)
    assert (
        "TwinFlow is off" in page.plain and "No evaluation so far" in page.plain and "2 of 2,000, not f" in page.plain
    )
    assert "No samples yet: they are drawn every 500 steps" in page.plain and page.data["charts"][0]["points"] == []
    assert [chart["id"] for chart in page.data["charts"]] == ["loss", "memory"] and "38.2" in page.plain
    assert page.data["run"]["columns"]["peak_gb"]["mean"] == [38.25, 38.25]


def test_damage_is_counted_and_left_out(copied):
    with copied.metrics.open("ab") as file:
        file.write(b'{"kind": "step", "st\n\xff\n')
    copied.config.write_text('{"learning_rate": "much", "pretrained_model_name_or_path": "model"}')
    copied.environment.write_text("[1]")
    (copied.samples_at(40) / "samples.json").write_text('{"images": 3}')
    (copied.samples_at(20) / "0-1.png").write_bytes(b"no picture")
    page = page_of(copied)
    told = page.texts["li"]
    assert any(text == "2 lines of metrics.jsonl are damaged and left out" for text in told)
    for part in ("samples/step-000040 is left out", "config.json is shown as it stands: train: learning_rate must be",
                 "environment.json must hold an object, got a list"):  # fmt: skip
        assert any(text.startswith(part) for text in told), part
    assert "much" in page.texts["td"] and len(page.data["run"]["last"]) == STEPS
    assert page.data["samples"]["sets"][0]["images"][0][0]["uri"] is None


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname", "sub/a.png", "link.png"])
def test_no_file_from_outside_is_shown(copied, name):
    """A run's folder may come from a stranger, and the page go to one."""
    secret = copied.root.parent / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    (copied.samples_at(40) / "link.png").symlink_to(secret)
    path = copied.samples_at(40) / "samples.json"
    record = json.loads(path.read_text())
    record["images"][0]["file"] = name
    path.write_text(json.dumps(record))
    page = page_of(copied)
    assert [own["step"] for own in page.data["samples"]["sets"]] == [20]
    assert any(name in text and text.startswith("samples/step-000040 is left out") for text in page.texts["li"])


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "a file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, what in (("folder", "without either"), ("a file", "which is a file"), ("nothing", "does not exist")):
        with pytest.raises(ValueError, match=r"^write_report: run must be the folder of a run, .*, got ") as raised:
            write_report(RunFolder(tmp_path / name))
        assert str(raised.value).endswith(what) and name in str(raised.value)
    assert not list((tmp_path / "folder").iterdir())


def test_the_page_goes_where_it_is_asked_to_or_nowhere(copied, tmp_path, monkeypatch):
    to = tmp_path / "other.html"
    assert write_report(copied, to) == to and not copied.report.exists()
    for bad, what in ((tmp_path, "a folder"), (tmp_path / "no" / "x.html", "in a folder that does not exist")):
        with pytest.raises(
            ValueError, match=rf"^write_report: to must be a file in a folder that exists, got .*, {what}$"
        ):
            write_report(copied, bad)
    before = to.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_report(copied, to)
    assert to.read_text() == before and sorted(p.name for p in tmp_path.iterdir()) == ["other.html", "run"]

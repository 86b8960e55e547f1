"""Options as people type them: every spelling, lists and switches, and a line for each mistake."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from twinflow.cli import COMMANDS, main
from twinflow.cli.parser import Parser
from twinflow.cli.train import add_options, settings_from
from twinflow.train import read_config
from twinflow.train.config import simpletuner
from twinflow.train.config.resolve import ALIASES
from twinflow.train.config.settings import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"pretrained_model_name_or_path": "some/model"}


def parsed(*words, command=add_options):
    parser = Parser(prog="twinflow train")
    command(parser)
    options = parser.parse_args(words)
    parser.settle(options, words)
    return options


def settings(*words):
    return settings_from(parsed("--pretrained_model_name_or_path", "some/model", *words))


def test_no_help_waits_for_torch():
    """All of them in one interpreter; and what they import takes well under a second."""
    code = (
        "import sys\nfrom twinflow.cli import COMMANDS, main\nfor name in ['', *COMMANDS]:\n    try:\n"
        "        main([name, '--help'] if name else ['--help'])\n    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'transformers', 'matplotlib', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("usage: twinflow") == len(COMMANDS) + 1


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_a_help_page_fits_its_terminal_and_has_examples(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        main([name, "--help"] if name else ["--help"])
    page = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, page.split("\n"))) <= columns
    text = " ".join(page.split())
    assert "--debug" in text and "examples: twinflow" in text
    assert not {"(default: None)", "(default: [])", "(default: False)", "==SUPPRESS=="} & {*page.split("  ")}
    for command, purpose in COMMANDS.items() if not name else ():
        assert f"{command} {purpose[:20]}" in text


def test_the_help_of_training_has_units_and_defaults_and_no_second_spellings():
    parser = Parser(prog="twinflow train")
    add_options(parser)
    text = " ".join(parser.format_help().split())
    assert "usage: twinflow train [CONFIG] [--OPTION VALUE ...]" in text
    assert "pixels: edge of a square of an image's area (default: 1024)" in text and "(default: 0.0001)" in text
    assert "--lr_warmup_steps N steps over which the rate rises from 0 (default: 0)" in text
    assert "--learning-rate" not in text and "distillation_method" not in text


def test_every_spelling_of_every_option_is_a_flag():
    spellings = [*OPTIONS, *ALIASES, *simpletuner.OPTIONS]
    assert len(spellings) == len(set(spellings))
    for name in spellings:
        for spelled in {name, name.replace("_", "-")}:
            options = vars(parsed(f"--{spelled}=7"))
            assert options[ALIASES.get(name, name)] in ("7", ["7"])


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"pretrained_model_name_or_path": "a/b", "use_ema": true, "twinflow_enabled": true, "seed": 3}')
    for flags in (["--learning_rate", "2e-4"], ["--learning-rate=2e-4"], ["--lr", "2e-4"]):
        found = settings_from(parsed(str(path), *flags, "--twinflow-estimate-order", "3", "--use_ema=false",
                                     "--twinflow_allow_no_ema_teacher"))  # fmt: skip
        assert found.learning_rate == 2e-4 and found.twinflow.estimate_order == 3 and not found.use_ema
        assert found.twinflow_options["twinflow_allow_no_ema_teacher"] is True and found.seed == 3
    assert settings_from(parsed(str(path))) == read_config(path, {})
    assert read_config(path, {"use_ema": True, "learning_rate": ""}).learning_rate == 1e-4
    assert settings_from(parsed(str(path), "--twinflow", '{"loss": "barron"}')).twinflow.loss == "barron"


@pytest.mark.parametrize("words", [
    ["--validation_prompts", "a cat", "a dog"], ["--validation-prompts", "a cat", "--validation_prompts", "a dog"],
    ["--validation_prompt=a cat", "--validation_prompts", "a dog"], ["--validation_prompts", "a cat", "a dog", "--lr=1"]
])  # fmt: skip
def test_a_list_takes_several_words_and_may_be_repeated(words):
    assert settings(*words).validation_prompts == ("a cat", "a dog")
    assert settings("--lora_layers", "to_q", "to_k").lora_layers == ("to_q", "to_k")


@pytest.mark.parametrize("words, values", [
    (["--validation_prompts", "a", "b", "c.json"], {"validation_prompts": ["a", "b"]}),
    (["--validation_prompts", "a", "c.json", "--validation_prompts", "b"], {"validation_prompts": ["a", "b"]}),
    (["--use_ema", "c.json"], {"use_ema": True}), (["--use_ema", "c.json", "--lr", "1"], {"use_ema": True}),
    (["c.json", "--validation_prompts", "a", "b.json"], {"validation_prompts": ["a", "b.json"]}),
])  # fmt: skip
def test_a_config_may_stand_after_a_list_or_a_switch(words, values):
    options = vars(parsed(*words))
    assert options["config"] == Path("c.json") and values.items() <= options.items()


def test_prompts_of_a_sample_and_its_run_in_any_order(tmp_path):
    from twinflow.cli.sample import add_options as command

    run = str(tmp_path)
    for words in (["--prompt", "a", "b", run], [run, "--prompt", "a", "b"], ["--prompt", "a", run, "--prompt", "b"],
                  ["--prompt", "a", "--prompt", "b", "--", run]):  # fmt: skip
        options = parsed(*words, command=command)
        assert (options.source, options.prompt) == (tmp_path, ["a", "b"]), words


@pytest.mark.parametrize("command, words, names", [
    ("train", ["~/c.json"], ["config"]), ("export", ["~/run", "--out=~/x", "--checkpoint=~/c", "--model=~/m"],
    ["run_folder", "out", "checkpoint", "model"]), ("report", ["~/run", "--out=~/x"], ["run_folder", "out"]),
    ("sample", ["~", "--out=~/x", "--prompts-file=~/p", "--model=~/m"], ["source", "out", "prompts_file", "model"]),
    ("plan", ["--model=sd3", "--json=~/x", "--png=~/y"], ["json", "png"]),
])  # fmt: skip
def test_the_home_folder_in_every_path(command, words, names, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = vars(parsed(*words, command=import_module(f"twinflow.cli.{command}").add_options))
    for name in names:
        assert str(options[name]).startswith(str(tmp_path)), name


def test_the_debug_of_the_whole_command_line_is_no_option_of_a_run():
    options = parsed(*(f"--{name}={value}" for name, value in MODEL.items()))
    options.debug = False
    assert settings_from(options) == read_config(None, MODEL)
    assert settings("--debug").debug is True


@pytest.mark.parametrize("words, message", [
    ([], "twinflow: the following arguments are required: COMMAND; `twinflow --help` shows all"),
    (["plam"], "twinflow: there is no command 'plam'; did you mean 'plan'?"),
    (["zzz"], "twinflow: there is no command 'zzz'; `twinflow --help` shows all"),
    (["sample", "x", "--promt", "y"], "twinflow sample: there is no option '--promt'; did you mean --prompt?"),
    (["export", "x", "--form", "y"], "twinflow export: there is no option '--form'; did you mean --format?"),
    (["export", "x", "y"], "twinflow export: there is no place for 'y'; `twinflow export --help` shows all"),
    (["export", "x", "--checkpoint", "a", "b"], "twinflow export: there is no place for 'b' after --checkpoint and"),
    (["sample", "x", "--steps", "two"], "twinflow sample: argument --steps: invalid int value: 'two'; "),
    (["sample", "--prompt", "x"], "twinflow sample: the following arguments are required: RUN_OR_EXPORT"),
    (["export", "x", "--ema", "--student"], "twinflow export: argument --student: not allowed with argument --ema"),
    (["train", "--lernrate", "3"], "twinflow train: there is no option '--lernrate'; did you mean --learning_rate?"),
    (["train", "--estimate_order", "1"], "twinflow train: there is no option '--estimate_order'; did you mean --twinf"),
    (["train", "--skip_b", "1"], "twinflow train: there is no option '--skip_b'; did you mean --skip_bad?"),
    (["train", "--seed", "1", "2"], "twinflow train: there is no place for '2' after --seed and its value"),
    (["train", "--report_to", "tensorboard", "wandb"], "twinflow train: there is no place for 'wandb' after --rep"),
    (["train", "config.yaml", "--seed", "1"], "twinflow train: config must be a JSON file that exists, got 'config"),
    (["train", "--learning_rate", "-1e-4"], "twinflow train: learning_rate must be a number in (0, 1000], got '-1e-4'"),
    (["train", "--batch_size", "4"], "twinflow train: there is no option '--batch_size'; did you mean --train_batch_s"),
    (["train", "--use_ema", "-no"], "twinflow train: there is no option '-no'; a value that begins with a dash is "),
    (["train", "--seed"], "twinflow train: argument --seed: expected one argument"),
    (["train", "--seed", "x"], "twinflow train: seed must be an integer from 0 to 4294967295, got 'x'"),
    (["train", "--use_ema", "maybe"], "twinflow train: use_ema must be true or false, got 'maybe'"),
])  # fmt: skip
def test_a_mistake_is_a_line_and_status_two(words, message, capsys):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert status == 2 and line.startswith(message)

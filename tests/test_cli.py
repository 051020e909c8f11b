"""The command line: help, exit codes, and one sentence for what the user did wrong."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from pretrain import cli
from pretrain.errors import EXIT_BAD_INPUT, EXIT_DONE
from tests.runs import pretrain, raw_config, write_config, write_corpus

COMMANDS = [
    "train",
    "plan",
    "export",
    "generate",
    "evaluate",
    "report",
    "profile",
    "doctor",
    "models",
    "checkpoint",
    "bench",
    "tokenizer",
    "data",
]


def run(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process."""
    monkeypatch.setattr("sys.argv", ["pretrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    shown = CliRunner().invoke(cli.app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output


def test_help_documents_the_exit_codes():
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert "2 bad input" in shown.output and "3 stopped by a" in shown.output


WRONG = {
    "unknown key": (["train.step=3"], "unknown key 'train.step'; did you mean 'steps'?"),
    "wrong type": (["train.steps=many"], "'train.steps' is 'many'"),
    "out of range": (["train.steps=0"], "'train.steps' is 0"),
    "not an override": (["train.steps"], "expected key=value"),
    "heads by tensor": (["parallel.tensor=3", "model.vocab_size=267"], "num_heads=4 is not divisible by parallel.te"),
    "layers by pipeline": (["parallel.pipeline=3"], "num_layers=2 is fewer than parallel.pipeline=3"),
    "zero 3 with pipeline": (["parallel.pipeline=2", "parallel.zero=3"], "zero=3 does not go with pipeline=2"),
    "processes": (["parallel.tensor=2"], "1 processes cannot hold parallel.tensor=2"),
    "data-parallel size": (["parallel.data=2"], "start 2 processes"),
    "batch": (["train.micro_batch_size=3"], "train.global_batch_size=4 is not a multiple"),
    "missing source": (["data.source.path=nowhere"], "nowhere"),
    "empty source": (["data.source.pattern=*.absent"], "*.absent"),
    "small vocabulary": (["model.vocab_size=256"], "model.vocab_size=256 is smaller than the vocabulary"),
    "missing checkpoint": (["--resume", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_sentence_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    overrides, expected = WRONG[case]
    code, _, error = run(capsys, monkeypatch, "train", write_config(tmp_path), *overrides)
    assert code == EXIT_BAD_INPUT
    lines = [line for line in error.splitlines() if line and "warn" not in line.lower()]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ") and expected in lines[0]
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("checkpoints/*"))


def test_missing_and_broken_files(tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.yaml").write_text("train: [unclosed")
    for arguments, expected in (
        (["train", tmp_path / "absent.yaml"], "no such configuration file"),
        (["train", tmp_path / "broken.yaml"], "is not valid YAML"),
        (["export", tmp_path / "no_run", tmp_path / "out"], "no_run"),
        (["report", tmp_path / "no_run"], "no_run"),
    ):
        code, _, error = run(capsys, monkeypatch, *arguments)
        assert code == EXIT_BAD_INPUT
        assert expected in error


def test_an_unknown_command_or_option_is_bad_input(capsys, monkeypatch):
    assert run(capsys, monkeypatch, "trian")[0] == EXIT_BAD_INPUT
    assert run(capsys, monkeypatch, "train", "--no-such-option")[0] == EXIT_BAD_INPUT


def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    code, _, error = run(capsys, monkeypatch, "train", config)
    assert code == EXIT_BAD_INPUT
    assert "run" in error and (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_plan_prints_json_without_torch(tmp_path):
    write_corpus(tmp_path / "corpus")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw_config(tmp_path)))
    planned = pretrain("plan", config, "--json")
    assert planned.returncode == EXIT_DONE, planned.stderr
    figures = json.loads(planned.stdout)
    assert figures["parameters"] == figures["active_parameters"] > 0
    assert figures["flops_per_token"] > 6 * 0.5 * figures["parameters"]
    assert figures["bytes_per_rank"] > 12 * figures["parameters"]


def test_models_lists_what_is_registered(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "models")
    assert code == EXIT_DONE
    assert "mlstm" in out and "swiglu" in out

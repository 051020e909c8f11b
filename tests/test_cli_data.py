"""``pretrain data prepare``, ``inspect`` and ``verify``, as they are typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from data.dataset import open_data
from pretrain import cli
from pretrain.config import load_data_config
from pretrain.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE
from tests.data.preparing import contents, write_texts
from tests.runs import environment


@pytest.fixture
def run(capsys, monkeypatch):
    """Exit code, standard output and standard error of a command, in this process."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["pretrain", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    texts = write_texts(tmp_path / "texts", size=2000)
    (texts / "story.txt").write_text("Es war einmal\x1b[2J ein Bär.\r\n[bold]Ende[/bold]")
    (texts / "again.txt").write_bytes((texts / "0001.txt").read_bytes())
    return _config(tmp_path / "config.yaml", source={"type": "text_files", "path": str(texts)})


def _config(path: Path, **settings: object) -> Path:
    data = {"tokenizer": {"type": "bytes"}, "sequence_length": 32, "held_out_fraction": 0.2} | settings
    path.write_text(yaml.safe_dump({"data": data}))
    return path


@pytest.mark.parametrize("command", ["prepare", "inspect", "verify"])
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(cli.app, ["data", command, "--help"])
    assert shown.exit_code == 0 and "Usage:" in shown.output


def test_prepare_verify_inspect_and_train_on_it(run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, error = run("prepare", config, out, "--shard-megabytes", 0.02, "--workers", 0)
    assert (code, error) == (EXIT_DONE, "")
    assert "1 documents repeat an earlier one" in printed and "they were left out" in printed
    # What it prints as a section opens, and is what was written.
    section = yaml.safe_load(printed.split("To train on it:")[1])
    (tmp_path / "section.yaml").write_text(yaml.safe_dump(section))
    data = open_data(load_data_config(tmp_path / "section.yaml", ()), seed=0)
    manifest = json.loads((out / "manifest.json").read_text())
    assert data.summary.train.counts.tokens == manifest["train"]["tokens"]
    assert len(manifest["shards"]) > 2

    before = contents(out)
    assert run("prepare", config, out, "--shard-megabytes", 0.02)[0] == EXIT_DONE
    assert contents(out) == before

    code, printed, error = run("verify", out)
    assert code == EXIT_DONE and f"{out} is as it was written: {len(before)} files" in printed

    for source in (out, tmp_path / "section.yaml"):
        code, printed, _ = run("inspect", source, "--json", "--documents", 100, "--characters", 8)
        (found,) = json.loads(printed)
        assert code == EXIT_DONE
        assert found["counts"]["train"]["tokens"] == manifest["train"]["tokens"]
        assert found["manifest"]["shards"] == len(manifest["shards"])
        assert len(found["documents"]) == manifest["train"]["documents"]
        assert found["documents"][0]["is_cut"] and len(found["documents"][0]["text"]) == 8
    assert run("inspect", out)[0] == EXIT_DONE


def test_documents_are_shown_as_they_are_but_steer_no_terminal(run, config: Path, tmp_path: Path) -> None:
    run("prepare", config, tmp_path / "out")
    shown = ["--documents", 100, "--characters", 60]
    for source in (tmp_path / "out", config):
        printed = "".join(run("inspect", source, "--split", split, *shown)[1] for split in ("train", "held_out"))
        assert "Es war einmal\\x1b[2J ein Bär.\n[bold]Ende[/bold]" in printed
        assert " [...]" in printed


def test_text_is_shown_without_tokenizing_all_of_it(run, config: Path, tmp_path: Path, monkeypatch) -> None:
    raw = json.loads(run("inspect", config, "--json", "--first", 2, "--documents", 2, "--characters", 5000)[1])
    monkeypatch.setattr("data.prepare.prepare_directory", None)
    assert raw[0]["counts"] is None and [document["number"] for document in raw[0]["documents"]] == [2, 3]
    cached = tmp_path / "cache"
    override = f"data.cache_directory={cached}"
    code, printed, _ = run("inspect", config, override)
    assert code == EXIT_DONE and "nobody has counted it" in printed and not cached.exists()
    monkeypatch.undo()
    open_data(load_data_config(config, [override]), seed=0)
    monkeypatch.setattr("sys.argv", [])
    code, printed, _ = run("inspect", config, override, "--json", "--first", 2, "--documents", 2, "--characters", 5000)
    (found,) = json.loads(printed)
    assert found["counts"]["train"]["documents"] > 20
    assert found["documents"] == raw[0]["documents"]


def test_a_mixture_is_prepared_source_by_source(run, tmp_path: Path) -> None:
    mixture = {
        name: {"source": {"type": "text_files", "path": str(write_texts(tmp_path / name, seed=seed))}, "weight": weight}
        for seed, (name, weight) in enumerate((("web", 3.0), ("code", 1.0)))
    }
    config = _config(tmp_path / "mixture.yaml", mixture=mixture)
    code, printed, _ = run("prepare", config, tmp_path / "out", "--keep-duplicates")
    assert code == EXIT_DONE and "they were kept" in printed
    section = yaml.safe_load(printed.split("To train on it:")[1])
    assert section["data"]["mixture"]["web"]["weight"] == 3.0
    (tmp_path / "section.yaml").write_text(yaml.safe_dump(section))
    prepared = open_data(load_data_config(tmp_path / "section.yaml", ()), seed=0)
    in_memory = open_data(load_data_config(config, ()), seed=0)
    assert prepared.fingerprint == in_memory.fingerprint
    assert np.array_equal(prepared.train.batch(range(16)).tokens, in_memory.train.batch(range(16)).tokens)
    code, printed, _ = run("inspect", tmp_path / "out", "--json", "--documents", 1)
    assert [found["name"] for found in json.loads(printed)] == ["code", "web"]
    assert run("verify", tmp_path / "out")[0] == EXIT_DONE
    (tmp_path / "web" / "0000.txt").unlink()
    code, _, error = run("prepare", config, tmp_path / "out", "--keep-duplicates")
    assert code == EXIT_BAD_INPUT and "data.mixture.web: " in error and "other files in data.source" in error


def test_what_is_tokenized_already(run, config: Path, tmp_path: Path) -> None:
    run("prepare", config, tmp_path / "out")
    prepared = ["data.source={type: prepared, path: " + str(tmp_path / "out") + "}"]
    with_source = _config(tmp_path / "prepared.yaml", source={"type": "prepared", "path": str(tmp_path / "out")})
    code, _, error = run("prepare", with_source, tmp_path / "again", *prepared)
    assert code == EXIT_BAD_INPUT and "data.source.type prepared is tokenized already" in error
    assert not (tmp_path / "again").exists()
    # A shard by itself is an indexed dataset like any other.
    prefix = tmp_path / "out" / "train-00000"
    code, _, error = run("inspect", prefix)
    assert code == EXIT_BAD_INPUT and "does not say which tokenizer wrote its ids" in error
    indexed = _config(tmp_path / "indexed.yaml", source={"type": "megatron_indexed", "path_prefix": str(prefix)})
    (found,) = json.loads(run("inspect", indexed, "--json", "--documents", 1)[1])
    assert found["manifest"] is None and found["counts"]["train"]["bytes"] is None
    assert run("inspect", indexed)[0] == EXIT_DONE
    code, printed, _ = run("verify", prefix)
    assert code == EXIT_DONE and "it has no checksums, so flipped bits cannot be found" in printed


def test_damage_is_exit_code_1_and_named(run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("prepare", config, out)
    path = out / "train-00000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (out / "held_out-00000.bin").write_bytes(b"")
    code, printed, error = run("verify", out)
    assert (code, printed) == (EXIT_FAILURE, "")
    assert error.startswith(f"error: {out} is damaged: ") and len(error.splitlines()) == 1
    assert f"{path} has changed since it was written" in error and "held_out-00000.bin has 0 bytes instead" in error


def bad_input(tmp_path: Path, config: Path) -> dict[str, tuple[list[object], str]]:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    return {
        "no config": (["prepare", tmp_path / "none.yaml", out], "no such configuration file"),
        "unknown key": (["prepare", config, out, "data.sorce=3"], "unknown key 'data.sorce'; did you mean 'source'?"),
        "no source": (["prepare", config, out, "data.source.path=nowhere"], "nowhere does not exist"),
        "a file": (["prepare", config, config], "config.yaml is a file; give a new directory"),
        "full of others": (["prepare", config, tmp_path], "holds other files (config.yaml"),
        "not writable": (["prepare", config, "/proc/none/out"], "/proc/none/out cannot be written"),
        "shards": (["prepare", config, out, "--shard-megabytes", 0], "shard-megabytes"),
        "workers": (["prepare", config, out, "--workers", -1], "workers"),
        "inspect nothing": (["inspect", empty], "has no manifest.json"),
        "inspect no config": (["inspect", tmp_path / "none.yaml"], "no such configuration file"),
        "overrides of a directory": (["inspect", empty, "data.sequence_length=3"], "overrides such as data.sequence_l"),
        "behind the last": (["inspect", config, "--first", 10_000], "so none is number 10000; show another split"),
        "verify nothing": (["verify", empty], "has no manifest.json"),
        "verify none": (["verify", tmp_path / "none"], "none does not exist"),
    }


def test_bad_input_is_one_sentence_and_exit_code_2(run, config: Path, tmp_path: Path) -> None:
    for case, (arguments, message) in bad_input(tmp_path, config).items():
        code, _, error = run(*arguments)
        assert code == EXIT_BAD_INPUT, case
        assert message in error, case
        assert not (tmp_path / "out").exists(), case


def test_behind_the_last_document(run, config: Path, tmp_path: Path) -> None:
    run("prepare", config, tmp_path / "out")
    code, _, error = run("inspect", tmp_path / "out", "--first", 1000, "--split", "held_out")
    assert code == EXIT_BAD_INPUT and "the held-out split has " in error and "but it is 1000" in error


def test_an_unfinished_directory(run, config: Path, tmp_path: Path) -> None:
    run("prepare", config, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").rename(tmp_path / "out" / "unfinished.json")
    for command in ("verify", "inspect"):
        code, _, error = run(command, tmp_path / "out")
        assert code == EXIT_BAD_INPUT and "is unfinished" in error


def test_a_full_disk_keeps_what_is_finished(config: Path, tmp_path: Path) -> None:
    # A limit on file size stands for a full disk: the writes themselves fail.
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from pretrain.cli import main; main()"
    )
    (tmp_path / "texts" / "z long.txt").write_text("x" * 50_000)
    arguments = ["data", "prepare", str(config), str(tmp_path / "out"), "--shard-megabytes", "0.02"]
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == EXIT_BAD_INPUT, ended.stderr
    assert "cannot be written (File too large)" in ended.stderr and "finished are kept" in ended.stderr
    assert list((tmp_path / "out").glob("shard-*.json")) and not list((tmp_path / "out").glob("*.partial-*"))


def test_the_commands_need_no_torch(config: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pretrain.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "assert 'torch' not in sys.modules"
    )
    out = str(tmp_path / "out")
    for arguments in (["prepare", str(config), out], ["verify", out], ["inspect", out], ["inspect", str(config)]):
        command = [sys.executable, "-c", program, "data", *arguments]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr

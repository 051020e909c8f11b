"""``pretrain tokenizer``: files that runs can use, tables, and one sentence for what the user did wrong."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer as LibraryTokenizer
from typer.testing import CliRunner, Result

from data.config import DataConfig
from data.dataset import open_data
from data.errors import DataError
from data.splitting import held_out
from data.tokenizers import training
from pretrain import cli, tokenizer_commands
from pretrain.config import load_data_config
from pretrain.errors import CheckError, InputError
from pretrain.observe.reading_progress import ReadingProgress
from pretrain.tokenizer_commands import tokenizer_named
from tests.runs import write_config, write_corpus

TRAIN = ["tokenizer", "train"]
BPE = ["--vocab-size", "300"]
SENTENCEPIECE = ["--vocab-size", "290", "--type", "sentencepiece"]
# The name of a file that is held out at the fraction of the configuration below.
HELD_OUT = next(name for number in range(100) if held_out(name := f"other {number}.txt", 0.2))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file with a data section alone, over sixty texts."""
    source = {"type": "text_files", "path": str(write_corpus(tmp_path / "corpus")), "pattern": "*.txt"}
    data = {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 32, "held_out_fraction": 0.2}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"data": data}))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def printed_section(result: Result) -> dict:
    """The YAML block at the end of what ``train`` prints."""
    return yaml.safe_load(result.stdout[result.stdout.index("data:\n") :])


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_commands_explain_themselves(command: str) -> None:
    shown = run("tokenizer", command, "--help")
    assert shown.exit_code == 0 and "--megabytes" in shown.output


@pytest.mark.parametrize(("name", "options"), [("new.json", BPE), ("new.model", SENTENCEPIECE)])
def test_a_run_reads_with_what_was_trained(config: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    out = tmp_path / "tokenizers" / name
    result = run(*TRAIN, config, out, *options)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stdout
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert out.stat().st_mode & 0o777 == 0o644
    assert "training on" in result.stderr
    section = printed_section(result)
    raw = yaml.safe_load(config.read_text())
    data = DataConfig.model_validate(raw["data"] | section["data"])
    opened = open_data(data, seed=0)
    assert f"vocabulary: {opened.tokenizer.vocab_size} ids" in result.stdout
    summary = opened.summary.held_out.counts
    found = summary.bytes / (summary.tokens - summary.documents)
    assert f"bytes per token: {found:.3f} on 0.0 MB of held-out text" in result.stdout


def test_only_the_training_split_is_read(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def train(documents: list[bytes], vocab_size: int, mark: str) -> bytes:
        seen.extend(documents)
        return training.train_byte_level_bpe(documents, vocab_size, mark)

    monkeypatch.setitem(tokenizer_commands._KINDS, "bpe", (train, *tokenizer_commands._KINDS["bpe"][1:]))
    result = run(*TRAIN, config, tmp_path / "new.json", *BPE, "--boundary-token", "<document>")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "corpus").iterdir() if not held_out(path.name, 0.2))
    assert seen == [(tmp_path / "corpus" / name).read_bytes() for name in names]
    assert printed_section(result)["data"]["tokenizer"]["boundary_token"] == "<document>"


def test_overrides_and_limits(config: Path, tmp_path: Path) -> None:
    options = ["data.held_out_fraction=0.4", *BPE, "--megabytes", "0.004", "--read-megabytes", "0.009"]
    result = run(*TRAIN, config, tmp_path / "new.json", *options)
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("trained on"))
    assert ", 0.00 MB, of the" in line and "with 0.01 MB in the training split" in line


def test_a_mixture_and_a_whole_run(config: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(config.read_text())["data"]
    mixture = {name: {"source": raw["source"], "weight": 1.0} for name in ("one", "two")}
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(yaml.safe_dump({"data": raw | {"source": None, "mixture": mixture}}))
    result = run(*TRAIN, mixed, tmp_path / "mixed.json", *BPE)
    assert result.exit_code == 0, result.output
    assert "one: trained on" in result.stdout and "two: trained on" in result.stdout
    (tmp_path / "run").mkdir()
    whole = write_config(tmp_path / "run")
    assert run(*TRAIN, whole, tmp_path / "whole.json", *BPE).exit_code == 0
    # The run's corpus is the same, and all of it was read.
    assert run(*TRAIN, config, tmp_path / "alone.json", *BPE).exit_code == 0
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


def test_little_text_is_said(config: Path, tmp_path: Path) -> None:
    result = run(*TRAIN, config, tmp_path / "new.json", "--vocab-size", 5000)
    assert "(the text gives no more than that of 5,000)" in result.stdout


def test_nothing_held_out_is_said(config: Path, tmp_path: Path) -> None:
    result = run(*TRAIN, config, tmp_path / "new.json", "data.held_out_fraction=1e-9", *BPE)
    assert result.exit_code == 0, result.output
    assert "bytes per token: not known, since no document with text is held out" in result.stdout
    compared = run("tokenizer", "compare", _with(config, tmp_path, held_out_fraction=1e-9))
    assert isinstance(compared.exception, DataError)
    assert "no document with text is held out at data.held_out_fraction 1e-09; raise" in str(compared.exception)


def _with(config: Path, directory: Path, **settings: object) -> Path:
    raw = yaml.safe_load(config.read_text())
    raw["data"] |= settings
    path = directory / "changed.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_what_is_there_is_never_overwritten(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new.json"
    out.write_text("precious")
    result = run(*TRAIN, config, out, *BPE)
    assert isinstance(result.exception, InputError) and f"{out} exists already" in str(result.exception)
    out.unlink()
    rename = Path.chmod

    def chmod(path: Path, mode: int) -> None:
        # Another process writes the same name while this one trains.
        out.write_text("precious")
        rename(path, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    result = run(*TRAIN, config, out, *BPE)
    assert isinstance(result.exception, InputError) and "exists already" in str(result.exception)
    assert out.read_text() == "precious"
    assert not list(tmp_path.glob(".new*"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["new.model", *BPE],
            InputError,
            "new.model, but a tokenizer of type bpe is a file .json; give, say, .*new.json",
        ),
        (["new", *SENTENCEPIECE], InputError, "is a file .model; give, say, .*new/tokenizer.model"),
        (["new.json", "--vocab-size", "200"], DataError, "vocabulary of 200 cannot hold the 256 bytes"),
        (["new.json", *BPE, "--boundary-token", "state"], DataError, "must not be a word that text may hold"),
        (["new.json", *BPE, "data.source.pathh=x"], InputError, "unknown key 'data.source.pathh'"),
        (["new.json", *BPE, "data.source.path=/nowhere"], DataError, "/nowhere does not exist"),
        (["corpus/000.txt/new.json", *BPE], InputError, "cannot be written .*give another place"),
    ],
)
def test_bad_input_is_one_sentence(config: Path, tmp_path: Path, arguments, error, message) -> None:
    result = run(*TRAIN, config, tmp_path / arguments[0], *arguments[1:])
    assert isinstance(result.exception, error), result.output
    assert "\n" not in str(result.exception)
    with pytest.raises(error, match=message):
        raise result.exception
    assert not list(tmp_path.rglob("*new*")) and not list(tmp_path.rglob("*.partial*"))


def test_options_out_of_range(config: Path, tmp_path: Path) -> None:
    for options in ([], ["--vocab-size", "many"], [*BPE, "--type", "words"], [*BPE, "--megabytes", "0"]):
        assert run(*TRAIN, config, tmp_path / "new.json", *options).exit_code == 2


def test_a_tokenizer_that_loses_text_is_not_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(documents: list[bytes], vocab_size: int, mark: str) -> bytes:
        library = LibraryTokenizer.from_str(training.train_byte_level_bpe(documents, vocab_size, mark).decode())
        description = json.loads(library.to_str())
        description["normalizer"] = {"type": "Lowercase"}
        return json.dumps(description).encode()

    (tmp_path / "corpus" / HELD_OUT).write_text("STATE")
    monkeypatch.setitem(tokenizer_commands._KINDS, "bpe", (train, *tokenizer_commands._KINDS["bpe"][1:]))
    result = run(*TRAIN, config, tmp_path / "new.json", *BPE)
    assert isinstance(result.exception, CheckError)
    assert "changes 1 of" in str(result.exception) and "nothing was written" in str(result.exception)
    assert not list(tmp_path.glob("*new*"))


def test_compare_prints_a_table_and_json(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")
    bpe, model = tmp_path / "new.json", tmp_path / "new.model"
    assert run(*TRAIN, config, bpe, *BPE).exit_code == run(*TRAIN, config, model, *SENTENCEPIECE).exit_code == 0
    others = ["hierarchical_bytes", bpe, model]
    table = run("tokenizer", "compare", config, *others)
    assert table.exit_code == 0, table.output
    assert "bytes/token" in table.stdout and "bytes/word" in table.stdout and table.stdout.count("exact") == 4
    result = run("tokenizer", "compare", config, *others, "--json")
    figures = json.loads(result.stdout)
    assert [figure["tokenizer"] for figure in figures] == ["bytes", "hierarchical_bytes", str(bpe), str(model)]
    texts = [path for path in sorted((tmp_path / "corpus").iterdir()) if held_out(path.name, 0.2)]
    assert {figure["bytes"] for figure in figures} == {sum(path.stat().st_size for path in texts)}
    assert [figure["vocab_size"] for figure in figures[:2]] == [257, 257]
    assert figures[1]["tokens"] == figures[0]["tokens"] == figures[0]["bytes"]
    assert figures[0]["bytes_per_word"] is None and 3 < figures[1]["bytes_per_word"] < 8
    assert all(figure["bytes_per_token"] > 1.5 for figure in figures[2:])
    assert all(figure["changed_documents"] == 0 < figure["encode_megabytes_per_second"] for figure in figures)


def test_compare_counts_documents_that_change(config: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus" / HELD_OUT).write_bytes(b"caf\xe9")
    bpe = tmp_path / "new.json"
    assert run(*TRAIN, config, bpe, *BPE).exit_code == 0
    table = run("tokenizer", "compare", config, bpe)
    assert "1 differ" in table.stdout and "bytes/word" not in table.stdout


def test_compare_on_a_part_of_the_text(config: Path) -> None:
    result = run("tokenizer", "compare", config, "--megabytes", "0.001", "--json")
    (figures,) = json.loads(result.stdout)
    assert 500 < figures["bytes"] <= 1000


def test_compare_names_the_tokenizer_that_is_wrong(config: Path, tmp_path: Path) -> None:
    bpe = tmp_path / "new.json"
    assert run(*TRAIN, config, bpe, *BPE, "--boundary-token", "<mine>").exit_code == 0
    result = run("tokenizer", "compare", config, bpe)
    assert isinstance(result.exception, DataError)
    assert f"tokenizer {bpe}: the tokenizer {bpe} has no token '<|endoftext|>'" in str(result.exception)
    assert str(result.exception).endswith("here it may stand behind the name, as in NAME=TOKEN")
    assert run("tokenizer", "compare", config, f"{bpe}=<mine>").exit_code == 0
    missing = run("tokenizer", "compare", config, tmp_path / "none.model")
    assert isinstance(missing.exception, DataError) and "none.model cannot be read" in str(missing.exception)


def test_names_on_the_command_line(tmp_path: Path) -> None:
    assert tokenizer_named("bytes").type == "bytes"
    assert tokenizer_named("hierarchical_bytes").type == "hierarchical_bytes"
    found = tokenizer_named("owner/name")
    assert (found.type, found.path, found.boundary_token) == ("huggingface", "owner/name", "<|endoftext|>")
    found = tokenizer_named("given.model=<eos>")
    assert (found.type, found.path, found.boundary_token) == ("sentencepiece", "given.model", "<eos>")
    assert tokenizer_named("given.model").boundary_token == "</s>"
    (tmp_path / "a=b").mkdir()
    assert tokenizer_named(f"{tmp_path}/a=b").path == f"{tmp_path}/a=b"


def test_a_section_that_ships_can_be_compared_on() -> None:
    path = Path(__file__).parents[1] / "configs/data/standard_library.yaml"
    assert load_data_config(path, ()).tokenizer.type == "bytes"
    result = run("tokenizer", "compare", path, "--megabytes", "0.2", "--read-megabytes", "4", "--json")
    assert json.loads(result.stdout)[0]["changed_documents"] == 0


def test_progress_prints_lines_where_there_is_no_terminal() -> None:
    stream, now = StringIO(), [0.0]
    with ReadingProgress(stream=stream, clock=lambda: now[0]) as progress:
        for size in range(4):
            now[0] += 6
            progress.read("web", size * 10**6)
        progress.begin("training")
    assert stream.getvalue().splitlines() == ["reading web: 1.0 MB", "reading web: 3.0 MB", "training"]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream, now = Terminal(), [0.0]
    with ReadingProgress(stream=stream, clock=lambda: now[0]) as progress:
        progress.read("web", 5 * 10**6)
        progress.read("web", 6 * 10**6)
        now[0] += 1
        progress.read("web", 7 * 10**6)
        progress.begin("training")
    shown = stream.getvalue()
    assert "reading web: 5.0 MB" in shown and "7.0 MB" in shown and "training" in shown and "6.0 MB" not in shown
    progress.close()

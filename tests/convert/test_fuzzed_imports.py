"""Whatever stands in a directory that is imported, there is a whole checkpoint afterwards or one clear error."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.checkpoint.commands import verify
from pretrain.convert import import_model
from pretrain.errors import CheckError, InputError
from tests.convert.native_models import CLASSES, add_tokenizer
from tests.fuzzing import JSON_VALUES, changed, fast_and_slow
from tests.runs import raw_config

CONFIG, INDEX, GENERATION = "config.json", "model.safetensors.index.json", "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VALUES = JSON_VALUES | st.sampled_from(["../secret", "/etc/passwd", "float16", "auto", 1e-300, 1e300])
# One of each layout; all classes in the slow test.
FEW = ["xlstm", "nemotron", "granite, experts and multipliers", "mistral"]


class Directories:
    """A directory to damage anew for each example, and the place where it is imported to."""

    def __init__(self, saved: Callable[[str], Path], place: Path) -> None:
        self.saved, self.place = saved, place
        self.damaged, self.output = place / "damaged", place / "imported"
        (place / "base.yaml").write_text(yaml.safe_dump({k: v for k, v in raw_config(place).items() if k != "model"}))

    def fresh(self, name: str) -> Path:
        for path in (self.damaged, self.output):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.saved(name), self.damaged)
        add_tokenizer(self.damaged, {"eos_token": "<|end|>"})
        (self.damaged / GENERATION).write_text('{"eos_token_id": 1, "max_length": 20, "temperature": 0.5}')
        return self.damaged

    def assert_a_clear_error_at_most(self, *, own_tokenizer: bool = False, check: bool = False) -> None:
        base = None if own_tokenizer else self.place / "base.yaml"
        before = {entry.name for entry in self.place.iterdir()}
        try:
            import_model(self.damaged, self.output, base=base, check=check)
        except (InputError, CheckError) as error:
            # Values may be of thousands of characters; what is said of them is for people. A comparison may fail too.
            assert 0 < len(str(error).encode()) < 20_000 and (check or isinstance(error, InputError))
            assert str(self.damaged) in str(error) or isinstance(error, CheckError)
            assert {entry.name for entry in self.place.iterdir()} == before
        else:
            assert verify(self.output)["step"] == 0


@pytest.fixture
def directories(saved: Callable[[str], Path], tmp_path: Path) -> Directories:
    return Directories(saved, tmp_path)


def fuzzed(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable], Callable]:
    chosen = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    return lambda check: chosen(given(*strategies)(check))


@fast_and_slow(24, 2000)
@pytest.mark.parametrize("file", [CONFIG, INDEX, *TOKENIZER_FILES])
def test_a_file_of_anything(file: str, examples: int, directories: Directories) -> None:
    @fuzzed(examples, st.sampled_from(FEW if examples < 100 else sorted(CLASSES)), st.data())
    def check(name: str, data: st.DataObject) -> None:
        path = directories.fresh(name) / file
        path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text()), VALUES))))
        directories.assert_a_clear_error_at_most(own_tokenizer=file in TOKENIZER_FILES)

    check()


@fast_and_slow(24, 2000)
def test_a_shard_with_a_header_of_anything(examples: int, directories: Directories) -> None:
    lengths = st.none() | st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])

    @fuzzed(examples, st.integers(0, 3), lengths, st.data())
    def check(which: int, claimed: int | None, data: st.DataObject) -> None:
        path = sorted(directories.fresh("mamba2").glob("model-*"))[which]
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = data.draw(changed(json.loads(content[8 : 8 + length]), VALUES))
        written = json.dumps(header).encode()
        claim = struct.pack("<Q", len(written) if claimed is None else claimed)
        path.write_bytes(claim + written + content[8 + length :])
        directories.assert_a_clear_error_at_most()

    check()


@fast_and_slow(24, 2000)
def test_files_of_any_bytes(examples: int, directories: Directories) -> None:
    files = st.sampled_from([CONFIG, INDEX, "shard", *TOKENIZER_FILES])

    @fuzzed(examples, files, st.floats(0, 1, exclude_max=True), st.binary(max_size=12), st.integers(0, 40))
    def check(file: str, place: float, inserted: bytes, removed: int) -> None:
        directory = directories.fresh("mamba2")
        path = next(directory.glob("model-00001-*")) if file == "shard" else directory / file
        content = path.read_bytes()
        at = int(place * len(content))
        path.write_bytes(content[:at] + inserted + content[at + removed :])
        directories.assert_a_clear_error_at_most(own_tokenizer=file in TOKENIZER_FILES)

    check()


@fast_and_slow(4, 400)
@pytest.mark.parametrize("file", [CONFIG, INDEX, GENERATION])
def test_what_the_comparison_reads_too(file: str, examples: int, directories: Directories) -> None:
    """Here ``transformers`` opens the directory itself, with files that an import else has no need of."""

    @fuzzed(examples, st.sampled_from(FEW if examples < 100 else sorted(CLASSES)), st.data())
    def check(name: str, data: st.DataObject) -> None:
        path = directories.fresh(name) / file
        path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text()), VALUES))))
        directories.assert_a_clear_error_at_most(check=True)

    check()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (GENERATION, '{"max_new_tokens": "many"}'),
        (INDEX, None),
    ],
    ids=["a number that is none", "an index that says nothing of itself"],
)
def test_what_only_transformers_stumbles_over(file: str, text: str | None, directories: Directories) -> None:
    path = directories.fresh("mamba2") / file
    path.write_text(text or json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    with pytest.raises(InputError, match=r"transformers does not load it as Mamba2ForCausalLM \(.*--no-check"):
        import_model(directories.damaged, directories.output, base=directories.place / "base.yaml")
    assert not directories.output.exists()
    directories.assert_a_clear_error_at_most()
    assert directories.output.exists()

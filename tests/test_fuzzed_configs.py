"""Whatever a configuration's text is, it is a configuration or one clear error that names the file, and soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.config import load_config
from pretrain.errors import InputError
from tests.fuzzing import JSON_VALUES, changed, fast_and_slow
from tests.runs import raw_config

WORDS = ["???", "${run.directory}", "${run}", "${nowhere}", "${", "${oc.env:NOWHERE}", "1e5", "mlstm", "bytes", "~"]


def load(path: Path, overrides: list[str]) -> None:
    try:
        load_config(path, overrides)
    except InputError as error:
        assert str(path) in str(error) or "override" in str(error)


@fast_and_slow(40, 3000)
def test_any_value_under_any_key(examples: int, tmp_path: Path) -> None:
    path, raw = tmp_path / "config.yaml", raw_config(tmp_path)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed(raw, JSON_VALUES | st.sampled_from(WORDS)))
    def check(mangled: Any) -> None:
        # JSON is YAML, and written many times as fast.
        path.write_text(json.dumps(mangled))
        load(path, [])

    check()


@fast_and_slow(40, 3000)
def test_any_change_of_the_text(examples: int, tmp_path: Path) -> None:
    path, text = tmp_path / "config.yaml", yaml.safe_dump(raw_config(tmp_path))
    letters = "{}[]:&*!|>-?%@`'\"#,\n \t~0123456789eE.+_xob$\x00\u2028é"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.integers(0, len(text) - 1), st.integers(0, 20), st.text(alphabet=st.sampled_from(letters), max_size=12))
    def check(place: int, removed: int, inserted: str) -> None:
        path.write_text(text[:place] + inserted + text[place + removed :])
        load(path, [])

    check()


@fast_and_slow(30, 2000)
def test_any_override(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path)))
    keys = st.sampled_from(["train.steps", "model.blocks", "data.source.path", "model.layers.0", "wandb"])
    values = st.text(max_size=8) | JSON_VALUES.map(json.dumps) | st.sampled_from(WORDS)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(keys | st.text(max_size=6), st.sampled_from(["=", "", "=="]), values)
    def check(key: str, separator: str, value: str) -> None:
        load(path, [key + separator + value])

    check()


# A few lines that stand for 2 to the power of 40 values.
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
REFERENCES = "".join(f'a{i}: "${{a{i + 1}}}${{a{i + 1}}}"\n' for i in range(40)) + "a40: x\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "more than 50,000 values"),
        (REFERENCES, "more than 16 references"),
        ("a: &a [*a]\n", "nested more than 50 deep"),
        ("[" * 3000, "nested more than 50 deep"),
        ("a: 2001-13-45\n", "not of the type that it seems to be of"),
        ("a: 2001-12-24\n", "'a' is a date in YAML's reading; put it in quotes"),
        ("a: !!bool x\n", "not of the type that it seems to be of"),
        ("a: !!timestamp x\n", "not of the type that it seems to be of"),
        ("a: 0x_\n", "not of the type that it seems to be of"),
        ("a: " + "9" * 5000, "not of the type that it seems to be of"),
        ("a: {1: x}\n", "the key a.1 is not text"),
        ("a: !!python/object/apply:os.mkdir [executed]\n", "could not determine a constructor"),
        ('base: "a\\0b"\n', "null byte"),
        ("base: /\n", "cannot be read as a text file"),
    ],
    ids=lambda value: value[:16].strip() if isinstance(value, str) else None,
)
def test_what_yaml_lets_people_write(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"], "it was executed"

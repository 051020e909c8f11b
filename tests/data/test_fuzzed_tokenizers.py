"""Whatever stands in a tokenizer's file, opening and using it ends in ids and text, or in one clear error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data.errors import DataError
from data.tokenizers import Tokenizer
from data.tokenizers.huggingface import byte_level_alphabet
from tests.data.test_tokenizers_hostile import LINES, open_file, sentencepiece_model
from tests.fuzzing import JSON_VALUES, changed, fast_and_slow

DOCUMENTS = [b"the state a b \n\xf0\x9f\x99\x82 \xff added <|end|> \xe2\x96\x81 <0x41>", b"", b" a"]
# Where sizes overflow, and where a library would make room for every id below.
VALUES = JSON_VALUES | st.sampled_from([2**22, 2**31, 2**32 - 1, ["a", float("nan")], [["t"], ["h"]]])


def byte_level() -> dict[str, Any]:
    library = LibraryTokenizer(models.BPE(vocab=byte_level_alphabet() | {"th": 256, "the": 257}, merges=[("t", "h")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    library.add_tokens(["added"])
    return json.loads(library.to_str())


def sentencepiece_style() -> dict[str, Any]:
    fallback = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces = [("<unk>", 0.0), *fallback, ("\u2581", -2.0), ("a", -2.0), ("\u2581a", -1.5)]
    library = LibraryTokenizer(models.Unigram(pieces, 0, True))
    library.normalizer, library.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<|end|>"])
    return json.loads(library.to_str())


KINDS: dict[str, Callable[[], dict[str, Any]]] = {"byte level": byte_level, "sentencepiece style": sentencepiece_style}


def changed_somewhere(sound: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Changes of the file, of its model, and of the vocabulary, which alone has most of the places."""
    model, large = sound["model"], ("vocab", "merges")
    settings_of_model = {key: value for key, value in model.items() if key not in large}
    kept = {key: value for key, value in model.items() if key in large}
    return st.one_of(
        changed({key: value for key, value in sound.items() if key != "model"}, VALUES).map(
            lambda rest: {**rest, "model": model}
        ),
        changed(settings_of_model, VALUES).map(lambda rest: {**sound, "model": {**kept, **rest}}),
        changed({key: model[key] for key in large if key in model}, VALUES).map(
            lambda rest: {**sound, "model": {**settings_of_model, **rest}}
        ),
        changed({"added_tokens": sound["added_tokens"]}, VALUES).map(lambda rest: {**sound, **rest}),
    )


def assert_a_clear_error_at_most(path: Path, mark: str) -> None:
    try:
        use_everything(open_file(path, mark))
    except DataError as error:
        assert "\n" not in str(error) and str(error).endswith(".") and str(error).encode()


def use_everything(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_byte_lengths()
    assert len(lengths) == tokenizer.vocab_size and (lengths >= 0).all() and tokenizer.fingerprint()
    for ids in tokenizer.encode_many(DOCUMENTS):
        assert (ids < tokenizer.vocab_size).all() and tokenizer.boundary_id not in ids
        assert isinstance(tokenizer.decode(ids), bytes)


@fast_and_slow(60, 5000)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_of_anything(kind: str, examples: int, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    sound = KINDS[kind]()
    path.write_text(json.dumps(sound))
    use_everything(open_file(path, "<|end|>"))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed_somewhere(sound))
    def check(mangled: Any) -> None:
        path.write_text(json.dumps(mangled))
        assert_a_clear_error_at_most(path, "<|end|>")

    check()


@fast_and_slow(30, 3000)
def test_a_tokenizer_json_of_any_bytes(examples: int, tmp_path: Path) -> None:
    path, content = tmp_path / "tokenizer.json", json.dumps(byte_level()).encode()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.floats(0, 1, exclude_max=True), st.binary(max_size=12), st.integers(0, 40))
    def check(place: float, inserted: bytes, removed: int) -> None:
        at = int(place * len(content))
        path.write_bytes(content[:at] + inserted + content[at + removed :])
        assert_a_clear_error_at_most(path, "<|end|>")

    check()


def before_text(part: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda sound: {**sound, "normalizer": part}


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    # The library would allocate room for every id below, and end the process where there is none.
    "an id of 2**31": (
        "byte level",
        lambda sound: {**sound, "model": sound["model"] | {"vocab": sound["model"]["vocab"] | {"the": 2**31}}},
        "has the id 2147483648, where at most 4194303 is expected",
    ),
    # It panics over these, which is no Exception in Python.
    "a merge of less than it begins with": (
        "byte level",
        lambda sound: {
            **sound,
            "model": sound["model"]
            | {"continuing_subword_prefix": "###", "merges": [["t", "h"]], "vocab": sound["model"]["vocab"] | {"t": 1}},
        },
        "is not a tokenizer.json",
    ),
    "a normalizer without an end": (
        "byte level",
        before_text({"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}),
        "cannot encode every text",
    ),
    "an expression that tries for ever": (
        "byte level",
        before_text({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        "cannot encode every text .*retry-limit",
    ),
    "a table that leads outside of itself": (
        "sentencepiece style",
        before_text({"type": "Precompiled", "precompiled_charsmap": "AAAAAAECAwQ="}),
        "cannot encode every text",
    ),
    "no token for the unknown": (
        "sentencepiece style",
        lambda sound: {**sound, "model": sound["model"] | {"unk_id": None, "byte_fallback": False}},
        "cannot encode every text .*unk_id",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_the_library_fails_over(case: str, tmp_path: Path) -> None:
    kind, change, message = HOSTILE[case]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(KINDS[kind]())))
    with pytest.raises(DataError, match=message):
        open_file(path, "<|end|>").encode("b" + "a" * 40 + "b \u00e9\u4e2d")


@pytest.fixture(scope="module")
def sound_models(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Byte pairs with bytes to fall back on, and likeliest pieces without."""
    directory = tmp_path_factory.mktemp("models")
    likeliest, of = io.BytesIO(), {"model_type": "unigram", "vocab_size": 50, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=likeliest, minloglevel=2, **of)
    return [sentencepiece_model(directory).read_bytes(), likeliest.getvalue()]


@fast_and_slow(60, 5000)
def test_a_sentencepiece_model_of_any_bytes(examples: int, sound_models: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "fuzzed.model"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(sound_models), st.floats(0, 1, exclude_max=True), st.binary(max_size=12), st.integers(0, 40))
    def check(content: bytes, place: float, inserted: bytes, removed: int) -> None:
        at = int(place * len(content))
        path.write_bytes(content[:at] + inserted + content[at + removed :])
        assert_a_clear_error_at_most(path, "</s>")

    check()


PIECE_TEXTS = st.text(max_size=6) | st.sampled_from(["", "<0x>", "<0xZZ>", "<0x00>", "</s>", "\u2581", "a" * 999, "\0"])


@fast_and_slow(60, 5000)
def test_a_sentencepiece_model_of_any_pieces(examples: int, sound_models: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "fuzzed.model"

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        model = ModelProto.FromString(data.draw(st.sampled_from(sound_models)))
        for _ in range(data.draw(st.integers(1, 4))):
            index = data.draw(st.integers(0, max(len(model.pieces) - 1, 0)))
            match (
                data.draw(st.sampled_from(["piece", "score", "type", "fewer", "map", "none"])) if model.pieces else ""
            ):
                case "piece":
                    model.pieces[index].piece = data.draw(PIECE_TEXTS)
                case "score":
                    model.pieces[index].score = data.draw(st.floats(width=32))
                case "type":
                    model.pieces[index].type = data.draw(st.integers(1, 6))
                case "fewer":
                    del model.pieces[index : index + data.draw(st.sampled_from([1, 5, 999]))]
                case "map":
                    model.normalizer_spec.precompiled_charsmap = data.draw(st.binary(max_size=64))
                case "none":
                    model.ClearField(data.draw(st.sampled_from(["trainer_spec", "normalizer_spec"])))
        path.write_bytes(model.SerializeToString())
        assert_a_clear_error_at_most(path, "</s>")

    check()


def test_pieces_that_are_no_text(sound_models: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "fuzzed.model").write_bytes(sound_models[0].replace(b"<0x41>", b"<0x\xff1>"))
    with pytest.raises(DataError, match="fuzzed.model is not a sentencepiece model .*utf-8"):
        open_file(tmp_path / "fuzzed.model", "</s>")

"""Tokenizers: exact round trips, no text becomes a mark, byte counts, errors that say how to mend them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from data.config import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from data.errors import DataError
from data.tokenizers import Tokenizer, base, open_tokenizer
from data.tokenizers.huggingface import byte_level_alphabet

BYTES = open_tokenizer(BytesTokenizer(type="bytes"))


def open_bpe(path: Path, boundary_token: str = "<|endoftext|>") -> Tokenizer:
    return open_tokenizer(HuggingFaceTokenizer(type="huggingface", path=str(path), boundary_token=boundary_token))


def open_sentencepiece(path: Path, boundary_token: str = "</s>") -> Tokenizer:
    return open_tokenizer(SentencePieceTokenizer(type="sentencepiece", path=str(path), boundary_token=boundary_token))


def test_bytes_round_trip(hostile_document: bytes) -> None:
    ids = BYTES.encode(hostile_document)
    assert ids.tolist() == list(hostile_document)
    assert BYTES.decode(ids) == hostile_document


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_round_trip_of_anything(content: bytes) -> None:
    assert BYTES.decode(BYTES.encode(content)) == content


@pytest.mark.parametrize(
    ("parallelism", "threads", "expected"),
    [("", "", 8), ("true", "", 8), ("1", "3", 3), ("", "99", 8), ("", "0", 8), ("false", "", 1), ("off", "3", 1)],
)
def test_threads(parallelism: str, threads: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "usable_cores", lambda: 8)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    assert base.tokenizing_threads() == expected


def test_bytes_vocabulary() -> None:
    assert (BYTES.vocab_size, BYTES.boundary_id) == (257, 256)
    assert BYTES.token_byte_lengths().tolist() == [1] * 256 + [0]
    assert BYTES.decode([256, 97, 256, 98]) == b"ab"
    assert BYTES.decode_text([0xE9, 97]) == "\ufffda"
    assert BYTES.encode("é").tolist() == [0xC3, 0xA9]


@pytest.mark.parametrize("outside", [-1, 257])
def test_decoding_an_id_outside_the_vocabulary(outside: int) -> None:
    with pytest.raises(DataError, match=f"id {outside} is outside .* vocabulary of 257"):
        BYTES.decode([97, outside])


def test_byte_level_bpe_round_trip(bpe_file: Path, text_document: bytes) -> None:
    tokenizer = open_bpe(bpe_file)
    ids = tokenizer.encode(text_document)
    assert tokenizer.decode(ids) == text_document
    assert tokenizer.token_byte_lengths()[ids].sum() == len(text_document)
    assert tokenizer.boundary_id not in ids


def test_byte_level_bpe_merges_and_replaces_invalid_utf8(bpe_file: Path) -> None:
    tokenizer = open_bpe(bpe_file)
    assert len(tokenizer.encode("the state")) < len("the state")
    assert tokenizer.decode(tokenizer.encode(b"caf\xe9")) == "caf\ufffd".encode()


def test_spelled_special_tokens_stay_text(bpe_file: Path) -> None:
    text = "a<|endoftext|>b<pad>"
    recognised = LibraryTokenizer.from_file(str(bpe_file)).encode(text, add_special_tokens=False).ids
    assert {0, 1} <= set(recognised), "the library itself would place the specials"
    tokenizer = open_bpe(bpe_file)
    ids = tokenizer.encode(text)
    assert not {0, 1} & set(ids.tolist())
    assert tokenizer.decode_text(ids) == text
    assert tokenizer.decode([0, *ids, 1]) == text.encode()
    assert tokenizer.token_byte_lengths()[[0, 1]].tolist() == [0, 0]


@pytest.mark.parametrize("text", ["state", "the state and statestate", "a state", "stat", "estate state "])
def test_a_mark_that_is_an_ordinary_token_is_never_encoded(unmarked_bpe_file: Path, text: str) -> None:
    tokenizer = open_bpe(unmarked_bpe_file, boundary_token="state")
    assert LibraryTokenizer.from_file(str(unmarked_bpe_file)).token_to_id("state") == tokenizer.boundary_id
    ids = tokenizer.encode(text)
    assert tokenizer.boundary_id not in ids
    assert tokenizer.decode_text(ids) == text


def test_a_mark_of_one_character_that_the_text_holds_is_refused(bpe_file: Path) -> None:
    tokenizer = open_bpe(bpe_file, boundary_token="h")
    with pytest.raises(DataError, match="boundary_token to a special token"):
        tokenizer.encode("h h")


def test_a_directory_with_a_tokenizer(bpe_file: Path) -> None:
    assert open_bpe(bpe_file.parent).fingerprint() == open_bpe(bpe_file).fingerprint()


def test_byte_level_alphabet_is_the_librarys() -> None:
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    decoder = decoders.ByteLevel()
    assert all(decoder.decode([c]) == bytes([b]).decode() for c, b in alphabet.items() if b < 128)


def test_sentencepiece_style_tokenizer_json(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0, "\u2581": 1, "a": 2, "b": 3, "\u2581a": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = LibraryTokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_bpe(tmp_path, boundary_token="</s>")
    assert opened.encode("a é").tolist() == [4, 1, 5 + 0xC3, 5 + 0xA9]
    assert opened.decode([0, 4, 1, 5 + 0xC3, 5 + 0xA9, 0, 4]) == "a éa".encode()
    assert opened.token_byte_lengths()[[0, 1, 2, 4, 7]].tolist() == [0, 1, 1, 2, 1]


def test_sentencepiece_round_trip(sentencepiece_file: Path, text_document: bytes) -> None:
    tokenizer = open_sentencepiece(sentencepiece_file)
    ids = tokenizer.encode(text_document)
    assert tokenizer.decode(ids) == text_document
    # The model puts one space in front of every document.
    assert tokenizer.token_byte_lengths()[ids].sum() == len(text_document) + 1
    assert tokenizer.boundary_id not in ids


def test_sentencepiece_documents_lose_their_added_space(sentencepiece_file: Path) -> None:
    tokenizer = open_sentencepiece(sentencepiece_file)
    mark = [tokenizer.boundary_id]
    ids = np.concatenate([mark, tokenizer.encode("the state"), mark, tokenizer.encode("  world")])
    assert tokenizer.decode_text(ids) == "the state  world"


def test_vocabulary_sizes(bpe_file: Path, sentencepiece_file: Path) -> None:
    for tokenizer in (open_bpe(bpe_file), open_sentencepiece(sentencepiece_file)):
        lengths = tokenizer.token_byte_lengths()
        assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int64
        assert tokenizer.encode(bytes(range(128))).max() < tokenizer.vocab_size
        assert tokenizer.encode(b"").size == 0


def test_fingerprints_differ(bpe_file: Path, sentencepiece_file: Path, tmp_path: Path) -> None:
    description = json.loads(bpe_file.read_text())
    description["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    opened = [BYTES, open_bpe(bpe_file), open_bpe(bpe_file, "<pad>"), open_bpe(tmp_path)]
    opened += [open_sentencepiece(sentencepiece_file), open_sentencepiece(sentencepiece_file, "<s>")]
    assert len({tokenizer.fingerprint() for tokenizer in opened}) == len(opened)


def test_missing_boundary_tokens(bpe_file: Path, sentencepiece_file: Path) -> None:
    with pytest.raises(DataError, match=r"no token '</s>'.*boundary_token.*'<\|endoftext\|>', '<pad>'"):
        open_bpe(bpe_file, "</s>")
    with pytest.raises(DataError, match=r"no piece '<eot>'.*boundary_token.*'<s>', '</s>'"):
        open_sentencepiece(sentencepiece_file, "<eot>")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_text("not a tokenizer")
    (tmp_path / "empty").write_bytes(b"")
    for opener, path, message in [
        (open_bpe, tmp_path / "none.json", "none.json does not exist; give a tokenizer.json"),
        (open_bpe, tmp_path, "tokenizer.json does not exist"),
        (open_bpe, damaged, "damaged is not a tokenizer.json"),
        (open_sentencepiece, tmp_path / "none.model", "none.model cannot be read .*give a .model file"),
        (open_sentencepiece, damaged, "damaged is not a sentencepiece model"),
        (open_sentencepiece, tmp_path / "empty", "empty is not a sentencepiece model"),
    ]:
        with pytest.raises(DataError, match=message):
            opener(path)


def test_a_tokenizer_that_loses_text_is_refused(word_level_file: Path) -> None:
    with pytest.raises(DataError, match="WordLevel.*does not keep every byte.*byte-level or a sentencepiece"):
        open_bpe(word_level_file)

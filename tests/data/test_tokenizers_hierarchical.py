"""Hierarchical bytes: every byte kept, words as the splitter cuts them, models that read plain bytes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.baseline import bigram_bits_per_byte
from data.config import DataConfig, HierarchicalBytesTokenizer
from data.dataset import open_data
from data.errors import DataError
from data.tokenizers import Tokenizer, hierarchical_bytes, open_tokenizer
from data.tokenizers.base import split_word_starts
from tests.data.conftest import HOSTILE_DOCUMENTS

hat_splitter = pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")

# Characters whose neighbours decide whether a word ends: marks, joiners, flags, cases, spaces and line ends.
CHARACTERS = "aB1 \t\n\r.,'_-\u0301\u200d\u00a0\u65e5\u30d0\U0001f1ee\U0001f469\U0001f3fd\u2581\u05d0\ufffd"
TEXTS = st.one_of(st.text(max_size=80), st.text(CHARACTERS, max_size=80))


def opened(maximum_word_bytes: int = 100) -> Tokenizer:
    return open_tokenizer(HierarchicalBytesTokenizer(type="hierarchical_bytes", maximum_word_bytes=maximum_word_bytes))


def words(tokenizer: Tokenizer, content: bytes) -> list[bytes]:
    """The words of a document by its stored ids."""
    tokens, starts = split_word_starts(tokenizer.encode(content))
    bounds = [*np.flatnonzero(starts).tolist(), len(tokens)]
    return [tokens[first:end].astype(np.uint8).tobytes() for first, end in itertools.pairwise(bounds)]


def test_words_of_a_sentence() -> None:
    assert words(opened(), b"Hello, world!  It's fooBar\n\nof 3.") == [
        *(b"Hello,", b" world!", b"  ", b"It'", b"s", b" foo", b"Bar", b"\n", b"\n", b"of", b" 3."),
    ]


@settings(deadline=None)
@given(TEXTS)
def test_words_are_the_splitters(text: str) -> None:
    assert words(opened(), text.encode()) == hat_splitter.HATSplitter().split_with_limit(text, 100)


@pytest.mark.parametrize("longest", [4, 7, 100])
def test_every_byte_is_kept_and_no_word_is_longer(hostile_document: bytes, longest: int) -> None:
    tokenizer = opened(longest)
    ids = tokenizer.encode(hostile_document)
    assert ids.dtype == np.uint16 and len(ids) == len(hostile_document)
    assert tokenizer.decode(ids) == hostile_document
    assert tokenizer.model_ids(ids).tolist() == list(hostile_document)
    found = words(tokenizer, hostile_document)
    assert b"".join(found) == hostile_document
    assert max(map(len, found)) <= longest


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=12), TEXTS.map(str.encode)), max_size=6).map(b"".join), st.integers(4, 20))
def test_any_bytes_are_kept(content: bytes, longest: int) -> None:
    tokenizer = opened(longest)
    ids = tokenizer.encode(content)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.model_ids(ids)) == content
    found = words(tokenizer, content)
    assert b"".join(found) == content and all(0 < len(word) <= longest for word in found)


def test_characters_are_not_cut() -> None:
    for name in ("emoji", "chinese and japanese"):
        assert all(word.decode() for word in words(opened(4), HOSTILE_DOCUMENTS[name]))


def test_bytes_that_are_not_utf8_are_words_of_their_own() -> None:
    assert words(opened(), b"caf\xe9 au lait\xff\xfe\xfd, oui") == [
        *(b"caf", b"\xe9", b" au", b" lait", b"\xff\xfe\xfd", b",", b" oui")
    ]
    assert words(opened(4), b"a" + b"\xff" * 10) == [b"a", b"\xff" * 4, b"\xff" * 4, b"\xff" * 2]
    # Half a surrogate pair is no UTF-8, however it is encoded.
    assert words(opened(), "a\ud800b".encode("utf-8", errors="surrogatepass")) == [b"a", b"\xed\xa0\x80", b"b"]


@settings(deadline=None)
@given(st.text(CHARACTERS, max_size=80), st.integers(1, 10))
def test_long_documents_are_split_as_short_ones(text: str, block: int) -> None:
    whole = opened().encode(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hierarchical_bytes, "BLOCK_CHARACTERS", block)
        assert opened().encode(text).tolist() == whole


def test_vocabulary() -> None:
    tokenizer = opened()
    assert (tokenizer.vocab_size, tokenizer.boundary_id, tokenizer.word_start_flag) == (257, 256, 257)
    assert tokenizer.stored_vocab_size == 514
    assert tokenizer.token_byte_lengths().tolist() == [1] * 256 + [0]
    assert tokenizer.decode([256, 97 + 257, 98, 256, 99 + 257]) == b"abc"
    assert tokenizer.encode(b"").tolist() == []
    for outside in (-1, 514):
        with pytest.raises(DataError, match=f"id {outside} is outside the tokenizer's vocabulary of 514 ids"):
            tokenizer.decode([97, outside])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_split_word_starts(dtype: type) -> None:
    rows = np.array([[256, 97 + 257, 98], [257, 0, 255 + 257]], dtype=dtype)
    tokens, starts = split_word_starts(rows)
    assert tokens.dtype == dtype
    assert tokens.tolist() == [[256, 97, 98], [0, 0, 255]]
    assert starts.tolist() == [[True, True, False], [True, False, True]]


def test_fingerprint_names_the_splitter_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened().fingerprint()
    assert opened(50).fingerprint() != first
    monkeypatch.setattr(hierarchical_bytes.importlib.metadata, "version", lambda name: "9.9")
    assert opened().fingerprint() != first and "9.9" in opened().fingerprint()


def test_a_splitter_that_loses_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy:
        def split_with_limit(self, text: str, limit: int) -> list[bytes]:
            return [word.encode() for word in text.split(" ")]

    monkeypatch.setattr(hat_splitter, "HATSplitter", Lossy)
    with pytest.raises(DataError, match="does not keep every byte of 'two words'.*type=bytes"):
        opened().encode("two words")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hat_splitter", None)
    with pytest.raises(
        DataError, match="hierarchical_bytes needs the package hat-splitter; install it .* or use bytes"
    ):
        opened()


@pytest.mark.parametrize("settings", [{"maximum_word_bytes": 3}, {"splitter": "sentences"}, {"path": "x"}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValidationError):
        HierarchicalBytesTokenizer(type="hierarchical_bytes", **settings)


def _config(path: Path, kind: str, **settings: object) -> DataConfig:
    source = {"type": "text_files", "path": str(path)}
    base = {"source": source, "tokenizer": {"type": kind}, "sequence_length": 32, "held_out_fraction": 0.1}
    return DataConfig.model_validate(base | settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": "best_fit"}, {"stream": {"shuffle_documents": 16}}],
    ids=["concatenate", "fit", "stream"],
)
def test_models_read_the_bytes(text_directory: Path, settings: dict) -> None:
    hierarchical = open_data(_config(text_directory, "hierarchical_bytes", **settings), seed=3)
    plain = open_data(_config(text_directory, "bytes", **settings), seed=3)
    for split in ("train", "held_out"):
        ours, theirs = (getattr(data, split).batch(range(6)) for data in (hierarchical, plain))
        assert ours.tokens.equal(theirs.tokens) and ours.labels.equal(theirs.labels)
        assert ours.document_starts.equal(theirs.document_starts)
        assert (ours.label_bytes, ours.label_count) == (theirs.label_bytes, theirs.label_count)
    assert hierarchical.fingerprint != plain.fingerprint
    scores = [bigram_bits_per_byte(data.train, data.held_out, 20_000) for data in (hierarchical, plain)]
    assert scores[0] == scores[1]
    hierarchical.close(), plain.close()


def test_word_starts_are_stored(text_directory: Path, tmp_path: Path) -> None:
    settings = {"cache_directory": str(tmp_path / "cache")}
    made = open_data(_config(text_directory, "hierarchical_bytes", **settings), seed=0).train
    kept = open_data(_config(text_directory, "hierarchical_bytes", **settings), seed=0).train
    rows = kept.rows([0, 1, 2]).tokens
    assert np.array_equal(made.rows([0, 1, 2]).tokens, rows)
    tokens, starts = split_word_starts(rows)
    assert 256 < rows.max() < 514 and tokens.max() <= 256 and 0.1 < starts.mean() < 0.9
    # Behind each mark a document begins, and so does a word.
    marks = np.flatnonzero(tokens[:, :-1].ravel() == 256)
    assert len(marks) and starts[:, 1:].ravel()[marks].all()

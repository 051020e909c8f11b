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
from data.config import BytesTokenizer, DataConfig, HierarchicalBytesTokenizer
from data.dataset import open_data
from data.errors import DataError
from data.tokenizers import Tokenizer, hierarchical_bytes, open_tokenizer, word_splitting
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
        patch.setattr(word_splitting, "BLOCK_CHARACTERS", block)
        assert opened().encode(text).tolist() == whole


def stored_starts(tokenizer: Tokenizer, content: bytes) -> list[bool]:
    return split_word_starts(tokenizer.encode(content))[1].tolist()


# Bytes as they come: whole characters, ends within one, and what is no UTF-8.
BYTES = st.one_of(
    TEXTS.map(str.encode), st.binary(max_size=8), st.sampled_from([b"\n", b"\r\n", b"\xc3\n", b"\xe6\x97"])
)
CONTENT = st.lists(BYTES, max_size=6).map(b"".join)


@settings(deadline=None)
@given(CONTENT, st.sampled_from([4, 7, 100]))
def test_what_follows_changes_only_words_that_are_not_settled(content: bytes, longest: int) -> None:
    """Read byte by byte, each time cutting only what the byte before left open."""
    tokenizer = opened(longest)
    starts: list[bool] = []
    for end in range(1, len(content) + 1):
        settled = tokenizer.settled_bytes(content[: end - 1])
        starts[settled:] = tokenizer.word_starts(content[settled:end]).tolist()
        assert starts == tokenizer.word_starts(content[:end]).tolist()
    assert not content or content[-1] >= 0x80 or starts == stored_starts(tokenizer, content)


def test_a_text_that_ends_within_a_character() -> None:
    """The character is cut as the highest that begins so, and only its own bytes count."""
    tokenizer = opened()
    for character in ("\xff", "\ufff0", "\u4e16", "\ud7ff", "\U0010ffff", "\U0001f642", "\u0800", "\U00010000"):
        whole = character.encode()
        for end in range(1, len(whole)):
            begun = whole[:end]
            highest = max(
                begun + rest
                for second in ([0xBF, 0x9F, 0x8F] if end == 1 else [0xBF])
                if _is_utf8(begun + (rest := bytes([second] + [0xBF] * (len(whole) - end - 1))))
            )
            for before in (b"", b"a", b"a. ", b"\xff"):
                expected = stored_starts(tokenizer, before + highest)[: len(before) + end]
                assert tokenizer.word_starts(before + begun).tolist() == expected, (before, begun)
    # A byte that no character continues with, or that begins none.
    for content in (b"a\xe4", b"\xed\xa0", b"a\xf4\x90", b"\xc0", b"\xf5", b"\x80", b"\xe4b"):
        assert tokenizer.word_starts(content + b" ").tolist() == stored_starts(tokenizer, content + b" ")
    assert tokenizer.word_starts(b"\xed\xa0").tolist() == stored_starts(tokenizer, b"\xed\xa0")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        # A tab behind a space starts a word until a mark combines with it; a no-break space likewise.
        (b" \t", "\u0301".encode(), [1]),
        ("a \xa0".encode(), "\u200d".encode(), [2]),
        # The first bytes of a dash are those of an ideograph until its second byte is there.
        (b"a\xe2", b"\x80", [1]),
        # No character begins so.
        (b"caf\xc3", b" ", [3]),
    ],
)
def test_the_end_of_a_text_is_cut_anew(before: bytes, after: bytes, changed: list[int]) -> None:
    tokenizer = opened()
    earlier, later = tokenizer.word_starts(before), tokenizer.word_starts(before + after)[: len(before)]
    assert np.flatnonzero(earlier != later).tolist() == changed


def test_words_of_a_text_need_a_tokenizer_that_cuts_words() -> None:
    tokenizer = open_tokenizer(BytesTokenizer(type="bytes"))
    assert tokenizer.settled_bytes(b"a\nb") == 0
    with pytest.raises(DataError, match="ByteTokenizer does not cut text into words; use data.tokenizer.type"):
        tokenizer.word_starts(b"a")


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

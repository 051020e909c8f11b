"""Every kind of tokenizer on hostile text: what comes back, and that no text becomes a special token."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from data.config import HuggingFaceTokenizer, SentencePieceTokenizer
from data.errors import DataError
from data.tokenizers import Tokenizer, open_tokenizer
from data.tokenizers.training import train_byte_level_bpe, train_sentencepiece_bpe

LINES = ["hello world", "recurrent networks carry a state", "the state restarts <s> at the mark"] * 30
DOCUMENTS = [line.encode() for line in LINES]
# Pieces that text is made of in the property tests: specials, their parts, spaces and the stand-in for one.
PIECES = [
    "<s>",
    "</s>",
    "<",
    "s",
    ">",
    "/",
    "<sep>",
    "<|endoftext|>",
    "<unk>",
    " ",
    "  ",
    "\u2581",
    "\n",
    "a",
    "the",
    "é",
    "\0",
]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


def open_file(path: Path, mark: str) -> Tokenizer:
    if path.suffix == ".model":
        return open_tokenizer(SentencePieceTokenizer(type="sentencepiece", path=str(path), boundary_token=mark))
    return open_tokenizer(HuggingFaceTokenizer(type="huggingface", path=str(path), boundary_token=mark))


def trained_bpe(directory: Path) -> Tokenizer:
    (directory / "tokenizer.json").write_bytes(train_byte_level_bpe(DOCUMENTS, 400, "<|endoftext|>"))
    return open_file(directory / "tokenizer.json", "<|endoftext|>")


def trained_sentencepiece(directory: Path) -> Tokenizer:
    (directory / "new.model").write_bytes(train_sentencepiece_bpe(DOCUMENTS, 330, "</s>"))
    return open_file(directory / "new.model", "</s>")


def sentencepiece_model(directory: Path, **settings: object) -> Path:
    import sentencepiece

    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "hard_vocab_limit": False}
    defaults |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **(defaults | {"user_defined_symbols": ["<sep>"]} | settings)
    )
    path = directory / "given.model"
    path.write_bytes(model.getvalue())
    return path


def sentencepiece_with_symbols(directory: Path) -> Tokenizer:
    """The mark is a user-defined symbol, which the library would make from text, and a space is put in front."""
    return open_file(sentencepiece_model(directory), "<sep>")


def sentencepiece_ordinary_mark(directory: Path) -> Tokenizer:
    """The mark is a piece that text is full of."""
    return open_file(sentencepiece_model(directory), "\u2581the")


def stripping_bpe(directory: Path) -> Tokenizer:
    """An added token that is not special and takes the spaces around it, as in some published tokenizers."""
    library = LibraryTokenizer.from_str(train_byte_level_bpe(DOCUMENTS, 400, "<|endoftext|>").decode())
    library.add_tokens([AddedToken("</s>", lstrip=True, rstrip=True), AddedToken("<sep>", single_word=True)])
    library.save(str(directory / "tokenizer.json"))
    return open_file(directory / "tokenizer.json", "<|endoftext|>")


def llama_style(directory: Path) -> Tokenizer:
    """BPE over characters with bytes to fall back on; a space is always put in front of a text."""
    library = LibraryTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    library.train_from_iterator(LINES, trainer)
    description = json.loads(library.to_str())
    # The bytes are ordinary entries of the vocabulary, not added tokens.
    description["added_tokens"] = description["added_tokens"][:3]
    decoder = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library = LibraryTokenizer.from_str(json.dumps(description))
    library.decoder = decoders.Sequence(decoder)
    library.save(str(directory / "tokenizer.json"))
    return open_file(directory / "tokenizer.json", "</s>")


def unigram(directory: Path, prepend: str = "never", normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A unigram model's own vocabulary holds the special tokens, so it finds them in text by itself."""
    entries = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0)]
    entries += [(character, -3.0) for character in "abcdehst/<>"] + [("\u2581the", -4.0)]
    entries += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    library = LibraryTokenizer(models.Unigram(entries, 0, True))
    if normalizer is not None:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(directory / "tokenizer.json"))
    return open_file(directory / "tokenizer.json", "</s>")


KEEPS_TEXT: dict[str, Callable[[Path], Tokenizer]] = {
    "trained BPE": trained_bpe,
    "trained sentencepiece": trained_sentencepiece,
    "sentencepiece, mark user-defined": sentencepiece_with_symbols,
    "sentencepiece, mark ordinary": sentencepiece_ordinary_mark,
    "BPE with tokens that strip spaces": stripping_bpe,
    "BPE over characters": llama_style,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=list(KEEPS_TEXT))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return KEEPS_TEXT[request.param](tmp_path_factory.mktemp("tokenizer"))


def as_read(document: bytes) -> bytes:
    """What a tokenizer of text reads: U+FFFD in place of what is not UTF-8."""
    return document.decode("utf-8", errors="replace").encode()


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return set(np.flatnonzero(tokenizer.token_byte_lengths() == 0).tolist())


def test_hostile_documents_come_back(tokenizer: Tokenizer, hostile_document: bytes) -> None:
    ids = tokenizer.encode(hostile_document)
    assert tokenizer.decode(ids) == as_read(hostile_document)
    assert not special_ids(tokenizer) & set(ids.tolist())
    assert ids.max() < tokenizer.vocab_size == tokenizer.stored_vocab_size


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    @settings(deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == as_read(text.encode("utf-8", errors="surrogatepass"))
        assert not special_ids(tokenizer) & set(ids.tolist())

    check()


def test_documents_together_are_documents_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", "</s> the", " <s>", "\u2581 the state", "<sep>", "caf\u00e9", "  the"]
    together = tokenizer.encode_many([text.encode() for text in texts])
    assert [ids.tolist() for ids in together] == [tokenizer.encode(text).tolist() for text in texts]
    mark = [tokenizer.boundary_id]
    joined = np.concatenate([part for ids in together for part in (mark, ids)])
    assert tokenizer.decode_text(joined) == "".join(texts)


def test_an_empty_document_has_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(b"").tolist() == []
    assert tokenizer.decode([]) == b""


def test_what_the_libraries_would_do(tmp_path: Path) -> None:
    """The cases above are real: read as they are, these files turn text into special tokens or lose spaces."""
    import sentencepiece

    library = LibraryTokenizer.from_file(_saved(unigram, tmp_path))
    library.encode_special_tokens = True
    assert library.encode("a</s>", add_special_tokens=False).tokens[-1] == "</s>"
    library = LibraryTokenizer.from_file(_saved(stripping_bpe, tmp_path))
    library.encode_special_tokens = True
    assert library.decode(library.encode("a  </s>  b").ids) == "a</s>b"
    assert "  </s>  " in library.encode("a  </s>  b").tokens
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(tmp_path)))
    assert processor.piece_to_id("<sep>") in processor.encode("a<sep>")
    assert processor.decode(processor.encode("a\u2581b")) == "a b"


def _saved(make: Callable[[Path], Tokenizer], directory: Path) -> str:
    make(directory)
    return str(directory / "tokenizer.json")


def test_symbols_that_are_not_the_mark_stand_for_their_text(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path)
    tokenizer, marked = open_file(path, "</s>"), open_file(path, "<sep>")
    symbol = marked.boundary_id
    assert symbol in tokenizer.encode("a<sep>b") and symbol not in marked.encode("a<sep>b")
    assert tokenizer.token_byte_lengths()[symbol] == len("<sep>")
    assert marked.token_byte_lengths()[symbol] == 0
    assert marked.decode([*marked.encode("a"), symbol]) == b"a"


def test_an_added_token_that_is_not_special_keeps_the_spaces_around_it(tmp_path: Path) -> None:
    tokenizer = stripping_bpe(tmp_path)
    ids = tokenizer.encode("a  </s>  b").tolist()
    added = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("</s>")
    assert ids.count(added) == 1 and tokenizer.decode([added]) == b"</s>"
    assert tokenizer.decode(ids) == b"a  </s>  b"


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_space_in_front_of_texts_without_one_cannot_be_told_from_the_texts_own(tmp_path: Path, scheme: str) -> None:
    tokenizer = unigram(tmp_path, prepend=scheme)

    @settings(deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        expected = text.removeprefix(" ") if not text.startswith(" <") or True else text
        ids = tokenizer.encode(text)
        assert tokenizer.decode_text(ids) == expected.encode("utf-8", errors="replace").decode()
        assert not special_ids(tokenizer) & set(ids.tolist())

    check()
    assert tokenizer.encode(" the").tolist() == tokenizer.encode("the").tolist()


def test_a_normalizer_that_makes_the_spelling_of_a_special_token(tmp_path: Path) -> None:
    tokenizer = unigram(tmp_path, normalizer=normalizers.NFKC())
    for text in ("\uff1cs\uff1e", "a\uff1c/s\uff1e b", "the <\uff0fs>\u2581"):
        ids = tokenizer.encode(text)
        assert not special_ids(tokenizer) & set(ids.tolist())
        assert tokenizer.decode_text(ids) == normalizers.NFKC().normalize_str(text)


def test_a_mark_that_is_the_only_word_for_a_character(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=60)
    with pytest.raises(DataError, match="'w' is the only piece .*boundary_token to a control piece"):
        open_file(path, "w")
    with_bytes = open_file(sentencepiece_model(tmp_path), "w")
    assert with_bytes.decode(with_bytes.encode("the world")) == b"the world"


def test_a_mark_that_stands_for_unknown_text_is_refused_when_text_is_unknown(tmp_path: Path) -> None:
    path = sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=60)
    tokenizer = open_file(path, "<unk>")
    assert tokenizer.decode(tokenizer.encode("the state <unk>"[:9])) == b"the state"
    with pytest.raises(DataError, match="encodes to the boundary token '<unk>'.*boundary_token to a special token"):
        tokenizer.encode("the \u4f60")


def test_special_tokens_of_a_file_that_takes_whole_words_from_its_vocabulary(tmp_path: Path) -> None:
    """``ignore_merges``: a word of the vocabulary is a token although no merge makes it."""
    description = json.loads(train_byte_level_bpe(DOCUMENTS, 400, "<|endoftext|>"))
    description["model"]["ignore_merges"] = True
    description["model"]["vocab"]["zzz"] = len(description["model"]["vocab"])
    library = LibraryTokenizer.from_str(json.dumps(description))
    library.add_special_tokens(["zzz"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_file(tmp_path / "tokenizer.json", "<|endoftext|>")
    special = library.token_to_id("zzz")
    assert tokenizer.token_byte_lengths()[special] == 0
    for text in ("zzz", "a zzz zzzz", "zz"):
        ids = tokenizer.encode(text)
        assert special not in ids and tokenizer.decode_text(ids) == text


def test_a_special_token_of_one_character_is_that_character(tmp_path: Path) -> None:
    library = LibraryTokenizer.from_str(train_byte_level_bpe(DOCUMENTS, 400, "<|endoftext|>").decode())
    library.add_special_tokens(["h"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_file(tmp_path / "tokenizer.json", "<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("h hh")) == b"h hh"

"""Exported tokenizers: the ids of the run's own tokenizer, loaded by transformers without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.config import BytesTokenizer, HierarchicalBytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer
from data.tokenizers import open_tokenizer
from data.tokenizers.byte_level import ByteTokenizer
from pretrain.convert.tokenizer import DOCUMENT_MARK, write_tokenizer
from pretrain.errors import InputError

LINES = ["recurrent networks carry a state", "the state restarts at the mark"] * 30


@pytest.fixture(scope="module")
def exported_bytes(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer(BytesTokenizer(type="bytes"), ByteTokenizer(), directory)
    return AutoTokenizer.from_pretrained(directory)


@settings(deadline=None)
@given(st.text(max_size=100))
def test_ids_are_the_bytes(exported_bytes: PreTrainedTokenizerFast, text: str) -> None:
    ids = exported_bytes.encode(text)
    assert ids == list(text.encode())
    assert exported_bytes.decode(ids) == text


def test_every_byte_is_decoded(exported_bytes: PreTrainedTokenizerFast) -> None:
    for byte in range(256):
        assert exported_bytes.decode([byte]) == ByteTokenizer().decode_text([byte])


def test_the_mark(exported_bytes: PreTrainedTokenizerFast) -> None:
    assert len(exported_bytes) == 257
    assert exported_bytes.bos_token_id == exported_bytes.eos_token_id == 256
    assert exported_bytes.pad_token is None
    assert exported_bytes.encode(f"a{DOCUMENT_MARK}b") == [97, 256, 98]
    as_text = exported_bytes.encode(DOCUMENT_MARK, split_special_tokens=True)
    assert as_text == list(DOCUMENT_MARK.encode())
    assert exported_bytes.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_hierarchical_bytes_are_exported_as_bytes(exported_bytes: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")
    config = HierarchicalBytesTokenizer(type="hierarchical_bytes")
    write_tokenizer(config, open_tokenizer(config), tmp_path)
    written = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, wörld!\n  def f(x):"
    assert written.encode(text) == exported_bytes.encode(text) == list(text.encode())
    assert written.eos_token_id == 256


def _byte_level_bpe(path: Path, special: list[str]) -> LibraryTokenizer:
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    library.train_from_iterator(LINES, trainer)
    library.save(str(path))
    return library


def _export(path: Path, mark: str, directory: Path) -> tuple[object, PreTrainedTokenizerFast]:
    config = HuggingFaceTokenizer(type="huggingface", path=str(path), boundary_token=mark)
    ours = open_tokenizer(config)
    directory.mkdir()
    write_tokenizer(config, ours, directory)
    return ours, AutoTokenizer.from_pretrained(directory)


def test_a_tokenizer_file_keeps_its_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = _byte_level_bpe(path, ["<|endoftext|>", "<pad>"])
    library.enable_truncation(8)
    library.enable_padding(length=8)
    library.save(str(path))
    ours, written = _export(path, "<|endoftext|>", tmp_path / "out")
    text = "the state restarts, and 12 networks carry a caf\u00e9 \U0001f642 " * 3
    ids = ours.encode(text).tolist()
    assert len(ids) < len(text.encode())
    assert written.encode(text) == ids
    assert written.decode(ids) == text
    assert written.bos_token_id == written.eos_token_id == ours.boundary_id == 0


def test_a_start_token_of_the_users_own_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = _byte_level_bpe(path, ["<|endoftext|>"])
    library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.save(str(path))
    ours, written = _export(path, "<|endoftext|>", tmp_path / "out")
    assert written.encode("state") == [0, *ours.encode("state").tolist()]


def test_a_mark_that_was_no_special_token_becomes_one(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    _byte_level_bpe(path, []).save(str(path))
    library = LibraryTokenizer.from_file(str(path))
    library.add_tokens(["[document]"])
    library.save(str(path))
    ours, written = _export(path, "[document]", tmp_path / "out")
    assert written.eos_token_id == ours.boundary_id == library.token_to_id("[document]")
    assert written.decode([ours.boundary_id], skip_special_tokens=True) == ""


def test_a_tokenizer_that_decodes_otherwise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    library = _byte_level_bpe(path, ["<|endoftext|>"])
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("world", "planet")])
    library.save(str(path))
    with pytest.raises(InputError, match="the run's tokenizer cannot be exported: transformers gives"):
        _export(path, "<|endoftext|>", tmp_path / "out")


def test_sentencepiece_is_refused_with_a_way_out(tmp_path: Path) -> None:
    config = SentencePieceTokenizer(type="sentencepiece", path="tiny.model")
    with pytest.raises(InputError, match=r"tokenizer.type=sentencepiece .* convert tiny.model .*type=huggingface"):
        write_tokenizer(config, ByteTokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())

"""New tokenizers from text: byte-level BPE and sentencepiece BPE, both without loss."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data.errors import DataError

# Sentencepiece leaves out longer lines, and cannot count positions in words of more than 65,535 characters.
LINE_CHARACTERS = 4096
# Written into the model, so it must not depend on the machine.
_SENTENCEPIECE_THREADS = 16


def train_byte_level_bpe(documents: Sequence[bytes], vocab_size: int, boundary_token: str) -> bytes:
    """A ``tokenizer.json``: byte pair encoding (Sennrich et al. 2016) over bytes, as in GPT-2 (Radford et al. 2019).

    The alphabet is all 256 bytes, so that every text can be written. Id 0 is ``boundary_token``. The same documents in
    the same order give the same file.

    Args:
        documents: text; what is not UTF-8 is read as U+FFFD, as it will be when it is encoded.
        vocab_size: most ids; little text makes fewer.
        boundary_token: spelling of the only special token.

    Raises:
        DataError: no document has text, the vocabulary is too small, or the token is a word that text may hold.
    """
    _check(documents, vocab_size, 257, boundary_token)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(boundary_token, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((_text(document) for document in documents), trainer, length=len(documents))
    return library.to_str(pretty=True).encode()


def train_sentencepiece_bpe(documents: Sequence[bytes], vocab_size: int, boundary_token: str) -> bytes:
    """A sentencepiece ``.model`` (Kudo and Richardson 2018) that keeps every character.

    Text is not normalized, no space is put in front of it, runs of spaces stay, and rare characters are written as
    their bytes. Id 0 is ``<unk>``, which no text needs; id 1 is ``boundary_token``, a control piece. The same
    documents in the same order give the same file.

    Args and errors are those of :func:`train_byte_level_bpe`; moreover the vocabulary must hold the common characters
    of the documents.
    """
    _check(documents, vocab_size, 259, boundary_token)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LINE_CHARACTERS,
            unk_id=0,
            eos_id=1,
            eos_piece=boundary_token,
            bos_id=-1,
            pad_id=-1,
            num_threads=_SENTENCEPIECE_THREADS,
            minloglevel=2,
        )
    except Exception as error:  # the library raises RuntimeError or its own types, by version
        raise DataError(
            f"sentencepiece cannot train on this text with a vocabulary of {vocab_size}"
            f" ({' '.join(str(error).split())}); give a larger vocabulary or more text."
        ) from error
    return model.getvalue()


def _check(documents: Sequence[bytes], vocab_size: int, smallest: int, boundary_token: str) -> None:
    if not any(document.strip() for document in documents):
        raise DataError("there is no text to train a tokenizer on; give a source with more text in its training split.")
    if vocab_size < smallest:
        raise DataError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the special tokens; give {smallest} or more."
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(boundary_token)
    if len(words) < 2 or any(character.isspace() for character in boundary_token):
        raise DataError(
            f"the boundary token {boundary_token!r} must not be a word that text may hold; give one with brackets and"
            " without spaces, such as <|endoftext|>."
        )


def _text(document: bytes) -> str:
    return document.decode("utf-8", errors="replace")


def _lines(documents: Sequence[bytes]) -> Iterator[str]:
    """Lines without their ends, long ones in parts: at the last space where there is one, so that words stay whole."""
    for document in documents:
        for line in _text(document).split("\n"):
            while len(line) > LINE_CHARACTERS:
                end = line.rfind(" ", 1, LINE_CHARACTERS)
                end = LINE_CHARACTERS if end < 0 else end
                yield line[:end]
                line = line[end:]
            if line:
                yield line

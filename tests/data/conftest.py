"""Corpora and tokenizers small enough to make anew for every run."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from data.batch import SampleFormat
from data.documents import SplitCounts, TokenizedDocuments
from data.packing import PackedSamples

MARK = 256

HOSTILE_DOCUMENTS = {
    "every byte": bytes(range(256)),
    "every byte, reversed and repeated": bytes(range(255, -1, -1)) * 3,
    "emoji": "\U0001f469\u200d\U0001f680 flags \U0001f1ee\U0001f1f8 \U0001f3f4\U000e0067".encode(),
    "chinese and japanese": "循环神经网络。再帰型ニューラルネットワーク".encode(),
    "line endings": b"one\r\ntwo\rthree\n\n\r\n",
    "spaces": b"  two  spaces\t\ttabs \x00 nul  ",
    "invalid utf-8": b"\xff\xfe\x80 caf\xe9 \xc3(\xed\xa0\x80",
    "lone surrogates": "high \ud83d and low \udc00, a\ud800".encode("utf-8", errors="surrogatepass"),
    "space's stand-in": "spark \u2581\u2582\u2583 a\u2581b \u2581 \u2581\u2581 end\u2581".encode(),
    "spelled specials": b"a<|endoftext|>b</s>c<pad><s><unk>",
    "one long line": b"x = [" + b"0, " * 350_000 + b"]",
}
TEXT_DOCUMENTS = {name: c for name, c in HOSTILE_DOCUMENTS.items() if c.decode(errors="ignore").encode() == c}


def byte_documents(contents: list[bytes]) -> TokenizedDocuments:
    """Documents as the bytes tokenizer stores them, without going through files."""
    pieces = [np.concatenate([[MARK], np.frombuffer(c, dtype=np.uint8)]).astype(np.uint16) for c in contents]
    tokens = np.concatenate(pieces)
    offsets = np.cumsum([0, *map(len, pieces)])
    counts = SplitCounts(
        documents=len(contents),
        tokens=len(tokens),
        bytes=sum(map(len, contents)),
        empty_documents=0,
        invalid_utf8_documents=0,
        sha256=hashlib.sha256(tokens).hexdigest(),
    )
    return TokenizedDocuments(tokens, offsets, counts)


def byte_samples(contents: list[bytes], sequence_length: int, seed: int = 0, shuffled: bool = True) -> PackedSamples:
    """Packed samples over ``contents`` with the bytes tokenizer's ids."""
    lengths = np.ones(257, dtype=np.int64)
    lengths[MARK] = 0
    format = SampleFormat(sequence_length, MARK, lengths)
    return PackedSamples(byte_documents(contents), format, seed, shuffled)


def random_contents(rng: np.random.Generator, count: int, longest: int) -> list[bytes]:
    """``count`` documents of 1 to ``longest`` random bytes."""
    return [rng.integers(0, 256, rng.integers(1, longest + 1), dtype=np.uint8).tobytes() for _ in range(count)]


@pytest.fixture(scope="session")
def make_byte_samples():
    return byte_samples


@pytest.fixture(scope="session")
def make_random_contents():
    return random_contents


@pytest.fixture(params=list(HOSTILE_DOCUMENTS))
def hostile_document(request: pytest.FixtureRequest) -> bytes:
    return HOSTILE_DOCUMENTS[request.param]


@pytest.fixture(params=list(TEXT_DOCUMENTS))
def text_document(request: pytest.FixtureRequest) -> bytes:
    return TEXT_DOCUMENTS[request.param]


@pytest.fixture
def text_directory(tmp_path: Path) -> Path:
    """200 text files, in two directories."""
    root = tmp_path / "corpus"
    for number in range(200):
        path = root / ("even" if number % 2 == 0 else "odd") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"document {number}: ".encode() * (1 + number % 7))
    return root


TRAINING_LINES = ["hello world", "recurrent networks carry a state", "the state restarts at the mark"] * 30


def _save_bpe(path: Path, pre_tokenizer, decoder, **trainer_settings) -> Path:
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<pad>"], show_progress=False, **trainer_settings
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json that also asks for truncation, padding and a start token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors

    path = _save_bpe(
        tmp_path_factory.mktemp("bpe") / "tokenizer.json",
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def unmarked_bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of tokenizer, but its mark ``state`` is an ordinary word that the text spells."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    path = _save_bpe(
        tmp_path_factory.mktemp("unmarked") / "tokenizer.json",
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["state"])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def word_level_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of whole words, which loses the spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "<|endoftext|>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE model that keeps every character, with the usual space put in front."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tiny.model"
    path.write_bytes(model.getvalue())
    return path

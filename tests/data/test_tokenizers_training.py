"""New tokenizers: on the training split alone, spread over the source, the same file each time, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import ONLY_SOURCE, DataConfig, HuggingFaceTokenizer, SentencePieceTokenizer
from data.errors import DataError
from data.splitting import held_out
from data.text_sample import sample_text
from data.tokenizers import Tokenizer, open_tokenizer
from data.tokenizers.comparison import measure_tokenizer
from data.tokenizers.training import LINE_CHARACTERS, train_byte_level_bpe, train_sentencepiece_bpe

DOCUMENTS = [
    *[f"def f{number}(x):\n    return x + {number}\n\n\n".encode() for number in range(60)],
    *[b"the state of a recurrent model restarts where a document starts"] * 20,
    b"caf\xe9 \x00 \xff",
    "循环神经网络 ▁▂▃".encode(),
]
TRAINERS = {"bpe": train_byte_level_bpe, "sentencepiece": train_sentencepiece_bpe}
MARKS = {"bpe": "<|endoftext|>", "sentencepiece": "</s>"}


def opened(kind: str, content: bytes, directory: Path, mark: str | None = None) -> Tokenizer:
    path = directory / ("new.json" if kind == "bpe" else "new.model")
    path.write_bytes(content)
    mark = mark or MARKS[kind]
    if kind == "bpe":
        return open_tokenizer(HuggingFaceTokenizer(type="huggingface", path=str(path), boundary_token=mark))
    return open_tokenizer(SentencePieceTokenizer(type="sentencepiece", path=str(path), boundary_token=mark))


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_trained_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = opened(kind, TRAINERS[kind](DOCUMENTS, 340, MARKS[kind]), tmp_path)
    assert tokenizer.vocab_size == 340
    special = {"bpe": 1, "sentencepiece": 2}[kind]
    assert (tokenizer.token_byte_lengths() == 0).sum() == special and tokenizer.boundary_id == special - 1
    figures = measure_tokenizer(kind, tokenizer, DOCUMENTS[:80])
    assert figures.changed_documents == 0 and figures.bytes_per_token > 1.7
    text = "unseen: Ω\u2028\r\n\t  ▁ " + MARKS[kind]
    assert tokenizer.decode_text(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(bytes(range(256)))) == bytes(range(256)).decode(errors="replace").encode()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_mark_of_ones_own(kind: str, tmp_path: Path) -> None:
    tokenizer = opened(kind, TRAINERS[kind](DOCUMENTS, 340, "[DOCUMENT]"), tmp_path, "[DOCUMENT]")
    ids = tokenizer.encode("a[DOCUMENT]b")
    assert tokenizer.boundary_id not in ids and tokenizer.decode(ids) == b"a[DOCUMENT]b"


PROGRAM = """
import sys
from tests.data.test_tokenizers_training import DOCUMENTS, MARKS, TRAINERS
sys.stdout.buffer.write(TRAINERS[sys.argv[1]](DOCUMENTS, 340, MARKS[sys.argv[1]]))
"""


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_same_text_gives_the_same_file(kind: str) -> None:
    here = TRAINERS[kind](DOCUMENTS, 340, MARKS[kind])
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", PROGRAM, kind]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=120).stdout == here
    assert TRAINERS[kind]([*DOCUMENTS, b"an other text" * 9], 340, MARKS[kind]) != here


def test_little_text_makes_fewer_ids(tmp_path: Path) -> None:
    tokenizer = opened("bpe", train_byte_level_bpe([b"ab ab"], 5000, MARKS["bpe"]), tmp_path)
    assert 257 < tokenizer.vocab_size < 262
    model = opened("sentencepiece", train_sentencepiece_bpe([b"ab ab"], 5000, "</s>"), tmp_path)
    assert 258 < model.vocab_size < 270


def test_sentencepiece_takes_lines_of_any_length(tmp_path: Path) -> None:
    line = b"x = [" + b"1234, " * 30_000 + b"]" + b"z" * 200_000
    tokenizer = opened("sentencepiece", train_sentencepiece_bpe([line, *DOCUMENTS], 340, "</s>"), tmp_path)
    assert len(line) > 20 * LINE_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert measure_tokenizer("", tokenizer, [line]).bytes_per_token > 2


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize(
    ("documents", "vocab_size", "mark", "message"),
    [
        ([], 400, "<e>", "no text to train a tokenizer on"),
        ([b" \n", b""], 400, "<e>", "no text to train a tokenizer on"),
        (DOCUMENTS, 256, "<e>", "vocabulary of 256 cannot hold the 256 bytes .* give 25[79] or more"),
        (DOCUMENTS, 400, "state", "'state' must not be a word that text may hold; .*brackets"),
        (DOCUMENTS, 400, "s", "'s' must not be a word"),
        (DOCUMENTS, 400, "<end of text>", "without spaces"),
    ],
)
def test_what_cannot_be_trained(kind: str, documents: list[bytes], vocab_size: int, mark: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TRAINERS[kind](documents, vocab_size, mark)


def test_a_vocabulary_without_room_for_the_characters() -> None:
    with pytest.raises(DataError, match="sentencepiece cannot train .* vocabulary of 260 .*give a larger vocabulary"):
        train_sentencepiece_bpe(DOCUMENTS, 260, "</s>")


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(*paths: Path, weights: tuple[float, ...] = (), fraction: float = 0.25) -> DataConfig:
    sources = [{"type": "jsonl", "path": str(path)} for path in paths]
    named = {
        f"part{number}": {"source": source, "weight": w}
        for number, (source, w) in enumerate(zip(sources, weights, strict=False))
    }
    source = {"mixture": named} if weights else {"source": sources[0]}
    rest = {"tokenizer": {"type": "bytes"}, "sequence_length": 8, "held_out_fraction": fraction}
    return DataConfig.model_validate(source | rest)


def test_everything_where_it_fits_and_each_split_by_itself(text_directory: Path) -> None:
    source = {"type": "text_files", "path": str(text_directory)}
    data = DataConfig.model_validate(
        {"source": source, "tokenizer": {"type": "bytes"}, "sequence_length": 8, "held_out_fraction": 0.2}
    )
    samples = sample_text(data, {"train": 10**6, "held_out": 10**6})[ONLY_SOURCE]
    names = sorted(path.relative_to(text_directory).as_posix() for path in text_directory.rglob("*.txt"))
    for split, wanted in (("train", False), ("held_out", True)):
        expected = [(text_directory / name).read_bytes() for name in names if held_out(name, 0.2) is wanted]
        assert samples[split].documents == expected
        assert samples[split].source_documents == len(expected)
        assert samples[split].source_bytes == samples[split].bytes == sum(map(len, expected))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 900))
def test_a_sample_is_spread_and_never_too_large(tmp_path_factory: pytest.TempPathFactory, sizes, limit) -> None:
    texts = [f"{number:05}" + "x" * size for number, size in enumerate(sizes)]
    directory = tmp_path_factory.mktemp("sample")
    samples = [
        sample_text(config(jsonl(directory / "all.jsonl", order)), {"train": limit})[ONLY_SOURCE]["train"]
        for order in (texts, texts[::-1])
    ]
    for sample in samples:
        assert sample.bytes <= limit
    kept, reversed_kept = (sample.documents for sample in samples)
    if len(kept) > 1 and len(reversed_kept) > 1:
        # It does not depend on the order in which documents are read.
        assert kept == reversed_kept[::-1]
    everything = sample_text(config(directory / "all.jsonl"), {"train": 10**9})[ONLY_SOURCE]["train"]
    assert everything.source_documents == samples[0].source_documents == len(everything.documents)
    if everything.bytes <= limit:
        assert sorted(kept) == sorted(everything.documents)
    elif everything.documents:
        assert 0 < len(kept) <= len(everything.documents)


def test_a_sample_comes_from_all_parts_of_the_source(tmp_path: Path) -> None:
    texts = [f"{number:06} " + "text " * 20 for number in range(2000)]
    kept = sample_text(config(jsonl(tmp_path / "a.jsonl", texts)), {"train": 20_000})[ONLY_SOURCE]["train"].documents
    assert 150 < len(kept) <= 187 and kept == sorted(kept)
    quarters = [sum(int(document[:6]) // 500 == quarter for document in kept) for quarter in range(4)]
    assert min(quarters) > 25


def test_a_document_that_is_too_long_is_cut_between_characters(tmp_path: Path) -> None:
    for limit in range(40, 48):
        data = config(jsonl(tmp_path / "a.jsonl", ["日本語のとても長い文章" * 9]), fraction=1e-9)
        (kept,) = sample_text(data, {"train": limit})[ONLY_SOURCE]["train"].documents
        assert limit - 3 < len(kept) <= limit and kept.decode()


def test_sources_of_a_mixture_share_by_weight(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / f"{name}.jsonl", [f"{name}{n:04}" * 10 for n in range(1000)]) for name in "ab"]
    samples = sample_text(config(*paths, weights=(3.0, 1.0)), {"train": 16_000, "held_out": 1_000})
    sizes = [samples[name]["train"].bytes for name in ("part0", "part1")]
    assert sizes[0] <= 12_000 and sizes[1] <= 4_000 and 2.8 < sizes[0] / sizes[1] < 3.2
    small = jsonl(tmp_path / "small.jsonl", [f"c{n}" for n in range(40)])
    samples = sample_text(config(paths[0], small, weights=(1.0, 1.0)), {"train": 16_000})
    assert samples["part1"]["train"].bytes == samples["part1"]["train"].source_bytes < 200


def test_reading_may_end_early(tmp_path: Path) -> None:
    texts = [f"{number:04}" * 25 for number in range(100)]
    seen: list[int] = []
    data = config(jsonl(tmp_path / "a.jsonl", texts))
    samples = sample_text(data, {"train": 10**6, "held_out": 10**6}, 2_050, lambda name, size: seen.append(size))
    assert seen == list(range(100, 2_200, 100))
    assert sum(sample.source_documents for sample in samples[ONLY_SOURCE].values()) == 21


def test_sources_without_text(tmp_path: Path) -> None:
    empty = jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(DataError, match="holds no document with any text"):
        sample_text(config(empty), {"train": 10})
    with pytest.raises(DataError, match="data.mixture.part1: data.source holds no document"):
        sample_text(config(jsonl(tmp_path / "a.jsonl", ["a"]), empty, weights=(1.0, 1.0)), {"train": 10})
    tokens = {"source": {"type": "megatron_indexed", "path_prefix": "x"}}
    data = DataConfig.model_validate(config(empty).model_dump() | tokens)
    with pytest.raises(DataError, match="data.source.type=megatron_indexed holds token ids, but text is needed"):
        sample_text(data, {"train": 10})


def test_figures_of_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = opened("bpe", train_byte_level_bpe(DOCUMENTS, 340, MARKS["bpe"]), tmp_path)
    documents = [b"the state", b"", b"caf\xe9", b"a model"]
    figures = measure_tokenizer("mine", tokenizer, documents)
    counted = [len(tokenizer.encode(document)) for document in documents]
    assert (figures.tokens, figures.bytes, figures.documents) == (sum(counted), 20, 4)
    assert figures.changed_documents == 1 and figures.words is None
    assert figures.to_dict()["bytes_per_token"] == 20 / sum(counted)
    assert figures.seconds > 0 and figures.megabytes_per_second > 0
    for nothing in ([], [b"", b""]):
        with pytest.raises(DataError, match="mine makes no token of the text"):
            measure_tokenizer("mine", tokenizer, nothing)

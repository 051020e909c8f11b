"""What ``pretrain tokenizer train`` and ``compare`` do."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.config import (
    BytesTokenizer,
    HierarchicalBytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
)
from data.errors import DataError
from data.source import Split
from data.text_sample import TextSample, sample_text
from data.tokenizers import open_tokenizer
from data.tokenizers.base import tokenizing_threads
from data.tokenizers.comparison import TokenizerFigures, measure_tokenizer
from data.tokenizers.training import train_byte_level_bpe, train_sentencepiece_bpe
from pretrain.config.loading import load_data_config
from pretrain.errors import CheckError, InputError
from pretrain.observe.reading_progress import ReadingProgress

# Held-out text that a new tokenizer is tried on.
_TRIED_BYTES = 8_000_000

_Trainer = Callable[[Sequence[bytes], int, str], bytes]
# By the name of the kind: its trainer, its ending, and how a run is configured with it.
_KINDS: dict[str, tuple[_Trainer, str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]]] = {
    "bpe": (train_byte_level_bpe, ".json", HuggingFaceTokenizer),
    "sentencepiece": (train_sentencepiece_bpe, ".model", SentencePieceTokenizer),
}


def train_tokenizer(
    config: Path,
    output: Path,
    overrides: Sequence[str],
    kind: str,
    vocab_size: int,
    megabytes: float,
    read_megabytes: float | None = None,
    boundary_token: str | None = None,
) -> str:
    """Trains a tokenizer on the training split of what ``config`` reads, and writes it to the new file ``output``.

    Args:
        config: a file with a ``data`` section.
        output: where to write; the directory is made if need be.
        overrides: ``key=value``.
        kind: ``bpe`` or ``sentencepiece``.
        vocab_size: ids, special ones included.
        megabytes: text that it is trained on, at most.
        read_megabytes: text that is read of the source, at most; None: all.
        boundary_token: None: the usual one of that kind.

    Returns:
        What was trained on, the vocabulary, bytes per token on held-out text, and the YAML that uses the tokenizer.

    Raises:
        InputError, DataError: the configuration, its source, or an option is wrong, or ``output`` is there already.
        CheckError: what was trained does not give held-out text back; nothing was written.
    """
    trainer, ending, settings = _KINDS[kind]
    if output.suffix != ending:
        name = output.with_suffix(ending) if output.suffix else output / f"tokenizer{ending}"
        raise InputError(f"OUT is {output}, but a tokenizer of type {kind} is a file {ending}; give, say, {name}")
    _refuse_if_there(output)
    data = load_data_config(config, overrides)
    token = boundary_token or str(settings.model_fields["boundary_token"].default)
    limits: dict[Split, int] = {"train": max(1, int(megabytes * 1e6)), "held_out": _TRIED_BYTES}
    with ReadingProgress() as progress:
        samples = sample_text(data, limits, _bytes_or_none(read_megabytes), progress.read)
        documents = [document for sample in samples.values() for document in sample["train"].documents]
        size = sum(map(len, documents)) / 1e6
        progress.begin(f"training on {len(documents):,} documents, {size:,.1f} MB")
        content = trainer(documents, vocab_size, token)
        # What the tokenizer will read: it sees U+FFFD in place of what is not UTF-8.
        held_out = [document.decode("utf-8", errors="replace").encode() for document in _held_out(samples)]
        progress.begin(f"trying it on {len(held_out):,} held-out documents")
        with _new_file(output, content) as temporary:
            tokenizer = open_tokenizer(settings(type=_type_of(settings), path=str(temporary), boundary_token=token))
            figures = measure_tokenizer(str(output), tokenizer, held_out) if held_out else None
            if figures and figures.changed_documents:
                raise CheckError(
                    f"the new tokenizer changes {figures.changed_documents} of {figures.documents} held-out documents;"
                    " nothing was written"
                )
    section = settings(type=_type_of(settings), path=str(output), boundary_token=token).model_dump(mode="json")
    lines = [f"wrote {output}"]
    lines += [_trained_on(name, sample["train"], len(samples)) for name, sample in samples.items()]
    fewer = f" (the text gives no more than that of {vocab_size:,})" if tokenizer.vocab_size < vocab_size else ""
    lines.append(f"vocabulary: {tokenizer.vocab_size:,} ids{fewer}")
    if figures is None:
        lines.append("bytes per token: not known, since no document with text is held out")
    else:
        lines.append(
            f"bytes per token: {figures.bytes_per_token:.3f} on {figures.bytes / 1e6:,.1f} MB of held-out text"
        )
    lines.append(yaml.safe_dump({"data": {"tokenizer": section}}, sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines)


def compare_tokenizers(
    config: Path, others: Sequence[str], megabytes: float, read_megabytes: float | None = None
) -> list[TokenizerFigures]:
    """The figures of the configured tokenizer and of ``others`` (see :func:`tokenizer_named`) on held-out text.

    Raises:
        InputError, DataError: the configuration, its source or a tokenizer is wrong, or nothing is held out.
    """
    data = load_data_config(config, ())
    named = [(_name_of(data.tokenizer), data.tokenizer), *((name, tokenizer_named(name)) for name in others)]
    opened = []
    for name, settings in named:
        try:
            opened.append((name, open_tokenizer(settings)))
        except DataError as error:
            hint = "; here it may stand behind the name, as in NAME=TOKEN" if "boundary_token" in str(error) else ""
            raise DataError(f"tokenizer {name}: {error}{hint}") from error
    with ReadingProgress() as progress:
        limits: dict[Split, int] = {"held_out": max(1, int(megabytes * 1e6))}
        documents = _held_out(sample_text(data, limits, _bytes_or_none(read_megabytes), progress.read))
        if not documents:
            raise DataError(
                f"no document with text is held out at data.held_out_fraction {data.held_out_fraction}; raise the"
                " fraction or give more documents."
            )
        figures = []
        for name, tokenizer in opened:
            progress.begin(f"encoding with {name}")
            figures.append(measure_tokenizer(name, tokenizer, documents))
    return figures


def print_comparison(figures: Sequence[TokenizerFigures]) -> None:
    """A table, a line for each tokenizer."""
    table = Table(
        title=f"{figures[0].documents:,} held-out documents, {figures[0].bytes / 1e6:,.2f} MB",
        title_justify="left",
        caption=f"MB/s: encoding, at most {tokenizing_threads()} threads; a word is counted where a tokenizer has them",
        caption_justify="left",
    )
    table.add_column("tokenizer", overflow="fold")
    headings = ["ids", "tokens", "bytes/token", "MB/s", "round trip"]
    with_words = any(figure.words is not None for figure in figures)
    for heading in headings[:3] + ["bytes/word"] * with_words + headings[3:]:
        table.add_column(heading, justify="left" if heading == "round trip" else "right", no_wrap=True)
    for figure in figures:
        words = [] if not with_words else [f"{figure.bytes_per_word:.3f}" if figure.bytes_per_word else ""]
        changed = figure.changed_documents
        table.add_row(
            escape(figure.name),
            f"{figure.vocab_size:,}",
            f"{figure.tokens:,}",
            f"{figure.bytes_per_token:.3f}",
            *words,
            f"{figure.megabytes_per_second:,.1f}",
            f"{changed:,} differ" if changed else "exact",
        )
    Console().print(table)


def tokenizer_named(name: str) -> TokenizerConfig:
    """What a name on the command line means.

    ``bytes``, ``hierarchical_bytes``, a sentencepiece ``.model``, or else a ``tokenizer.json``, a directory or a name
    on the hub. ``=TOKEN`` behind it names the boundary token; without it, it is the usual one of that kind.
    """
    if name == "bytes":
        return BytesTokenizer(type="bytes")
    if name == "hierarchical_bytes":
        return HierarchicalBytesTokenizer(type="hierarchical_bytes")
    path, _, token = (name, "", "") if Path(name).exists() else name.partition("=")
    settings = SentencePieceTokenizer if path.endswith(".model") else HuggingFaceTokenizer
    given: dict[str, Any] = {"boundary_token": token} if token else {}
    return settings(type=_type_of(settings), path=path, **given)


def _type_of(settings: type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]) -> Any:
    return get_args(settings.model_fields["type"].annotation)[0]


def _name_of(settings: TokenizerConfig) -> str:
    return getattr(settings, "path", settings.type)


def _bytes_or_none(megabytes: float | None) -> int | None:
    return None if megabytes is None else int(megabytes * 1e6)


def _held_out(samples: dict[str, dict[Split, TextSample]]) -> list[bytes]:
    return [document for sample in samples.values() for document in sample["held_out"].documents]


def _trained_on(name: str, sample: TextSample, sources: int) -> str:
    named = f"{name}: " if sources > 1 else ""
    return (
        f"{named}trained on {len(sample.documents):,} documents, {sample.bytes / 1e6:,.2f} MB, of the"
        f" {sample.source_documents:,} with {sample.source_bytes / 1e6:,.2f} MB in the training split"
    )


def _refuse_if_there(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise InputError(f"OUT {output} exists already; give another name, or remove it first")


@contextlib.contextmanager
def _new_file(output: Path, content: bytes) -> Iterator[Path]:
    """Writes ``content`` beside ``output``, hands that file out to be checked, and then gives it its name.

    Raises:
        InputError: the directory cannot be written, or a file of that name has come up meanwhile.
    """
    temporary: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{output.stem}.partial-", suffix=output.suffix, dir=output.parent)
        temporary = Path(name)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        yield temporary
        _refuse_if_there(output)
        temporary.rename(output)
        directory = os.open(output.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise InputError(f"OUT {output} cannot be written ({error.strerror or error}); give another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)

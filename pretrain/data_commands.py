"""What ``pretrain data prepare``, ``inspect`` and ``verify`` do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from data.config import DataConfig, MegatronIndexedSource, PreparedSource
from data.documents import SPLITS, SplitCounts
from data.errors import DataError
from data.preparation.directory import prepare_directory
from data.preparation.inspecting import Inspection, Shown, inspect_config, inspect_directory
from data.preparation.manifest import Manifest, why_no_manifest
from data.preparation.plan import Options
from data.preparation.verifying import Verification, prepared_directories, total_bytes, verify
from data.processes import usable_cores
from data.tokenizers import open_tokenizer
from pretrain.config import load_data_config
from pretrain.errors import CheckError, InputError
from pretrain.observe.preparation_progress import PreparationProgress


def prepare_data(
    config_file: Path,
    output: Path,
    overrides: Sequence[str],
    workers: int | None,
    shard_megabytes: float,
    deduplicate: bool,
) -> None:
    """Prepares every source of a configuration and prints what came of it.

    Raises:
        InputError, DataError: for a bad configuration, source, tokenizer or directory.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = load_data_config(config_file, overrides)
    options = Options(deduplicate, shard_megabytes)
    workers = _workers() if workers is None else workers
    sources = list(_single_sources(config))
    for name, single in sources:
        if isinstance(single.source, MegatronIndexedSource | PreparedSource):
            raise InputError(
                f"{config_file}: {_key(name)}.type {single.source.type} is tokenized already; give a source of text,"
                " or train on it as it is"
            )
    tokenizer = open_tokenizer(config.tokenizer)
    prepared: list[tuple[str, Path, Manifest]] = []
    for name, single in sources:
        directory = output / name
        try:
            with PreparationProgress(name) as progress:
                manifest = prepare_directory(single, tokenizer, directory, options, workers, progress.update)
        except OSError as error:
            raise InputError(
                f"{directory} cannot be written ({error.strerror or error}); give a directory that can be, with enough"
                " room; shards that are finished are kept"
            ) from error
        except DataError as error:
            raise DataError(f"data.mixture.{name}: {error}" if name else str(error)) from error
        prepared.append((name, directory, manifest))
    console = Console()
    for name, _, manifest in prepared:
        console.print(_totals(name, {split: manifest.counts(split) for split in SPLITS}))
        console.print(_about(manifest), highlight=False)
    print(f"To train on it:\n\n{_section(config, prepared)}")


def _workers() -> int:
    """One process for each core, unless there is only one: then another would only wait for it."""
    cores = usable_cores()
    return cores if cores > 1 else 0


def _single_sources(config: DataConfig) -> Iterator[tuple[str, DataConfig]]:
    """Each source with its name, which is empty for the only one."""
    for name, single in config.by_source().items():
        yield "" if config.mixture is None else name, single


def _key(name: str) -> str:
    return f"data.mixture.{name}.source" if name else "data.source"


def _section(config: DataConfig, prepared: list[tuple[str, Path, Manifest]]) -> str:
    """The section of a configuration that reads what was prepared."""
    tokenizer = prepared[0][2].tokenizer_in(prepared[0][1]).model_dump(mode="json")
    sources = {name: {"type": "prepared", "path": str(directory)} for name, directory, _ in prepared}
    where: dict[str, object] = {"source": sources.get("")}
    if config.mixture is not None:
        weights = {name: entry.weight for name, entry in config.mixture.items()}
        mixture = {name: {"source": source, "weight": weights[name]} for name, source in sources.items()}
        where = {"source": None, "mixture": mixture}
    section = {"data": {**where, "tokenizer": tokenizer, "sequence_length": config.sequence_length}}
    return yaml.safe_dump(section, sort_keys=False)


def inspect_data(source: Path, overrides: Sequence[str], shown: Shown) -> list[Inspection]:
    """Looks at a prepared directory, at those of a mixture, or at the sources of a configuration.

    Raises:
        InputError, DataError: for what is none of these, is unfinished or damaged.
    """
    if not source.is_dir():
        if Path(f"{source}.idx").is_file():
            raise InputError(
                f"{source}.idx does not say which tokenizer wrote its ids; give a configuration with"
                f" data.source.type=megatron_indexed, data.source.path_prefix={source} and data.tokenizer"
            )
        config = load_data_config(source, overrides)
        return [inspect_config(name, single, shown) for name, single in _single_sources(config)]
    if overrides:
        raise InputError(f"{source} is a directory, to which overrides such as {overrides[0]} do not apply")
    directories = prepared_directories(source)
    if not directories:
        raise InputError(why_no_manifest(source))
    return [inspect_directory("" if path == source else path.name, path, shown) for path in directories]


def print_inspections(inspections: list[Inspection]) -> None:
    """Tables of totals, and documents as text."""
    console = Console()
    for inspection in inspections:
        if inspection.counts is None:
            title = f"{inspection.name}: " if inspection.name else ""
            console.print(f"{title}text that is not tokenized yet, so nobody has counted it", highlight=False)
        else:
            console.print(_totals(inspection.name, inspection.counts))
        if inspection.manifest is not None:
            console.print(_about(inspection.manifest), highlight=False)
        for document in inspection.documents:
            tokens = "" if document.tokens is None else f", {document.tokens:,} tokens"
            console.rule(f"document {document.number}{tokens}", align="left")
            # As it is: neither rich's markup nor its wrapping belongs in a text.
            print(_printable(document.text) + (" [...]" if document.is_cut else ""))


def _printable(text: str) -> str:
    """Text without characters that would steer the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else f"\\x{ord(character):02x}"
        for character in text.replace("\r\n", "\n")
    )


def verify_data(path: Path) -> str:
    """Reads prepared data in full; a sentence that says what was found to be right.

    Raises:
        DataError: for what is no prepared data, or is unfinished.
        CheckError: naming each file that is damaged.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total_bytes(path))
        found = verify(path, lambda size: progress.advance(task, size))
    if found.problems:
        raise CheckError(f"{path} is damaged: " + " ".join(found.problems))
    return _all_right(path, found)


def _all_right(path: Path, found: Verification) -> str:
    numbers = f"{found.files} files, {found.bytes:,} bytes, {found.documents:,} documents, {found.tokens:,} tokens"
    if found.has_checksums:
        return f"{path} is as it was written: {numbers}; every checksum, index and id is right"
    return f"{path} has a structure that is right: {numbers}; it has no checksums, so flipped bits cannot be found"


def _totals(name: str, counts: dict[str, SplitCounts]) -> Table:
    table = Table(title=name or None, title_justify="left")
    table.add_column("")
    for split in counts:
        table.add_column(split, justify="right")

    def add(what: str, numbers: list[str]) -> None:
        table.add_row(what, *numbers)

    splits = list(counts.values())
    add("documents", [f"{split.documents:,}" for split in splits])
    add("tokens", [f"{split.tokens:,}" for split in splits])
    add("bytes of text", ["-" if split.bytes is None else f"{split.bytes:,}" for split in splits])
    add("bytes per token", ["-" if not split.bytes else f"{split.bytes / split.tokens:.3f}" for split in splits])
    add("empty, left out", [f"{split.empty_documents:,}" for split in splits])
    add("not UTF-8", [f"{split.invalid_utf8_documents:,}" for split in splits])
    return table


def _about(manifest: Manifest) -> str:
    """What the table does not say, a line each."""
    kept = "left out" if manifest.deduplicate else "kept"
    unique = manifest.train.bytes + manifest.held_out.bytes
    everything = unique + manifest.duplicate_bytes if manifest.deduplicate else unique
    share = manifest.duplicate_bytes / max(everything, 1)
    lines = [
        f"{len(manifest.shards)} shards of {manifest.dtype} ids, tokenizer {manifest.tokenizer.type} with"
        f" {manifest.vocab_size} ids, {manifest.held_out_fraction:g} of the documents held out",
        f"{manifest.duplicate_documents:,} documents repeat an earlier one ({manifest.duplicate_bytes / 1e6:,.1f} MB,"
        f" {share:.1%} of the text); they were {kept}",
    ]
    if manifest.filtered_records or manifest.skipped_records:
        lines.append(
            f"{manifest.filtered_records:,} records were left out by the source's filters, {manifest.skipped_records:,}"
            " as bad ones"
        )
    return "\n".join(lines)

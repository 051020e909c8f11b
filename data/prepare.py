"""Documents -> token ids, split by identity, kept on disk for the next start."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data.config import DataConfig, MegatronIndexedSource
from data.documents import SPLITS, SplitWriter, StoredDocuments, TokenizedDocuments, open_prepared, token_dtype
from data.errors import DataError
from data.indexed import open_indexed
from data.sources import Document, Source, Split, open_source
from data.tokenizers import Tokenizer, open_tokenizer

# Raised whenever the stored form or the split changes, so that older prepared data is not taken for it.
FORMAT_VERSION = 1
# Documents are tokenized in groups of about this many bytes: enough for a tokenizer's threads to share.
GROUP_BYTES = 4 << 20


def held_out(identity: str, fraction: float) -> bool:
    """Whether the document of this identity is held out: by a hash of the identity, never by position.

    A document therefore stays on its side when others are added, removed or reordered, and a larger fraction
    only ever moves documents from training to held out.
    """
    return identity_position(identity) < fraction


def identity_position(identity: str) -> float:
    """A number in [0, 1) from the SHA-256 of ``identity``."""
    digest = hashlib.sha256(identity.encode("utf-8", errors="surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Mapping[Split, StoredDocuments]:
    """Tokenizes the source, or opens what an earlier start has prepared in ``config.cache_directory``.

    A dataset that is tokenized already is read where it lies.

    Any number of processes may call this at once: one does the work, the others wait for it (where the file
    system has no locks each does it, and the first to finish is kept).
    Raises ``DataError`` for bad sources, tokenizers and prepared files.
    """
    tokenizer = tokenizer or open_tokenizer(config.tokenizer)
    if isinstance(config.source, MegatronIndexedSource):
        return open_indexed(config.source, tokenizer, config.held_out_fraction)
    source = open_source(config.source)
    if config.cache_directory is None:
        return _tokenize_in_memory(config, source, tokenizer)
    key = _cache_key(config, source, tokenizer)
    cache = Path(config.cache_directory).expanduser()
    target = cache / f"prepared-{key}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not target.is_dir():
            with _locked(cache / f"prepared-{key}.lock"):
                if not target.is_dir():
                    _tokenize_to_directory(config, source, tokenizer, target)
    except OSError as error:
        raise DataError(
            f"data.cache_directory {cache} cannot be written ({error.strerror or error}); give a writable"
            " directory with enough room, or null to tokenize in memory."
        ) from error
    return open_prepared(target)


def _tokenize(config: DataConfig, source: Source, tokenizer: Tokenizer, writers: dict[Split, SplitWriter]) -> None:
    """Sends every document of the source to its split's writer, in the source's order."""
    group: list[Document] = []
    group_bytes = 0
    closest = 1.0  # the smallest fraction that would hold a document out

    def write_group() -> None:
        nonlocal closest
        encoded = tokenizer.encode_many([document.content for document in group])
        for document, ids in zip(group, encoded, strict=True):
            split: Split = "held_out" if held_out(document.identity, config.held_out_fraction) else "train"
            if ids.size:
                closest = min(closest, identity_position(document.identity))
            valid = not tokenizer.reads_text or _is_utf8(document.content)
            writers[split].add(ids, len(document.content), valid)
        group.clear()

    for document in source.documents():
        group.append(document)
        group_bytes += len(document.content)
        if group_bytes >= GROUP_BYTES:
            write_group()
            group_bytes = 0
    write_group()

    held_out_documents, train_documents = (len(writers[s].offsets) - 1 for s in ("held_out", "train"))
    if held_out_documents + train_documents == 0:
        raise DataError(
            "data.source holds no document with any text; give a source with text in it"
            f" ({sum(w.empty for w in writers.values())} empty documents were found)."
        )
    if train_documents == 0:
        raise DataError(
            f"all {held_out_documents} documents of data.source are held out; lower data.held_out_fraction,"
            " give more documents, or cut large files into documents (text_files has document_separator)."
        )
    if held_out_documents == 0:
        needed = f"set data.held_out_fraction above {closest:.4f}, " if closest < 0.49 else ""
        raise DataError(
            f"none of the {train_documents} documents of data.source falls into the held-out split at"
            f" data.held_out_fraction {config.held_out_fraction}; {needed}give more documents, or cut large"
            " files into documents (text_files has document_separator)."
        )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _tokenize_in_memory(config: DataConfig, source: Source, tokenizer: Tokenizer) -> dict[Split, TokenizedDocuments]:
    files: dict[Split, io.BytesIO] = {split: io.BytesIO() for split in SPLITS}
    writers: dict[Split, SplitWriter] = {split: SplitWriter(files[split], tokenizer) for split in SPLITS}
    _tokenize(config, source, tokenizer, writers)
    return {
        split: TokenizedDocuments(
            tokens=np.frombuffer(files[split].getbuffer(), dtype=writer.dtype),
            offsets=np.array(writer.offsets, dtype=np.int64),
            counts=writer.counts(),
        )
        for split, writer in writers.items()
    }


def _tokenize_to_directory(config: DataConfig, source: Source, tokenizer: Tokenizer, target: Path) -> None:
    """Writes beside ``target`` and renames, so that ``target`` is never half full."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        with contextlib.ExitStack() as stack:
            files = {s: stack.enter_context(open(temporary / f"{s}_tokens.bin", "wb")) for s in SPLITS}
            writers: dict[Split, SplitWriter] = {s: SplitWriter(files[s], tokenizer) for s in SPLITS}
            _tokenize(config, source, tokenizer, writers)
        metadata: dict[str, object] = {"dtype": token_dtype(tokenizer.stored_vocab_size).name}
        for split, writer in writers.items():
            np.save(temporary / f"{split}_offsets.npy", np.array(writer.offsets, dtype=np.int64))
            metadata[split] = asdict(writer.counts())
        (temporary / "metadata.json").write_text(json.dumps(metadata, indent=1))
        temporary.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        for path in [*temporary.iterdir(), temporary]:
            _flush_to_disk(path)
        try:
            temporary.rename(target)
        except OSError:
            # Without locks another process may have finished first; its result is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as lock:
        # Some network file systems have no locks: then each process prepares, and the rename decides.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cache_key(config: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    parts = [FORMAT_VERSION, source.fingerprint(), tokenizer.fingerprint(), config.held_out_fraction]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

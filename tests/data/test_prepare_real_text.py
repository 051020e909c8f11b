"""Real text beyond the standard library: whatever trees of text the machine has, or the one that TEXT_TREE names."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import open_data
from data.documents import SPLITS
from data.preparation.verifying import verify
from data.prepared import open_directory
from data.sources import open_source
from data.splitting import held_out
from data.tokenizers import open_tokenizer
from tests.data.preparing import contents, data_config, prepare_into

# Sources of a large package that torch needs, and the licences of the system's packages: by many authors, in many
# languages and some encodings, and often the same.
TREES = {
    "given": (os.environ.get("TEXT_TREE", ""), "**/*"),
    "mathematics": (str(Path(sysconfig.get_path("purelib"), "sympy")), "**/*.py"),
    "licences": ("/usr/share/doc", "**/copyright"),
}
SHARD_MEGABYTES = 16


def tree_config(name: str, tokenizer: dict[str, str]) -> DataConfig:
    path, pattern = TREES[name]
    if not path or not Path(path).is_dir():
        pytest.skip("there is no such tree here")
    config = data_config({"type": "text_files", "path": path, "pattern": pattern}, tokenizer=tokenizer)
    config = config.model_copy(update={"held_out_fraction": 0.02, "sequence_length": 2048})
    if sum(len(document.content) for document in open_source(config.source).documents()) < 10**6:
        pytest.skip("there is not enough text in it")
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "huggingface"])
@pytest.mark.parametrize("name", TREES)
def test_real_text(tmp_path: Path, bpe_file: Path, name: str, kind: str) -> None:
    tokenizer = {"type": kind} | ({"path": str(bpe_file)} if kind == "huggingface" else {})
    config = tree_config(name, tokenizer)
    out = tmp_path / "out"
    manifest = prepare_into(out, config, workers=2, shard_megabytes=SHARD_MEGABYTES)
    prepare_into(tmp_path / "alone", config, shard_megabytes=SHARD_MEGABYTES)
    assert contents(out) == contents(tmp_path / "alone")
    found = verify(out)
    assert found.problems == [] and found.tokens == manifest.train.tokens + manifest.held_out.tokens

    # Every document is there once, on its side, in its order: compared one by one with the files.
    opened = open_tokenizer(config.tokenizer)
    _, splits = open_directory(out)
    next_number = dict.fromkeys(SPLITS, 0)
    seen: set[bytes] = set()
    duplicates = duplicate_bytes = invalid = 0
    for document in open_source(config.source).documents():
        digest = hashlib.sha256(document.content).digest()
        if not document.content:
            continue
        if digest in seen:
            duplicates += 1
            duplicate_bytes += len(document.content)
            continue
        seen.add(digest)
        split = "held_out" if held_out(document.identity, 0.02) else "train"
        ids = np.empty(int(splits[split].lengths[next_number[split]]), dtype=np.int64)
        splits[split].read(next_number[split], 0, ids)
        next_number[split] += 1
        text = document.content.decode("utf-8", errors="replace").encode()
        assert opened.decode(ids[1:]) == (document.content if kind == "bytes" else text), document.location
        assert ids[0] == opened.boundary_id
        invalid += kind != "bytes" and text != document.content
    assert (manifest.duplicate_documents, manifest.duplicate_bytes) == (duplicates, duplicate_bytes)
    assert next_number == {"train": manifest.train.documents, "held_out": manifest.held_out.documents}
    # Text that holds U+FFFD itself is valid, so it is not among those that differ.
    assert manifest.train.invalid_utf8_documents + manifest.held_out.invalid_utf8_documents == invalid

    # The order of training: each sample by itself is what it is in a batch, and an epoch reads every token but the
    # few behind its last sample.
    prepared = {"type": "prepared", "path": str(out)}
    section = config.model_dump() | {"source": prepared}
    data, again = (open_data(DataConfig.model_validate(section), seed=7) for _ in range(2))
    together = data.train.batch(range(0, 64))
    alone = [again.train.batch([index]) for index in range(63, -1, -1)][::-1]
    assert np.array_equal(together.tokens, np.concatenate([batch.tokens for batch in alone]))
    labels = sum(data.train.batch([index]).label_count for index in range(data.train.samples_per_epoch))
    assert labels + data.summary.train.dropped_tokens == manifest.train.tokens - 1

"""What ``pretrain checkpoint list|inspect|verify`` report, as plain dictionaries."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.checkpoint.directory import (
    CHECKPOINTS_DIRECTORY,
    is_step_directory,
    read_listed_manifest,
    resolve_checkpoint,
    step_directories,
)
from pretrain.checkpoint.format import MANIFEST_FILE, STATE_FILE, Manifest, read_manifest
from pretrain.errors import InputError


def describe(path: Path) -> dict[str, Any]:
    """What one checkpoint holds.

    Args:
        path: a run directory, its checkpoints directory (the newest is meant), or one checkpoint.

    Returns:
        ``path``, ``step``, ``bytes``, ``shards`` (files), ``tensors`` (distinct names), ``parameters``
        (elements of all weights), ``kinds`` (tensors of each kind), ``saved_at`` (ISO 8601, UTC: the
        manifest's modification time) and ``config`` (scalar settings of the resolved config, by dotted key).

    Raises:
        InputError: when there is no complete checkpoint.
    """
    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{checkpoint / STATE_FILE} is not readable JSON: {error}") from error
    config = state.get("config") if isinstance(state, dict) else None
    return {**_summary(checkpoint, manifest), "config": _scalars(config if isinstance(config, dict) else {})}


def describe_all(path: Path) -> list[dict[str, Any]]:
    """One row for each checkpoint of a run or of a checkpoints directory, in order of step, broken ones too.

    A broken one has ``problem`` (a sentence); ``problem`` is ``None`` for a complete one, which also has the
    entries of ``describe`` but ``config``.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; give a run directory or its {CHECKPOINTS_DIRECTORY}/")
    if (path / MANIFEST_FILE).exists() or is_step_directory(path):
        return [{**_summary(path, read_manifest(path)), "problem": None}]
    rows: list[dict[str, Any]] = []
    found = step_directories(path / CHECKPOINTS_DIRECTORY) or step_directories(path)
    if not found:
        raise InputError(f"{path} holds no checkpoint yet; a save that did not finish is none")
    for step, directory in found:
        try:
            manifest = read_listed_manifest(step, directory)
        except InputError as error:
            rows.append({"path": str(directory), "step": step, "problem": str(error)})
        else:
            rows.append({**_summary(directory, manifest), "problem": None})
    return rows


def verify(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and compare it with its checksums; the result is its ``describe``.

    Of a run the newest is meant, whole or not: a resume would pass over a broken one, but here it must be told.

    Raises:
        InputError: naming the damaged files.
    """
    from pretrain.checkpoint.reader import CheckpointReader

    path = Path(path)
    found = step_directories(path / CHECKPOINTS_DIRECTORY) or step_directories(path)
    checkpoint = found[-1][1] if found else resolve_checkpoint(path)
    if found:
        read_listed_manifest(*found[-1])
    with CheckpointReader(checkpoint) as reader:
        reader.verify()
    return describe(checkpoint)


def _summary(path: Path, manifest: Manifest) -> dict[str, Any]:
    tensors = manifest.tensors()
    kinds: dict[str, int] = {}
    parameters = 0
    for (_, kind), pieces in tensors.items():
        kinds[kind] = kinds.get(kind, 0) + 1
        if kind == "weight":
            parameters += math.prod(pieces[0][0].full_shape)
    modified = (path / MANIFEST_FILE).stat().st_mtime
    return {
        "path": str(path),
        "step": manifest.step,
        "bytes": manifest.num_bytes,
        "shards": len(manifest.shards),
        "tensors": len({name for name, _ in tensors}),
        "parameters": parameters,
        "kinds": kinds,
        "saved_at": datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds"),
    }


def _scalars(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found.update(_scalars(value, f"{prefix}{key}."))
        elif isinstance(value, str | int | float | bool):
            found[f"{prefix}{key}"] = value
    return found

"""Whatever a checkpoint's files hold, reading it ends in a checkpoint or in one clear error that names a file.

Sizes and checksums are renewed after each change, as someone who means harm would, so that what lies behind them is met
as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import CheckpointReader, TensorPiece, newest_checkpoint, write_checkpoint
from pretrain.checkpoint.commands import describe, describe_all, verify
from pretrain.checkpoint.format import KINDS, MANIFEST_FILE, STATE_FILE, manifest_checksum
from pretrain.errors import InputError
from tests.fuzzing import JSON_VALUES, changed, fast_and_slow

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Files]:
    """A checkpoint of three shards with a split tensor and a scalar; its files."""
    halves = [TensorPiece("b", "exp_avg", torch.ones(4, 2), (8, 2), 0, offset) for offset in (0, 4)]
    whole = [
        TensorPiece("embedding.weight", "weight", torch.arange(48.0).reshape(8, 6), (8, 6)),
        TensorPiece("scale", "weight", torch.tensor(1.5), ()),
    ]
    run = tmp_path_factory.mktemp("fuzzed") / "run" / "checkpoints"
    path = write_checkpoint(run, 100, [*halves, *whole], {"config": {"seed": 1}}, max_shard_bytes=100)
    return path, {file.name: file.read_bytes() for file in path.iterdir()}


def write(path: Path, files: Files, sign: bool = True) -> None:
    """Puts the files in place; the manifest agrees with their sizes and contents where it can."""
    body = json.loads(files[MANIFEST_FILE]) if sign else None
    for file in path.iterdir():
        file.unlink()
    for name, content in files.items():
        (path / name).write_bytes(content)
    if body is None:
        return
    for record in (body["state"], *body["shards"]):
        content = files[record["file"]]
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sign_manifest(path, body)


def sign_manifest(path: Path, body: Any) -> None:
    """Writes a manifest whose checksum is right."""
    if isinstance(body, dict):
        body = body | {"checksum": manifest_checksum(body)}
    (path / MANIFEST_FILE).write_text(json.dumps(body))


def use_everything(path: Path) -> None:
    """What any command does with a checkpoint."""
    with CheckpointReader(path) as reader:
        for kind in KINDS:
            for name in reader.names(kind):
                assert tuple(reader.read(name, kind).shape) == reader.shape(name, kind)
        reader.verify()


def assert_a_clear_error_at_most(path: Path) -> None:
    """No other exception, and no file opened but those of the checkpoint."""
    uses: tuple[Callable[[], Any], ...] = (
        lambda: use_everything(path),
        lambda: describe(path),
        lambda: verify(path),
        lambda: describe_all(path.parent.parent),
        lambda: newest_checkpoint(path.parent, verify_checksums=True),
    )
    for use in uses:
        try:
            use()
        except InputError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error)


@fast_and_slow(60, 3000)
def test_a_manifest_of_anything(examples: int, sound: tuple[Path, Files]) -> None:
    path, files = sound
    body = json.loads(files[MANIFEST_FILE])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed(body, JSON_VALUES | st.sampled_from([*files, "../" + MANIFEST_FILE, "/etc/passwd"])))
    def check(mangled: Any) -> None:
        write(path, files, sign=False)
        sign_manifest(path, mangled)
        assert_a_clear_error_at_most(path)

    check()


@fast_and_slow(60, 3000)
def test_files_of_any_bytes(examples: int, sound: tuple[Path, Files]) -> None:
    path, files = sound

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        name=st.sampled_from(sorted(files)),
        place=st.floats(0, 1, exclude_max=True),
        inserted=st.binary(max_size=12),
        removed=st.integers(0, 40),
        sign=st.booleans(),
    )
    def check(name: str, place: float, inserted: bytes, removed: int, sign: bool) -> None:
        content = files[name]
        at = int(place * len(content))
        mangled = content[:at] + inserted + content[at + removed :]
        write(path, files | {name: mangled}, sign=sign and name != MANIFEST_FILE)
        assert_a_clear_error_at_most(path)

    check()


def with_header(content: bytes, header: bytes, length: int | None = None) -> bytes:
    """A safetensors file with another header, which claims to have ``length`` bytes."""
    (before,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(header) if length is None else length) + header + content[8 + before :]


@fast_and_slow(60, 3000)
def test_a_shard_with_a_header_of_anything(examples: int, sound: tuple[Path, Files]) -> None:
    path, files = sound
    name = next(name for name in sorted(files) if name.startswith("shard-"))
    (length,) = struct.unpack("<Q", files[name][:8])
    header = json.loads(files[name][8 : 8 + length])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed(header, JSON_VALUES), st.none() | st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]))
    def check(mangled: Any, claimed: int | None) -> None:
        write(path, files | {name: with_header(files[name], json.dumps(mangled).encode(), claimed)})
        assert_a_clear_error_at_most(path)

    check()


def nested(depth: int) -> str:
    return '{"format": "recurrent-pretrain-checkpoint", "version": 1, "x": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize(
    "text",
    [*(nested(depth) for depth in (400, 980, 100_000)), "9" * 10_000, '{"step": 1e999}', "\x00", '"\ud800"', "null"],
    ids=lambda text: text[:12],
)
def test_manifests_that_libraries_stumble_over(text: str, sound: tuple[Path, Files]) -> None:
    path, files = sound
    write(path, files | {MANIFEST_FILE: text.encode("utf-8", "surrogatepass")}, sign=False)
    with pytest.raises(InputError, match=MANIFEST_FILE):
        CheckpointReader(path)
    assert_a_clear_error_at_most(path)


def entries_of(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for shard in body["shards"]:
        yield from shard["tensors"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        # Nothing of this size is ever allocated: the sums of bytes are right, because one dimension is 0.
        ({"full_shape": [0, 10**18, 10**18]}, r"no tensor has the shape \[0, 1000000000000000000"),
        ({"full_shape": [1] * 500}, "no tensor has the shape .* and 492 more dimensions"),
        ({"full_shape": [0, 10**30]}, "full_shape"),
        ({"name": "half a character \ud800"}, "a name has 1 to 1000 characters"),
    ],
)
def test_shapes_and_names_that_cannot_be(entry: dict[str, Any], message: str, sound: tuple[Path, Files]) -> None:
    path, files = sound
    write(path, files)
    body = json.loads(files[MANIFEST_FILE])
    next(found for found in entries_of(body) if found["name"] == "scale").update(entry)
    sign_manifest(path, body)
    with pytest.raises(InputError, match=message):
        CheckpointReader(path)


@pytest.mark.parametrize("name", [MANIFEST_FILE, STATE_FILE])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_regular_files_are_opened(name: str, kind: str, sound: tuple[Path, Files]) -> None:
    """A link leads out of the directory; a pipe would keep the reader waiting for ever."""
    path, files = sound
    write(path, files)
    outside = path.parent.parent / "outside"
    outside.write_bytes(files[name])
    (path / name).unlink()
    {"link": lambda p: p.symlink_to(outside), "pipe": os.mkfifo, "directory": Path.mkdir}[kind](path / name)
    try:
        with pytest.raises(InputError, match=f"{name} is not a regular file"):
            CheckpointReader(path)
        assert_a_clear_error_at_most(path)
    finally:
        Path.rmdir(path / name) if kind == "directory" else (path / name).unlink()

"""Damaged, incomplete and hostile checkpoints are refused by name, and an earlier one is used."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from pretrain.checkpoint import CheckpointReader, newest_checkpoint, write_checkpoint
from pretrain.checkpoint.format import MANIFEST_FILE, STATE_FILE
from pretrain.errors import InputError


def shard_of(checkpoint):
    return sorted(checkpoint.glob("shard-*"))[0]


@pytest.fixture
def two_checkpoints(checkpoint, run_checkpoints, tensors, whole_pieces, state):
    """Steps 100 and 200; the test damages the second."""
    return checkpoint, write_checkpoint(run_checkpoints, 200, whole_pieces(tensors, 2.0), state)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_byte_is_found_and_the_earlier_checkpoint_used(two_checkpoints, run_checkpoints, caplog):
    first, second = two_checkpoints
    flip_last_byte(shard_of(second))
    with pytest.raises(InputError, match=r"shard-00000-0000.safetensors does not match its SHA-256"):
        CheckpointReader(second).verify()
    assert newest_checkpoint(run_checkpoints) == second  # sizes alone cannot tell
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(run_checkpoints, verify_checksums=True) == first
    assert "SKIPPING A BROKEN CHECKPOINT" in caplog.text and "step-00000200" in caplog.text


def test_verification_can_be_divided_among_ranks(checkpoint):
    files = [record.file for record in CheckpointReader(checkpoint).manifest.files]
    assert len(files) >= 3
    flip_last_byte(checkpoint / files[2])
    reader = CheckpointReader(checkpoint)
    reader.verify(share=(0, 3))
    reader.verify(share=(1, 3))
    with pytest.raises(InputError, match=files[2]):
        reader.verify(share=(2, 3))


def truncate(checkpoint):
    path = shard_of(checkpoint)
    path.write_bytes(path.read_bytes()[:-4])


def remove_shard(checkpoint):
    shard_of(checkpoint).unlink()


def remove_manifest(checkpoint):
    (checkpoint / MANIFEST_FILE).unlink()


def cut_manifest(checkpoint):
    path = checkpoint / MANIFEST_FILE
    path.write_text(path.read_text()[:-40])


def edit_manifest_without_checksum(checkpoint):
    path = checkpoint / MANIFEST_FILE
    path.write_text(path.read_text().replace('"step": 200', '"step": 201'))


def replace_state(checkpoint):
    path = checkpoint / STATE_FILE
    path.write_text(path.read_text().replace("12800", "12801"))


def link_shard_elsewhere(checkpoint):
    path = shard_of(checkpoint)
    outside = checkpoint.parent.parent / "outside.safetensors"
    shutil.move(path, outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"shard-00000-0000.safetensors has \d+ bytes where the manifest says"),
        (remove_shard, r"shard-00000-0000.safetensors is missing"),
        (remove_manifest, r"manifest.json is missing"),
        (cut_manifest, r"manifest.json is not readable JSON"),
        (edit_manifest_without_checksum, r"manifest.json does not match its own checksum"),
        (link_shard_elsewhere, r"not a regular file"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_and_skipped(two_checkpoints, run_checkpoints, caplog, damage, message):
    first, second = two_checkpoints
    damage(second)
    with pytest.raises(InputError, match=message):
        CheckpointReader(second)
    assert newest_checkpoint(run_checkpoints) == first
    assert "step-00000200" in caplog.text


def test_a_changed_state_of_the_same_size_is_refused(checkpoint):
    replace_state(checkpoint)
    with pytest.raises(InputError, match=r"state.json does not match its SHA-256"):
        CheckpointReader(checkpoint)


def entry_of(body, name):
    """The manifest entry of a tensor's weight."""
    return next(
        piece
        for shard in body["shards"]
        for piece in shard["tensors"]
        if piece["name"] == name and piece["kind"] == "weight"
    )


def set_version(body):
    body["version"] = 2


def set_file(name):
    def change(body):
        body["shards"][0]["file"] = name

    return change


def set_state_file(body):
    body["state"]["file"] = "../state.json"


def make_gap(body):
    entry_of(body, "embedding.weight").update(dimension=0, offset=0, length=7)


def make_overlap(body):
    body["shards"][-1]["tensors"].append(dict(entry_of(body, "blocks.0.decay")))


def make_huge(body):
    for shard in body["shards"]:
        for piece in shard["tensors"]:
            if piece["name"] == "embedding.weight":
                piece["full_shape"] = [10**9, 10**9]


def list_twice(body):
    body["shards"].append(body["shards"][0])


def set_dtype(body):
    entry_of(body, "embedding.weight")["dtype"] = "object"


def set_negative_offset(body):
    entry_of(body, "embedding.weight").update(dimension=0, offset=-4, length=8)


def add_key(body):
    body["execute"] = "echo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_version, "format version 2; this program reads version 1"),
        (set_file("../../secret.safetensors"), "refused"),
        (set_file("/etc/passwd"), "refused"),
        (set_file("nested/shard-00000-0000.safetensors"), "refused"),
        (set_file("shard-00000-0000.safetensors\n"), "refused"),
        (set_file(".."), "refused"),
        (set_state_file, "the state file must be called"),
        (make_gap, r"'embedding.weight' \(weight\): gap at 7..8 of dimension 0"),
        (make_overlap, r"'blocks.0.decay' \(weight\): stored whole 2 times \(overlap\)"),
        (make_huge, "fewer than its listed tensors"),
        (list_twice, "listed more than once"),
        (set_dtype, "dtype"),
        (set_negative_offset, "greater than or equal to 0"),
        (add_key, "execute"),
    ],
)
def test_a_hostile_or_faulty_manifest_is_refused(checkpoint, edit_manifest, change, message):
    (checkpoint.parent.parent / "secret.safetensors").write_bytes(b"secret")
    edit_manifest(checkpoint, change)
    with pytest.raises(InputError, match=message) as caught:
        CheckpointReader(checkpoint)
    assert MANIFEST_FILE in str(caught.value)


def test_overlapping_slices_are_refused(run_checkpoints, edit_manifest):
    from pretrain.checkpoint import TensorPiece

    halves = [TensorPiece("w", "weight", torch.ones(4, 2), (8, 2), 0, offset) for offset in (0, 4)]
    path = write_checkpoint(run_checkpoints, 1, halves, {})

    def overlap(body):
        body["shards"][0]["tensors"][1]["offset"] = 3

    edit_manifest(path, overlap)
    with pytest.raises(InputError, match="overlap at 3..4 of dimension 0"):
        CheckpointReader(path)


def test_a_shard_whose_header_differs_from_the_manifest_is_refused(checkpoint, edit_manifest):
    """Transposing a shape keeps every size and the coverage; only the header of the shard can tell."""

    def transpose(body):
        entry_of(body, "embedding.weight")["full_shape"] = [6, 8]

    edit_manifest(checkpoint, transpose)
    reader = CheckpointReader(checkpoint)
    with pytest.raises(InputError, match=r"F32 of shape \[8, 6\], manifest.json says F32 of shape \[6, 8\]"):
        reader.read("embedding.weight")
    with pytest.raises(InputError, match=r"says F32 of shape \[6, 8\]"):
        reader.verify()


def test_a_shard_of_other_contents_is_never_unpickled(checkpoint, edit_manifest):
    """A pickle under a shard's name, with a size and checksum that fit, is refused as no safetensors file."""
    import hashlib
    import pickle

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(checkpoint.parent / 'executed')!r}, 'w').close()",))

    shard = shard_of(checkpoint)
    data = pickle.dumps(Bomb()).ljust(shard.stat().st_size, b"\0")
    shard.write_bytes(data)

    def renew_checksum(body):
        body["shards"][0].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    edit_manifest(checkpoint, renew_checksum)
    with pytest.raises(InputError, match="cannot be read"):
        CheckpointReader(checkpoint).verify()
    assert not (checkpoint.parent / "executed").exists()

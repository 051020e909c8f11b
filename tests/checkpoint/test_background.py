"""Checkpoints that a thread writes: the same bytes, nothing of later steps in them, and failures only told."""

from __future__ import annotations

import errno
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint import (
    CheckpointReader,
    TensorPiece,
    background,
    host_copies,
    list_checkpoints,
    newest_checkpoint,
    shards,
    write_checkpoint,
    writer,
)
from pretrain.checkpoint.background import BackgroundWriter
from pretrain.checkpoint.host_copies import HostCopies

CPU = torch.device("cpu")


@pytest.fixture
def in_background(run_checkpoints):
    return BackgroundWriter(run_checkpoints, keep_last=1, keep_every=None, device=CPU)


def begin(in_background, step, pieces, state):
    in_background.start(step, pieces, state, resumed_from=None, began=time.perf_counter())


@pytest.fixture
def gate(checkpoint, monkeypatch):
    """Holds every shard file back until it is set; step 100 is there already."""
    opened, save_file = threading.Event(), shards.save_file

    def held(*arguments, **options):
        assert opened.wait(60)
        save_file(*arguments, **options)

    monkeypatch.setattr(shards, "save_file", held)
    yield opened
    opened.set()


def test_the_bytes_are_those_of_a_save_that_training_waits_for(in_background, tmp_path, tensors, whole_pieces, state):
    awaited = write_checkpoint(tmp_path / "awaited", 200, whole_pieces(tensors), state)
    begin(in_background, 200, whole_pieces(tensors), state)
    outcome = in_background.take_outcome(wait=True)
    assert outcome.error is None and outcome.step == 200 and 0 <= outcome.stalled <= outcome.seconds
    files = sorted(path.name for path in awaited.iterdir())
    assert files == sorted(path.name for path in outcome.path.iterdir()) and len(files) == 3
    for name in files:
        assert (outcome.path / name).read_bytes() == (awaited / name).read_bytes(), name


def test_training_changes_its_tensors_while_they_are_written(
    in_background, gate, checkpoint, run_checkpoints, tensors, whole_pieces, state
):
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    begin(in_background, 200, whole_pieces(tensors), state)
    for tensor in tensors.values():
        tensor.fill_(-1.0)
    assert in_background.is_writing and in_background.take_outcome(wait=False) is None
    # Only one is kept, but the earlier one stays until there is another.
    assert list_checkpoints(run_checkpoints) == [checkpoint]
    with pytest.raises(RuntimeError, match="in flight"):
        begin(in_background, 201, whole_pieces(tensors), state)
    gate.set()
    outcome = in_background.take_outcome(wait=True)
    assert list_checkpoints(run_checkpoints) == [outcome.path]
    with CheckpointReader(outcome.path) as reader:
        reader.verify()
        assert reader.state == state
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in saved.items())
    assert in_background.take_outcome(wait=True) is None, "it is told once"


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def out_of_memory(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("module", "name", "failure", "message"),
    [
        (shards, "save_file", no_space, "No space left on device"),
        (writer.Path, "mkdir", read_only, "Read-only file system"),
        (writer, "write_durably", no_space, "No space left on device"),
        (writer.os, "rename", no_space, "No space left on device"),
        (host_copies, "torch", SimpleNamespace(**vars(torch) | {"empty": out_of_memory}), "can't allocate memory"),
        # What no save expects: the protocol itself is cut short.
        (background, "write_checkpoint", out_of_memory, "can't allocate memory"),
    ],
)
def test_a_failure_is_told_and_the_next_save_is_complete(
    in_background, checkpoint, run_checkpoints, tensors, whole_pieces, monkeypatch, module, name, failure, message
):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failure)
        begin(in_background, 200, whole_pieces(tensors, 2.0), {})
        outcome = in_background.take_outcome(wait=True)
    assert outcome.path is None and "step 200 could not be saved" in outcome.error
    assert message in outcome.error and "Earlier checkpoints are untouched" in outcome.error
    assert newest_checkpoint(run_checkpoints, verify_checksums=True) == checkpoint
    assert list(run_checkpoints.iterdir()) == [checkpoint]
    begin(in_background, 300, whole_pieces(tensors, 3.0), {})
    outcome = in_background.take_outcome(wait=True)
    assert list(run_checkpoints.iterdir()) == [outcome.path] and outcome.path.name == "step-00000300"
    CheckpointReader(outcome.path).verify()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_ended_counts_as_a_failure(in_background, checkpoint, run_checkpoints, monkeypatch):
    def ended(*_, **__):
        raise SystemExit

    monkeypatch.setattr(background, "write_checkpoint", ended)
    begin(in_background, 200, iter(()), {})
    outcome = in_background.take_outcome(wait=True)
    assert outcome.path is None and "its thread was ended" in outcome.error
    assert list_checkpoints(run_checkpoints) == [checkpoint]


def pieces_of(sizes, start=0.0, dimension=None):
    for index, size in enumerate(sizes):
        tensor = torch.arange(size, dtype=torch.float32) + start + index
        yield TensorPiece(f"w{index}", "weight", tensor, (max(size, 1),), dimension if size == 0 else None)


def test_host_copies_use_their_memory_again(monkeypatch):
    monkeypatch.setattr(host_copies, "_SLAB_ELEMENTS", 64)
    copies = HostCopies(CPU)
    # Several to a slab, one too large for any, none where a rank has an empty slice.
    sizes = [1, 20, 30, 200, 0, 64, 5]
    first = list(copies.take(pieces_of(sizes, dimension=0)))
    held, places = copies.num_bytes, [piece.tensor.data_ptr() for piece in first]
    assert [piece.tensor.numel() for piece in first] == [1, 20, 30, 200, 64, 5]
    assert held <= 4 * (sum(sizes) + 4 * 64)
    second = list(copies.take(pieces_of(sizes, start=1000.0, dimension=0)))
    by_name = {piece.name: piece.tensor for piece in second}
    for expected in pieces_of(sizes, 1000.0, dimension=0):
        assert expected.name == "w4" or torch.equal(by_name[expected.name], expected.tensor)
    assert [piece.tensor.data_ptr() for piece in second] == places and copies.num_bytes == held


def test_host_copies_of_pieces_that_grow_from_save_to_save(monkeypatch):
    monkeypatch.setattr(host_copies, "_SLAB_ELEMENTS", 64)
    copies = HostCopies(CPU)
    for sizes in ([10, 40], [40, 70, 10], [100, 10, 80]):
        for piece, expected in zip(copies.take(pieces_of(sizes)), pieces_of(sizes), strict=True):
            assert torch.equal(piece.tensor, expected.tensor)


def test_pieces_are_drawn_to_the_end_where_one_cannot_be_copied():
    """Other ranks wait in the collectives behind the later pieces."""
    drawn = []

    def pieces():
        for index in range(4):
            drawn.append(index)
            yield TensorPiece(f"w{index}", "weight", torch.ones(4, dtype=torch.float64), (4,))

    copies = HostCopies(CPU).take(pieces())
    assert drawn == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="'w0'.*expected float32"):
        next(copies)


@pytest.mark.gpu
def test_copies_from_a_gpu_are_pinned_and_complete(tensors, whole_pieces):
    device = torch.device("cuda")
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    copies = list(HostCopies(device).take(whole_pieces(on_device)))
    for tensor in on_device.values():
        tensor.fill_(-1.0)
    for copy, piece in zip(copies, whole_pieces(tensors), strict=True):
        assert copy.tensor.is_pinned() and torch.equal(copy.tensor, piece.tensor)

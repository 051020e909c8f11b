"""What is written is read back, whole or in any slice, whatever the split it was written with."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import CheckpointError, CheckpointReader, TensorPiece, write_checkpoint
from pretrain.checkpoint.format import KINDS
from pretrain.errors import InputError


def test_round_trip_of_every_kind_and_the_state(checkpoint, tensors, state):
    assert checkpoint.name == "step-00000100"
    reader = CheckpointReader(checkpoint)
    assert reader.step == 100
    assert reader.state == state
    for multiple, kind in enumerate(KINDS, start=1):
        assert reader.names(kind) == sorted(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name, kind) == tuple(tensor.shape)
            read = reader.read(name, kind)
            assert read.dtype == torch.float32 and read.is_contiguous()
            assert torch.equal(read, tensor * multiple)
    reader.verify()


def test_special_values_survive_bit_for_bit(run_checkpoints):
    tensor = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38])
    path = write_checkpoint(run_checkpoints, 1, [TensorPiece("w", "weight", tensor, (6,))], {})
    assert torch.equal(CheckpointReader(path).read("w").view(torch.int32), tensor.view(torch.int32))


@st.composite
def split_tensors(draw):
    """A shape, a way to split it when writing, and a slice to read."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dimension = draw(st.none() | st.integers(0, len(shape) - 1))
    cuts: list[int] = []
    if dimension is not None:
        cuts = sorted(draw(st.sets(st.integers(1, shape[dimension]), max_size=3)) | {0, shape[dimension]})
    read_dimension = draw(st.integers(0, len(shape) - 1))
    offset = draw(st.integers(0, shape[read_dimension]))
    length = draw(st.integers(0, shape[read_dimension] - offset))
    max_shard_bytes = draw(st.sampled_from([1, 40, 10**6]))
    return shape, dimension, cuts, read_dimension, offset, length, max_shard_bytes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(split_tensors())
def test_any_split_is_read_back_in_any_slice(case):
    shape, dimension, cuts, read_dimension, offset, length, max_shard_bytes = case
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    if dimension is None:
        pieces = [TensorPiece("w", "weight", tensor, shape)]
    else:
        # Written last part first: the order in which ranks come must not matter.
        pieces = [
            TensorPiece("w", "weight", tensor.narrow(dimension, low, high - low), shape, dimension, low)
            for low, high in reversed(list(zip(cuts, cuts[1:], strict=False)))
        ]
    with TemporaryDirectory() as directory:
        path = write_checkpoint(Path(directory), 0, pieces, {}, max_shard_bytes=max_shard_bytes)
        reader = CheckpointReader(path)
        assert torch.equal(reader.read("w"), tensor)
        expected = tensor.narrow(read_dimension, offset, length)
        assert torch.equal(reader.read("w", "weight", read_dimension, offset, length), expected)


def test_same_input_gives_the_same_bytes(tmp_path, tensors, whole_pieces, state):
    first = write_checkpoint(tmp_path / "a", 5, whole_pieces(tensors), state)
    second = write_checkpoint(tmp_path / "b", 5, whole_pieces(tensors), dict(reversed(state.items())))
    files = sorted(entry.name for entry in first.iterdir())
    assert files == sorted(entry.name for entry in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_shards_are_bounded_and_pieces_are_taken_lazily(run_checkpoints):
    drawn_when_written: list[int] = []

    def pieces():
        buffer = torch.empty(16)
        for index in range(8):
            buffer.fill_(index)  # the caller reuses its buffer: the writer must have copied the last one
            yield TensorPiece(f"w{index}", "weight", buffer, (16,))
            temporary = next(run_checkpoints.iterdir())
            drawn_when_written.append(len(list(temporary.glob("shard-*"))))

    path = write_checkpoint(run_checkpoints, 1, pieces(), {}, max_shard_bytes=128)
    assert drawn_when_written == [0, 0, 1, 1, 2, 2, 3, 3]  # two tensors of 64 bytes to a shard
    assert len(list(path.glob("shard-*"))) == 4
    reader = CheckpointReader(path)
    assert [reader.read(f"w{index}")[0].item() for index in range(8)] == list(range(8))


def test_a_rank_may_hold_nothing_of_an_unevenly_split_tensor(run_checkpoints):
    tensor = torch.arange(6.0).reshape(3, 2)
    pieces = [
        TensorPiece("w", "weight", tensor, (3, 2), 0, 0),
        TensorPiece("w", "weight", tensor[3:], (3, 2), 0, 3),
    ]
    path = write_checkpoint(run_checkpoints, 1, pieces, {})
    assert torch.equal(CheckpointReader(path).read("w"), tensor)


def test_a_slice_reads_only_its_part_of_the_file(run_checkpoints):
    """Damage outside the slice goes unseen by ``read`` (it did not read it) and is found by ``verify``."""
    tensor = torch.arange(4096.0).reshape(64, 64)
    path = write_checkpoint(run_checkpoints, 1, [TensorPiece("w", "weight", tensor, (64, 64))], {})
    shard = next(path.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    reader = CheckpointReader(path)
    assert torch.equal(reader.read("w", "weight", 1, 3, 5), tensor[:, 3:8])
    with pytest.raises(InputError, match=shard.name):
        reader.verify()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimension": 2}, "no dimension 2"),
        ({"dimension": -1}, "no dimension -1"),
        ({"dimension": 0, "offset": 6, "length": 3}, "outside"),
        ({"dimension": 0, "offset": -1}, "outside"),
        ({"offset": 1}, "need a dimension"),
    ],
)
def test_a_slice_outside_the_tensor_is_refused(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        CheckpointReader(checkpoint).read("embedding.weight", **arguments)


def test_an_unknown_name_suggests_the_nearest(checkpoint):
    with pytest.raises(InputError, match="nearest name is 'embedding.weight'"):
        CheckpointReader(checkpoint).read("embeding.weight")


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (TensorPiece("w", "weight", torch.ones(4).bfloat16(), (4,)), "expected float32"),
        (TensorPiece("w", "gradient", torch.ones(4), (4,)), "kind must be one of"),
        (TensorPiece("w", "weight", torch.ones(4), (5,)), "does not fit"),
        (TensorPiece("w", "weight", torch.ones(4), (5,), 0, 2), "exceeds dimension 0"),
        (TensorPiece("w", "weight", torch.ones(4), (4,), 1, 0), "no dimension 1"),
        (TensorPiece("w", "weight", torch.ones(4), (8,), 0, 0), "gap at 4..8"),
        (TensorPiece("a|b", "weight", torch.ones(4), (4,)), "a name has"),
    ],
)
def test_a_piece_that_contradicts_itself_is_never_saved(run_checkpoints, piece, message):
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(run_checkpoints, 1, [piece], {})
    assert list(run_checkpoints.iterdir()) == []


@pytest.mark.parametrize("state", [{"tensor": torch.ones(2)}, {"a": {1: "x"}}, {"a": [{"b": {None: 1}}]}])
def test_a_state_that_json_cannot_hold_is_refused(run_checkpoints, state):
    with pytest.raises(CheckpointError, match="the state is not JSON"):
        write_checkpoint(run_checkpoints, 1, [], state)


def test_only_json_and_safetensors_are_written(checkpoint):
    names = sorted(entry.name for entry in checkpoint.iterdir())
    assert names[:2] == ["manifest.json", "shard-00000-0000.safetensors"]
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    json.loads((checkpoint / "manifest.json").read_text())

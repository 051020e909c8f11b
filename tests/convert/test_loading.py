"""Reading a model: whole in one process whatever the layout, in slices under any, errors in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import write_checkpoint
from pretrain.errors import InputError
from pretrain.models.loading import load_decoder
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section, pieces_of, random_decoder, random_tokens, write_run
from tests.workers import WorkerPool


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {"zero": 1}),
        (2, {"tensor": 2, "sequence": True, "zero": 3}),
        (4, {"tensor": 4, "pipeline": 2, "data": 4, "zero": 1}),
    ],
)
def test_a_checkpoint_of_any_layout_is_read_whole(tmp_path: Path, ranks: int, parallel: dict) -> None:
    expected = random_decoder(tiny_config(model=model_section()))
    trained = tiny_config(model=model_section(), parallel=parallel, train={"precision": "bfloat16"})
    state = {"config": trained.model_dump(mode="json")}
    checkpoint = write_checkpoint(tmp_path / "checkpoints", 7, pieces_of(expected, ranks), state)
    loaded = load_decoder(tmp_path)
    assert (loaded.step, loaded.checkpoint) == (7, checkpoint)
    assert loaded.config.parallel.model_parallel == 1
    assert loaded.config.train.precision == "float32"
    assert not loaded.decoder.training
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.decoder.get_parameter(name), parameter), name
    tokens = random_tokens(2, 19)
    assert torch.equal(loaded.decoder.logits(tokens)[0], expected.logits(tokens)[0])


@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence": True}, {"pipeline": 2}])
def test_each_rank_reads_its_own_slice(
    tmp_path: Path, worker_pools: Callable[[int], WorkerPool], parallel: dict
) -> None:
    run, whole = write_run(tmp_path / "run")
    ranks = worker_pools(2).run("tests.convert.programs", "read_slices", run=str(run), parallel=parallel)
    names = [set(rank) for rank in ranks]
    assert names[0] | names[1] == {name for name, _ in whole.named_parameters()}
    if "pipeline" in parallel:
        assert not names[0] & names[1]
    else:
        assert names[0] == names[1]
    for number, rank in enumerate(ranks):
        for name, (values, dimension) in rank.items():
            expected = whole.get_parameter(name)
            if "tensor" in parallel and dimension is not None:
                expected = expected.chunk(2, dimension)[number]
            assert torch.equal(values, expected), name


def _write(directory: Path, pieces: list, model: dict | None = None, state: dict | None = None) -> Path:
    config = tiny_config(model=model or model_section())
    write_checkpoint(
        directory / "checkpoints",
        1,
        pieces,
        {"config": config.model_dump(mode="json")} if state is None else state,
    )
    return directory


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    pieces = list(pieces_of(random_decoder(tiny_config(model=model_section()))))
    run = _write(tmp_path, [piece for piece in pieces if piece.name != "layers.1.mixer.output.weight"])
    with pytest.raises(InputError, match="another model: it lacks 1 tensors .*'layers.1.mixer.output.weight'"):
        load_decoder(run)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    three_layers = random_decoder(tiny_config(model=model_section(num_layers=3)))
    run = _write(tmp_path, list(pieces_of(three_layers)))
    with pytest.raises(InputError, match="another model: it has .* first 'layers.2.channel.down.weight'"):
        load_decoder(run)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    wider = random_decoder(tiny_config(model=model_section(channel={"intermediate_size": 96})))
    run = _write(tmp_path, list(pieces_of(wider)))
    with pytest.raises(InputError, match=r"'layers.0.channel.* has shape \[96, 64\] there, but \[192, 64\]"):
        load_decoder(run)


def test_a_state_without_a_configuration(tmp_path: Path) -> None:
    pieces = list(pieces_of(random_decoder(tiny_config(model=model_section()))))
    with pytest.raises(InputError, match="holds no run configuration"):
        load_decoder(_write(tmp_path / "none", pieces, state={"samples": 3}))
    with pytest.raises(InputError, match="configuration in .*'run' is missing"):
        load_decoder(_write(tmp_path / "half", pieces, state={"config": {"model": model_section()}}))


def test_a_damaged_checkpoint_and_none_at_all(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run")
    (shard,) = (run / "checkpoints" / "step-00000007").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="incomplete"):
        load_decoder(run)
    with pytest.raises(InputError, match=shard.name):
        load_decoder(shard.parent)
    with pytest.raises(InputError, match="not a directory"):
        load_decoder(tmp_path / "absent")


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="auto, cpu or cuda, but is 'gpu'"):
        load_decoder(tmp_path, "gpu")

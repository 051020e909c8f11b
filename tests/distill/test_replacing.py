"""Recurrent layers in the place of attention begin as attention without softmax; all else is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, silu
from typer.testing import CliRunner

from pretrain.checkpoint import CheckpointReader, resolve_checkpoint
from pretrain.cli import app
from pretrain.config import load_config
from pretrain.convert import import_model
from pretrain.distill.replacing import parse_layers, replace_layers
from pretrain.errors import InputError
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.attention.linear_maps import MEMORY_OF_HEADS
from pretrain.models.loading import load_decoder
from pretrain.models.registry import sequence_mixers
from tests.conformance.tools import alone, call, context_of
from tests.convert.checkpoints import random_tokens
from tests.convert.native_models import add_tokenizer, random_model
from tests.distill.models import write_student, write_teacher
from tests.runs import raw_config

WIDTH, LENGTH = 32, 19
ATTENTION: dict[str, dict[str, Any]] = {
    "grouped": {"num_heads": 4, "num_key_value_heads": 2},
    "biases": {"num_heads": 2, "bias": True, "output_bias": False, "softmax_scale": 0.4},
    "norms": {"num_heads": 4, "num_key_value_heads": 1, "head_size": 6, "query_key_norm": True},
}


def _random_attention(config: AttentionConfig) -> dict[str, Tensor]:
    mixer = alone(sequence_mixers()["attention"], config, context_of(WIDTH))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in mixer.named_parameters()}
    return {name: value * 0.2 if value.dim() > 1 else 1 + 0.3 * value for name, value in weights.items()}


def _replacement(mixer: str, attention: AttentionConfig, source: dict[str, Tensor], memory: bool) -> torch.nn.Module:
    """The layer that begins with these weights; without ``memory`` none of its heads forgets."""
    family = sequence_mixers()[mixer]
    config = family.config.model_validate(family.from_attention.section(attention, WIDTH))
    layer = alone(family, config, context_of(WIDTH))
    made = family.from_attention.weights(attention, config, WIDTH, source)
    assert made.keys() == dict(layer.named_parameters()).keys()
    if not memory:
        made |= {"mamba2": {"log_decay_rate": torch.full((attention.num_heads,), -40.0)}}.get(
            mixer, {"forget_gate_bias": torch.full((attention.num_heads,), 1e4)}
        )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(made[name])
    return layer


def _linear_attention(
    mixer: str, attention: AttentionConfig, source: dict[str, Tensor], hidden: Tensor, memory: bool
) -> Tensor:
    """Attention without softmax in float64, ``(sequence, batch, width)``, from its definition."""
    source = {name: value.double() for name, value in source.items()}
    size = attention.size_of_head(WIDTH)
    heads = {}
    for name in ("query", "key", "value"):
        projected = hidden.double() @ source[f"projections.{name}_weight"].T
        projected = projected + source.get(f"{name}_bias", 0.0)
        projected = projected.unflatten(-1, (-1, size)) * source.get(f"{name}_norm_weight", 1.0)
        heads[name] = projected
    # Each key head serves the next so many query heads.
    serves = torch.arange(attention.num_heads) // (attention.num_heads // attention.key_value_heads)
    query = heads["query"] * (attention.softmax_scale or size**-0.5)
    key, value = heads["key"][:, :, serves], heads["value"][:, :, serves]
    if mixer == "mamba2":
        query, key, value = silu(query), silu(key), silu(value)
    scores = torch.einsum("tbhc,sbhc->bhts", query, key).tril()
    if memory:
        tokens = torch.tensor(MEMORY_OF_HEADS, dtype=torch.float64).log()
        spaced = torch.linspace(0, 1, attention.num_heads, dtype=torch.float64)
        log_keep = -1 / torch.exp(tokens[0] + spaced * (tokens[1] - tokens[0]))
        if mixer == "mlstm":
            gates = [torch.log(torch.tensor(tokens - 1, dtype=torch.float64)) for tokens in MEMORY_OF_HEADS]
            log_keep = torch.nn.functional.logsigmoid(gates[0] + spaced * (gates[1] - gates[0]))
        back = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        scores = scores * torch.exp(log_keep[:, None, None] * back).tril()
    mixed = torch.einsum("bhts,sbhc->tbhc", scores, value)
    scale = source["projections.value_weight"].square().sum(1).unflatten(0, (-1, size)).mean(1).sqrt()[serves]
    if mixer == "mamba2":
        normed = rms_norm(mixed, (size,), eps=1e-5)
    else:
        normed = mixed / scores.sum(-1).permute(2, 0, 1).abs().clamp(min=1.0)[..., None]
        normed = layer_norm(normed, (size,), eps=1e-6)
    return (normed * scale[:, None]).flatten(2) @ source["output.weight"].T


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("mixer", "kind"), [("mamba2", "grouped"), ("mamba2", "biases"), ("mamba2", "norms"), ("mlstm", "grouped")]
)
def test_it_begins_as_attention_without_softmax(mixer: str, kind: str, memory: bool) -> None:
    attention = AttentionConfig(**ATTENTION[kind])
    source = _random_attention(attention)
    hidden = torch.randn(LENGTH, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    layer = _replacement(mixer, attention, source, memory)
    output, _ = call(layer, hidden)
    expected = _linear_attention(mixer, attention, source, hidden, memory)
    assert expected.std() > 0.1
    torch.testing.assert_close(output.double(), expected, atol=2e-4, rtol=0)
    output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        # Gates can learn, unless they are so far open.
        assert not memory or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("mixer", "keys", "message"),
    [
        (
            "mlstm",
            {"bias": True, "output_bias": False},
            "layer 1: mlstm has no biases of queries, keys, values or output",
        ),
        ("mamba2", {"bias": True}, "layer 1: mamba2 has no bias of its output"),
        ("slstm", {}, "--with slstm: no layer of it is made from attention; take one of mamba2, mlstm"),
    ],
)
def test_what_cannot_be_replaced_is_said(mixer: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    teacher, _ = write_teacher(tmp_path / "teacher", **keys)
    with pytest.raises(InputError, match=message):
        replace_layers(teacher, tmp_path / "student", [1], mixer)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("mixer", ["mamba2", "mlstm"])
def test_all_else_is_copied_bit_for_bit(mixer: str, tmp_path: Path) -> None:
    teacher, student = write_student(tmp_path, mixer)
    with (
        CheckpointReader(resolve_checkpoint(teacher)) as before,
        CheckpointReader(resolve_checkpoint(student)) as after,
    ):
        after.verify()
        kept = {name for name in before.names() if not name.startswith("layers.1.mixer.")}
        assert kept == {name for name in after.names() if not name.startswith("layers.1.mixer.")}
        assert all(torch.equal(before.read(name), after.read(name)) for name in kept)
        assert torch.equal(after.read("layers.1.mixer.output.weight"), before.read("layers.1.mixer.output.weight"))
        assert after.state["imported_from"] == {
            "teacher": str(resolve_checkpoint(teacher)),
            "replaced_layers": [1],
            "mixer": mixer,
        }
    config = load_config(student / "config.yaml")
    assert [config.model.block(layer).mixer.type for layer in range(3)] == ["attention", mixer, "attention"]
    assert config.distillation.teacher == str(resolve_checkpoint(teacher))
    assert config.run.directory == "runs/student"
    decoder = load_decoder(student).decoder
    logits, _ = decoder.logits(random_tokens(2, 20))
    assert logits.isfinite().all() and logits.std() > 0.5
    with pytest.raises(InputError, match=f"layer 1 has {mixer}, not attention; layers with attention: 0, 2"):
        replace_layers(student, tmp_path / "again", [1], mixer)


def test_a_student_of_an_imported_model(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "hf")
    add_tokenizer(tmp_path / "hf", {"eos_token": "<|end|>"})
    import_model(tmp_path / "hf", tmp_path / "teacher", check=False)
    report = replace_layers(tmp_path / "teacher", tmp_path / "student", [0], "mlstm")
    assert not report.chosen and "choose what stands as ???" in str(report)
    with pytest.raises(InputError, match=r"data.sequence_length, data.source, .* must still be chosen"):
        load_config(tmp_path / "student" / "config.yaml")
    text = (tmp_path / "student" / "config.yaml").read_text()
    assert str(tmp_path / "teacher" / "step-00000000") in text and str(tmp_path / "teacher" / "tokenizer.json") in text
    raw = raw_config(tmp_path, distillation={"teacher": "another", "logits": {"temperature": 2.0}})
    del raw["model"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw))
    report = replace_layers(tmp_path / "teacher", tmp_path / "chosen", [0, 1], "mamba2", base=tmp_path / "base.yaml")
    config = load_config(tmp_path / "chosen" / "config.yaml")
    assert report.chosen and config.train.steps == 12 and config.distillation.logits.temperature == 2.0
    assert config.distillation.teacher == str(tmp_path / "teacher" / "step-00000000")
    assert {config.model.block(layer).mixer.type for layer in range(2)} == {"mamba2"}


def test_the_command(tmp_path: Path) -> None:
    teacher, _ = write_teacher(tmp_path / "teacher")
    student = tmp_path / "student"
    result = CliRunner().invoke(app, ["replace-layers", str(teacher), str(student), "--layers", "2,0"])
    assert result.exit_code == 0, result.output
    assert "attention of layers 0, 2" in result.output and "not taken over: rotary positions" in result.output
    assert f"pretrain train {student}/config.yaml --resume {student}" in result.output
    assert parse_layers("3, 1,1") == [1, 3]
    with pytest.raises(InputError, match="expected numbers of layers with commas between"):
        parse_layers("1-3")
    with pytest.raises(InputError, match="has no layer 3; layers are counted from 0 to 2"):
        replace_layers(teacher, tmp_path / "other", [3], "mamba2")

"""Mamba-2 and its mixes in the classes that ``transformers`` has for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.tokenizers.byte_level import ByteTokenizer
from pretrain.convert import export_model, import_model
from pretrain.convert.huggingface import choose_form
from pretrain.errors import InputError
from pretrain.generate import generate
from pretrain.models.decoder import Decoder
from pretrain.models.loading import load_decoder
from pretrain.models.registry import family_of
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section, random_tokens, write_run

MAMBA2 = {"type": "mamba2", "head_size": 16, "state_size": 8, "num_groups": 2, "chunk_size": 16, "norm_epsilon": 1e-6}
ATTENTION = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2, "rotary_fraction": 0.0}
HALF = {"rotary_fraction": 0.5, "rotary_base": 5000.0}
FULL = {"rotary_fraction": 1.0, "rotary_base": 5000.0}
RELU_SQUARED = {"type": "mlp", "activation": "relu_squared", "round_up_to": 16}
EXPERTS = {
    "type": "moe",
    "router": "linear",
    "num_experts": 4,
    "intermediate_size": 24,
    "shared_expert_size": 32,
    "shared_expert_share": 0.3,
}
SWIGLU = {"type": "swiglu", "round_up_to": 16}


def mix(*blocks: tuple[dict | None, dict | None], **fields: object) -> dict:
    """A model of these ``(mixer, channel)`` blocks."""
    named = {
        f"block{index}": {part: section for part, section in zip(("mixer", "channel"), block, strict=True) if section}
        for index, block in enumerate(blocks)
    }
    fields = {"output_logit_soft_cap": None, **fields}
    return model_section(num_layers=len(named), layers=list(named), blocks=named, **fields)


MODELS = {
    "mamba2": ("Mamba2ForCausalLM", mix((MAMBA2, None), (MAMBA2 | {"num_groups": 2}, None))),
    "mamba2, one group, no bias": (
        "Mamba2ForCausalLM",
        mix((MAMBA2 | {"num_groups": 1, "convolution_bias": False, "convolution_width": 3, "expand": 3.0}, None)),
    ),
    "mamba2, tied": ("Mamba2ForCausalLM", mix((MAMBA2, None), tie_embeddings=True)),
    "nemotron": (
        "NemotronHForCausalLM",
        mix(
            (MAMBA2 | {"num_heads": 6}, None),
            (None, RELU_SQUARED),
            (ATTENTION | {"head_size": 24}, None),
            (None, RELU_SQUARED),
        ),
    ),
    "nemotron, mlp with silu": (
        "NemotronHForCausalLM",
        mix((MAMBA2, None), (None, RELU_SQUARED | {"activation": "silu"}), (ATTENTION, None)),
    ),
    "bamba": (
        "BambaForCausalLM",
        mix((MAMBA2, SWIGLU), (ATTENTION | HALF, SWIGLU), (MAMBA2, SWIGLU)),
    ),
    "bamba, tied": (
        "BambaForCausalLM",
        mix((MAMBA2, SWIGLU), (ATTENTION | HALF | {"bias": True, "head_size": 24}, SWIGLU), tie_embeddings=True),
    ),
    "granite": (
        "GraniteMoeHybridForCausalLM",
        mix((MAMBA2, SWIGLU), (ATTENTION | FULL | {"softmax_scale": 0.3}, SWIGLU)),
    ),
    "granite without positions, tied": (
        "GraniteMoeHybridForCausalLM",
        mix((ATTENTION, SWIGLU), (MAMBA2, SWIGLU), tie_embeddings=True),
    ),
    "granite, experts": (
        "GraniteMoeHybridForCausalLM",
        mix((MAMBA2, EXPERTS), (ATTENTION | FULL | {"softmax_scale": 0.3}, EXPERTS)),
    ),
    "granite, attention alone": (
        "GraniteMoeHybridForCausalLM",
        mix((ATTENTION | FULL | {"softmax_scale": 0.3}, SWIGLU)),
    ),
    "llama": ("LlamaForCausalLM", mix((ATTENTION | FULL, SWIGLU), tie_embeddings=True)),
    "mistral": ("MistralForCausalLM", mix((ATTENTION | FULL | {"sliding_window": 9, "head_size": 24}, SWIGLU))),
    "qwen2": ("Qwen2ForCausalLM", mix((ATTENTION | FULL | {"bias": True, "output_bias": False}, SWIGLU))),
    "qwen3": ("Qwen3ForCausalLM", mix((ATTENTION | FULL | {"query_key_norm": True, "head_size": 24}, SWIGLU))),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Decoder]:
    """A directory, and our model of it; logits were compared when it was written."""
    architecture, model = MODELS[request.param]
    directory = tmp_path_factory.mktemp("native")
    run, decoder = write_run(directory / "run", model)
    report = export_model(run, directory / "out")
    assert (report.architecture, report.needs_code, report.cached_generation) == (architecture, False, True)
    assert report.comparison.tolerance == 1e-4
    assert report.parameters == sum(parameter.numel() for parameter in decoder.parameters())
    return directory / "out", decoder


def test_the_configuration_is_plain_json(exported: tuple[Path, Decoder]) -> None:
    directory, decoder = exported
    text = (directory / "config.json").read_text()
    assert "__float__" not in text and "Infinity" not in text
    assert json.loads(text)["tie_word_embeddings"] == decoder.model.tie_embeddings
    assert not list(directory.glob("*.py"))
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())


@torch.no_grad()
def test_cached_decoding_is_the_full_forward_pass(exported: tuple[Path, Decoder]) -> None:
    directory, decoder = exported
    model, tokens = AutoModelForCausalLM.from_pretrained(directory), random_tokens(2, 30)
    ours, _ = decoder.logits(tokens)
    assert ours.std() > 0.5
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    pieces, cache, position = [], {}, 0
    for piece in tokens.split([20, *[1] * 10], 1):
        # Bamba counts positions anew in every call unless told; generate() tells.
        positions = torch.arange(position, position + piece.shape[1])[None]
        told = {} if name == "cache_params" else {"position_ids": positions}
        output = model(input_ids=piece, use_cache=True, **told, **cache)
        pieces.append(output.logits)
        cache, position = {name: output[name]}, position + piece.shape[1]
    torch.testing.assert_close(torch.cat(pieces, 1), ours, atol=1e-4, rtol=0)


def test_it_writes_our_text(exported: tuple[Path, Decoder]) -> None:
    directory, decoder = exported
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    prompt = "the state "
    inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    (ours,) = generate(decoder, ByteTokenizer(), [prompt.encode()], 12, temperature=0)
    assert bytes(token for token in ids.tolist() if token < 256) == ours
    assert len(ours) > 0


def test_prompts_of_different_lengths_are_padded_on_the_left(exported: tuple[Path, Decoder]) -> None:
    """As the model card says: what the mask masks enters neither state nor attention."""
    directory, _ = exported
    assert "padded on the left" in (directory / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompts = [random_tokens(length, seed=length).clamp(max=255) for length in (9, 2, 6)]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens, mask = torch.full((3, 9), 256), torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    together = model.generate(tokens, attention_mask=mask, **options)[:, 9:]
    alone = [model.generate(prompt[None], **options)[0, len(prompt) :] for prompt in prompts]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_packed_documents_are_not_kept_apart(exported: tuple[Path, Decoder]) -> None:
    """As the model card warns; where this fails, the classes have learnt it and the card should say so."""
    directory, decoder = exported
    assert "do not pack several documents into a row" in (directory / "README.md").read_text()
    if not any(family_of(block.mixer).name == "mamba2" for block in decoder.model.blocks.values() if block.mixer):
        return
    model, tokens = AutoModelForCausalLM.from_pretrained(directory), random_tokens(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits[0, 12:]
    assert (packed - model(tokens[:, 12:]).logits[0]).abs().max() > 1e-3


def test_it_is_imported_again(exported: tuple[Path, Decoder], base: Path, tmp_path: Path) -> None:
    directory, decoder = exported
    import_model(directory, tmp_path / "imported", base=base, check=False)
    again = load_decoder(tmp_path / "imported").decoder
    tokens = random_tokens(1, 30)
    torch.testing.assert_close(again.logits(tokens)[0], decoder.logits(tokens)[0], atol=1e-5, rtol=0)


def test_it_trains(exported: tuple[Path, Decoder]) -> None:
    model, tokens = AutoModelForCausalLM.from_pretrained(exported[0]).train(), random_tokens(2, 40)
    tokens[0, 3] = 256
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # The document mark, which is the padding token too, goes on learning.
    assert model.get_input_embeddings().weight.grad[256].abs().max() > 0


@pytest.mark.parametrize(
    ("model", "problems"),
    [
        (
            mix((MAMBA2, None), (ATTENTION | FULL, None)),
            {"NemotronH": "has no rotary positions", "Mamba2": r"layer 1 \(mixer attention, channel none\)"},
        ),
        (
            mix((MAMBA2 | {"norm_epsilon": 1e-3}, SWIGLU)),
            {"Bamba": "one rms_norm_eps .* model needs 1e-06 and model.blocks.block0.mixer needs 0.001"},
        ),
        (mix((MAMBA2 | {"num_heads": 6}, None)), {"Mamba2": "no inner width of 96"}),
        (
            mix((MAMBA2, SWIGLU), output_logit_soft_cap=30.0),
            {"Bamba": "does not cap its logits, fails without an attention layer", "GraniteMoeHybrid": "fails without"},
        ),
        (mix((MAMBA2, None), (None, RELU_SQUARED)), {"NemotronH": "fails without an attention layer"}),
        (mix((None, RELU_SQUARED), tie_embeddings=True), {"NemotronH": "does not tie"}),
        (
            mix((ATTENTION | FULL | {"bias": True, "output_bias": False, "sliding_window": 9}, SWIGLU)),
            {"Llama": "all four projections|sliding window", "Mistral": "all four", "Qwen2": "sliding window"},
        ),
        (
            mix((ATTENTION | HALF | {"query_key_norm": True}, SWIGLU)),
            {"Llama": "rotary positions in all of each head", "Qwen3": "in all of each", "Bamba": "no norm of queries"},
        ),
        (mix((None, RELU_SQUARED | {"gated": True})), {"NemotronH": "no gated"}),
        (
            mix((ATTENTION, EXPERTS | {"router": "recurrent"})),
            {"GraniteMoeHybrid": "no recurrent router", "Bamba": r"layer 0 \(mixer attention, channel moe\)"},
        ),
        (mix((ATTENTION, EXPERTS | {"shared_expert_size": None})), {"GraniteMoeHybrid": "without a shared one"}),
        (mix((ATTENTION, EXPERTS | {"experts_per_token": 1})), {"GraniteMoeHybrid": "the only expert of a token"}),
        (mix((ATTENTION, EXPERTS), (MAMBA2, SWIGLU)), {"GraniteMoeHybrid": "one .* for the whole model"}),
    ],
)
def test_what_a_class_has_not_is_named(model: dict, problems: dict[str, str]) -> None:
    _, unfit = choose_form(tiny_config(model=model).model)
    for architecture, problem in problems.items():
        (found,) = (reason for reason in unfit if reason.startswith(f"{architecture}ForCausalLM "))
        with pytest.raises(InputError, match=problem):
            raise InputError(found)


def test_a_gated_mlp_with_silu_is_a_swiglu() -> None:
    gated = {"type": "mlp", "gated": True, "activation": "silu", "round_up_to": 16}
    attention = (ATTENTION | HALF, SWIGLU | {"projection_factor": 4.0})
    model = tiny_config(model=mix((MAMBA2, gated), attention)).model
    form, _ = choose_form(model)
    assert form.architecture == "BambaForCausalLM"
    swiglu = tiny_config(model=mix((MAMBA2, SWIGLU | {"projection_factor": 4.0}), attention)).model
    assert family_of(model.block(0).channel).name == "mlp"
    assert form.native.config_fields(model) == choose_form(swiglu)[0].native.config_fields(swiglu)

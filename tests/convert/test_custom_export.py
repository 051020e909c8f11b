"""Models that bring their own code: ``transformers`` loads, generates from, trains and saves them as any other."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from data.tokenizers.byte_level import ByteTokenizer
from pretrain.convert import custom, export_model
from pretrain.convert.comparison import COMPARED_LENGTHS
from pretrain.convert.custom import self_contained
from pretrain.convert.native_classes import NATIVE_CLASSES
from pretrain.convert.remote import mixers as remote_mixers
from pretrain.convert.remote import modeling_recurrent
from pretrain.convert.remote.configuration_recurrent import RecurrentConfig
from pretrain.errors import InputError
from pretrain.generate import generate
from pretrain.models.decoder import Decoder
from pretrain.models.registry import channel_mixers, sequence_mixers
from tests.convert.checkpoints import model_section, random_tokens, write_run
from tests.models.hnet_models import hnet_model

HIDDEN_SIZE = 64


def mix_of_all_mixers() -> dict:
    """A model with every registered mixer, and blocks without the one or the other part; few rounding errors add up."""
    mixers, channels = (
        [family.config.examples(HIDDEN_SIZE)[0].model_dump(mode="json") for family in families.values()]
        for families in (sequence_mixers(), channel_mixers())
    )
    blocks = {
        f"block{index}": {"mixer": mixer, "channel": channels[index % len(channels)]}
        for index, mixer in enumerate(mixers)
    }
    blocks |= {"channel": {"channel": channels[0]}, "mixer": {"mixer": mixers[0]}}
    return model_section(hidden_size=HIDDEN_SIZE, num_layers=len(blocks), layers=list(blocks), blocks=blocks)


MODELS = {
    "all": mix_of_all_mixers(),
    "layer norm": model_section(norm="layer", norm_epsilon=1e-3),
    "tied": model_section(tie_embeddings=True, output_logit_soft_cap=4.0),
    # Without mLSTM, whose cells with random weights amplify rounding through all stages.
    "hierarchy": json.loads(
        json.dumps(hnet_model(2)).replace('["mlstm", ', '["mamba2", ').replace('["mlstm"]', '["mamba2"]')
    ),
}
ARCHITECTURES = {"hierarchy": "HNetForCausalLM"}


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place of this module's own for the code that transformers copies."""
    from transformers import dynamic_module_utils

    directory, usual = tmp_path_factory.mktemp("modules"), dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(directory)
    yield directory
    dynamic_module_utils.HF_MODULES_CACHE = usual
    # It is there only once transformers has loaded code from it.
    sys.path[:] = [entry for entry in sys.path if entry != str(directory)]
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, code_cache: Path):
    """A directory, our model of it, and the name among ``MODELS``."""
    directory = tmp_path_factory.mktemp("custom")
    run, decoder = write_run(directory / "run", MODELS[request.param])
    report = export_model(run, directory / "out")
    architecture = ARCHITECTURES.get(request.param, "RecurrentForCausalLM")
    assert (report.architecture, report.needs_code, report.cached_generation) == (architecture, True, True)
    assert (report.comparison.lengths, report.comparison.tolerance) == (COMPARED_LENGTHS, 1e-4)
    assert len(report.unfit) == len(NATIVE_CLASSES) and "xLSTMForCausalLM" in str(report)
    # The code under the name of the unfinished directory is gone again.
    assert not [path for path in code_cache.glob("transformers_modules/*") if "unfinished" in path.name]
    return directory / "out", decoder, request.param


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


def test_logits_are_ours(exported: tuple[Path, Decoder, str]) -> None:
    directory, decoder, _ = exported
    model, tokens = load(directory), random_tokens(3, 90)
    ours, _ = decoder.logits(tokens)
    torch.testing.assert_close(model(tokens).logits, ours, atol=1e-4, rtol=0)
    assert ours.std() > 0.5
    kept = model(tokens, logits_to_keep=2).logits
    torch.testing.assert_close(kept, ours[:, -2:], atol=1e-4, rtol=0)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    torch.testing.assert_close(embedded, ours, atol=1e-4, rtol=0)


def test_bfloat16_is_close(exported: tuple[Path, Decoder, str]) -> None:
    tokens = random_tokens(2, 20)
    model = AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=True, dtype=torch.bfloat16)
    found, expected = model(tokens).logits, load(exported[0])(tokens).logits
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_states_carry_on(exported: tuple[Path, Decoder, str]) -> None:
    directory, decoder, _ = exported
    model, tokens = load(directory), random_tokens(2, 40)
    ours, _ = decoder.logits(tokens)
    with torch.no_grad():
        before = model(tokens[:, :30])
        assert before.past_key_values.get_seq_length() == 30
        pieces, cache = [before.logits], before.past_key_values
        for piece in tokens[:, 30:].split([6, 1, 1, 2], 1):
            output = model(piece, past_key_values=cache)
            pieces.append(output.logits)
            cache = output.past_key_values
        torch.testing.assert_close(torch.cat(pieces, 1), ours, atol=1e-4, rtol=0)
        # A cache is not changed by what follows it.
        again = model(tokens[:, 30:], past_key_values=before.past_key_values).logits
        torch.testing.assert_close(again, ours[:, 30:], atol=1e-4, rtol=0)
        assert model(tokens, use_cache=False).past_key_values is None


def test_it_writes_our_text(exported: tuple[Path, Decoder, str]) -> None:
    directory, decoder, _ = exported
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    prompt = "the state "
    inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    (ours,) = generate(decoder, ByteTokenizer(), [prompt.encode()], 12, temperature=0)
    assert bytes(token for token in ids.tolist() if token < 256) == ours
    assert len(ours) > 0


def test_sequences_of_a_batch_are_apart(exported: tuple[Path, Decoder, str]) -> None:
    """Prompts of different lengths, padded on the left, generate what each does alone; so do beams."""
    model = load(exported[0])
    prompts = [random_tokens(length, seed=length).clamp(max=255) for length in (9, 1, 9, 6)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for beams in (1, 3):
        alone = [model.generate(prompt[None], num_beams=beams, **options)[0, len(prompt) :] for prompt in prompts]
        tokens, mask = torch.full((4, 9), 256), torch.zeros(4, 9, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
        together = model.generate(tokens, attention_mask=mask, num_beams=beams, **options)[:, 9:]
        assert torch.equal(together, torch.stack(alone))
        in_chunks = model.generate(tokens, attention_mask=mask, num_beams=beams, use_cache=False, **options)[:, 9:]
        assert torch.equal(in_chunks, together)


def test_padding_after_a_sequence_changes_nothing_before_it(exported: tuple[Path, Decoder, str]) -> None:
    model, tokens = load(exported[0]), random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    output = model(tokens, attention_mask=mask)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits[1, :7], model(tokens[1:, :7]).logits[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="pad on the left"):
        model(tokens, attention_mask=mask, use_cache=True)


def test_it_trains(exported: tuple[Path, Decoder, str]) -> None:
    directory, decoder, _ = exported
    model, tokens = load(directory).train(), random_tokens(2, 30)
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels)
    assert output.past_key_values is None
    ours = decoder.logits(tokens)[0][:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(ours, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=0)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name
    assert sorted(gradients) == sorted(name for name, _ in decoder.named_parameters())

    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_it_is_saved_and_loaded_again(exported: tuple[Path, Decoder, str], tmp_path: Path) -> None:
    directory, _, name = exported
    model, tokens = load(directory), random_tokens(1, 20)
    with torch.no_grad():
        model.output_norm.weight.mul_(1.5)
        if name == "tied":
            assert model.head.weight is model.embedding.weight
            model.embedding.weight.mul_(0.9)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == {file.name for file in directory.glob("*.py")}
    fresh = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory, trust_remote_code=True), trust_remote_code=True
    )
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())


def test_models_of_one_name_keep_their_own_code(exported: tuple[Path, Decoder, str], tmp_path: Path) -> None:
    """Another model in a directory of the same name, in one process."""
    first = load(exported[0])
    channel = {"channel": {"type": "swiglu"}}
    run, decoder = write_run(tmp_path / "run", model_section(layers=["only"], blocks={"only": channel}))
    export_model(run, tmp_path / exported[0].name)
    second, tokens = load(tmp_path / exported[0].name), random_tokens(1, 9)
    assert type(first) is not type(second)
    torch.testing.assert_close(second(tokens).logits, decoder.logits(tokens)[0], atol=1e-4, rtol=0)
    assert not list((tmp_path / exported[0].name).glob("mixer_*.py"))


def test_the_files(exported: tuple[Path, Decoder, str]) -> None:
    directory, _, name = exported
    code = {file.name for file in directory.glob("*.py")}
    common = {"configuration_recurrent.py", "modeling_recurrent.py", "recurrent_cache.py", "mixers.py", "layers.py"}
    assert common < code
    if name not in ("all", "hierarchy"):
        assert code - common == {"mixer_mlstm.py", "channel_swiglu.py"}
    assert len({file.stat().st_mode for file in directory.iterdir()}) == 1
    for file in directory.glob("*.py"):
        assert self_contained(file.read_text()) == file.read_text()
    config = json.loads((directory / "config.json").read_text())
    loaded_by = "modeling_hnet.HNetForCausalLM" if name == "hierarchy" else "modeling_recurrent.RecurrentForCausalLM"
    assert config["auto_map"]["AutoModelForCausalLM"] == loaded_by
    assert (config["bos_token_id"], config["vocab_size"]) == (256, 264)


_ALONE = """
import importlib.util, sys
from pathlib import Path

# An editable installation adds either a finder of its own or the repository's path.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if not (Path(path) / "pretrain").exists()]
for name in ("pretrain", "kernels", "data"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

directory, expected = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(directory)
with torch.no_grad():
    difference = (model(expected["tokens"]).logits - expected["logits"]).abs().max().item()
written = model.generate(expected["tokens"][:, :9], max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, 9:]
texts = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=3)(["one", "three"])
assert torch.equal(written, expected["written"])
assert [text[0]["generated_text"][:3] for text in texts] == ["one", "thr"]
print(difference)
"""


@pytest.mark.parametrize("exported", ["all", "hierarchy"], indirect=True)
def test_it_needs_no_code_of_ours(exported: tuple[Path, Decoder, str], tmp_path: Path) -> None:
    """In a new process, where this package cannot be imported, from a directory of its own."""
    directory, decoder, _ = exported
    tokens = random_tokens(2, 70)
    logits, _ = decoder.logits(tokens)
    with torch.no_grad():
        written = load(directory).generate(tokens[:, :9], max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, 9:]
    torch.save({"tokens": tokens, "logits": logits, "written": written}, tmp_path / "expected.pt")
    found = subprocess.run(
        [sys.executable, "-I", "-c", _ALONE, str(directory), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout.split()[-1]) <= 1e-4


def test_the_shipped_class_is_importable_here() -> None:
    assert set(remote_mixers.MIXERS) <= set(sequence_mixers()) and set(remote_mixers.CHANNELS) <= set(channel_mixers())
    model = modeling_recurrent.RecurrentForCausalLM(
        RecurrentConfig(layers=["a"], blocks={"a": {"channel": {"type": "swiglu", "inner_size": 8}}})
    )
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 256)


def test_code_that_imports_ours_is_not_shipped() -> None:
    assert self_contained("from pretrain.models.modeling import State\n") == "from .layers import State\n"
    assert self_contained("from pretrain.models.mlstm.modeling import f\n") == "from .mixer_mlstm import f\n"
    for line in ("import kernels.mlstm", "from pretrain.models.mlstm.mixer import MLSTM", "import numpy as np"):
        with pytest.raises(InputError, match="not shipped"):
            self_contained(f"{line}\n")
    assert ast.parse(custom._mixers_file({"mlstm": "pretrain.models.mlstm.modeling"}, {}))

"""Export of HAT: logits, words and text are ours, also where this package cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from data.config import HierarchicalBytesTokenizer
from data.tokenizers import Tokenizer, open_tokenizer
from pretrain.convert import export_model
from pretrain.convert.comparison import COMPARED_LENGTHS
from pretrain.convert.custom import CustomForm, self_contained
from pretrain.errors import InputError
from pretrain.generate import generate
from pretrain.models.decoder import Decoder
from tests.configurations import tiny_config
from tests.convert.checkpoints import random_tokens, write_run
from tests.convert.test_custom_export import code_cache
from tests.models.hat_models import WORDS, hat_model, random_words
from tests.models.test_hnet import first_only

pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")

__all__ = ["code_cache"]

PROMPTS = ["It's 3.14 don't", "na\u00efve \u4e16\u754c\u2014", " \t\u0301x"]


def exported_model(read_words: str) -> dict[str, Any]:
    # Without mLSTM in the decoder: its cells with random weights amplify rounding.
    text = json.dumps(hat_model(read_words)).replace('["mlstm", ', '["mamba2", ')
    return json.loads(text)


@pytest.fixture(scope="module", params=["every", "first"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, code_cache: Path):
    """A directory and our model of it."""
    directory = tmp_path_factory.mktemp("hat")
    run, decoder = write_run(directory / "run", exported_model(request.param), data=WORDS)
    report = export_model(run, directory / "out")
    assert (report.architecture, report.needs_code, report.cached_generation) == ("HATForCausalLM", True, False)
    assert (report.comparison.lengths, report.comparison.tolerance) == (COMPARED_LENGTHS, 1e-4)
    assert "whole text for each token: a byte may change how the end of its text is cut" in str(report)
    return directory / "out", decoder


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return open_tokenizer(HierarchicalBytesTokenizer(type="hierarchical_bytes"))


def load(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def of_text(words: Tokenizer, content: bytes) -> tuple[Tensor, Tensor]:
    """The mark and the bytes, and where words start."""
    tokens = torch.tensor([[256, *content]])
    return tokens, torch.cat([torch.tensor([True]), torch.from_numpy(words.word_starts(content))])[None]


def test_logits_are_ours(exported: tuple[Path, Decoder], words: Tokenizer) -> None:
    directory, decoder = exported
    model = load(directory)
    for length in (1, 7, 90):
        tokens = random_tokens(3, length)
        starts = random_words(first_only(tokens), length)
        ours, _ = decoder.logits(tokens, word_starts=starts)
        torch.testing.assert_close(model(tokens, word_starts=starts).logits, ours, atol=1e-4, rtol=0)
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), word_starts=starts).logits
        torch.testing.assert_close(embedded, ours, atol=1e-4, rtol=0)
        assert ours.std() > 0.5
    # Without saying where words start, at every length of texts, which then may end within a character.
    for prompt in PROMPTS:
        for end in range(len(prompt.encode()) + 1):
            tokens, starts = of_text(words, prompt.encode()[:end])
            ours, _ = decoder.logits(tokens, word_starts=starts)
            torch.testing.assert_close(model(tokens).logits, ours, atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_are_apart(exported: tuple[Path, Decoder], words: Tokenizer) -> None:
    """Words are cut, and states begin, where position_ids do; with marks between the documents and without."""
    directory, decoder = exported
    model = load(directory)
    for mark in ([256], []):
        documents = [torch.tensor([*mark, *prompt.encode()]) for prompt in PROMPTS]
        tokens = torch.cat(documents)[None]
        positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
        starts = torch.cat([model.find_word_starts(document[None])[0] for document in documents])[None]
        ours, _ = decoder.logits(tokens, document_starts=positions == 0, word_starts=starts)
        found = model(tokens, position_ids=positions).logits
        torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)
        assert model.find_word_starts(tokens, document_starts=positions == 0).tolist() == starts.tolist()
        assert (model(tokens).logits - ours).abs().max() > 1e-2
        # Beside a shorter row, padded on the left.
        short = documents[0][None]
        padded = torch.cat([tokens, torch.cat([tokens.new_full((1, tokens.shape[1] - short.shape[1]), 256), short], 1)])
        mask = torch.ones_like(padded)
        mask[1, : -short.shape[1]] = 0
        both = torch.cat([positions, (mask[1:].cumsum(1) - 1).clamp(min=0)])
        together = model(padded, attention_mask=mask, position_ids=both).logits
        torch.testing.assert_close(together[:1], ours, atol=1e-4, rtol=0)
        torch.testing.assert_close(together[1:, -short.shape[1] :], model(short).logits, atol=1e-4, rtol=0)


def test_words_are_those_of_the_tokenizer(exported: tuple[Path, Decoder], words: Tokenizer) -> None:
    """Also behind marks, other ids that are no bytes, and padding, which are words of one position."""
    model = load(exported[0])
    texts = [prompt.encode() for prompt in PROMPTS] + [b"caf\xc3", b"a\xff\xfe" * 60 + b"\n", b"", b"x\xe4\xb8"]
    ids, expected = [], []
    for text in texts:
        # A text that something follows is as in training; only the last one may go on.
        found = words.word_starts(text) if text is texts[-1] else words.encode(text) >= 257
        ids += [256, *text] if text != b"" else [256, 260]
        expected += [True, *found.tolist()] if text != b"" else [True, True]
    tokens = torch.tensor([ids])
    assert model.find_word_starts(tokens)[0].tolist() == expected
    mask = torch.ones_like(tokens)
    mask[0, len(texts[0]) - 3 :] = 0
    masked = model.find_word_starts(tokens, mask)[0].tolist()
    assert masked == [True, *(words.encode(texts[0][:-4]) >= 257).tolist(), *[True] * (len(ids) - len(texts[0]) + 3)]


def test_bfloat16_is_close(exported: tuple[Path, Decoder]) -> None:
    tokens = random_tokens(2, 20) % 128
    found = load(exported[0], dtype=torch.bfloat16)(tokens).logits
    expected = load(exported[0])(tokens).logits
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_it_writes_our_text(exported: tuple[Path, Decoder], words: Tokenizer) -> None:
    directory, decoder = exported
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    ours = generate(decoder, words, [prompt.encode() for prompt in PROMPTS], 12, temperature=0)
    for prompt, expected in zip(PROMPTS, ours, strict=True):
        inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert bytes(token for token in ids.tolist() if token < 256) == expected
    assert max(map(len, ours)) > 0


def test_sequences_of_a_batch_are_apart(exported: tuple[Path, Decoder]) -> None:
    """Prompts of different lengths, padded on the left, generate what each does alone; so do beams."""
    model = load(exported[0])
    prompts = [torch.tensor([256, *text.encode()]) for text in ("It's a", "", "don't", "fooBar")]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    longest = max(map(len, prompts))
    for beams in (1, 2):
        alone = [model.generate(prompt[None], num_beams=beams, **options)[0, len(prompt) :] for prompt in prompts]
        tokens, mask = torch.full((4, longest), 256), torch.zeros(4, longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        together = model.generate(tokens, attention_mask=mask, num_beams=beams, **options)[:, longest:]
        assert torch.equal(together, torch.stack(alone))


def test_padding_after_a_sequence_changes_nothing_before_it(exported: tuple[Path, Decoder]) -> None:
    """Not even where it would be bytes of the last word."""
    model = load(exported[0])
    tokens = torch.tensor([[256, *b"of \tx words"], [256, *b"don't \t\xcc\x81xx"]])
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    output = model(tokens, attention_mask=mask)
    torch.testing.assert_close(output.logits[1, :8], model(tokens[1:, :8]).logits[0], atol=1e-4, rtol=0)
    assert (model(tokens).logits[1, :8] - output.logits[1, :8]).abs().max() > 1e-3


def test_it_trains(exported: tuple[Path, Decoder]) -> None:
    directory, decoder = exported
    model, tokens = load(directory).train(), random_tokens(2, 30)
    starts = random_words(first_only(tokens), 3)
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels, word_starts=starts)
    assert output.past_key_values is None
    ours = decoder.logits(tokens, word_starts=starts)[0][:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(ours, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=0)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    decoder.requires_grad_(True)
    expected_loss = decoder.logits(tokens, word_starts=starts)[0][:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(expected_loss, labels[:, 1:].flatten(), ignore_index=-100).backward()
    for name, parameter in decoder.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(gradients[name] / scale, parameter.grad / scale, atol=1e-3, rtol=0, msg=name)
    decoder.zero_grad(), decoder.requires_grad_(False)
    assert sorted(gradients) == sorted(name for name, _ in decoder.named_parameters())

    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=labels, word_starts=starts).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_it_is_saved_and_loaded_again(exported: tuple[Path, Decoder], tmp_path: Path) -> None:
    model, tokens = load(exported[0]), random_tokens(1, 20)
    with torch.no_grad():
        model.shift.first_word.mul_(1.5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(tokens).logits, model(tokens).logits)


def test_what_it_cannot_do_is_refused(exported: tuple[Path, Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = load(exported[0]), random_tokens(1, 4)
    for options in ({"use_cache": True}, {"past_key_values": object()}):
        with pytest.raises(ValueError, match="keeps no cache, since a byte may change .* use_cache=False"):
            model(tokens, **options)
    with pytest.raises(ValueError, match="keeps no cache"):
        model.generate(tokens, max_new_tokens=2, use_cache=True)
    with pytest.raises(ValueError, match="give word_starts, or input_ids instead"):
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(ValueError, match=r"the shape \(1, 3\), but the sequences \(1, 4\); generate\(\) finds words"):
        model(tokens, word_starts=torch.ones(1, 3, dtype=torch.bool))
    monkeypatch.setitem(sys.modules, "hat_splitter", None)
    with pytest.raises(ImportError, match="not installed: pip install hat-splitter==.*or give word_starts"):
        model(tokens)
    assert model(tokens, word_starts=torch.ones(1, 4, dtype=torch.bool)).logits.shape == (1, 4, 264)


def test_a_form_needs_the_tokenizer(tmp_path: Path) -> None:
    config = tiny_config(model=hat_model(), data=WORDS)
    with pytest.raises(InputError, match="is exported with its tokenizer, data.tokenizer.type=hierarchical_bytes"):
        CustomForm(config.model).write_config(tmp_path, "float32", {})


def test_the_files(exported: tuple[Path, Decoder]) -> None:
    directory, _ = exported
    code = {file.name for file in directory.glob("*.py")}
    assert {"modeling_hat.py", "block_stack.py", "word_splitting.py", "modeling_recurrent.py"} < code
    for file in directory.glob("*.py"):
        assert self_contained(file.read_text()) == file.read_text()
    config = json.loads((directory / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hat.HATForCausalLM"
    assert (config["use_cache"], config["hierarchy"]["maximum_word_bytes"]) == (False, 100)


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
written = model.generate(expected["tokens"], max_new_tokens=6, do_sample=False)[0, expected["tokens"].shape[1] :]
assert bytes(token for token in written.tolist() if token < 256) == expected["written"]
texts = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=3)(["one", "three"])
assert [text[0]["generated_text"][:3] for text in texts] == ["one", "thr"]
print(difference)
"""


def test_it_needs_no_code_of_ours(exported: tuple[Path, Decoder], words: Tokenizer, tmp_path: Path) -> None:
    """In a new process, where this package cannot be imported, from a directory of its own."""
    directory, decoder = exported
    prompt = PROMPTS[1].encode()
    tokens, starts = of_text(words, prompt)
    logits, _ = decoder.logits(tokens, word_starts=starts)
    (written,) = generate(decoder, words, [prompt], 6, temperature=0)
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

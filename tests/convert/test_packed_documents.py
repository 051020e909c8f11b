"""Exported code and rows of several documents: position_ids that begin anew are our document starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel

from pretrain.convert import export_model
from pretrain.models.decoder import Decoder
from tests.convert.checkpoints import random_tokens, write_run
from tests.convert.test_custom_export import MODELS, code_cache, load

__all__ = ["code_cache"]

# Where documents begin in rows of 40: several in one, one token long, at the first position, in none.
BEGINNINGS = [[0, 1, 17, 33, 39], [5, 22], []]


def rows_of_documents() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, our document starts, and position ids."""
    tokens, starts = random_tokens(3, 40), torch.zeros(3, 40, dtype=torch.bool)
    positions = torch.empty(3, 40, dtype=torch.long)
    for row, beginnings in enumerate(BEGINNINGS):
        starts[row, beginnings] = True
        # A first document that does not begin here goes on from somewhere.
        count = 0 if 0 in beginnings else 7
        for place in range(40):
            count = 0 if place in beginnings else count
            positions[row, place] = count
            count += 1
    return tokens, starts, positions


@pytest.fixture(scope="module", params=["all", "hierarchy", "tied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, code_cache: Path):
    """Our model and its exported form."""
    directory = tmp_path_factory.mktemp("packed")
    run, decoder = write_run(directory / "run", MODELS[request.param])
    export_model(run, directory / "out", check=False)
    return decoder, load(directory / "out")


@torch.no_grad()
def test_documents_are_ours(exported: tuple[Decoder, PreTrainedModel]) -> None:
    decoder, model = exported
    tokens, starts, positions = rows_of_documents()
    ours, _ = decoder.logits(tokens, document_starts=starts)
    found = model(tokens, position_ids=positions).logits
    torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)
    assert (model(tokens).logits - ours).abs().max() > 1e-2
    # With a cache, also where a document begins just with a call.
    pieces, cache = [], None
    for begin, end in ((0, 5), (5, 20), (20, 21), (21, 22), (22, 40)):
        output = model(
            tokens[:, begin:end], position_ids=positions[:, begin:end], past_key_values=cache, use_cache=True
        )
        pieces.append(output.logits)
        cache = output.past_key_values
    torch.testing.assert_close(torch.cat(pieces, 1), ours, atol=1e-4, rtol=0)
    # One row's positions for all.
    shared, _ = decoder.logits(tokens, document_starts=starts[:1].expand(3, -1))
    torch.testing.assert_close(model(tokens, position_ids=positions[:1]).logits, shared, atol=1e-4, rtol=0)


def test_flattened_batches_train_as_documents_do(exported: tuple[Decoder, PreTrainedModel]) -> None:
    """transformers' own collator without padding: the same loss and gradients as document by document."""
    _, model = exported
    documents = [random_tokens(length, seed=length).tolist() for length in (9, 1, 14, 9)]
    flat = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": document} for document in documents])
    model.zero_grad()
    loss = model(**flat).loss
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for document in documents:
        tokens = torch.tensor([document])
        if len(document) > 1:
            part = model(tokens, labels=tokens).loss * (len(document) - 1) / sum(len(each) - 1 for each in documents)
            part.backward()
            total += part.item()
    assert loss.item() == pytest.approx(total, abs=1e-5)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, atol=1e-5, rtol=1e-3, msg=name)
    model.zero_grad()


def test_generation_goes_on_from_the_last_document(exported: tuple[Decoder, PreTrainedModel]) -> None:
    _, model = exported
    tokens, options = (
        random_tokens(1, 12).clamp(max=255),
        {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False},
    )
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    alone = model.generate(tokens[:, 7:], **options)[:, 5:]
    assert torch.equal(model.generate(tokens, position_ids=positions, **options)[:, 12:], alone)


@pytest.mark.parametrize("exported", ["tied"], indirect=True)
def test_what_is_not_read_is_refused(exported: tuple[Decoder, PreTrainedModel]) -> None:
    _, model = exported
    tokens = random_tokens(2, 6)
    with pytest.raises(ValueError, match="seq_idx is not read here; give position_ids"):
        model(tokens, seq_idx=torch.zeros(2, 6, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be .batch, tokens., 0 for padding, but has 4 dimensions"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))
    mask = torch.ones_like(tokens)
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="masks tokens within a sequence"):
        model(tokens, attention_mask=mask)

"""Attention against a plain softmax and against transformers, and the block masks of long packed sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from pretrain.models.attention import attend as attend_module
from pretrain.models.attention.attend import BLOCK, attend, block_mask, visible
from pretrain.models.attention.config import AttentionConfig
from pretrain.models.attention.cost import cost, visible_pairs
from pretrain.models.attention.mixer import Attention
from pretrain.models.attention.rotary import angles, rotate
from pretrain.models.mixer import Documents
from pretrain.models.parameters import initialise_weights
from tests.conformance.tools import context_of


def random_earliest(batch: int, queries: int, keys: int, seed: int = 0, rate: float = 0.1) -> Tensor:
    """Places that never go back, of documents that begin at random."""
    starts = torch.rand(batch, queries, generator=torch.Generator().manual_seed(seed)) < rate
    own = torch.arange(keys - queries, keys)
    return torch.where(starts, own, 0).cummax(1).values


def plain(query: Tensor, key: Tensor, value: Tensor, earliest: Tensor, scale: float) -> Tensor:
    """One query at a time."""
    batch, queries, heads, size = query.shape
    keys, groups = key.shape[1], heads // key.shape[2]
    rows = []
    for row in range(batch):
        for index in range(queries):
            seen = slice(int(earliest[row, index]), keys - queries + index + 1)
            for head in range(heads):
                scores = key[row, seen, head // groups] @ query[row, index, head] * scale
                rows.append(scores.softmax(0) @ value[row, seen, head // groups])
    return torch.stack(rows).view(batch, queries, heads, size)


def random_heads(batch: int, queries: int, keys: int, heads: tuple[int, int], size: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads[0], size), *[(batch, keys, heads[1], size)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(("queries", "keys", "masked"), [(9, 9, False), (9, 9, True), (5, 12, True), (1, 7, True)])
def test_attention_is_the_plain_softmax(heads: tuple[int, int], queries: int, keys: int, masked: bool) -> None:
    tensors = random_heads(2, queries, keys, heads, 6)
    earliest = random_earliest(2, queries, keys, rate=0.3) if masked else None
    expected = plain(*tensors, torch.zeros(2, queries, dtype=torch.int64) if earliest is None else earliest, 0.3)
    found = attend(*tensors, earliest, 0.3)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for actual, gradient in zip(
        torch.autograd.grad(found, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True
    ):
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("rate", [0.0, 0.005, 0.1, 1.0])
@pytest.mark.parametrize("length", [1, BLOCK, 2 * BLOCK + 1, 5 * BLOCK - 3])
def test_block_masks_hold_what_is_visible(length: int, rate: float) -> None:
    earliest = random_earliest(3, length, length, seed=length, rate=rate)
    blocks = -(-length // BLOCK)
    pairs = torch.zeros(3, blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    pairs[:, :length, :length] = visible(earliest, length)
    # Rows and columns beyond the end never count: a block is full if what there is of it is.
    real = torch.zeros_like(pairs)
    real[:, :length, :length] = True
    by_block = (3, blocks, BLOCK, blocks, BLOCK)
    some = pairs.view(by_block).any(4).any(2)
    every = (pairs | ~real).view(by_block).all(4).all(2)
    mask = block_mask(earliest)
    found_partial, found_full = torch.zeros_like(some), torch.zeros_like(some)
    for found, counts, places in (
        (found_partial, mask.kv_num_blocks, mask.kv_indices),
        (found_full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(3):
            for block in range(blocks):
                found[row, block, places[row, 0, block, : counts[row, 0, block]].long()] = True
    assert torch.equal(found_partial | found_full, some)
    assert not (found_partial & found_full).any()
    assert (every | ~found_full).all(), "a block that is not wholly visible is computed without its mask"
    # Below the diagonal no block is masked for nothing.
    assert not (found_partial & every & ~torch.eye(blocks, dtype=torch.bool)).any()


# Not compiled here, it computes every pair and says so.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_attention_by_blocks_is_attention_by_a_mask(heads: tuple[int, int]) -> None:
    length = BLOCK + 70
    tensors = [tensor.detach().float().transpose(1, 2) for tensor in random_heads(2, length, length, heads, 16)]
    for earliest in (random_earliest(2, length, length, rate=0.03), random_earliest(1, length, length, rate=0.03)):
        found = attend_module._by_blocks(*tensors, earliest, 0.3, flex_attention)
        expected = attend_module._by_mask(*tensors, earliest, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_packed_sequences_on_a_gpu(dtype: torch.dtype) -> None:
    length = 1300
    tensors = [tensor.detach().to("cuda", dtype) for tensor in random_heads(2, length, length, (4, 2), 64)]
    earliest = random_earliest(2, length, length, rate=0.01).cuda()
    assert length**2 > attend_module.MOST_MASKED_PAIRS
    results = []
    for kind in (dtype, torch.float64):
        leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
        if kind == dtype:
            output = attend(*leaves, earliest, 0.125)
        else:
            transposed = [tensor.transpose(1, 2) for tensor in leaves]
            repeated = [transposed[0], *(tensor.repeat_interleave(2, 1) for tensor in transposed[1:])]
            scores = repeated[0] @ repeated[1].mT * 0.125
            scores = scores.masked_fill(~visible(earliest, length)[:, None], -torch.inf)
            output = (scores.softmax(-1) @ repeated[2]).transpose(1, 2)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        # Scores of the fp32 form may be rounded to TF32.
        assert (actual - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_rotation_is_that_of_transformers(fraction: float) -> None:
    bamba = pytest.importorskip("transformers.models.bamba.modeling_bamba")
    config = bamba.BambaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, mamba_n_heads=2)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": fraction}
    positions = torch.tensor([[0, 1, 2, 7, 0, 1], [5, 6, 7, 8, 9, 500]])
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 6, 2, 16, generator=generator) for _ in range(2))
    cosines, sines = bamba.BambaRotaryEmbedding(config)(query, positions)
    expected = bamba.apply_rotary_pos_emb(query, key, cosines, sines, unsqueeze_dim=2)
    own = angles(positions, int(16 * fraction), 100.0)
    for tensor, rotated in zip((query, key), expected, strict=True):
        torch.testing.assert_close(rotate(tensor, *own), rotated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_that_of_transformers(bias: bool) -> None:
    bamba = pytest.importorskip("transformers.models.bamba.modeling_bamba")
    config = bamba.BambaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attention_bias=bias, mamba_n_heads=2
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config._attn_implementation = "sdpa"
    theirs = bamba.BambaAttention(config, layer_idx=0)
    ours = Attention(
        AttentionConfig(num_heads=4, num_key_value_heads=2, rotary_fraction=0.5, bias=bias), context_of(32)
    )
    initialise_weights(ours, seed=0)
    for name in ("query", "key", "value"):
        linear = getattr(theirs, f"{name[0]}_proj")
        linear.weight.data.copy_(getattr(ours.projections, f"{name}_weight"))
        if bias:
            getattr(ours, f"{name}_bias").data.copy_(linear.bias.data.normal_())
    theirs.o_proj.weight.data.copy_(ours.output.weight)
    if bias:
        ours.output_bias.data.copy_(theirs.o_proj.bias.data.normal_())
    hidden = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    angles_of_all = bamba.BambaRotaryEmbedding(config)(hidden, torch.arange(11)[None])
    expected, _ = theirs(hidden, position_embeddings=angles_of_all)
    output, _ = ours(hidden.transpose(0, 1), None, None)
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_a_sequence_without_inner_documents_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        "pretrain.models.attention.mixer.attend",
        lambda query, key, value, earliest, scale: asked.append(earliest is not None) or query,
    )
    hidden = torch.randn(9, 2, 32)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 0] = True
    inner = starts.clone()
    inner[1, 4] = True
    for window, documents, needed in (
        (None, None, False),
        (None, Documents(starts), False),
        (None, Documents(inner), True),
        (9, None, False),
        (8, None, True),
    ):
        mixer = Attention(AttentionConfig(num_heads=2, sliding_window=window), context_of(32))
        initialise_weights(mixer, seed=0)
        _, state = mixer(hidden, None, documents)
        assert asked.pop() == needed, (window, documents)
        mixer(hidden, state, None)
        assert asked.pop()


def test_a_window_keeps_no_more_than_it_needs() -> None:
    mixer = Attention(AttentionConfig(num_heads=2, sliding_window=4), context_of(32))
    initialise_weights(mixer, seed=0)
    state, hidden = None, torch.randn(12, 2, 32)
    for length in (1, 1, 1, 1, 5, 3):
        output, state = mixer(hidden[:length], state, None)
        assert output.shape == (length, 2, 32)
        assert state["key"].shape[1] == min(3, int(state["position"][0]))
    single = Attention(AttentionConfig(num_heads=2, sliding_window=1), context_of(32))
    initialise_weights(single, seed=0)
    assert single(hidden, None, None)[1]["key"].shape[1] == 0


def test_useful_work_counts_visible_pairs() -> None:
    for length in (1, 6, 13):
        for window in (None, 1, 5, 13, 20):
            own = torch.arange(length)
            earliest = (own - (length if window is None else window) + 1).clamp(min=0)[None]
            pairs = int(visible(earliest, length).sum())
            assert visible_pairs(length, window) == pairs
            config = AttentionConfig(num_heads=4, num_key_value_heads=1, head_size=8, sliding_window=window)
            assert cost(config, 32, length, 2, 3).scan_flops_per_token == pytest.approx(4 * 32 * pairs / length)

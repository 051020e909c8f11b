"""Generation: the recurrent state gives what whole passes give, batches do not mix, seeds decide what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.config import HierarchicalBytesTokenizer
from data.tokenizers import open_tokenizer
from data.tokenizers.byte_level import ByteTokenizer
from pretrain import reading
from pretrain.errors import InputError
from pretrain.generate import generate, generate_text
from pretrain.models.decoder import Decoder
from tests.configurations import TINY_MODEL, tiny_config
from tests.convert.checkpoints import model_section, random_decoder, write_run
from tests.models.hnet_models import hnet_model

TOKENIZER = ByteTokenizer()
BOUNDARY = TOKENIZER.boundary_id
PROMPTS = [b"state", b"", b"a longer prompt, over several chunks of eight", b"gates", b"\xff\x00 any bytes"]


ATTENTION = {"type": "attention", "num_heads": 4, "num_key_value_heads": 2}
HYBRID = {
    "layers": ["mlstm", "attention", "window"],
    "num_layers": 3,
    "blocks": {
        **TINY_MODEL["blocks"],
        "attention": {"mixer": ATTENTION, "channel": {"type": "mlp"}},
        "window": {"mixer": ATTENTION | {"sliding_window": 9}},
    },
}


MODELS = {"recurrent": {}, "hybrid": HYBRID, "hierarchy": hnet_model(2)}


@pytest.fixture(scope="module", params=list(MODELS))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """One whose states have a fixed size, one with states that grow, and one whose states wait for chunks."""
    return random_decoder(tiny_config(model=model_section(**MODELS[request.param])))


def _greedy_by_whole_passes(decoder: Decoder, prompt: bytes, max_new_tokens: int) -> list[int]:
    """The likeliest continuation, every token from a pass over all before it."""
    tokens = [BOUNDARY, *prompt]
    for _ in range(max_new_tokens):
        logits, _ = decoder.logits(torch.tensor([tokens]))
        token = int(logits[0, -1, : TOKENIZER.vocab_size].argmax())
        if token == BOUNDARY:
            break
        tokens.append(token)
    return tokens[1 + len(prompt) :]


def test_greedy_is_the_argmax_of_whole_passes(decoder: Decoder) -> None:
    texts = generate(decoder, TOKENIZER, PROMPTS, 20, temperature=0)
    assert texts == [bytes(_greedy_by_whole_passes(decoder, prompt, 20)) for prompt in PROMPTS]
    assert len(set(texts)) == len(texts)


def test_a_tokenizer_that_stores_words_gives_the_model_bytes(decoder: Decoder) -> None:
    pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")
    words = open_tokenizer(HierarchicalBytesTokenizer(type="hierarchical_bytes"))
    assert generate(decoder, words, PROMPTS, 12, seed=4) == generate(decoder, TOKENIZER, PROMPTS, 12, seed=4)


def test_long_prompts_are_read_in_segments(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(decoder, TOKENIZER, PROMPTS, 8, temperature=0)
    monkeypatch.setattr(reading, "PROMPT_SEGMENT", 7)
    assert generate(decoder, TOKENIZER, PROMPTS, 8, temperature=0) == expected


def test_a_seed_decides_what_is_drawn(decoder: Decoder) -> None:
    first = generate(decoder, TOKENIZER, PROMPTS, 16, seed=1)
    assert generate(decoder, TOKENIZER, PROMPTS, 16, seed=1) == first
    assert generate(decoder, TOKENIZER, PROMPTS, 16, seed=2) != first


def test_a_prompt_does_not_depend_on_those_beside_it(decoder: Decoder) -> None:
    together = generate(decoder, TOKENIZER, PROMPTS, 12, seed=3)
    assert generate(decoder, TOKENIZER, PROMPTS[:2], 12, seed=3) == together[:2]
    # The same prompt at two places is drawn from two sequences of random numbers.
    twice = generate(decoder, TOKENIZER, [b"state", b"state"], 12, seed=3)
    assert twice[0] != twice[1]


def _with_output(decoder: Decoder, bias: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the decoder give fixed logits (the others -1000); returns a list of the rows of each call."""
    calls = []
    forward = decoder.logits

    def fixed(tokens: torch.Tensor, states: dict | None = None) -> tuple[torch.Tensor, dict]:
        calls.append(len(tokens))
        logits, states = forward(tokens, states)
        logits = torch.full_like(logits, -1000.0)
        for token, value in bias.items():
            logits[..., token] = value
        return logits, states

    monkeypatch.setattr(decoder, "logits", fixed)
    return calls


def test_padding_of_the_vocabulary_is_never_drawn(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder.model.vocab_size == 264
    _with_output(decoder, {260: 25.0, 263: 24.0, 65: 5.0}, monkeypatch)
    assert generate(decoder, TOKENIZER, [b"x"], 5, temperature=0) == [b"AAAAA"]
    assert generate(decoder, TOKENIZER, [b"x"], 5, temperature=1.0) == [b"AAAAA"]


def test_the_mark_ends_a_text_and_only_that_text(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _with_output(decoder, {BOUNDARY: 1.0, 65: 2.0}, monkeypatch)
    texts = generate(decoder, TOKENIZER, [b"x"] * 6, 10, seed=0)
    assert all(set(text) <= {65} for text in texts)
    lengths = [len(text) for text in texts]
    assert len(set(lengths)) > 1 and max(lengths) <= 10
    # Each call goes on with the rows that have not ended; no call follows the last token of all.
    ended_by_mark = [length + 1 if length < 10 else 10 for length in lengths]
    assert calls == [sum(end > step for end in ended_by_mark) for step in range(max(ended_by_mark))]


def test_top_k_and_top_p_leave_out_the_unlikely(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # Probabilities 0.5, 0.3, 0.15 and 0.05 of A, B, C and D.
    values = {65: 0.5, 66: 0.3, 67: 0.15, 68: 0.05}
    bias = {token: float(torch.tensor(value).log()) + 5.0 for token, value in values.items()}
    _with_output(decoder, bias, monkeypatch)

    def drawn(**options: float) -> set[int]:
        return set(b"".join(generate(decoder, TOKENIZER, [b""] * 8, 25, **options)))

    assert drawn() == {65, 66, 67, 68}
    assert drawn(top_k=1) == {65}
    assert drawn(top_k=2) == {65, 66}
    assert drawn(top_p=0.4) == {65}
    assert drawn(top_p=0.7) == {65, 66}
    assert drawn(top_p=0.9) == {65, 66, 67}
    # Of the two likeliest A has 0.625: the mass is counted within what top_k leaves.
    assert drawn(top_k=2, top_p=0.6) == {65}
    assert drawn(temperature=1e-6) == {65}


def test_drawn_shares_follow_the_temperature(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_output(decoder, {65: 2.0, 66: 0.0}, monkeypatch)
    for temperature in (1.0, 4.0):
        text = b"".join(generate(decoder, TOKENIZER, [b""] * 20, 40, temperature=temperature, seed=5))
        expected = torch.tensor(2.0 / temperature).sigmoid().item()
        # 800 draws: the standard deviation of the share is below 0.018; the seed is fixed.
        assert text.count(b"A") / len(text) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, but is -1"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"top_p": 1.5}, "top_p must lie above 0"),
    ],
)
def test_options_out_of_range(decoder: Decoder, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(decoder, TOKENIZER, [b""], **{"max_new_tokens": 1, **options})


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    small = random_decoder(tiny_config(model=model_section(vocab_size=256)))
    with pytest.raises(InputError, match="the tokenizer has 257 ids, but the model only 256"):
        generate(small, TOKENIZER, [b""], 1)


def test_nothing_to_do(decoder: Decoder) -> None:
    assert generate(decoder, TOKENIZER, [], 5) == []
    assert generate(decoder, TOKENIZER, [b"a", b"b"], 0) == [b"", b""]


def test_text_from_a_run(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run")
    prompts = ["na\u00efve", "\udcff byte"]  # the second as a shell hands over a byte that is not UTF-8
    texts = generate_text(run, prompts, 12, temperature=0.7, top_k=40, seed=4, device="cpu")
    expected = generate(decoder, TOKENIZER, ["na\u00efve".encode(), b"\xff byte"], 12, 0.7, 40, seed=4)
    assert texts == [text.decode(errors="replace") for text in expected]


def test_a_tokenizer_that_has_moved(tmp_path: Path) -> None:
    gone = {"type": "huggingface", "path": str(tmp_path / "gone.json")}
    run, _ = write_run(tmp_path / "run", data={"tokenizer": gone})
    with pytest.raises(InputError, match="tokenizer of .* cannot be opened: .*gone.json does not exist"):
        generate_text(run, ["x"], 1)

"""Generation by word: at every byte what a whole pass says of the text so far, however its end is cut by then."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.config import HierarchicalBytesTokenizer
from data.tokenizers import Tokenizer, open_tokenizer
from data.tokenizers.byte_level import ByteTokenizer
from data.tokenizers.hierarchical_bytes import HierarchicalByteTokenizer
from pretrain import generate as generate_module
from pretrain import word_reading
from pretrain.errors import InputError
from pretrain.generate import generate
from pretrain.models.hierarchy.hat.model import HAT
from pretrain.models.loading import load_decoder
from pretrain.word_reading import WordReading, WordText
from tests.models.hat_models import WORDS, hat_model, random_hat
from tests.models.test_hat import logits_of
from tests.models.test_hnet import first_only
from tests.runs import pretrain, write_config

pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")

# The end of each is cut anew once or more: marks behind white space, characters byte by byte, what is no UTF-8.
TEXTS = [
    "3.14 don't \t\u0301 fooBar, HTTPServer: x".encode(),
    "a \xa0\u200d \u4e16\u754c\u2014\u65e5\u672c \u30d0\u30ca\u30ca \u00c9t\u00e9".encode(),
    b"caf\xc3 au\xf0\x9f lait\xff\xfe\n\n  \xe4\xb8",
    "\U0001f469\u200d\U0001f469 \U0001f1ee\U0001f1ee\r\n".encode(),
    b"",
    b"x",
]


@pytest.fixture(scope="module", params=["every", "first"])
def model(request: pytest.FixtureRequest) -> HAT:
    return random_hat(request.param).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(HierarchicalBytesTokenizer(type="hierarchical_bytes"))


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens had been read of each text when a byte changed the start of an earlier word."""
    append, found = WordText.append, []

    def recorded(text: WordText, token: int) -> int | None:
        changed = append(text, token)
        if changed is not None:
            found.append(len(text.tokens) - 1)
        return changed

    monkeypatch.setattr(WordText, "append", recorded)
    return found


def by_whole_pass(model: HAT, tokenizer: Tokenizer, content: bytes) -> Tensor:
    """Logits of what follows a text so far."""
    tokens = torch.tensor([[tokenizer.boundary_id, *content]])
    starts = first_only(tokens)
    words = torch.from_numpy(np.concatenate([[True], tokenizer.word_starts(content)]))[None]
    return logits_of(model, tokens, starts, words)[0, -1]


def assert_every_byte_is_right(model: HAT, tokenizer: Tokenizer, prompts: list[bytes], texts: list[bytes]) -> None:
    """``texts`` begin with ``prompts``; they end at different times."""
    reading = WordReading(model, [[tokenizer.boundary_id, *prompt] for prompt in prompts], tokenizer)
    lengths = [len(prompt) for prompt in prompts]
    while True:
        for position, row in enumerate(reading.rows):
            expected = by_whole_pass(model, tokenizer, texts[row][: lengths[row]])
            torch.testing.assert_close(reading.logits[position], expected, atol=2e-5, rtol=0)
        positions = [position for position, row in enumerate(reading.rows) if lengths[row] < len(texts[row])]
        if not positions:
            break
        going_on = [reading.rows[position] for position in positions]
        reading.read(positions, torch.tensor([texts[row][lengths[row]] for row in going_on]))
        assert sorted(reading.rows) == sorted(going_on)
        for row in going_on:
            lengths[row] += 1


@torch.no_grad()
def test_every_byte_of_texts_that_are_cut_anew(model: HAT, tokenizer: Tokenizer, changes: list[int]) -> None:
    assert_every_byte_is_right(model, tokenizer, [b""] * len(TEXTS), TEXTS)
    assert len(changes) >= 10


@torch.no_grad()
def test_every_byte_behind_prompts(model: HAT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of equal and of different lengths, some of which end within a character; also read in segments."""
    prompts = [text[: len(text) * 2 // 3] for text in TEXTS]
    prompts[1] = TEXTS[1][:21]
    assert prompts[1][-1] >= 0xC0 and len({len(prompt) for prompt in prompts}) > 3
    assert_every_byte_is_right(model, tokenizer, prompts, TEXTS)
    monkeypatch.setattr(word_reading, "PROMPT_SEGMENT", 5)
    assert_every_byte_is_right(model, tokenizer, [text[:8] for text in TEXTS], TEXTS)


@torch.no_grad()
def test_every_byte_of_random_texts(tokenizer: Tokenizer, changes: list[int]) -> None:
    model, source = random_hat().eval(), random.Random(0)
    characters = "aB1 \t\n.,'-\u0301\u200d\u00a0\u65e5\u30d0\U0001f1ee\u2019\u00c9"
    for _ in range(3):
        texts = ["".join(source.choices(characters, k=16)).encode()[: source.randint(12, 24)] for _ in range(3)]
        assert_every_byte_is_right(model, tokenizer, [text[: source.randint(0, 9)] for text in texts], texts)
    assert changes


class CutAnew(HierarchicalByteTokenizer):
    """Cuts a text otherwise from its beginning as soon as there is an exclamation mark, and in one word with two."""

    def word_starts(self, text: bytes) -> np.ndarray:
        starts = np.zeros(len(text), dtype=bool)
        starts[:: [2, 3, max(1, len(text))][min(text.count(b"!"), 2)]] = True
        return starts

    def settled_bytes(self, text: bytes | bytearray) -> int:
        return 0


@pytest.fixture
def lengths(model: HAT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the model reads."""
    logits, found = model.logits, []

    def recorded(tokens: Tensor, *arguments: object, **named: object) -> tuple:
        found.append(tokens.shape[1])
        return logits(tokens, *arguments, **named)

    monkeypatch.setattr(model, "logits", recorded)
    return found


@torch.no_grad()
def test_a_change_before_all_words_that_can_be_read_again(model: HAT, lengths: list[int]) -> None:
    texts = [b"abcdefghijklmno!pqr!st", b"abcdefghijklmnopqrstuv"]
    assert_every_byte_is_right(model, CutAnew(100), [b"", texts[1][:15]], texts)
    # The mark and the first three of six words, and later all 20 bytes as one word behind the mark.
    assert {10, 20} < set(lengths)


@torch.no_grad()
def test_only_the_last_words_are_read_again(
    model: HAT, tokenizer: Tokenizer, lengths: list[int], changes: list[int]
) -> None:
    text = b"A text of many words, of which caf\xc3\x89 \t\xcc\x81 is one"
    assert_every_byte_is_right(model, tokenizer, [text[:20]], [text])
    # First what the prompt has before its last words.
    assert len(changes) > 1 and lengths[0] == max(lengths) == 7 and max(lengths[4:]) < 5


def test_greedy_is_the_argmax_of_whole_passes(model: HAT, tokenizer: Tokenizer, changes: list[int]) -> None:
    prompts = [text[:9] for text in TEXTS]
    expected = []
    for prompt in prompts:
        content = bytearray(prompt)
        for _ in range(16):
            token = int(by_whole_pass(model, tokenizer, bytes(content))[:257].argmax())
            if token == tokenizer.boundary_id:
                break
            content.append(token)
        expected.append(bytes(content[len(prompt) :]))
    assert generate(model, tokenizer, prompts, 16, temperature=0) == expected
    assert len(set(expected)) == len(expected)


def test_what_is_drawn_is_drawn_from_whole_passes(
    model: HAT, tokenizer: Tokenizer, changes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, logits = generate_module._draw, []

    def recorded(given: Tensor, *options: object) -> Tensor:
        logits.append(given)
        return draw(given, *options)

    monkeypatch.setattr(generate_module, "_draw", recorded)
    prompts = [b"It's ", "\u4e16\u754c".encode()[:5], b""]
    texts = generate(model, tokenizer, prompts, 14, temperature=1.5, seed=3)
    assert changes and max(map(len, texts)) == 14
    # Each row's logits are those of a whole pass over one of the texts so far, whatever the order of rows.
    for step, found in enumerate(logits):
        expected = [
            by_whole_pass(model, tokenizer, prompt + text[:step])[:257]
            for prompt, text in zip(prompts, texts, strict=True)
            if len(text) >= step
        ]
        distances = torch.cdist(found, torch.stack(expected), p=float("inf"))
        assert distances.shape[0] == distances.shape[1]
        assert sorted(distances.argmin(1).tolist()) == list(range(len(expected)))
        assert distances.amin(1).max() < 5e-5
    assert generate(model, tokenizer, prompts, 14, temperature=1.5, seed=3) == texts


def test_a_tokenizer_without_words_is_refused(model: HAT) -> None:
    with pytest.raises(InputError, match="type hat reads where words start, but ByteTokenizer cuts no words"):
        generate(model, ByteTokenizer(), [b"x"], 1)


def test_from_training_to_text(tmp_path: Path) -> None:
    """The commands themselves, on a run of a few steps."""
    config = write_config(tmp_path, model=hat_model(), data=WORDS)
    trained = pretrain("train", config)
    assert trained.returncode == 0, trained.stderr
    prompts = ["the state don't", "na\u00efve \u4e16\u754c "]
    command = ["generate", tmp_path / "run", "--max-new-tokens", "24", "--temperature", "0"]
    for prompt in prompts:
        command += ["--prompt", prompt]
    shown = pretrain(*command, "--show-chunks")
    assert shown.returncode == 0, shown.stderr
    assert "|the| state| don'|t" in shown.stdout and "|na\u00efve| \u4e16|\u754c" in shown.stdout
    loaded = load_decoder(tmp_path / "run", "cpu")
    tokenizer = open_tokenizer(loaded.config.data.tokenizer)
    texts = generate(loaded.decoder, tokenizer, [prompt.encode() for prompt in prompts], 24, temperature=0)
    plain = pretrain(*command)
    for prompt, text in zip(prompts, texts, strict=True):
        assert prompt + text.decode(errors="replace") in plain.stdout

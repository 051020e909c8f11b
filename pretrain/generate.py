"""Text from a trained model, carrying its recurrent state from token to token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from data.errors import DataError
from data.tokenizers import Tokenizer, open_tokenizer
from pretrain.errors import InputError
from pretrain.models.decoder import Decoder
from pretrain.models.loading import load_decoder
from pretrain.reading import Reading
from pretrain.show_chunks import mark_chunks
from pretrain.word_reading import WordReading


def generate_text(
    path: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    show_chunks: bool = False,
) -> list[str]:
    """:func:`generate` from a run or checkpoint, as text; bytes that are not UTF-8 are shown as U+FFFD.

    Args:
        show_chunks: return each prompt with what follows it, as :func:`pretrain.show_chunks.mark_chunks` writes them.

    Raises:
        InputError: also where there is no such checkpoint, its tokenizer cannot be opened, or chunks are asked of a
            model that forms none.
    """
    loaded = load_decoder(path, device)
    try:
        tokenizer = open_tokenizer(loaded.config.data.tokenizer)
    except DataError as error:
        raise InputError(f"the tokenizer of {loaded.checkpoint} cannot be opened: {error}") from error
    # A prompt from the command line may hold bytes that are not UTF-8; they are kept as they are.
    encoded = [prompt.encode("utf-8", errors="surrogateescape") for prompt in prompts]
    if show_chunks:
        # Refuses, before anything is generated, a model that has none.
        mark_chunks(loaded.decoder, tokenizer, [])
    texts = generate(loaded.decoder, tokenizer, encoded, max_new_tokens, temperature, top_k, top_p, seed)
    if show_chunks:
        together = [prompt + text for prompt, text in zip(encoded, texts, strict=True)]
        return mark_chunks(loaded.decoder, tokenizer, together)
    return [text.decode("utf-8", errors="replace") for text in texts]


@torch.no_grad()
def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[bytes],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[bytes]:
    """Continues each prompt as the beginning of a document, until the model ends the document.

    Every token costs the same, however long the text, but for layers whose state grows with it (attention). Prompts
    are read in groups of equal length, so that nothing but their own tokens enters a state; all are then continued
    together. Where a model reads words, they are those of the text so far: a byte that changes how the end of its text
    is cut makes the model read that end again.

    Args:
        model: whole in this process.
        tokenizer: the one that the model was trained with.
        prompts: texts, which may be empty.
        max_new_tokens: most tokens that are added to a prompt.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: draw only from that many likeliest tokens (Fan et al. 2018, arXiv 1805.04833); 0: from all.
        top_p: draw only from the likeliest tokens that together reach this probability (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751); 1: from all.
        seed: what is drawn for a prompt depends on this and on its place in ``prompts``.

    Returns:
        What follows each prompt, without the prompt and without the boundary mark.

    Raises:
        InputError: an option is out of its range, or the tokenizer is not the model's.
    """
    _check_options(model, tokenizer, max_new_tokens, temperature, top_k, top_p)
    encoded = [[tokenizer.boundary_id, *tokenizer.model_ids(tokenizer.encode(prompt)).tolist()] for prompt in prompts]
    added: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens > 0 and prompts:
        if model.model.reads_word_starts:
            reading: Reading = WordReading(model, encoded, tokenizer)
        else:
            reading = Reading(model, encoded)
        generators = [_generator(seed, row) for row in range(len(prompts))]
        while True:
            drawn = _draw(
                reading.logits[:, : tokenizer.vocab_size],
                temperature,
                top_k,
                top_p,
                [generators[row] for row in reading.rows],
            )
            going_on = []
            for position, (row, token) in enumerate(zip(reading.rows, drawn.tolist(), strict=True)):
                if token == tokenizer.boundary_id:
                    continue
                added[row].append(token)
                if len(added[row]) < max_new_tokens:
                    going_on.append(position)
            if not going_on:
                break
            reading.read(going_on, drawn[going_on])
    # A tokenizer may drop the space that it puts before a text, so a continuation is not decoded by itself.
    return [
        tokenizer.decode(prompt[1:] + new)[len(tokenizer.decode(prompt[1:])) :]
        for prompt, new in zip(encoded, added, strict=True)
    ]


def _check_options(
    model: Decoder,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be 0 or more, but is {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (always the likeliest token) or more, but is {temperature}")
    if top_k < 0:
        raise InputError(f"top_k must be at least 1, or 0 to draw from all tokens, but is {top_k}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must lie above 0 and not above 1, but is {top_p}")
    if tokenizer.vocab_size > model.model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {model.model.vocab_size}; use the "
            f"tokenizer that the model was trained with"
        )


def _generator(seed: int, row: int) -> Generator:
    """Random numbers of one prompt, which do not depend on when other prompts end."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _draw(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generators: list[Generator],
) -> Tensor:
    """One token for each row of ``(rows, vocabulary)`` logits, ``(rows,)`` on the same device."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Relative to the largest, so that a tiny temperature does not overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    sorted_logits, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = sorted_logits.softmax(dim=-1)
    if top_k > 0:
        probabilities[:, top_k:] = 0
    if top_p < 1:
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= top_p] = 0
    # Drawn on the CPU, so that a seed gives the same text on every device whose logits agree.
    probabilities = probabilities.cpu()
    places = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return tokens.gather(1, torch.stack(places).to(tokens.device)).squeeze(1)

"""Text with the boundaries that a hierarchy chose in it, or was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.tokenizers import Tokenizer
from pretrain.errors import InputError
from pretrain.models.decoder import Decoder

MARK = "|"


@torch.no_grad()
def mark_chunks(model: Decoder, tokenizer: Tokenizer, texts: Sequence[bytes]) -> list[str]:
    """Each text, read as the beginning of a document, with ``|`` where a chunk begins.

    At a byte where chunks of several stages begin there are as many marks. Where a model reads words, chunks are the
    tokenizer's words. Bytes that are no whole UTF-8 character between two marks are written as ``\\xNN``.

    Args:
        model: whole in this process.
        tokenizer: the one that the model was trained with.

    Raises:
        InputError: the model forms no chunks.
    """
    if model.model.hierarchy is None:
        raise InputError("chunks can only be shown of a model that forms them, but this one has no model.hierarchy")
    device = next(model.parameters()).device
    marked = []
    for text in texts:
        tokens = torch.from_numpy(tokenizer.model_ids(tokenizer.encode(text)).astype("int64"))
        if model.model.reads_word_starts:
            begins = torch.from_numpy(tokenizer.word_starts(text))
        else:
            # The boundary mark is not shown; a text's first byte may belong to its chunk.
            marked_tokens = torch.cat([torch.tensor([tokenizer.boundary_id]), tokens])[None].to(device)
            begins = torch.stack(model.chunk_starts(marked_tokens))[:, 0, 1:].sum(0).cpu()
        marked.append(_marked(tokens, begins, tokenizer))
    return marked


def _marked(tokens: Tensor, begins: Tensor, tokenizer: Tokenizer) -> str:
    places = [0, *begins.nonzero()[:, 0].tolist(), len(tokens)]
    pieces = []
    for place, end in zip(places, places[1:], strict=False):
        if place < end:
            piece = tokenizer.decode(tokens[place:end].tolist())
            pieces.append(MARK * int(begins[place]) + piece.decode("utf-8", errors="backslashreplace"))
    return "".join(pieces)

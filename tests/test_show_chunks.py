"""Text is shown with the boundaries that the model chose, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data.config import HierarchicalBytesTokenizer
from data.tokenizers import open_tokenizer
from data.tokenizers.byte_level import ByteTokenizer
from pretrain.cli import app
from pretrain.errors import InputError
from pretrain.generate import generate, generate_text
from pretrain.show_chunks import mark_chunks
from tests.configurations import tiny_config
from tests.convert.checkpoints import model_section, random_decoder, write_run
from tests.models.hat_models import WORDS, hat_model
from tests.models.hnet_models import hnet_model

TOKENIZER = ByteTokenizer()
TEXTS = [b"the state of a recurrent model, carried", "na\u00efve \u4e16\u754c".encode(), b""]


@pytest.mark.parametrize("stages", [1, 2])
def test_marks_stand_where_chunks_begin(stages: int) -> None:
    decoder = random_decoder(tiny_config(model=hnet_model(stages)))
    shown = mark_chunks(decoder, TOKENIZER, TEXTS)
    assert shown[0].replace("|", "") == TEXTS[0].decode()
    assert ("||" in shown[0]) == (stages == 2)
    assert shown[2] == ""
    # Byte after byte, as in generation, by what each call adds to the states of the stage further in.
    states, expected = None, ""
    for byte in [TOKENIZER.boundary_id, *TEXTS[0]]:
        before = states
        _, states = decoder.logits(torch.tensor([[byte]]), states)
        if before is not None:
            inner = ["stages.1.router", "0"][2 - stages :]
            moved = [
                not all(torch.equal(states[name][key], before[name][key]) for key in states[name]) for name in inner
            ]
            expected += "|" * sum(moved) + chr(byte)
    assert shown[0] == expected


def _cut(text: bytes, begins: torch.Tensor) -> list[bytes]:
    places = [0, *begins.nonzero()[:, 0].tolist(), len(text)]
    return [text[place:end] for place, end in zip(places, places[1:], strict=False)]


def test_a_boundary_within_a_character_is_shown_in_bytes() -> None:
    decoder = random_decoder(tiny_config(model=hnet_model(1)))
    text = "\u4e16\u754c\u3002\u6f22\u5b57".encode()
    (shown,) = mark_chunks(decoder, TOKENIZER, [text])
    begins = decoder.chunk_starts(torch.tensor([[TOKENIZER.boundary_id, *text]]))[0][0, 1:]
    assert shown.count("|") == begins.sum()
    # Whole characters as they are, parts of one in bytes.
    pieces = [piece.decode("utf-8", "backslashreplace") for piece in _cut(text, begins)]
    assert any("\\x" in piece for piece in pieces) and shown.replace("|", "") == "".join(pieces)


def test_from_a_run(tmp_path: Path) -> None:
    run, decoder = write_run(tmp_path / "run", model=hnet_model(2))
    (text,) = generate(decoder, TOKENIZER, [b"state"], 9, temperature=0)
    (shown,) = generate_text(run, ["state"], 9, temperature=0, device="cpu", show_chunks=True)
    assert shown == mark_chunks(decoder, TOKENIZER, [b"state" + text])[0]
    result = CliRunner().invoke(
        app, ["generate", str(run), "--prompt", "state", "--max-new-tokens", "9", "--temperature", "0", "--show-chunks"]
    )
    assert result.exit_code == 0 and shown in result.output


def test_words_are_shown_of_a_model_that_reads_words(tmp_path: Path) -> None:
    pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")
    run, decoder = write_run(tmp_path / "run", model=hat_model(), data=WORDS)
    words = open_tokenizer(HierarchicalBytesTokenizer(type="hierarchical_bytes"))
    texts = [b"It's fooBar, of 3.14", "na\u00efve\u2014\u4e16\u754c".encode()[:-1], b""]
    expected = ["|It'|s| foo|Bar,| of| 3.|14", "|na\u00efve\u2014|\u4e16|\\xe7\\x95", ""]
    assert mark_chunks(decoder, words, texts) == expected
    (text,) = generate(decoder, words, [b"It's"], 9, temperature=0)
    (shown,) = generate_text(run, ["It's"], 9, temperature=0, device="cpu", show_chunks=True)
    assert shown == mark_chunks(decoder, words, [b"It's" + text])[0] and len(text) > 0
    assert shown.startswith("|It'|s")


def test_ids_that_say_where_words_start_are_those_of_bytes() -> None:
    """A model that chooses its own chunks reads the model's ids, whatever the tokenizer stores."""
    pytest.importorskip("hat_splitter", reason="there is no wheel of hat-splitter for this machine")
    decoder = random_decoder(tiny_config(model=hnet_model(2)))
    words = open_tokenizer(HierarchicalBytesTokenizer(type="hierarchical_bytes"))
    assert mark_chunks(decoder, words, TEXTS) == mark_chunks(decoder, TOKENIZER, TEXTS)


def test_a_model_without_chunks_is_refused(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path / "run", model=model_section())
    with pytest.raises(InputError, match=r"this one has no model\.hierarchy"):
        generate_text(run, ["x"], 1, show_chunks=True)

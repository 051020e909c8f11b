"""A run's tokenizer as files that ``AutoTokenizer`` loads, checked against the tokenizer of the run."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from data.config import BytesTokenizer, HierarchicalBytesTokenizer, HuggingFaceTokenizer, TokenizerConfig
from data.tokenizers import Tokenizer
from data.tokenizers.huggingface import byte_level_alphabet, open_library_tokenizer
from pretrain.errors import CheckError, InputError

DOCUMENT_MARK = "<|document|>"

# Encoded and decoded by both sides: line ends, runs of spaces, scripts, an emoji, control characters.
_SAMPLES = (
    "Hello, world!",
    "def f(x):\n    return x + 1\r\n\n\t# done",
    " two  spaces   and a tail ",
    "na\u00efve caf\u00e9 \u4f60\u597d \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f642",
    "0 1 22 333 \x00\x01\x7f",
)


def write_tokenizer(config: TokenizerConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, the boundary mark as ``bos`` and ``eos`` token.

    Hierarchical bytes become bytes: a model reads the same ids, and where words start is not a tokenizer's to say in
    ``transformers``, so a model that reads words splits them itself.

    Encoding adds no mark of itself, unless the run's own ``tokenizer.json`` says so. No padding token is
    named: padding on the left would enter the recurrent state. Text that spells a special token is read as
    that token, as everywhere in ``transformers``; ``split_special_tokens=True`` reads it as text.

    Args:
        config: of the run.
        tokenizer: that ``config`` opens.
        directory: where the files go.

    Raises:
        InputError: this kind of tokenizer has no Hugging Face form here, or encodes or decodes otherwise there.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(config, BytesTokenizer | HierarchicalBytesTokenizer):
        library, mark = byte_level_tokenizer(tokenizer.boundary_id), DOCUMENT_MARK
    elif isinstance(config, HuggingFaceTokenizer):
        library, mark = open_library_tokenizer(config.path), config.boundary_token
    else:
        raise InputError(
            f"data.tokenizer.type={config.type} has no exported form: transformers would need it converted to a "
            f"tokenizer.json; convert {config.path} and train with data.tokenizer.type=huggingface"
        )
    written = PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token=mark, eos_token=mark, clean_up_tokenization_spaces=False
    )
    try:
        written.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the library's own has no type
        raise InputError(f"tokenizer.json cannot be written in {directory.parent}: {error}; make room there") from None
    _name_common_class(directory / "tokenizer_config.json")
    _check(directory, tokenizer)


def _name_common_class(file: Path) -> None:
    """Names the class as transformers 4 and 5 both know it; 5 writes its own new name."""
    description = json.loads(file.read_text())
    description.pop("backend", None)
    description["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(description, indent=2) + "\n")


def byte_level_tokenizer(boundary_id: int) -> tokenizers.Tokenizer:
    """Bytes as ids 0 to 255, in the ``tokenizers`` library's terms: byte-level BPE without a merge."""
    vocabulary = {character: byte for character, byte in byte_level_alphabet().items()}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(DOCUMENT_MARK, special=True, normalized=False)])
    if library.token_to_id(DOCUMENT_MARK) != boundary_id:
        raise CheckError(f"the boundary mark has id {library.token_to_id(DOCUMENT_MARK)}, not {boundary_id}")
    return library


def _check(directory: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(written, name) != tokenizer.boundary_id:
            raise CheckError(
                f"the exported tokenizer's {name} is {getattr(written, name)}, not {tokenizer.boundary_id}"
            )
    for text in _SAMPLES:
        ids = tokenizer.model_ids(tokenizer.encode(text)).tolist()
        found = written.encode(text, add_special_tokens=False)
        if found != ids or written.decode(ids) != tokenizer.decode_text(ids):
            raise InputError(
                f"the run's tokenizer cannot be exported: transformers gives {text!r} the ids {found} and decodes "
                f"the run's ids {ids} to {written.decode(ids)!r}"
            )

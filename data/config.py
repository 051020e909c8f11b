"""What a user may say about the data, checked by pydantic. Imports neither torch nor numpy."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StandardLibrarySource(_Config):
    """The running Python interpreter's own standard library, one document per text file."""

    type: Literal["standard_library"]


class TextFilesSource(_Config):
    """Files below a directory (or one file), each a document unless ``document_separator`` cuts it up."""

    type: Literal["text_files"]
    path: str = Field(description="a directory, or one file")
    pattern: str = Field(default="**/*.txt", description="which files below the directory; ** is any depth")
    document_separator: str | None = Field(
        default=None, min_length=1, description="text between two documents in one file; it is left out"
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_is_relative(cls, pattern: str) -> str:
        if not pattern or pattern.startswith("/"):
            raise ValueError(f"pattern {pattern!r} must be relative to path, for instance '**/*.txt'")
        return pattern


class RecordsConfig(_Config):
    """What sources of records share: where the text is, and which records count."""

    text_field: str = Field(default="text", description="the key that holds the document's text")
    minimum_characters: int = Field(default=0, ge=0, description="shorter texts are left out")
    maximum_characters: int | None = Field(default=None, ge=1, description="longer texts are left out")
    keep: dict[str, list[str | int | float | bool]] = Field(
        default={}, description="field -> values that are kept, for instance language: [en]; dots reach into a field"
    )
    bad_records: Literal["stop", "skip"] = Field(
        default="stop", description="what happens at a record without a text, or that cannot be parsed"
    )
    maximum_bad_records: int = Field(default=100, ge=0, description="how many are skipped before the run stops")


class JsonlSource(RecordsConfig):
    """Files of one JSON object per line, each line a document; .gz, .bz2, .xz and .zst are read compressed."""

    type: Literal["jsonl"]
    path: str = Field(description="a file, or a glob such as corpus/*.jsonl")


class HuggingFaceSource(RecordsConfig):
    """Rows of a Hugging Face dataset: of the hub, or local or remote files of any format that ``datasets`` reads."""

    type: Literal["huggingface"]
    path: str = Field(
        description="a dataset on the hub, a local directory, or the format of data_files: parquet, json, arrow, text"
    )
    name: str | None = Field(default=None, description="configuration of the dataset, where it has several")
    data_files: str | list[str] | None = Field(
        default=None, description="files or globs; local, or in a store such as s3://bucket/*.parquet"
    )
    split: str = Field(default="train", description="split of the dataset that the documents are taken from")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub")
    streaming: bool = Field(default=True, description="read rows as they come, without a local copy of the dataset")


class MegatronIndexedSource(_Config):
    """Token ids in Megatron's indexed format: ``path_prefix`` + ``.bin`` and ``.idx``.

    The configured tokenizer is the one that wrote the ids; it says which id is the boundary mark.
    """

    type: Literal["megatron_indexed"]
    path_prefix: str
    held_out_path_prefix: str | None = Field(
        default=None, description="a second dataset that is the held-out split, instead of a fraction"
    )


class PreparedSource(_Config):
    """A directory that ``pretrain data prepare`` wrote, read in place.

    The configured tokenizer is the one that it was prepared with. The directory has its own held-out split, so
    ``held_out_fraction`` is not looked at.
    """

    type: Literal["prepared"]
    path: str = Field(description="the directory that holds manifest.json")


class BytesTokenizer(_Config):
    """Ids 0 to 255 are the bytes, 256 is the boundary mark."""

    type: Literal["bytes"]


class HierarchicalBytesTokenizer(_Config):
    """The same ids, and where words start: for models that read one vector a word."""

    type: Literal["hierarchical_bytes"]
    splitter: Literal["words"] = Field(default="words", description="rules by which text is cut into words")
    # A character has up to 4 bytes, and none is cut.
    maximum_word_bytes: int = Field(default=100, ge=4, description="longer words are cut")


class HuggingFaceTokenizer(_Config):
    """A ``tokenizer.json``: the file, a directory that holds it, or the name of a model on the hub."""

    type: Literal["huggingface"]
    path: str
    boundary_token: str = Field(default="<|endoftext|>", min_length=1)


class SentencePieceTokenizer(_Config):
    """A sentencepiece ``.model`` file."""

    type: Literal["sentencepiece"]
    path: str
    boundary_token: str = Field(default="</s>", min_length=1)


SourceConfig = Annotated[
    StandardLibrarySource | TextFilesSource | JsonlSource | HuggingFaceSource | MegatronIndexedSource | PreparedSource,
    Field(discriminator="type"),
]
TokenizerConfig = Annotated[
    BytesTokenizer | HierarchicalBytesTokenizer | HuggingFaceTokenizer | SentencePieceTokenizer,
    Field(discriminator="type"),
]

# The name of the source where there is no mixture.
ONLY_SOURCE = "source"

# Sources that hold token ids: they are not tokenized, and so not streamed either.
READ_IN_PLACE = (MegatronIndexedSource, PreparedSource)


class MixtureSource(_Config):
    """One source of a mixture."""

    source: SourceConfig
    weight: float = Field(
        gt=0, allow_inf_nan=False, description="share of the tokens, relative to the other sources' weights"
    )


class CurriculumPhase(_Config):
    """Other weights of the mixture, or another length of sequences, from some token of the run on."""

    from_tokens: int = Field(ge=0, description="tokens of the run after which this holds")
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, min_length=1, description="weight of each source that takes part from then on; null: as before"
    )
    sequence_length: int | None = Field(
        default=None,
        ge=2,
        description="each sample of data.sequence_length tokens is trained on in rows of so many, a divisor of it; the"
        " order of the data and the tokens of a step stay what they are. null: as before",
    )

    @model_validator(mode="after")
    def _says_something(self) -> CurriculumPhase:
        if self.weights is None and self.sequence_length is None:
            raise ValueError(f"the phase from_tokens={self.from_tokens} changes nothing; give weights, sequence_length")
        if self.weights is not None and self.from_tokens == 0:
            raise ValueError("weights from_tokens=0 are the mixture's own; give them in data.mixture")
        return self


class StreamConfig(_Config):
    """Documents are tokenized while the run reads them, and nothing is kept."""

    shuffle_documents: int = Field(
        default=4096, ge=1, description="documents that are held in memory and shuffled together"
    )
    held_out_samples: int = Field(
        default=256, ge=1, description="samples to evaluate on, from the first documents that are held out"
    )
    workers: int = Field(
        default=2, ge=0, description="background processes that tokenize; 0: the training process itself does"
    )


class DataConfig(_Config):
    """Where documents come from, how they become tokens, and how long a sample is."""

    source: SourceConfig | None = Field(default=None, description="the only source; or else give mixture")
    mixture: dict[str, MixtureSource] | None = Field(
        default=None, min_length=1, description="several sources by name, with their weights; or else give source"
    )
    curriculum: list[CurriculumPhase] = Field(
        default=[], description="weights of the mixture, and lengths of sequences, over the run"
    )
    tokenizer: TokenizerConfig
    sequence_length: int = Field(ge=2, description="tokens in a sample that the model reads")
    packing: Literal["concatenate", "best_fit"] = Field(
        default="concatenate",
        description="how training documents fill samples: one behind the other and cut where a sample is full, or whole"
        " wherever they fit, with some padding",
    )
    predict_document_ends: bool = Field(
        default=True, description="whether a document's last token predicts the mark behind it; false: nothing"
    )
    stream: StreamConfig | None = Field(
        default=None, description="tokenize while reading; null: tokenize everything before the first step"
    )
    held_out_fraction: float = Field(
        default=0.02, gt=0, lt=0.5, description="share of the documents that is never trained on"
    )
    cache_directory: str | None = Field(
        default=None, description="where tokenized documents are kept for the next start; null: in memory"
    )

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> DataConfig:
        if (self.source is None) == (self.mixture is None):
            raise ValueError("give either source or mixture" + (", not both" if self.source else ""))
        if self.mixture is None and any(phase.weights for phase in self.curriculum):
            raise ValueError("curriculum changes the weights of a mixture, but there is none; give mixture")
        if self.stream is not None and self.cache_directory is not None:
            raise ValueError("stream keeps no tokenized text, so leave out cache_directory (or stream)")
        if self.stream is not None and isinstance(self.source, READ_IN_PLACE):
            raise ValueError(f"source.type {self.source.type} is tokenized already and read in place; leave out stream")
        if any(not re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in self.mixture or ()):
            raise ValueError(f"names in mixture take letters, digits, - and _, but are {sorted(self.mixture or ())}")
        before = -1
        for phase in self.curriculum:
            unknown = sorted(set(phase.weights or ()) - set(self.mixture or ()))
            if unknown:
                raise ValueError(f"curriculum names the source '{unknown[0]}', but mixture has {sorted(self.mixture)}")
            if phase.from_tokens <= before:
                raise ValueError(f"curriculum's from_tokens must rise, but {phase.from_tokens} follows {before}")
            if phase.sequence_length is not None and self.sequence_length % phase.sequence_length:
                raise ValueError(
                    f"curriculum's sequence_length {phase.sequence_length} must divide data.sequence_length"
                    f" {self.sequence_length}"
                )
            before = phase.from_tokens
        return self

    def by_source(self) -> dict[str, DataConfig]:
        """The same for each source alone, by its name in the mixture, or ``ONLY_SOURCE``."""
        if self.mixture is None:
            return {ONLY_SOURCE: self}
        return {
            name: self.model_copy(update={"source": entry.source, "mixture": None, "curriculum": []})
            for name, entry in self.mixture.items()
        }

    def why_not_contiguous(self) -> str | None:
        """Why rows of a batch cannot go on where they ended in the batch before, in one sentence; None where they can.

        They can where consecutive samples are one stream of tokens that may be read at many places at once.
        """
        if self.mixture is not None:
            return (
                "data.mixture takes each sample from another source than the one before, so no row goes on where it "
                "ended; give data.source, with all documents prepared into one directory"
            )
        if self.packing != "concatenate":
            return (
                f"data.packing={self.packing} fills each sample with whole documents, so none goes on in the next; set "
                f"data.packing to concatenate"
            )
        if self.stream is not None:
            return (
                "data.stream reads the source from front to back, and each row would go on at a place of its own; "
                "leave out data.stream, or prepare the data once (pretrain data prepare)"
            )
        if any(phase.sequence_length is not None for phase in self.curriculum):
            return (
                "data.curriculum cuts samples into shorter rows, each of which begins anew; leave out its "
                "sequence_length"
            )
        return None

    def length_at(self, tokens: int) -> int:
        """Length of the rows that the run trains on after so many tokens."""
        length = self.sequence_length
        for phase in self.curriculum:
            if phase.sequence_length is not None and phase.from_tokens <= tokens:
                length = phase.sequence_length
        return length

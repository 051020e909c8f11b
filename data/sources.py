"""Opens the source of documents that a configuration describes."""

from __future__ import annotations

from data.config import HuggingFaceSource, JsonlSource, SourceConfig, StandardLibrarySource, TextFilesSource
from data.errors import DataError
from data.hub import HubDocuments
from data.records import JsonlDocuments
from data.source import Source
from data.text_files import open_standard_library, open_text_files


def open_source(config: SourceConfig) -> Source:
    """The source that ``config`` describes. Raises ``DataError`` when its files are missing or hold no text."""
    match config:
        case StandardLibrarySource():
            return open_standard_library()
        case TextFilesSource():
            return open_text_files(config)
        case JsonlSource():
            return JsonlDocuments(config)
        case HuggingFaceSource():
            return HubDocuments(config)
    raise DataError(
        f"data.source.type={config.type} holds token ids, but text is needed; give a source of text, for instance the"
        " one that was tokenized."
    )

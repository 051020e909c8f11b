"""Whatever stands in the files of a data set, opening it ends in data or in one clear error that names a file."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.indexed import IndexedFile
from data.indexed_format import index_content
from data.preparation.manifest import MANIFEST_FILE, Manifest, _own_sha256
from data.preparation.verifying import verify
from data.prepared import open_directory
from data.tokenizers.byte_level import ByteTokenizer
from tests.data.preparing import prepare_into, text_config, write_texts
from tests.fuzzing import JSON_VALUES, changed, fast_and_slow

LENGTHS = np.array([5, 1, 7, 3], dtype=np.int32)
# Of the name, the version, the code of the type, and both counts.
HEADER = struct.Struct("<9sQBQQ")


@fast_and_slow(150, 5000)
def test_an_index_of_anything(examples: int, tmp_path: Path) -> None:
    """Counts of any size are compared with the file's before anything of their size is made."""
    prefix, content = tmp_path / "corpus", index_content(np.dtype(np.uint16), LENGTHS)
    (tmp_path / "corpus.bin").write_bytes(np.arange(LENGTHS.sum(), dtype=np.uint16).tobytes())
    fields = HEADER.unpack_from(content)
    numbers = st.sampled_from([0, 1, 3, 4, 5, 2**31, 2**60, 2**64 - 1])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(1, 4), numbers), max_size=2),
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3),
        st.integers(-9, 9),
    )
    def check(header: list[tuple[int, int]], flipped: list[tuple[int, int]], longer: int) -> None:
        values: list[Any] = list(fields)
        for place, number in header:
            values[place] = number % 256 if place == 2 else number
        mangled = bytearray(HEADER.pack(*values) + content[HEADER.size :])
        for place, byte in flipped:
            mangled[place] = byte
        mangled = mangled[:longer] if longer < 0 else mangled + bytes(longer)
        (tmp_path / "corpus.idx").write_bytes(mangled)
        try:
            file = IndexedFile(str(prefix), ByteTokenizer())
        except DataError as error:
            assert str(prefix) in str(error)
        else:
            assert (file.starts + file.lengths <= len(file.tokens)).all() and (file.starts >= 0).all()

    check()


@fast_and_slow(60, 3000)
def test_a_manifest_of_anything(examples: int, tmp_path: Path) -> None:
    """Its checksum is renewed after each change, as someone who means harm would."""
    directory, outside = tmp_path / "out", tmp_path / "outside"
    outside.write_bytes(b"secret")
    prepare_into(directory, text_config(write_texts(tmp_path / "texts")))
    sound = json.loads((directory / MANIFEST_FILE).read_bytes())
    names = st.sampled_from(
        ["../outside", "..", ".", str(outside), MANIFEST_FILE, *(f.name for f in directory.iterdir())]
    )

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(changed(sound, JSON_VALUES | names))
    def check(mangled: Any) -> None:
        with contextlib.suppress(pydantic.ValidationError, UnicodeEncodeError):
            mangled["sha256"] = _own_sha256(Manifest.model_validate(mangled))
        (directory / MANIFEST_FILE).write_text(json.dumps(mangled))
        try:
            open_directory(directory)
        except DataError as error:
            assert str(directory) in str(error)
        try:
            verify(directory)
        except DataError as error:
            assert str(directory) in str(error)

    check()

"""Sources: which documents there are, in which order, on which side of the split, and what errors say."""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.source import Source
from data.sources import open_source
from data.splitting import held_out

RECORDS = [{"text": "first\nline"}, {"text": "é \U0001f600", "other": 1}, {"text": "half \ud83d pair"}]


def source(**settings: object) -> Source:
    return open_source(TypeAdapter(SourceConfig).validate_python(settings))


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_files(text_directory: Path) -> None:
    documents = list(source(type="text_files", path=str(text_directory)).documents())
    expected = sorted(p.relative_to(text_directory).as_posix() for p in text_directory.rglob("*.txt"))
    assert [d.identity for d in documents] == expected
    assert all(d.content == (text_directory / d.identity).read_bytes() for d in documents)


def test_text_files_pattern(text_directory: Path) -> None:
    (text_directory / "odd" / "notes.md").write_text("notes")
    documents = source(type="text_files", path=str(text_directory), pattern="**/*.md").documents()
    assert [d.identity for d in documents] == ["odd/notes.md"]


def test_one_text_file_keeps_its_raw_bytes(tmp_path: Path, hostile_document: bytes) -> None:
    (tmp_path / "one.bin").write_bytes(hostile_document)
    documents = list(source(type="text_files", path=str(tmp_path / "one.bin")).documents())
    assert [(d.identity, d.content) for d in documents] == [("one.bin", hostile_document)]


def test_a_separator_cuts_a_file_into_documents(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("one<end>two <end><end>three")
    documents = list(source(type="text_files", path=str(path), document_separator="<end>").documents())
    assert [d.content for d in documents] == [b"one", b"two ", b"", b"three"]
    path.write_text("zero<end>three<end>one")
    again = {d.content: d.identity for d in open_source_of(path)}
    assert again[b"three"] == documents[3].identity and again[b"one"] == documents[0].identity


def open_source_of(path: Path):
    return source(type="text_files", path=str(path), document_separator="<end>").documents()


def test_jsonl(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", RECORDS[1:])
    write_lines(tmp_path / "a.jsonl", RECORDS[:1])
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as lines:
        lines.write('\n  \n{"text": "zipped"}')
    documents = list(source(type="jsonl", path=str(tmp_path / "*.jsonl*")).documents())
    expected = [record["text"].encode("utf-8", "surrogatepass") for record in RECORDS] + [b"zipped"]
    assert [d.content for d in documents] == expected
    assert documents[2].location == f"{tmp_path / 'b.jsonl'} line 2"
    assert len({d.identity for d in documents}) == 4


def test_jsonl_identity_does_not_depend_on_the_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", RECORDS)
    before = {d.content: d.identity for d in source(type="jsonl", path=str(path)).documents()}
    write_lines(path, [{"text": "new"}, *reversed(RECORDS)])
    after = {d.content: d.identity for d in source(type="jsonl", path=str(path)).documents()}
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"a.jsonl line 2 is not valid JSON \(.*mend or remove"),
        ('{"content": "x"}', r"a.jsonl line 2 should hold a string under 'text'.*\['content'\].*text_field"),
        ('{"text": 3}', r"a.jsonl line 2 should hold a string under 'text'"),
        ("[1, 2]", "a.jsonl line 2 should hold a string under 'text' but holds a list"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(source(type="jsonl", path=str(tmp_path / "a.jsonl")).documents())


def test_jsonl_lines_that_are_not_utf8_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="a.jsonl line 1 is not valid JSON"):
        list(source(type="jsonl", path=str(tmp_path / "a.jsonl")).documents())


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "zipped"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a.jsonl.gz cannot be read"):
        list(source(type="jsonl", path=str(tmp_path / "a.jsonl.gz")).documents())


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="path .*/none does not exist; give a directory"):
        source(type="text_files", path=str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no file below .* matches .*'\*\*/\*.txt'; give the pattern"):
        source(type="text_files", path=str(tmp_path))
    with pytest.raises(DataError, match="none.jsonl matches no file"):
        source(type="jsonl", path=str(tmp_path / "none.jsonl"))


def test_a_file_that_vanishes_is_named(text_directory: Path) -> None:
    opened = source(type="text_files", path=str(text_directory))
    (text_directory / "odd" / "7.txt").unlink()
    with pytest.raises(DataError, match="odd/7.txt cannot be read .*No such file"):
        list(opened.documents())
    with pytest.raises(DataError, match="odd/7.txt cannot be read"):
        opened.fingerprint()


def test_fingerprints_follow_the_files(text_directory: Path) -> None:
    settings = {"type": "text_files", "path": str(text_directory)}
    first = source(**settings).fingerprint()
    assert source(**settings).fingerprint() == first
    assert source(**settings, document_separator="x").fingerprint() != first
    (text_directory / "odd" / "7.txt").write_text("changed")
    assert source(**settings).fingerprint() != first


def test_the_standard_library_leaves_out_what_is_installed() -> None:
    opened = source(type="standard_library")
    identities = [name for name, _ in opened.files]
    assert identities == sorted(identities) and "json/decoder.py" in identities
    left_out = ("site-packages", "dist-packages", "__pycache__")
    assert not [name for name in identities if any(part in left_out for part in Path(name).parts)]
    document = next(d for d in opened.documents() if d.identity == "this.py")
    assert document.content == (Path(sysconfig.get_path("stdlib")) / "this.py").read_bytes()


@given(st.integers(0, 10**6), st.floats(0.001, 0.49), st.floats(0.001, 0.49))
def test_a_larger_fraction_only_adds_to_the_held_out_split(number: int, one: float, two: float) -> None:
    smaller, larger = sorted([one, two])
    assert held_out(str(number), larger) or not held_out(str(number), smaller)


def test_the_split_holds_out_the_fraction_and_never_changes() -> None:
    share = sum(held_out(f"document/{i}", 0.1) for i in range(20_000)) / 20_000
    # Five standard deviations of a binomial share at n = 20 000.
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5
    # A change of these would leak held-out text into the training of a run that resumes.
    digests = [hashlib.sha256(f"document/{i}".encode()).hexdigest() for i in range(60)]
    assert [i for i in range(60) if held_out(f"document/{i}", 0.1)] == [
        i for i, digest in enumerate(digests) if int(digest[:16], 16) / 2**64 < 0.1
    ]
    assert held_out("document/5", 0.1) and not held_out("document/6", 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 1}, "greater than or equal to 2"),
        ({"held_out_fraction": 0.5}, "less than 0.5"),
        ({"held_out_fraction": 0}, "greater than 0"),
        ({"tokenizer": {"type": "words"}}, "'bytes', 'hierarchical_bytes', 'huggingface', 'sentencepiece'"),
        ({"source": {"type": "text_files", "path": "a", "pattern": "/a"}}, "must be relative to path"),
        ({"source": {"type": "jsonl"}}, "source.jsonl.path"),
        ({"shuffle": True}, "Extra inputs are not permitted"),
    ],
)
def test_config_errors(change: dict, message: str) -> None:
    good = {"source": {"type": "standard_library"}, "tokenizer": {"type": "bytes"}, "sequence_length": 8}
    assert DataConfig.model_validate(good).held_out_fraction == 0.02
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(good | change)


def test_the_config_needs_no_torch() -> None:
    import subprocess
    import sys

    program = "import sys, data.config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)

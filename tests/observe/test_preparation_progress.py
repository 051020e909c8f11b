"""What is printed while text is prepared, with and without a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from data.preparation.directory import PreparationState
from pretrain.observe.preparation_progress import SECONDS_BETWEEN_LINES, PreparationProgress
from tests.data.preparing import prepare_into, text_config, write_texts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def state(megabytes: float, total: float | None = None, duplicates: int = 0) -> PreparationState:
    size = None if total is None else int(total * 1e6)
    return PreparationState(3, 1200, int(megabytes * 1e6), size, 400_000, duplicates)


def test_lines_come_every_so_many_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    with PreparationProgress(stream=stream, clock=clock) as progress:
        for second in range(25):
            clock.now = float(second)
            progress.update(state(second))
    assert stream.getvalue().splitlines() == [
        f"shard 3  1,200 documents  {second:.1f} MB  400,000 tokens  1.0 MB/s"
        for second in (SECONDS_BETWEEN_LINES, 2 * SECONDS_BETWEEN_LINES)
    ]


def test_a_line_holds_all_that_is_known() -> None:
    clock, stream = Clock(), io.StringIO()
    with PreparationProgress("web", stream=stream, clock=clock) as progress:
        clock.now = 20.0
        progress.update(state(10, total=40, duplicates=7))
    assert stream.getvalue() == (
        "web: shard 3  1,200 documents  10.0 MB of 40.0 (25%)  400,000 tokens  7 duplicates  0.5 MB/s  eta 0:01:00\n"
    )


def test_a_terminal_has_a_bar(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    clock, stream = Clock(), Terminal()
    with PreparationProgress("web", stream=stream, clock=clock) as progress:
        for second, total in ((1, None), (2, 40.0), (3, 40.0)):
            clock.now = float(second)
            progress.update(state(10, total))
    shown = stream.getvalue()
    assert "\u2501" in shown and "10.0 MB of 40.0 (25%)" in shown and "web" in shown


def test_a_preparation_says_how_far_it_is(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    (texts / "again.txt").write_bytes((texts / "0001.txt").read_bytes())
    states: list[PreparationState] = []
    manifest = prepare_into(tmp_path / "out", text_config(texts), on_progress=states.append)
    size = sum(path.stat().st_size for path in texts.iterdir())
    tokens = manifest.train.tokens + manifest.held_out.tokens
    assert states[-1] == PreparationState(len(manifest.shards), 41, size, size, tokens, 1)
    assert [s.tokens for s in states] == sorted(s.tokens for s in states)

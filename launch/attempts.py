"""Whether a run that a job has left goes on in another one. Needs Python alone: it runs where the job's shell does.

``RUN/launch/attempts.jsonl`` has an object for every attempt; what the run itself said of its end is in a file that the
job names (``pretrain.observe.ending`` writes it).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

EXIT_DONE, EXIT_FAILED, EXIT_AGAIN = 0, 1, 75

LONGEST_WAIT = 600.0

_CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass
class Attempt:
    """One job, or one start of a job that is requeued.

    Attributes:
        ending: file in which the run says how it ended; names the attempt.
        began, ended: seconds since 1970; ``ended`` is None while it runs, and where nobody was left to write it.
        nodes: that it ran on.
        how: ``done``, ``stopped`` (told to end, the state saved), ``bad input``, ``diverged``, ``failed``,
            ``unhealthy`` (a node is), or ``lost`` (it said nothing).
        message: what it said.
        step: last step that is in ``metrics.jsonl`` at its end; None: none.
        checkpoint: step of the newest checkpoint at its end; None: none.
    """

    ending: str
    began: float
    nodes: str = ""
    ended: float | None = None
    how: str | None = None
    message: str = ""
    step: int | None = None
    checkpoint: int | None = None

    @property
    def failed(self) -> bool:
        return self.how in ("failed", "unhealthy", "lost")


def read_attempts(run: Path) -> list[Attempt]:
    """All attempts of a run; one that was cut off while it was written counts for nothing."""
    attempts = []
    try:
        lines = (run / "launch" / "attempts.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            print(f"{run}/launch/attempts.jsonl: a line is damaged and left out", file=sys.stderr)
    return attempts


def write_attempts(run: Path, attempts: Sequence[Attempt]) -> None:
    """Replaces the file at once."""
    file = run / "launch" / "attempts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w") as stream:
        stream.writelines(json.dumps(asdict(attempt)) + "\n" for attempt in attempts)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def last_logged_step(run: Path) -> int | None:
    """Of ``metrics.jsonl``; a last line that is not whole is left out."""
    try:
        with open(run / "metrics.jsonl", "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 65536))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            continue
    return None


def newest_checkpoint(run: Path) -> int | None:
    """Step of the newest checkpoint that has a manifest."""
    found = (run / "checkpoints").glob("step-*/manifest.json")
    steps = [int(match[1]) for file in found if (match := _CHECKPOINT.fullmatch(file.parent.name))]
    return max(steps, default=None)


def close(attempt: Attempt, run: Path, told: bool, exit_code: int | None) -> None:
    """Fills in how an attempt ended."""
    try:
        said = json.loads(Path(attempt.ending).read_text())
        attempt.how, attempt.message = str(said["how"]), str(said["message"])
    except (OSError, ValueError, TypeError, KeyError):
        # A signal may come before the run listens to it, or while nodes are checked.
        attempt.how = "stopped" if told else "lost"
        known = f"with exit code {exit_code}" if exit_code is not None else "with the job"
        attempt.message = f"ended {known} and said nothing"
    attempt.step, attempt.checkpoint = last_logged_step(run), newest_checkpoint(run)


def reason_to_stop(attempts: Sequence[Attempt], max_failures: int) -> str | None:
    """Why the run must not be tried again after its last attempt; None: it may."""
    last = attempts[-1]
    if last.how in ("bad input", "diverged"):
        return last.message
    if not last.failed:
        return None
    row = failures_in_a_row(attempts)
    if len(row) > 1 and row[-2].step == last.step and row[-2].how == last.how:
        where = "before its first step" if last.step is None else f"after step {last.step}"
        return f"it has failed {where} twice: {last.message}"
    if len(row) > max_failures:
        return f"{len(row)} jobs in a row have failed without a new checkpoint, the last one: {last.message}"
    return None


def failures_in_a_row(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The last attempts, as far back as all failed and none saved a checkpoint that the one before had not."""
    row: list[Attempt] = []
    for attempt in reversed(attempts):
        if not attempt.failed or (row and attempt.checkpoint != row[0].checkpoint):
            break
        row.insert(0, attempt)
    return row


def begin(run: Path, ending: str, nodes: str, max_failures: int) -> int:
    """Writes down that an attempt begins; one before it that was never ended is judged first."""
    attempts = read_attempts(run)
    if attempts and attempts[-1].how is None:
        close(attempts[-1], run, told=False, exit_code=None)
        write_attempts(run, attempts)
        problem = reason_to_stop(attempts, max_failures)
        if problem:
            print(f"the run is not tried again: {problem}", flush=True)
            return EXIT_FAILED
    Path(ending).parent.mkdir(parents=True, exist_ok=True)
    Path(ending).unlink(missing_ok=True)
    write_attempts(run, [*attempts, Attempt(ending, time.time(), nodes)])
    return EXIT_DONE


def end(run: Path, ending: str, exit_code: int, told: bool, max_failures: int, wait_seconds: float) -> int:
    """Judges the attempt that has just ended, and waits where the next one had better not begin at once."""
    attempts = read_attempts(run)
    if not attempts or attempts[-1].ending != ending:
        attempts.append(Attempt(ending, time.time()))
    last = attempts[-1]
    close(last, run, told, exit_code)
    last.ended = time.time()
    write_attempts(run, attempts)
    if last.how == "done":
        print(f"the run is done: {last.message}", flush=True)
        return EXIT_DONE
    problem = reason_to_stop(attempts, max_failures)
    if problem:
        print(f"the run is not tried again: {problem}", flush=True)
        return EXIT_FAILED
    where = "from the beginning" if last.checkpoint is None else f"from step {last.checkpoint}"
    wait = 0.0
    if last.failed:
        wait = min(LONGEST_WAIT, wait_seconds * 2 ** (len(failures_in_a_row(attempts)) - 1))
    waiting = f" in {wait:.0f} seconds" if wait else ""
    print(f"{last.how}: {last.message}; the run goes on {where}{waiting}", flush=True)
    time.sleep(wait)
    return EXIT_AGAIN


def main(arguments: Sequence[str] | None = None) -> int:
    """``begin`` or ``end``, as the job's shell calls it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path)
        command.add_argument("--ending", required=True)
        command.add_argument("--max-failures", type=int, default=3)
        if name == "begin":
            command.add_argument("--nodes", default="")
        else:
            command.add_argument("--exit-code", type=int, required=True)
            command.add_argument("--told", action="store_true")
            command.add_argument("--wait-seconds", type=float, default=30.0)
    given = parser.parse_args(arguments)
    if given.command == "begin":
        return begin(given.run, given.ending, given.nodes, given.max_failures)
    return end(given.run, given.ending, given.exit_code, given.told, given.max_failures, given.wait_seconds)


if __name__ == "__main__":
    sys.exit(main())

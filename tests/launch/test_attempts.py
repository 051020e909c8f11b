"""Whether a run goes on after a job, from what the job left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.attempts import EXIT_AGAIN, EXIT_DONE, EXIT_FAILED, LONGEST_WAIT, begin, end, main, read_attempts

MAX_FAILURES = 3


class Job:
    """One attempt after the other on a run directory; waits are written down instead of waited for."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch):
        self.run, self.count, self.waits = run, 0, []
        (run / "checkpoints").mkdir(parents=True)
        monkeypatch.setattr("launch.attempts.time.sleep", self.waits.append)

    @property
    def ending(self) -> Path:
        return self.run / "launch" / "endings" / f"7-{self.count}.json"

    def begin(self) -> int:
        self.count += 1
        return begin(self.run, str(self.ending), "n0,n1", MAX_FAILURES)

    def end(self, how: str | None, step: int | None = None, checkpoint: int | None = None, told: bool = False) -> int:
        if how is not None:
            self.ending.write_text(json.dumps({"how": how, "message": f"it was {how}"}))
        self.reach(step, checkpoint)
        return end(self.run, str(self.ending), 1, told, MAX_FAILURES, 30.0)

    def reach(self, step: int | None, checkpoint: int | None) -> None:
        if step is not None:
            # As a kill leaves it: the last line is not whole.
            (self.run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {step}, "loss": 1.0}}\n{{"step": 9')
        if checkpoint is not None:
            directory = self.run / "checkpoints" / f"step-{checkpoint:08d}"
            directory.mkdir()
            (directory / "manifest.json").write_text("{}")

    def attempt(self, *arguments: object, **options: object) -> int:
        assert self.begin() == EXIT_DONE
        return self.end(*arguments, **options)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path / "run", monkeypatch)


def test_a_run_that_is_done_ends_the_chain(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.attempt("done", 10, 10) == EXIT_DONE
    assert "the run is done" in capsys.readouterr().out
    (attempt,) = read_attempts(job.run)
    assert (attempt.how, attempt.step, attempt.checkpoint, attempt.nodes) == ("done", 10, 10, "n0,n1")
    assert attempt.ended >= attempt.began


def test_a_run_that_was_told_to_end_goes_on_at_once_however_often(job: Job) -> None:
    for step in range(10):
        assert job.attempt("stopped", step, step) == EXIT_AGAIN
    assert job.waits == [0.0] * 10


def test_a_signal_before_the_run_listens_is_no_failure(job: Job) -> None:
    for _ in range(5):
        assert job.attempt(None, told=True) == EXIT_AGAIN


@pytest.mark.parametrize("how", ["bad input", "diverged"])
def test_what_would_end_the_same_way_is_not_tried_again(job: Job, capsys: pytest.CaptureFixture[str], how: str) -> None:
    assert job.attempt(how, 5, 5) == EXIT_FAILED
    assert f"not tried again: it was {how}" in capsys.readouterr().out


def test_the_same_step_that_fails_twice_ends_the_chain(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.attempt("failed", 12, 10) == EXIT_AGAIN
    assert job.attempt("failed", 12) == EXIT_FAILED
    assert "it has failed after step 12 twice" in capsys.readouterr().out


def test_a_failure_before_the_first_step_is_tried_once_more(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.attempt("failed") == EXIT_AGAIN
    assert job.attempt("failed") == EXIT_FAILED
    assert "before its first step twice" in capsys.readouterr().out


def test_failures_elsewhere_are_tried_up_to_the_limit_with_growing_waits(job: Job) -> None:
    codes = [job.attempt(None, step, 10 if step == 11 else None) for step in (11, 13, 12, 14)]
    assert codes == [EXIT_AGAIN, EXIT_AGAIN, EXIT_AGAIN, EXIT_FAILED]
    assert job.waits == [30.0, 60.0, 120.0]


def test_a_new_checkpoint_forgives_earlier_failures(job: Job) -> None:
    for number in range(10):
        assert job.attempt("failed", 10 * number + 5, 10 * number) == EXIT_AGAIN
    assert job.waits == [30.0] * 10 and max(job.waits) < LONGEST_WAIT


def test_a_job_that_was_killed_whole_is_judged_by_the_next_one(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.begin() == EXIT_DONE
    job.reach(5, None)
    assert job.begin() == EXIT_DONE
    first, second = read_attempts(job.run)
    assert (first.how, first.step) == ("lost", 5) and second.how is None
    assert job.begin() == EXIT_FAILED
    assert "after step 5 twice" in capsys.readouterr().out


def test_a_damaged_line_is_left_out(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.attempt("stopped", 1, 1)
    with open(job.run / "launch" / "attempts.jsonl", "a") as stream:
        stream.write('{"ending": "x", "be')
    assert job.attempt("done", 2, 2) == EXIT_DONE
    assert "damaged" in capsys.readouterr().err


def test_the_command_line(job: Job) -> None:
    arguments = [str(job.run), "--ending", str(job.ending)]
    assert main(["begin", *arguments, "--nodes", "a"]) == 0
    job.ending.write_text(json.dumps({"how": "stopped", "message": "by a signal"}))
    assert main(["end", *arguments, "--exit-code", "0", "--told", "--wait-seconds", "1"]) == EXIT_AGAIN

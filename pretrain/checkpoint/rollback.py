"""Going back to a checkpoint from before a loss spike, for good: what was trained since is given up.

A rollback is a resume. First ``rollbacks.json`` in the run directory says what is left out, then checkpoints that have
seen it are removed, then the run starts again from the newest that is left. A process that is killed in between does
the rest when it starts: a checkpoint says which samples its run left out, and one that should have left out more goes.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from data.order import merged
from pretrain.checkpoint.directory import list_checkpoints
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.errors import InputError
from pretrain.observe.metrics import replace_file

logger = logging.getLogger(__name__)

ROLLBACKS_FILE = "rollbacks.json"
Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Rollback:
    """One entry of ``rollbacks.json``.

    Attributes:
        spike_step: whose loss was too high.
        loss, median: of that step and of those before it, nats per token.
        back_to_step: of the checkpoint that training went on from.
        first_sample, end_sample: samples from the first on and before the end are left out.
    """

    spike_step: int
    loss: float
    median: float
    back_to_step: int
    first_sample: int
    end_sample: int


def read_rollbacks(run: Path) -> list[Rollback]:
    """Those of a run so far.

    Raises:
        InputError: the file is damaged.
    """
    path = run / ROLLBACKS_FILE
    try:
        return [Rollback(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); it says which samples the run leaves out: restore it, or remove it "
            f"where none shall be"
        ) from None


def left_out_of(state: dict[str, object]) -> Ranges:
    """The samples that the run left out whose checkpoint holds this state."""
    return [(int(first), int(end)) for first, end in state.get("left_out_samples", [])]


def _seen_by(checkpoint: Path) -> tuple[int, int, Ranges] | None:
    """Step, place in the data and what was left out until then; None of one that says no such thing."""
    try:
        with CheckpointReader(checkpoint) as reader:
            return reader.step, int(reader.state["position"]["samples"]), left_out_of(reader.state)
    except (InputError, LookupError, TypeError, ValueError):
        # A start that would go on from it says what is wrong with it.
        return None


def roll_back(run: Path, run_checkpoints: Path, spike_step: int, loss: float, median: float, last_good: int,
              samples: tuple[int, int]) -> Rollback | None:  # fmt: skip
    """Gives up what was trained since a checkpoint of ``last_good`` steps or fewer; on rank 0 alone.

    Args:
        samples: the first that is left out, and the first behind them.

    Returns:
        What was done; None where no checkpoint is old enough, and nothing was.
    """
    for checkpoint in reversed(list_checkpoints(run_checkpoints)):
        if int(checkpoint.name.removeprefix("step-")) > last_good:
            continue
        found = _seen_by(checkpoint)
        if found is None:
            continue
        step, read, _ = found
        done = Rollback(spike_step, loss, median, step, max(samples[0], read), samples[1])
        rollbacks = [*read_rollbacks(run), done]
        content = json.dumps([asdict(rollback) for rollback in rollbacks], indent=2) + "\n"
        replace_file(run / ROLLBACKS_FILE, content.encode())
        finish_rollbacks(run, run_checkpoints)
        return done
    return None


def finish_rollbacks(run: Path, run_checkpoints: Path) -> Ranges:
    """Removes checkpoints that were trained on samples which a rollback leaves out; on rank 0 alone.

    Returns:
        All samples that the run's rollbacks leave out.

    Raises:
        InputError: ``rollbacks.json`` is damaged.
    """
    ranges = [(rollback.first_sample, rollback.end_sample) for rollback in read_rollbacks(run)]
    for checkpoint in list_checkpoints(run_checkpoints) if ranges else []:
        seen = _seen_by(checkpoint)
        if seen is None:
            continue
        _, read, left_out = seen
        # Of a range that begins further on it has seen nothing yet.
        if all(first >= read or any(a <= first and end <= b for a, b in left_out) for first, end in ranges):
            continue
        # Renamed first: a removal cut short must not leave something that looks like a broken checkpoint.
        doomed = checkpoint.with_name(f"tmp-removed-{checkpoint.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        logger.warning("removed %s, which a rollback has given up", checkpoint)
    return merged(ranges)

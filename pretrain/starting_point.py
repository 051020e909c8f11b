"""Which checkpoint a start goes on from, and whether the data can."""

from __future__ import annotations

from pathlib import Path

from data.dataset import Data
from pretrain.checkpoint.directory import newest_checkpoint, resolve_checkpoint, step_directories
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.recurrent_states import check_carried_states
from pretrain.checkpoint.training import begins_a_run, check_state
from pretrain.config.schema import Config
from pretrain.errors import InputError
from pretrain.observe.run_directory import RunDirectory


def choose_checkpoint(run: RunDirectory, data: Data, config: Config, resume: str) -> Path | None:
    """The checkpoint that a start goes on from; None where it begins with fresh weights.

    Args:
        resume: ``auto``, ``never``, or the path of a checkpoint; see ``Trainer``.

    Raises:
        InputError: it cannot be used, or going on from it would lose what the run has.
    """
    if resume == "never":
        return None
    newest = newest_checkpoint(run.checkpoints, verify_checksums=True)
    if resume == "auto":
        chosen = newest or _what_the_run_began_with(run)
    else:
        chosen = resolve_checkpoint(Path(resume)).resolve()
        if newest is not None and chosen.parent == newest.resolve().parent and chosen != newest.resolve():
            raise InputError(
                f"--resume {resume}: {newest} is newer, and two histories cannot share a run directory; give "
                f"another run.directory, or move the newer checkpoints away"
            )
    if chosen is not None:
        with CheckpointReader(chosen) as reader:
            if not begins_a_run(reader):
                check_state(reader)
                _check_data(reader, data, config)
    return chosen


def _what_the_run_began_with(run: RunDirectory) -> Path | None:
    """The checkpoint from elsewhere, for a run that ended before it had one of its own; None: fresh weights.

    Raises:
        InputError: there are checkpoints and all are broken, so that beginning again would lose what they hold; or
            what the run began with is gone.
    """
    broken = [path.name for _, path in step_directories(run.checkpoints)]
    if broken:
        raise InputError(
            f"{run.checkpoints} holds no checkpoint that is whole ({', '.join(broken)}); `pretrain checkpoint list "
            f"{run.path}` says why: restore one of them, or move them away to begin again"
        )
    began_with = run.began_with()
    if began_with is None:
        return None
    try:
        return resolve_checkpoint(began_with)
    except InputError as error:
        raise InputError(
            f"{run.path} has no checkpoint of its own yet and began with one that cannot be used any more ({error}): "
            f"restore it, or give another run.directory"
        ) from None


def _check_data(reader: CheckpointReader, data: Data, config: Config) -> None:
    check_carried_states(reader, config)
    differs = "source files, tokenizer, data.sequence_length or train.seed differ"
    changed = reader.state.get("data_fingerprint") != data.fingerprint
    # A source that is new, or that takes no further part, changes nothing of what was read.
    for name, recorded in reader.state.get("source_fingerprints", {}).items():
        if not changed and data.source_fingerprints.get(name, recorded) != recorded:
            changed, differs = True, f"the documents of data.mixture.{name} differ"
    if changed:
        raise InputError(
            f"{reader.path}: was trained on other data than this configuration gives ({differs}), so the order "
            f"of samples cannot go on; restore them, or start anew in another run.directory"
        )

"""The directory of a run: what stands in it, whose it is, and whether a configuration may continue it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import Config, dump_config, parse_config
from pretrain.errors import InputError
from pretrain.observe.environment import describe_environment
from pretrain.observe.metrics import replace_file

logger = logging.getLogger(__name__)

# What a run cannot change: its model, and what makes up the order of its samples. Sections stand for all in
# them. Where the files of the data lie may change, and so may everything about speed, length and layout. The weights
# and the sources of a mixture may, because each source's own documents are compared with the checkpoint's.
_FIXED = ("model", "data", "train.seed", "train.carry_state")
_FREE = (
    "data.cache_directory",
    "data.source.path",
    "data.source.path_prefix",
    "data.source.held_out_path_prefix",
    "data.mixture",
    "data.curriculum",
)

# ``launch.write_job`` fills it.
LAUNCH_DIRECTORY = "launch"

_CANNOT_LOCK = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}
_held_locks: set[int] = set()


def _close_locks_in_child() -> None:
    # A forked worker shares the parent's lock and would keep it after the parent was killed.
    for descriptor in _held_locks:
        os.close(descriptor)
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_locks_in_child)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, each with ``(old, new)``; a key that is not there counts as None."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in (*new, *(key for key in old if key not in new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed.update({f"{key}.{inner}": pair for inner, pair in changed_keys(before, after).items()})
        elif before != after:
            changed[str(key)] = (before, after)
    return changed


class RunDirectory:
    """A run on disk: ``config.yaml``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/``, and ``samples.jsonl``,
    ``wandb/`` and ``tensorboard/`` where they are configured; ``launch/`` where a job was made for it;
    ``rollbacks.json`` where loss spikes were gone back from; ``recall.json`` where recall was evaluated; nothing else.

    Every rank may build one to know the paths; only rank 0 calls :meth:`prepare`.

    Args:
        path: the directory; need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    @property
    def config_file(self) -> Path:
        """The resolved configuration of the latest start."""
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        """The environment of the latest start, with those of the earlier ones under ``earlier_starts``."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        """One JSON object per prompt and step that was sampled."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    def began_with(self) -> Path | None:
        """The checkpoint of another run, or of an import, that this run began with; None where with fresh weights.

        Until the run has a checkpoint of its own, this is what a start goes on from.
        """
        began_with = self._stored_environment().get("began_with")
        return Path(began_with) if isinstance(began_with, str) else None

    def prepare(self, config: Config, resume: str, start_from: Path | None = None) -> dict[str, tuple[Any, Any]]:
        """Make the directory ready to train in, or refuse it; call it on rank 0 alone.

        Takes the directory for this process until it ends (or :meth:`release`), writes the resolved
        configuration and the environment, and makes ``checkpoints/``. A directory in which no step was ever
        logged and no checkpoint saved holds nothing to protect, so ``auto`` lets any configuration start there.

        Args:
            config: the resolved configuration.
            resume: ``auto``, ``never``, or the path of a checkpoint.
            start_from: the checkpoint that is meant, if any.

        Returns:
            The dotted keys that changed since the earlier start, with ``(old, new)``; they are also kept in
            ``environment.json``. Empty for a new directory.

        Raises:
            InputError: when the directory belongs to another run, another job or something else altogether, or
                cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                return self._prepare_locked(config, resume, start_from)
            except BaseException:
                self.release()
                raise
        except OSError as error:
            raise InputError(
                f"run.directory {self.path} cannot be used: {error.strerror or error}; give a directory that "
                f"this job may write"
            ) from None

    def check(self, config: Config) -> None:
        """Whether a run of this configuration may begin or go on here; nothing is written.

        Raises:
            InputError: as :meth:`prepare`.
        """
        if not self.path.exists():
            return
        try:
            self._refuse_what_is_not_a_run()
            if self.config_file.exists() and self._has_started():
                changed = changed_keys(self._stored_config(), config.model_dump(mode="json"))
                self._refuse_another_run(changed, "auto", None)
        except OSError as error:
            raise InputError(f"run.directory {self.path} cannot be read: {error.strerror or error}") from None

    def release(self) -> None:
        """Let another job have the directory; the end of the process does the same."""
        if self._lock is not None:
            _held_locks.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def _prepare_locked(self, config: Config, resume: str, start_from: Path | None) -> dict[str, tuple[Any, Any]]:
        self._remove_temporaries()
        self._refuse_what_is_not_a_run()
        changed: dict[str, tuple[Any, Any]] = {}
        if self.config_file.exists():
            if resume == "never":
                raise InputError(
                    f"{self.path} already holds a run; continue it with --resume auto, or give another run.directory"
                )
            changed = changed_keys(self._stored_config(), config.model_dump(mode="json"))
            if self._has_started():
                self._refuse_another_run(changed, resume, start_from)
        began_with = self.began_with()
        if start_from is not None and not self._holds(start_from):
            began_with = start_from.resolve()
        # Before the configuration, or a start that is killed between the two has forgotten what it began with.
        self._write_environment(changed, began_with)
        replace_file(self.config_file, dump_config(config).encode())
        self.checkpoints.mkdir(exist_ok=True)
        return changed

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        # The directory itself is locked: no lock file to leave behind, and files in it are replaced by renaming.
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise InputError(
                    f"{self.path} is in use by another job; wait until it ends or stop it, or give another "
                    f"run.directory"
                ) from None
            if error.errno not in _CANNOT_LOCK:
                os.close(descriptor)
                raise
            logger.warning(
                "%s lies on a file system that cannot lock a directory (%s): nothing here can tell whether another "
                "job writes to it, so make sure that none does",
                self.path,
                error.strerror,
            )
        self._lock = descriptor
        _held_locks.add(descriptor)

    def _remove_temporaries(self) -> None:
        for file in (self.config_file, self.environment_file, self.metrics_file, self.samples_file):
            file.with_name(file.name + ".tmp").unlink(missing_ok=True)

    def _refuse_what_is_not_a_run(self) -> None:
        if self.config_file.exists():
            return
        # A job that is to run here has its script in it already, and a start that was killed before it wrote a
        # configuration leaves its environment alone.
        expected = (LAUNCH_DIRECTORY, self.environment_file.name)
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name not in expected)
        if found:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise InputError(
                f"{self.path} is not empty ({shown}) and has no {self.config_file.name}, so it is not the directory "
                f"of a run; give an empty or a new run.directory"
            )

    def _has_started(self) -> bool:
        try:
            logged = self.metrics_file.stat().st_size > 0
        except FileNotFoundError:
            logged = False
        return logged or self._holds_checkpoints()

    def _holds_checkpoints(self) -> bool:
        """Whether any was ever saved; what a killed save left is none."""
        return self.checkpoints.is_dir() and any(
            not entry.name.startswith("tmp-") for entry in self.checkpoints.iterdir()
        )

    def _holds(self, checkpoint: Path) -> bool:
        return self.path.resolve() in checkpoint.resolve().parents

    def _refuse_another_run(self, changed: dict[str, tuple[Any, Any]], resume: str, start_from: Path | None) -> None:
        same_begin = start_from is not None and start_from.resolve() == self.began_with()
        begins_again = same_begin and not self._holds_checkpoints()
        if resume != "auto" and not self._holds(Path(resume)) and not begins_again:
            raise InputError(
                f"{self.path} already holds a run, and --resume {resume} is a checkpoint of another; continue this "
                f"one with --resume auto, or give another run.directory"
            )
        for key, (old, new) in changed.items():
            if _is_below(key, _FIXED) and not _is_below(key, _FREE):
                raise InputError(
                    f"{self.path} holds a run with {key}={_shown(old)}, but the configuration says "
                    f"{key}={_shown(new)}; a run keeps its model and its data, so set {key} back or give another "
                    f"run.directory"
                )

    def _stored_config(self) -> dict[str, Any]:
        """The configuration of the earlier start, with the defaults of keys that have come up since."""
        try:
            raw = yaml.safe_load(self.config_file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config_file} is damaged: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise InputError(f"{self.config_file} is damaged: expected a mapping of keys to values")
        try:
            return parse_config(raw, str(self.config_file)).model_dump(mode="json")
        except InputError:
            # Written under another schema: compared as it stands, so that a key gone since is named.
            return raw

    def _stored_environment(self) -> dict[str, Any]:
        """What the latest start wrote; empty where there was none, or where it is damaged, which is reported."""
        try:
            stored = json.loads(self.environment_file.read_text())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            stored = None
        if not isinstance(stored, dict) or not isinstance(stored.get("earlier_starts", []), list):
            logger.warning("%s is damaged; the environments of earlier starts are lost", self.environment_file)
            return {}
        return stored

    def _write_environment(self, changed: dict[str, tuple[Any, Any]], began_with: Path | None) -> None:
        stored = self._stored_environment()
        earlier = stored.pop("earlier_starts", [])
        earlier += [stored] if stored else []
        content = {
            **describe_environment(),
            "began_with": None if began_with is None else str(began_with),
            "changed_configuration": {key: {"old": old, "new": new} for key, (old, new) in changed.items()},
            "earlier_starts": earlier,
        }
        replace_file(self.environment_file, (json.dumps(content, indent=2) + "\n").encode())


def _is_below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

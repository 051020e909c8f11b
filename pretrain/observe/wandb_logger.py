"""Metrics to Weights & Biases: offline unless asked otherwise, never a question, never the end of training."""

from __future__ import annotations

import importlib
import netrc
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain.config.sections import WandbConfig
from pretrain.errors import InputError
from pretrain.observe.optional_service import OptionalService

_DEFAULT_SERVER = "https://api.wandb.ai"
_RUN_NAME = re.compile(r"(?:offline-)?run-[0-9]{8}_[0-9]{6}-(\w+)")


class WandbLogger:
    """One run at Weights & Biases, kept under ``wandb/`` in the run directory; rank 0 alone makes one.

    A resumed run goes on under the same id. Steps are a metric of their own rather than the service's counter,
    which would refuse steps that are trained a second time after a crash.

    Args:
        config: the ``wandb`` section.
        run_directory: the run's directory, which exists.
        resolved: the whole resolved configuration, as plain values.

    Raises:
        InputError: when the package is missing, ``online`` has no login, or the service refuses the run.
    """

    def __init__(self, config: WandbConfig, run_directory: Path, resolved: Mapping[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise InputError(
                f"the section 'wandb' needs the package wandb, which cannot be imported ({error}); install it with "
                f"'pip install wandb', or take the section out"
            ) from None
        if config.mode == "online" and not _has_login():
            raise InputError(
                "wandb.mode=online needs a login: set WANDB_API_KEY, run 'wandb login' once, or use "
                "wandb.mode=offline and send the run later with 'wandb sync'"
            )
        self._service, self._wandb = OptionalService("Weights & Biases"), wandb
        try:
            self._run = wandb.init(
                mode=config.mode,
                dir=str(run_directory),
                project=config.project,
                entity=config.entity,
                name=config.name or Path(run_directory).resolve().name,
                id=_earlier_id(Path(run_directory) / "wandb"),
                resume="allow" if config.mode == "online" else None,
                config=dict(resolved),
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise InputError(
                f"wandb.mode={config.mode}: the run cannot be started ({' '.join(str(error).split())}); mend that, "
                f"use wandb.mode=offline, or take the section 'wandb' out"
            ) from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step; a failure is reported once in the log and never raised."""
        known = {key: value for key, value in metrics.items() if value is not None}
        self._service.attempt(lambda: self._run.log({**known, "step": step}))

    def log_samples(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Sends what the model wrote behind each prompt as a table."""

        def send() -> None:
            rows = [[step, prompt, text] for prompt, text in zip(prompts, texts, strict=True)]
            self._run.log({"samples": self._wandb.Table(columns=["step", "prompt", "text"], data=rows), "step": step})

        self._service.attempt(send)

    def close(self) -> None:
        """End the run so that it is whole on disk, and sent where the mode is online."""
        self._service.attempt(self._run.finish)


def _has_login() -> bool:
    """Whether a key is in the environment or stored for the server; asks nobody and contacts nothing."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _DEFAULT_SERVER).hostname or ""
    named = os.environ.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(str(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _earlier_id(directory: Path) -> str | None:
    """The id under which an earlier start of this run logged; None on the first."""
    if not directory.is_dir():
        return None
    names = sorted(entry.name.removeprefix("offline-") for entry in directory.iterdir() if entry.is_dir())
    ids = [match.group(1) for name in names if (match := _RUN_NAME.fullmatch(name))]
    return ids[-1] if ids else None

"""Loggers beside ``metrics.jsonl``: what fails in one never ends training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class OptionalService:
    """Calls that may fail: the first failure is told, and none is raised.

    Args:
        name: of the service, as people know it.
    """

    def __init__(self, name: str) -> None:
        self._name, self._warned = name, False

    def attempt(self, action: Callable[[], Any]) -> None:
        """Calls ``action``."""
        try:
            action()
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s failed and may miss metrics from here on; training goes on and metrics.jsonl has them all "
                    "(%s: %s)",
                    self._name,
                    type(error).__name__,
                    error,
                )

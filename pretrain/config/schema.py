"""The whole schema of a run. Imports no torch."""

from __future__ import annotations

from pydantic import model_validator

from pretrain.config.checks import sections_problem
from pretrain.config.sections import Sections


class Config(Sections):
    """One run: what ``pretrain train`` reads; its sections go with one another."""

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problem = sections_problem(self)
        if problem:
            raise ValueError(problem)
        return self

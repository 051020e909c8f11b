"""Errors that a person can mend, and the exit codes of the command line."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED_BY_SIGNAL = 3
EXIT_HUNG = 4


class InputError(Exception):
    """Something the user gave is wrong: a config, an option, a path, a checkpoint, the environment.

    The message is one clear sentence that names the file or key, what was expected and how to mend it.
    The command line prints it without a traceback and exits with ``EXIT_BAD_INPUT``.
    """


class CheckError(RuntimeError):
    """What was made did not pass its own check (an exported model, say); nothing of it is left.

    The command line prints the message and exits with ``EXIT_FAILURE``.
    """


class TrainingError(Exception):
    """Training cannot go on (for instance, too many steps in a row without finite gradients).

    The state has been saved where possible; the command line prints the message and exits with
    ``EXIT_FAILURE``.
    """


class DivergedError(TrainingError):
    """Gradients are not finite any more; going on from what was saved would end in the same way."""

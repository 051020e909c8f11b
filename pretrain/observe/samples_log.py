"""What the model wrote while it was trained, one JSON object per prompt and step: ``step``, ``prompt``, ``text``."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.observe.metrics import StepLog


class SamplesLog(StepLog):
    """The samples of a run, a line for each prompt of a step that was sampled."""

    def append(self, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Appends the lines of a step.

        Args:
            prompts, texts: what the model was given, and what it wrote behind each; equally many.

        Raises:
            OSError: the system does not take the lines now; they are not lost.
        """
        self._add([{"step": step, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)])

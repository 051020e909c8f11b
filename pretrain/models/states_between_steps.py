"""Recurrent states that go on from step to step: truncated backpropagation through time (Williams & Peng 1990).

Row r of micro-batch m begins with the states that row r of micro-batch m of the step before ended with, and no gradient
passes from one to the other. So a model trains on contexts longer than memory allows: what a state holds of earlier
steps it has to use, though not to learn to store, within the length of one step.

Each rank keeps the states of its own layers, rows and tensor-parallel share; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pretrain.models.mixer import State

# Of each layer with a sequence mixer, by its index in the whole model.
States = dict[str, State]


class StatesBetweenSteps:
    """The states of this rank's micro-batches: those that the last step left, and those that this one makes.

    Attributes:
        states: one entry for each micro-batch, in order, float32 and out of the graph; None before the first step.
    """

    def __init__(self) -> None:
        self.states: list[States] | None = None
        self._new: list[States] = []
        self._is_training = False

    def begin(self, train: bool) -> None:
        """Before the micro-batches of a global batch; where they are not trained on, no state is given or taken."""
        self._is_training = train
        if train:
            self._new = []

    def before_next(self) -> States | None:
        """What the next micro-batch begins with; None: as at the very beginning. They come in order on every stage."""
        return self.states[len(self._new)] if self._is_training and self.states is not None else None

    def take(self, final: Mapping[str, State]) -> None:
        """What that micro-batch ended with."""
        if self._is_training:
            # A copy: what a mixer returns may be a view of something that would be kept with it.
            self._new.append(
                {
                    layer: {
                        name: tensor.detach().clone(memory_format=torch.contiguous_format)
                        for name, tensor in state.items()
                    }
                    for layer, state in final.items()
                }
            )

    def are_finite(self) -> bool:
        """Whether every number that this step's micro-batches ended with is."""
        tensors = [tensor for states in self._new for state in states.values() for tensor in state.values()]
        return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def finish(self, keep: bool) -> None:
        """After a step: its states are those that the next one begins with, or else those before it are."""
        if keep:
            self.states = self._new
        self._new = []

    def restore(self, states: Sequence[States]) -> None:
        """Takes the states of each micro-batch as an earlier process left them."""
        self.states = list(states)

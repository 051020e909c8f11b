"""What the Newton solver asks of a recurrent cell, and how it is answered when only the step is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From a cotangent of the new states to the gradients of the inputs and of each parameter.
Pullback = Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]


class Cell:
    """A recurrent cell that acts on each channel alone: new_state = step(state, inputs, parameters).

    Tensors hold many tokens at once: ``state`` is (batch, tokens, channels), or (batch, tokens, K, channels)
    for ``components = K`` numbers per channel, and ``inputs`` is (batch, tokens, ..., channels). Parameters end
    in the channels too. Only ``step`` must be given; the other two are then found by automatic differentiation.
    A cell that writes them out runs faster.
    """

    components: int | None = None

    def step(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The next state of every token, given the state before it."""
        raise NotImplementedError(f"{type(self).__name__} must define step.")

    def linearise(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The next state and its Jacobian d new_state / d state.

        Returns:
            The states, shaped as ``state``, and a new tensor (batch, tokens, channels), or (batch, tokens, K, K,
            channels) with the new component first.
        """

        def of_state(value: Tensor) -> Tensor:
            return self.step(value, inputs, parameters)

        if self.components is None:
            new_state, jacobian = torch.func.jvp(of_state, (state,), (torch.ones_like(state),))
            return new_state, jacobian.clone()
        columns = []
        for component in range(self.components):
            direction = torch.zeros_like(state)
            direction[..., component, :] = 1.0
            new_state, column = torch.func.jvp(of_state, (state,), (direction,))
            columns.append(column)
        return new_state, torch.stack(columns, dim=-2)

    def pullback(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
        """The Jacobian as from ``linearise``, and the vector-Jacobian product of the step.

        The product maps a cotangent of the new states to the gradients of ``inputs`` and of the parameters
        (summed over batch and tokens) with the states before each token held fixed.
        """
        _, product = torch.func.vjp(lambda *leaves: self.step(state, leaves[0], leaves[1:]), inputs, *parameters)

        def apply(cotangent: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            inputs_gradient, *gradients = product(cotangent)
            return inputs_gradient, tuple(gradients)

        return self.linearise(state, inputs, parameters)[1], apply


class StepCell(Cell):
    """A cell given by its step function alone, ``step(state, inputs, *parameters) -> state``."""

    def __init__(self, step: Callable[..., Tensor], components: int | None) -> None:
        self.function = step
        self.components = components

    def step(self, state: Tensor, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return self.function(state, inputs, *parameters)


def sum_tokens(gradient: Tensor) -> Tensor:
    """(batch, tokens, ...) summed over batch and tokens."""
    return gradient.sum((0, 1))

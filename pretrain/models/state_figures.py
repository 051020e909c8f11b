"""Gates and states of a recurrent layer in numbers, for whoever asks."""

from __future__ import annotations

import torch
from torch import Tensor


class StateFigures:
    """Of one layer, over all forward passes since it was made.

    A mixer fills it only where it has been given one, so that it costs nothing otherwise. Sums stay on the device, and
    combine over ranks exactly: those of a tensor-parallel group hold equally many heads each.

    Args:
        has_ends: whether rows end on this rank; False where it holds segments that others go on from, whose states
            are not those behind the last token.

    Attributes:
        sums: name -> (2,) float64, the sum of the values and their number.
        largest: name -> scalar float64.
    """

    def __init__(self, has_ends: bool = True) -> None:
        self.has_ends = has_ends
        self.sums: dict[str, Tensor] = {}
        self.largest: dict[str, Tensor] = {}

    @torch.no_grad()
    def gate(self, name: str, values: Tensor) -> None:
        """Adds a gate's values, of any shape; their mean is asked for."""
        self._add(name, values)

    @torch.no_grad()
    def state(self, tensor: Tensor, log_scale: Tensor | None = None) -> None:
        """Adds the state behind the last token of each row.

        Args:
            tensor: ``(batch, heads, ...)``; of each head the L2 norm is taken, and its largest element.
            log_scale: logarithm of what the elements are to be multiplied by; of a shape that broadcasts to it.
        """
        if not self.has_ends:
            return
        values = tensor.double()
        if log_scale is not None:
            values = values * log_scale.double().exp()
        by_head = values.flatten(2)
        self._add("state_norm", by_head.norm(dim=-1))
        if not _is_recomputed():
            new = by_head.abs().amax()
            old = self.largest.get("largest_state")
            self.largest["largest_state"] = new if old is None else torch.maximum(old, new)

    def _add(self, name: str, values: Tensor) -> None:
        if _is_recomputed():
            return
        total = values.sum(dtype=torch.float64)
        new = torch.stack([total, total.new_tensor(float(values.numel()))])
        self.sums[name] = self.sums[name] + new if name in self.sums else new


def _is_recomputed() -> bool:
    """Whether this is the second forward pass of a block that is computed again in the backward pass."""
    return torch._C._current_graph_task_id() != -1


def values_before(values: Tensor, first: Tensor | None, starts: Tensor | None) -> Tensor:
    """What a recurrence had before each token.

    Args:
        values: ``(batch, sequence, ...)``, after each token.
        first: ``(batch, ...)``, before the first one; None: zeros.
        starts: ``(batch, sequence)`` bool, where documents begin, before which there are zeros.
    """
    first = torch.zeros_like(values[:, 0]) if first is None else first.to(values.dtype)
    before = torch.cat([first.unsqueeze(1), values[:, :-1]], dim=1)
    if starts is not None:
        before = before.masked_fill(starts.reshape(*starts.shape, *(1,) * (values.dim() - 2)), 0.0)
    return before

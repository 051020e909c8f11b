"""Losses that layers of a hierarchy add, as those of the tokens that are read.

A hierarchy has several networks: encoders and decoders over bytes or over chunks, and the innermost layers. What layers
carry begins in each of them with zeros, since a position of one is no position of another, and is handed on within it;
so a recurrent router gains something only where its network has another before it. Of what a network carries the
auxiliary loss alone leaves it (``mixer_config.AUXILIARY_LOSS``, one value for each of its positions).

The model's loss is the mean, over labels that count, of cross-entropy and auxiliary loss at the token of each. In a
hierarchy the auxiliary loss at a token is the sum of those, over all networks, at the position that the token is part
of: at the token itself, at its chunk, at the chunk which that belongs to. So each network's loss is a mean over labels
as it is without a hierarchy, in which a chunk weighs as much as it has tokens. It does not depend on how the batch is
cut, and where every token is a chunk it is the loss of a model without stages. Shares of experts, of which the balance
loss is made, are over the positions of one sequence, each chunk or word counted once.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.models.mixer import Carried
from pretrain.models.mixer_config import AUXILIARY_LOSS


def of_chunks(carried: Carried, latest: Tensor) -> Carried:
    """The auxiliary loss of the chunk that each position belongs to.

    Args:
        carried: what a network over chunks, ``(chunks, 1, channels)``, hands on.
        latest: ``(batch, sequence)`` int64, the chunk of each position.

    Returns:
        ``(sequence, batch, 1)``, or nothing where there is no such loss.
    """
    return {name: tensor[:, 0][latest.t()] for name, tensor in carried.items() if name == AUXILIARY_LOSS}


def added(*networks: Carried) -> Carried:
    """The sum of the auxiliary losses of networks over the same positions; nothing where none has one."""
    losses = [carried[AUXILIARY_LOSS] for carried in networks if AUXILIARY_LOSS in carried]
    return {AUXILIARY_LOSS: sum(losses[1:], losses[0])} if losses else {}

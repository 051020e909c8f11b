"""What the loss holds for the logits of a token. Imports no torch."""

from __future__ import annotations

from pretrain.config.schema import Config
from pretrain.plan.costs import BYTES_PER_ELEMENT, FLOAT32


def logit_bytes(config: Config) -> float:
    """What the loss of one token holds at most for its logits on one tensor-parallel rank, without the head's work.

    The logits in the dtype of activations and in float32, which become their softmax and gradient in place. A soft
    cap keeps its own result, and makes a third and fourth tensor on the way to the loss and back. A comparison with a
    teacher's takes both, the logarithms of both probabilities, their difference, two exponentials and the gradient.
    """
    per_token = config.model.vocab_size / config.parallel.tensor
    element = BYTES_PER_ELEMENT[config.train.precision]
    has_cap = config.model.output_logit_soft_cap is not None
    of_teacher = 0.0
    if config.distillation is not None:
        if config.distillation.logits.weight > 0:
            return (9 if has_cap else 8) * FLOAT32 * per_token
        of_teacher = FLOAT32 * per_token
    if has_cap:
        return of_teacher + 3 * FLOAT32 * per_token
    return of_teacher + per_token * (FLOAT32 if element == FLOAT32 else FLOAT32 + element)


def chunked_logit_bytes(config: Config) -> tuple[float, float]:
    """The same where the loss is made by chunks (``train.loss_chunk_size``), of a token of the chunk in work.

    Forward the logits in float32 and what their logarithms of sums are made of, or, under a soft cap, three tensors on
    the way to them beside the product. Backward the logits, which become their softmax and gradient in place; under a
    soft cap they and the slope of the cap are apart.

    Returns:
        Of the forward and of the backward pass.
    """
    per_token = config.model.vocab_size / config.parallel.tensor
    element = BYTES_PER_ELEMENT[config.train.precision]
    product = 0 if element == FLOAT32 else element
    if config.model.output_logit_soft_cap is not None:
        return per_token * (3 * FLOAT32 + element), per_token * 4 * FLOAT32
    return per_token * 2 * FLOAT32, per_token * (FLOAT32 + product)

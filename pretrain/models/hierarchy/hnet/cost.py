"""What H-Net's stages cost beside their blocks, from the configuration alone. Imports no torch.

How many chunks there are is the model's choice, so costs are those expected where every stage meets its
``target_ratio``. Where a rank has several micro-batches in a step, encoders and routers run over them once more than
is counted here; see ``ratio_loss.py``.
"""

from __future__ import annotations

from pretrain.models.hierarchy.hnet.config import HNetConfig
from pretrain.models.mixer_cost import MixerCost, OuterCost

_FLOAT32 = 4


def outer_costs(config: HNetConfig, hidden_size: int, bytes_per_element: int) -> list[OuterCost]:
    """Blocks of all stages, and for each stage what joins it with what stands further in.

    Args:
        config: of the hierarchy.
        hidden_size: width of the innermost network.
        bytes_per_element: of activations.
    """
    costs, positions = [], 1.0
    widths = [stage.hidden_size for stage in config.stages] + [hidden_size]
    for index, stage in enumerate(config.stages):
        size = stage.hidden_size
        for part in ("encoder", "decoder"):
            place = f"hierarchy.stages.{index}.{part}"
            costs += [OuterCost(size, positions, block=name, place=place) for name in getattr(stage, part)]
        # The encoder's norm and the decoder's; the outermost decoder's is the model's own, before its head.
        joint = _joint(size, widths[index + 1] - size, stage.target_ratio, bytes_per_element)
        costs.append(OuterCost(size, positions, joint=joint, norms=1 if index == 0 else 2))
        positions /= stage.target_ratio
    costs.append(OuterCost(hidden_size, positions, joint=_nothing(), norms=1))
    return costs


def _joint(size: int, padding: int, ratio: float, bytes_per_element: int) -> MixerCost:
    """Routing, smoothing and the residual of one stage, per position; every tensor-parallel rank does all of it."""
    weights = 3 * size * size
    copied = 0 if bytes_per_element == _FLOAT32 else _FLOAT32
    # Kept at each position: positions one later, queries and keys before and after their norm, the smoothed vector,
    # and a float32 copy for the residual; at each chunk: its vector, factor and average.
    activations = size * (bytes_per_element + 5.0 * _FLOAT32 + copied + 3.0 * _FLOAT32 / ratio)
    return MixerCost(
        parameters=weights + padding,
        parameters_replicated=weights + padding,
        active_parameters=weights + padding,
        projection_flops_per_token=2.0 * weights,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        state_bytes=_FLOAT32 * 2 * size,
        activation_bytes_per_token=activations,
        # Gradients of queries, keys and what they were made of.
        working_bytes_per_token=4.0 * _FLOAT32 * size,
        # A multiply-add for each channel of a chunk.
        elementwise_scan_flops_per_token=2.0 * size / ratio,
    )


def _nothing() -> MixerCost:
    return MixerCost(
        parameters=0,
        parameters_replicated=0,
        active_parameters=0,
        projection_flops_per_token=0.0,
        scan_flops_per_token=0.0,
        executed_scan_flops_per_token=0.0,
        executed_scan_backward_flops_per_token=0.0,
        state_bytes=0,
        activation_bytes_per_token=0.0,
        working_bytes_per_token=0.0,
    )

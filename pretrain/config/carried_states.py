"""Whether recurrent states can go on from step to step under a configuration. Imports no torch."""

from __future__ import annotations

from pretrain.config.sections import Sections
from pretrain.models.mixer_config import MixerConfig
from pretrain.models.registry import family_of

# Longer than any window of a state, and shorter than what integers in floating point can tell apart.
_ENDLESS = 2**40


def bytes_after_any_length(mixer: MixerConfig, hidden_size: int, num_layers: int) -> int | None:
    """Bytes of one sequence's state, however much was read; None where it grows without bound.

    Args:
        mixer: of a sequence.
        hidden_size: that it works at.
        num_layers: of the whole model.
    """
    cost = family_of(mixer).cost
    sizes = {cost(mixer, hidden_size, length, 4, num_layers).state_bytes for length in (_ENDLESS, 2 * _ENDLESS)}
    return sizes.pop() if len(sizes) == 1 else None


def carried_states_problem(config: Sections) -> str | None:
    """Why ``train.carry_state`` does not go with the rest, in one sentence; None where it does, or is not set."""
    if not config.train.carry_state:
        return None
    reason = config.data.why_not_contiguous() or _model_problem(config)
    if reason is None and config.parallel.context > 1:
        reason = (
            f"parallel.context={config.parallel.context} hands states from rank to rank within a step, and none from "
            f"the last rank to the first one's next step; set parallel.context to 1 and make data.sequence_length as "
            f"short as memory asks for"
        )
    return None if reason is None else f"train.carry_state does not go with the rest: {reason}"


def _model_problem(config: Sections) -> str | None:
    model = config.model
    if model.hierarchy is not None:
        return (
            f"model.hierarchy.type={model.hierarchy.type} forms chunks or words that may reach over the end of a row, "
            f"and hands none on; leave out model.hierarchy, or train.carry_state"
        )
    for name in dict.fromkeys(model.layers):
        mixer = model.blocks[name].mixer
        if mixer is not None and bytes_after_any_length(mixer, model.hidden_size, model.num_layers) is None:
            return (
                f"model.blocks.{name}.mixer: the state of {mixer.type} grows with every token, without bound; give it "
                f"a window (of attention: sliding_window), use a recurrent mixer, or leave out train.carry_state"
            )
    return None

"""Whether the sections of a run go with one another. Imports no torch."""

from __future__ import annotations

from data.config import HierarchicalBytesTokenizer
from pretrain.config.carried_states import carried_states_problem
from pretrain.config.layout import layout_problem
from pretrain.config.sections import Sections


def sections_problem(sections: Sections) -> str | None:
    """Why the sections of a run do not fit together, in one sentence; None where they do."""
    problem = (
        layout_problem(sections) or _words_problem(sections) or _batch_problem(sections) or _schedule_problem(sections)
    )
    problem = (
        problem or carried_states_problem(sections) or _spikes_problem(sections) or _distillation_problem(sections)
    )
    return problem or _observe_problem(sections)


def _words_problem(sections: Sections) -> str | None:
    hierarchy, tokenizer = sections.model.hierarchy, sections.data.tokenizer
    if not sections.model.reads_word_starts or isinstance(tokenizer, HierarchicalBytesTokenizer):
        return None
    return (
        f"model.hierarchy.type={hierarchy.type} reads where words start, but data.tokenizer.type={tokenizer.type} "
        f"knows no words; set data.tokenizer.type to hierarchical_bytes"
    )


def _batch_problem(sections: Sections) -> str | None:
    train, data_parallel = sections.train, sections.parallel.data or 1
    if train.global_batch_size % (train.micro_batch_size * data_parallel):
        return (
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"({train.micro_batch_size}) x parallel.data ({data_parallel})"
        )
    return None


def _schedule_problem(sections: Sections) -> str | None:
    schedule, steps = sections.schedule, sections.train.steps
    if schedule.warmup_steps >= steps and schedule.warmup_steps > 0:
        return f"schedule.warmup_steps={schedule.warmup_steps} must be below train.steps={steps}"
    if schedule.decay_steps is not None and schedule.warmup_steps + schedule.decay_steps > steps:
        return (
            f"schedule.warmup_steps + schedule.decay_steps = {schedule.warmup_steps + schedule.decay_steps} "
            f"exceeds train.steps={steps}"
        )
    return None


def _spikes_problem(sections: Sections) -> str | None:
    """Why ``train.spikes`` does not go with the rest, in one sentence; None where it does, or is not set."""
    train, spikes = sections.train, sections.train.spikes
    if spikes is None or spikes.action == "report":
        return None
    start = "train.spikes.action=rollback"
    if train.carry_state:
        return (
            f"{start} does not go with train.carry_state: rows would go on behind the samples that are left out with "
            f"the states of before them; use action=report, or leave out train.carry_state"
        )
    if train.checkpoint_every == 0:
        return f"{start} needs checkpoints to go back to; set train.checkpoint_every"
    reached = train.checkpoint_every * (train.keep_last - 1)
    if spikes.margin > reached:
        return (
            f"{start} with margin={spikes.margin} goes back further than the checkpoints that are surely kept, "
            f"train.checkpoint_every={train.checkpoint_every} x (train.keep_last={train.keep_last} - 1) = {reached} "
            f"steps; keep more, or lower train.spikes.margin"
        )
    return None


def _observe_problem(sections: Sections) -> str | None:
    """Why ``observe`` does not go with the rest, in one sentence; None where it does, or is not set."""
    observe, parallel = sections.observe, sections.parallel
    if observe is None or not observe.states or parallel.context == 1:
        return None
    even = parallel.context * parallel.segment_multiple
    for key, length in sections.sequence_lengths():
        if length % even:
            return (
                f"observe.states=true does not go with parallel.context={parallel.context} where {key}={length} is not "
                f"divisible by {even}: gates and states would be those of what fills up the last segment too; change "
                f"{key} or parallel.context, or set observe.states to false"
            )
    return None


def _distillation_problem(sections: Sections) -> str | None:
    """Why a teacher does not go with the rest, in one sentence; None where it does, or there is none."""
    if sections.distillation is None:
        return None
    model, parallel = sections.model, sections.parallel
    reasons = {
        "pipeline": "a stage would need the teacher's outputs of its own layers, and the last one its logits",
        "context": "the teacher would need the state before each segment from other ranks",
        "expert": "routed experts add losses of their own",
    }
    for key, reason in reasons.items():
        if getattr(parallel, key) > 1:
            return f"distillation does not go with parallel.{key}={getattr(parallel, key)}: {reason}; set it to 1"
    if model.hierarchy is not None:
        return (
            f"distillation does not go with model.hierarchy.type={model.hierarchy.type}, whose positions are not those "
            f"of the teacher; leave out one of them"
        )
    if model.carried_channels():
        names = ", ".join(model.carried_channels())
        return f"distillation does not go with layers that carry {names} to the next; leave out one of them"
    if sections.train.carry_state:
        return (
            "distillation does not go with train.carry_state=true: the teacher's states are not kept from step to "
            "step; set it to false"
        )
    if sections.train.loss_chunk_size is not None:
        return (
            "distillation does not go with train.loss_chunk_size: the teacher's logits are compared with the student's "
            "whole; set it to null"
        )
    layers = sections.distillation.layer_outputs.layers
    if isinstance(layers, list):
        wrong = [layer for layer in layers if not 0 <= layer < model.num_layers]
        if wrong or not layers:
            shown = f"names layer {wrong[0]}" if wrong else "is empty"
            return (
                f"distillation.layer_outputs.layers {shown}, but layers are counted from 0 to {model.num_layers - 1}; "
                f"change it"
            )
    return None

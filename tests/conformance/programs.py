"""Programs that run on every rank of a pool of workers, or in the test's own process for one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from pretrain.models.decoder import Decoder
from pretrain.models.mixer import Documents, SequenceMixer, StateTensor
from pretrain.models.parameters import declared_parameters, full_shape, initialise_weights, shard_of
from pretrain.parallel.topology import build_topology, megatron_config
from tests.configurations import tiny_config
from tests.conformance import tools
from tests.conformance.cases import find_case

# Tokens of each call; even, so that two ranks can split them.
PIECES = (12, 2, 10)


def _to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def run_mixer(name: str, tensor: int, sequence: bool) -> dict[str, Any]:
    """Outputs, final state, and gradients of one mixer over three calls that hand on the state.

    Under sequence parallelism inputs, outputs and the gradients of inputs are this rank's parts of each call.

    Returns:
        ``output`` and ``hidden`` (the gradient) with one array for each call, ``state``, ``gradients`` by
        parameter, and how states and parameters are split (``splits``, ``summed``).
    """
    case = find_case(name)
    mixer = tools.build(case, tensor, sequence)
    rank = parallel_state.get_tensor_model_parallel_rank()

    def own_part(whole: Tensor) -> Tensor:
        return whole.chunk(tensor)[rank] if sequence else whole

    starts = torch.rand(2, sum(PIECES), generator=tools.generator_of(case, "starts")) < 0.2
    whole = tools.random_hidden(case, sum(PIECES), 2).split(PIECES)
    weights = tools.random_hidden(case, sum(PIECES), 2, "weights").split(PIECES)
    parts = [own_part(piece).clone().requires_grad_() for piece in whole]
    outputs, state, loss = [], None, torch.zeros(())
    inputs = {f"hidden {index}": part for index, part in enumerate(parts)}
    for index, (part, weight, flags) in enumerate(zip(parts, weights, starts.split(PIECES, dim=1), strict=True)):
        if isinstance(mixer, SequenceMixer):
            output, state = mixer(part, state, Documents(flags))
        else:
            length, state = PIECES[index], {}
            earlier = tools.carried_of(case, length, 2)
            given = {carried: own_part(values).clone().requires_grad_() for carried, values in earlier.items()}
            inputs |= {f"{carried} {index}": values for carried, values in given.items()}
            output, handed_on = tools.call(mixer, part, given)
            for carried, values in sorted(handed_on.items()):
                # Beside the output, so that whoever compares outputs compares these.
                weight = torch.cat([weight, earlier[carried]], dim=-1)
                output = torch.cat([output, values], dim=-1)
        outputs.append(output)
        loss = loss + (output * own_part(weight)).sum()
    found = tools.gradients(loss, mixer, inputs)
    declared: dict[str, StateTensor] = mixer.state_tensors() if isinstance(mixer, SequenceMixer) else {}
    parameters = dict(declared_parameters(mixer))
    return {
        "output": [output.detach().numpy() for output in outputs],
        "hidden": [
            torch.cat([found.pop(name) for name in inputs if name.endswith(f" {index}")], dim=-1).numpy()
            for index in range(len(PIECES))
        ],
        "state": _to_numpy(state),
        "gradients": _to_numpy(found),
        "splits": {name: tensor.shard_dimension for name, tensor in declared.items()}
        | {name: parameter.spec.shard_dimension for name, parameter in parameters.items()},
        "summed": [name for name, parameter in parameters.items() if parameter.spec.partial_gradient],
    }


def first_weights(name: str, tensor: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, int | None]]:
    """This rank's slices of a mixer's first weights, and how each is split."""
    case = find_case(name)
    mixer = tools.alone(case.family, case.config, tools.context_of(case.hidden_size, tensor))
    initialise_weights(mixer, seed)
    parameters = dict(declared_parameters(mixer))
    splits = {name: parameter.spec.shard_dimension for name, parameter in parameters.items()}
    return _to_numpy(parameters), splits


def decoder_of(model: dict[str, Any], recompute: str = "none", **parallel: int) -> Decoder:
    """This rank's part of a decoder of this ``model`` section, its parameters away from their first values."""
    config = tiny_config(model=model, parallel={"zero": 0} | parallel, train={"recompute": recompute})
    build_topology(config)
    decoder = Decoder(config.model, megatron_config(config))
    initialise_weights(decoder, seed=1)
    with torch.no_grad():
        for name, parameter in declared_parameters(decoder):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            noise = 0.1 * torch.randn(full_shape(parameter), generator=generator)
            parameter.add_(shard_of(noise, parameter.spec))
    return decoder


def parameter_names(model: dict[str, Any], **parallel: int) -> list[str]:
    """Global names of the parameters that this rank holds, but for copies of another stage's."""
    parameters = declared_parameters(decoder_of(model, **parallel))
    return [name for name, parameter in parameters if not parameter.spec.pipeline_copy]

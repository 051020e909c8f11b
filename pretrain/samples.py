"""What a model writes while it is trained, in the layout that it is trained in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from data.tokenizers import Tokenizer
from pretrain.config.model import ModelConfig
from pretrain.config.observe import SamplesConfig
from pretrain.generate import generate
from pretrain.models.decoder import Decoder
from pretrain.models.mixer import State
from pretrain.models.parameters import padded_size
from pretrain.models.whole_sequences import whole_sequences
from pretrain.parallel.engine import Engine


class LogitsNotFiniteError(Exception):
    """There is no next token to draw."""


class ModelInTraining:
    """Logits of the whole vocabulary, the same on all ranks, from a model that is spread over them.

    Every rank makes the same calls. So ZeRO-3 gathers each weight, experts answer, and stages hand on what they have,
    as in a training step; replicas work in parallel, each for itself.
    """

    def __init__(self, engine: Engine):
        self.engine, self.decoder = engine, engine.decoder

    @property
    def model(self) -> ModelConfig:
        return self.decoder.model

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.decoder.parameters()

    def logits(
        self, tokens: Tensor, states: dict[str, State] | None = None, word_starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, State]]:
        """As :meth:`Decoder.logits`, but only those behind the last token: ``(batch, 1, vocabulary)`` float32.

        Raises:
            LogitsNotFiniteError: on every rank.
        """
        decoder, stages = self.decoder, parallel_state.get_pipeline_model_parallel_group()
        if not decoder.is_first_stage:
            decoder.set_input_tensor(self._from_stage_before(tokens))
        with _called_for_logits(decoder):
            found, final = self.engine.model(tokens, states, word_starts=word_starts)
        decoder.input_tensor = None
        if decoder.is_last_stage:
            last = gather_from_tensor_model_parallel_region(found[:, -1:])
        else:
            dist.send(found.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=stages)
            last = torch.empty(tokens.shape[0], 1, padded_size(decoder.model.vocab_size), device=tokens.device)
        dist.broadcast(last, parallel_state.get_pipeline_model_parallel_last_rank(), group=stages)
        # Replicas may differ in the last bits, and must not go different ways.
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.broadcast(last, dist.get_process_group_ranks(replicas)[0], group=replicas)
        last = last[..., : decoder.model.vocab_size]
        if not last.isfinite().all():
            raise LogitsNotFiniteError
        return last, final

    def _from_stage_before(self, tokens: Tensor) -> Tensor:
        decoder = self.decoder
        size = decoder.model.hidden_size + decoder.packed_channels
        shape = (*tokens.t().shape, size)
        received = torch.empty(shape, dtype=decoder.compute_dtype, device=tokens.device)
        before = parallel_state.get_pipeline_model_parallel_prev_rank()
        dist.recv(received, before, group=parallel_state.get_pipeline_model_parallel_group())
        return received


@contextlib.contextmanager
def _called_for_logits(decoder: Decoder) -> Iterator[None]:
    """While entered, to call the decoder, or an engine round it, is to call its ``logits``.

    ZeRO-3 gathers weights only for what a call of the whole module reads.
    """
    decoder.forward = decoder.logits
    try:
        yield
    finally:
        del decoder.forward


def sample_texts(engine: Engine, tokenizer: Tokenizer, settings: SamplesConfig, seed: int) -> list[str] | None:
    """What the model writes behind each prompt; every rank calls it, and has the same. None: logits are not finite.

    Nothing of the training changes: no weight, no carried state, no generator of random numbers but those made here.
    What is drawn depends on ``seed`` alone, so that texts of two steps differ by what the model has learned.

    Args:
        engine: of the training, in any layout, between two steps.
        settings: prompts and how tokens are drawn.
    """
    decoder = engine.decoder
    was_training = decoder.training
    decoder.eval()
    try:
        with whole_sequences(decoder):
            texts = generate(
                ModelInTraining(engine),
                tokenizer,
                [prompt.encode("utf-8", errors="surrogateescape") for prompt in settings.prompts],
                settings.max_new_tokens,
                settings.temperature,
                settings.top_k,
                settings.top_p,
                seed,
            )
    except LogitsNotFiniteError:
        return None
    finally:
        decoder.train(was_training)
    return [text.decode("utf-8", errors="replace") for text in texts]

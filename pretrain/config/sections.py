"""The sections of a run. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.config import DataConfig
from pretrain.config.distillation import DistillationConfig
from pretrain.config.launch import LaunchConfig
from pretrain.config.model import ModelConfig
from pretrain.config.observe import ObserveConfig, TensorBoardConfig
from pretrain.config.spikes import SpikesConfig
from pretrain.config.stages import layers_of_stages
from pretrain.models.mixer_config import StrictModel


class ParallelConfig(StrictModel):
    """How the model and the batch are split over processes."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size: heads and channels split over ranks")
    sequence: bool = Field(
        False, description="Megatron sequence parallelism: norms and residuals split along the sequence"
    )
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size: layers split over ranks (1F1B)")
    layers_per_stage: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="layers of each pipeline stage; null: as even as can be, the first stages with one more"
    )
    context: int = Field(1, ge=1, description="context-parallel size: each sequence split over ranks")
    context_scheme: Literal["auto", "chain", "gather", "scan"] = Field(
        "auto",
        description="how ranks learn the state before their segment: chain: each layer waits for the rank before; "
        "gather: every rank gets every segment's summary at once; scan: in log2 rounds; auto: gather, above 8 ranks "
        "scan, and chain where a mixer of the model can only wait",
    )
    expert: int = Field(
        1, ge=1, description="expert-parallel size: routed experts split over so many data-parallel ranks"
    )
    data: int | None = Field(
        None, ge=1, description="data-parallel size; null takes what the number of processes leaves"
    )
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO stage: 0 splits nothing, 1 optimizer states, 2 also gradients, 3 also weights"
    )

    @property
    def model_parallel(self) -> int:
        """Processes that read the same samples together."""
        return self.tensor * self.pipeline * self.context

    def stage_layers(self, num_layers: int) -> list[range]:
        """Layers of each pipeline stage, of a model that has so many."""
        return layers_of_stages(num_layers, self.pipeline, self.layers_per_stage)

    @property
    def segment_multiple(self) -> int:
        """What the length of a segment is a multiple of."""
        return self.tensor if self.sequence else 1

    def segment_length(self, sequence_length: int) -> int:
        """Tokens of each sequence that a context-parallel rank holds, padding included."""
        return -(-sequence_length // (self.context * self.segment_multiple)) * self.segment_multiple

    @model_validator(mode="after")
    def _combinations(self) -> ParallelConfig:
        if self.pipeline > 1 and self.zero >= 2:
            raise ValueError(
                f"zero={self.zero} does not go with pipeline={self.pipeline}: ZeRO-2 would save nothing, because "
                f"a pipeline stage keeps its whole gradients until its last micro-batch, and ZeRO-3's collective "
                f"calls deadlock against the stages' sends; use zero=0 or zero=1, or pipeline=1"
            )
        if self.expert > 1 and self.zero == 3:
            raise ValueError(
                f"zero=3 does not go with expert={self.expert}: DeepSpeed's ZeRO-3 splits every weight over all "
                f"data-parallel ranks, also those that hold other experts; use zero=0, 1 or 2, or expert=1"
            )
        if self.data is not None and self.data % self.expert:
            raise ValueError(f"data={self.data} is not divisible by expert={self.expert}; change either")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1: it splits the sequence over tensor-parallel ranks")
        return self


class OptimizerConfig(StrictModel):
    """AdamW with decoupled weight decay on the parameters whose module says so."""

    type: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates of the two moments")
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 does not clip")

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must both lie in [0, 1), but are {self.betas}")
        return self


class ScheduleConfig(StrictModel):
    """Learning rate over the run: linear warm-up, then a decay."""

    type: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "cosine", description="wsd holds the peak and decays only over the last decay_steps"
    )
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(
        None, ge=1, description="length of the decay; null: all after warm-up (wsd: a fifth of the run)"
    )
    final_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end over its peak")


class TrainConfig(StrictModel):
    """The loop."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    global_batch_size: int = Field(ge=1, description="sequences per optimizer step, all ranks together")
    micro_batch_size: int = Field(ge=1, description="sequences per forward pass of one data-parallel rank")
    seed: int = Field(0, ge=0, description="of the initial weights and of the data's order")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of activations and matrix products; weights and optimizer are always float32"
    )
    recompute: Literal["none", "block"] = Field(
        "none", description="block: keep only each block's input and compute the rest again backward"
    )
    loss_chunk_size: int | None = Field(
        None,
        ge=1,
        description="positions of a micro-batch whose float32 logits are held at once: less memory where the "
        "vocabulary is large, for a second product of the head; null: all of them",
    )
    carry_state: bool = Field(
        False,
        description="each row of a batch goes on where that of the step before ended, with its recurrent states, which "
        "gradients do not pass (truncated backpropagation through time)",
    )
    evaluate_every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    evaluate_samples: int = Field(64, ge=1, description="held-out samples of an evaluation, at most")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    checkpoint_mode: Literal["asynchronous", "synchronous"] = Field(
        "asynchronous",
        description="asynchronous: training waits only for a copy to host memory, and one that cannot be written is "
        "reported; synchronous: it waits for the disk, and ends where one cannot be written",
    )
    keep_last: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every: int | None = Field(None, ge=1, description="also keep checkpoints of multiples of this step")
    log_every: int = Field(1, ge=1, description="steps between lines where there is no terminal")
    hang_seconds: float | None = Field(
        1500.0,
        gt=0,
        description="seconds without progress after which every process says where it is, writes its stacks to "
        "RUN/hung and ends with exit code 4; null: never. Collective calls give up by themselves after 1800",
    )
    max_skipped_steps: int = Field(
        10, ge=1, description="steps in a row with a gradient that is not finite before the run stops"
    )
    spikes: SpikesConfig | None = Field(None, description="what to do when the loss jumps; null: nothing")


class RunConfig(StrictModel):
    """Where the run is kept."""

    directory: str = Field(min_length=1, description="run directory; holds config, metrics and checkpoints")


class WandbConfig(StrictModel):
    """Weights & Biases; nothing is sent anywhere unless the mode is online."""

    mode: Literal["offline", "online"] = "offline"
    project: str = Field("recurrent-pretrain", min_length=1)
    entity: str | None = None
    name: str | None = None


class Sections(StrictModel):
    """Every section of a run, each checked by itself."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    observe: ObserveConfig | None = None
    wandb: WandbConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    launch: LaunchConfig | None = None
    distillation: DistillationConfig | None = None

    @property
    def context_scheme(self) -> str:
        """How ranks that hold segments of a sequence learn what is before them: ``chain``, ``gather`` or ``scan``."""
        if self.parallel.context_scheme != "auto":
            return self.parallel.context_scheme
        if self.model.mixers_that_wait():
            return "chain"
        return "gather" if self.parallel.context <= 8 else "scan"

    def sequence_lengths(self) -> list[tuple[str, int]]:
        """Every length that sequences have in the run, with the key that says so."""
        lengths = [("data.sequence_length", self.data.sequence_length)]
        phases = [("data.curriculum: sequence_length", phase.sequence_length) for phase in self.data.curriculum]
        return lengths + [(key, length) for key, length in phases if length is not None]

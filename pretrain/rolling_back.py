"""What a run does about a loss spike that it has just seen."""

from __future__ import annotations

from data.order import first_of_last
from pretrain.checkpoint.rollback import Rollback, read_rollbacks, roll_back
from pretrain.parallel.agreement import any_rank, on_main_rank
from pretrain.trainer import Trainer


def rolls_back(trainer: Trainer) -> bool:
    """Says of a spike in the last step; whether the run is to start again from before it. Every rank calls it.

    Where it does, the samples of the spike and of ``train.spikes.margin`` steps before it are left out from now on,
    and checkpoints that have seen them are gone.
    """
    settings, position, spike = trainer.config.train.spikes, trainer.position, trainer.spike
    # Rank 0 decides: others need not know the last bits of a loss alike.
    if settings is None or not any_rank(trainer.topology.is_main and spike is not None, trainer.topology.device):
        return False
    if spike is not None:
        trainer.observer.message(
            f"step {position.step}: the loss, {spike.loss:.4f}, is a spike: the median of the steps before it is "
            f"{spike.median:.4f}, and the limit {spike.limit:.4f}"
        )
    if settings.action == "report":
        return False
    trainer.finish_saving()
    batches = (settings.margin + 1) * trainer.config.train.global_batch_size
    samples = first_of_last(position.samples, batches, trainer.data.left_out), position.samples

    def go_back() -> Rollback | str:
        if len(read_rollbacks(trainer.run.path)) >= settings.max_rollbacks:
            return f"no rollback: there were train.spikes.max_rollbacks={settings.max_rollbacks} before"
        last_good = position.step - 1 - settings.margin
        done = roll_back(
            trainer.run.path, trainer.run.checkpoints, position.step, spike.loss, spike.median, last_good, samples
        )
        return done or f"no rollback: there is no checkpoint of step {last_good} or before"

    done = on_main_rank(go_back)
    if isinstance(done, str):
        trainer.observer.message(done)
        return False
    trainer.observer.message(
        f"goes back to step {done.back_to_step}, and leaves out samples {done.first_sample:,} to "
        f"{done.end_sample - 1:,}"
    )
    return True

"""One step on one long document; started by torchrun, says what it took on the last line that rank 0 prints."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.batch import Batch
from pretrain.parallel.schedule import run_schedule
from tests.configurations import tiny_config
from tests.parallel.programs import open_engine


def document(length: int) -> Batch:
    """The first bytes of the standard library's modules, as one document."""
    text, files = b"", sorted(Path(json.__file__).parents[1].glob("*.py"))
    while len(text) <= length:
        text += files.pop(0).read_bytes()
    tokens = torch.tensor(list(text[: length + 1]), dtype=torch.int64)[None]
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, 0] = True
    return Batch(tokens[:, :-1], tokens[:, 1:], starts, label_bytes=length, label_count=length)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(length: int, context: int) -> None:
    torch.set_num_threads(1)
    block = {"mixer": {"type": "mlstm", "num_heads": 2}, "channel": {"type": "swiglu", "intermediate_size": 128}}
    config = tiny_config(
        model={"hidden_size": 64, "num_layers": 2, "layers": ["only"], "blocks": {"only": block}},
        data={"source": {"type": "standard_library"}, "tokenizer": {"type": "bytes"}, "sequence_length": length},
        parallel={"context": context, "zero": 0},
        train={"global_batch_size": 1, "micro_batch_size": 1},
    )
    topology, engine = open_engine(config)
    # What is made once, whatever the length: buffers, the optimizer's state, libraries.
    for batch in (document(4096), document(length)):
        before = peak_bytes()
        with engine.accumulate():
            loss = run_schedule(engine.model, engine.decoder, [batch], topology.device, train=True)
        result = engine.step(1e-3)
    used = torch.tensor(peak_bytes() - before, dtype=torch.float64)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    if topology.is_main:
        found: dict[str, Any] = {"nats_per_token": loss.nats_per_token, "gradient_norm": result.gradient_norm}
        print(json.dumps(found | {"bytes": used.item()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Other projects' cells for ``bench kernels``, in the layout that each wants; none is needed to import this."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pretrain.bench.contestants import INSTALL_PEER, PeerMissing

MLSTM_MODULE = "mlstm_kernels.torch.chunkwise"
SLSTM_MODULE = "xlstm.blocks.slstm.cell"
SSD_MODULE = "mamba_ssm.ops.triton.ssd_combined"
SIMPLE_GLA_MODULE = "fla.ops.simple_gla"


def load(module: str, install: str = INSTALL_PEER) -> Any:
    """Imports a peer.

    Raises:
        PeerMissing: it is not installed, or does not import here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PeerMissing(install) from error
    except Exception as error:
        raise PeerMissing(f"{module} does not import here: {error}") from error


def heads_first(tensor: Tensor) -> Tensor:
    """``(batch, tokens, heads, ...)`` to ``(batch, heads, tokens, ...)``, laid out so in memory."""
    return tensor.transpose(1, 2).contiguous()


def chunkwise_mlstm(kind: str, chunk: int, **options: Any) -> Callable[..., Tensor]:
    """A form of ``mlstm_kernels`` by its name there; takes what :func:`kernels.mlstm.mlstm` does, heads first.

    Raises:
        PeerMissing: the package is not installed, or has no such form here.
    """
    forms = load(MLSTM_MODULE).registry
    if kind not in forms:
        raise PeerMissing(f"mlstm_kernels has no form {kind!r} here")

    def run(query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
        return forms[kind](query, key, value, input_gate, forget_gate, chunk_size=chunk, **options)

    return run


def slstm_cell(recurrent: Tensor, bias: Tensor, batch: int) -> nn.Module:
    """The xlstm package's sLSTM in torch, with our weights.

    It maps ``(batch, tokens, 4 * heads * size)``, our gates flattened, to ``(batch, heads, tokens, size)`` and a state.

    Args:
        recurrent, bias: as :func:`kernels.slstm.slstm` takes them.
        batch: which it wants to know.

    Raises:
        PeerMissing: the package is not installed.
    """
    package = load(SLSTM_MODULE)
    _, heads, size = bias.shape
    cell = package.sLSTMCell(
        package.sLSTMCellConfig(
            hidden_size=heads * size,
            num_heads=heads,
            backend="vanilla",
            batch_size=batch,
            dtype="float32",
            enable_automatic_mixed_precision=False,
        )
    )
    # Its recurrent weights are (heads, gates and outputs, inputs), its biases flat.
    weights = {"_recurrent_kernel_": recurrent.transpose(0, 1).flatten(1, 2), "_bias_": bias.flatten()}
    cell.load_state_dict(weights)
    return cell


def mamba_ssd(chunk: int) -> Callable[..., Tensor]:
    """``mamba_ssm``'s SSD; takes what :func:`kernels.ssd.ssd` does.

    Raises:
        PeerMissing: the package is not installed.
    """
    scan = load(SSD_MODULE, "not installed: pip install mamba_ssm").mamba_chunk_scan_combined

    def run(values: Tensor, step: Tensor, rate: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        return scan(values, step, rate, keys, queries, chunk_size=chunk)

    return run


def simple_gla() -> Callable[..., Tensor]:
    """flash-linear-attention's kernel of the same recurrence; takes what :func:`kernels.ssd.ssd` does.

    It has no groups, so each head gets its own copy of keys and queries.

    Raises:
        PeerMissing: the package is not installed.
    """
    scan = load(SIMPLE_GLA_MODULE, "not installed: pip install flash-linear-attention").chunk_simple_gla

    def run(values: Tensor, step: Tensor, rate: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        heads = values.shape[2] // keys.shape[2]
        keys, queries = (tensor.repeat_interleave(heads, dim=2) for tensor in (keys, queries))
        weighed = values * step.to(values.dtype)[..., None]
        return scan(queries, keys, weighed, g=step * rate, scale=1.0)[0]

    return run


def dense_recurrence(kind: str, channels: int, **options: Any) -> nn.RNNBase:
    """torch's own ``GRU`` or ``LSTM``, which is cuDNN's on a CUDA device: its recurrent matrix is dense."""
    return getattr(nn, kind)(channels, channels, batch_first=True, **options)

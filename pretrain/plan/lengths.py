"""How the useful FLOPs of a token change with the length of its sequence. Imports no torch.

Products with weights do not change; of what happens along the sequence, recurrences stay as they are once a sequence
fills their chunks, and attention without a window grows with the length.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pretrain.config.schema import Config
from pretrain.models.registry import hierarchy_of
from pretrain.plan.costs import BYTES_PER_ELEMENT, mixer_cost, used_blocks

# Of ``data.sequence_length``.
FACTORS = (0.25, 1, 4, 16)
# Forward, and backward twice as much.
PASSES = 3


@dataclass(frozen=True)
class FlopsByLength:
    """Useful FLOPs of a training token, forward and backward, at several lengths.

    Attributes:
        lengths: tokens of a sequence.
        products: with weights, those of the head too; the same at every length.
        along_the_sequence: of each type of mixer, one figure for each length.
    """

    lengths: list[int]
    products: float
    along_the_sequence: dict[str, list[float]]

    @property
    def totals(self) -> list[float]:
        """Of all together, one figure for each length."""
        return [self.products + sum(row[place] for row in self.along_the_sequence.values()) for place in self._places]

    @property
    def _places(self) -> range:
        return range(len(self.lengths))


def flops_by_length(config: Config) -> FlopsByLength:
    """Figures at a quarter of the configuration's length, at the length itself, and at 4 and 16 times it."""
    lengths = [max(1, round(config.data.sequence_length * factor)) for factor in FACTORS]
    rows = [_flops(config, length) for length in lengths]
    products = rows[0].pop("")
    # A type that does nothing along the sequence has no row.
    kinds = [kind for kind in rows[0] if rows[0][kind]]
    return FlopsByLength(lengths, products, {kind: [row[kind] for row in rows] for kind in kinds})


def _flops(config: Config, length: int) -> Counter[str]:
    """By type of mixer, what happens along the sequence; products stand under no name."""
    model = config.model
    found: Counter[str] = Counter()
    found[""] += PASSES * 2.0 * model.vocab_size * model.embedding_size
    for used in used_blocks(config, range(model.num_layers)):
        block, positions = model.blocks[used.name], max(1, round(length * used.positions_per_token))
        for section in (block.mixer, block.channel):
            if section is not None:
                cost = mixer_cost(section, config, used.hidden_size, positions)
                times = PASSES * used.positions_per_token * used.count
                found[""] += times * cost.projection_flops_per_token
                found[section.type] += times * (cost.scan_flops_per_token + cost.elementwise_scan_flops_per_token)
    if model.hierarchy is not None:
        element = BYTES_PER_ELEMENT[config.train.precision]
        for outer in hierarchy_of(model.hierarchy).outer_costs(model.hierarchy, model.hidden_size, element):
            if outer.joint is not None:
                found[""] += PASSES * outer.positions_per_token * outer.joint.flops_per_token
    return found

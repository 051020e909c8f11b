"""One sequence over several ranks, a segment on each: what ranks tell each other so that the result is one rank's."""

from kernels.segments.carry import Combine, Parts, PartsTold
from kernels.segments.communication import SCHEMES, Arriving, ProcessSegments, Segments, Traffic
from kernels.segments.outer import weighted_outer_sum
from kernels.segments.told import Told

__all__ = [
    "SCHEMES",
    "Arriving",
    "Combine",
    "Parts",
    "PartsTold",
    "ProcessSegments",
    "Segments",
    "Told",
    "Traffic",
    "weighted_outer_sum",
]

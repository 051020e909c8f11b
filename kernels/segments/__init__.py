"""One sequence over several ranks, a segment on each: what ranks tell each other so that the result is one rank's."""

from kernels.segments.carry import Combine, Parts, parts_before
from kernels.segments.communication import SCHEMES, ProcessSegments, Segments, Traffic
from kernels.segments.outer import weighted_outer_sum

__all__ = [
    "SCHEMES",
    "Combine",
    "Parts",
    "ProcessSegments",
    "Segments",
    "Traffic",
    "parts_before",
    "weighted_outer_sum",
]

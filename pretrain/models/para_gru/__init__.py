"""ParaGRU: a GRU with elementwise recurrence, solved in parallel over the sequence by Newton's method."""

"""Grouped-query causal attention, as hybrid models have it in a few of their layers."""

"""Mamba-2: the state-space mixer with scalar decays per head."""

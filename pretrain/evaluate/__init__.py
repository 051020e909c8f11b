"""Evaluation: the loss on held-out text."""

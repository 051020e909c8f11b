"""Hierarchical autoregressive transformer: bytes, words that the tokenizer cuts, and bytes again."""

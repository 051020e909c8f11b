"""SwiGLU: a gated feed-forward network."""

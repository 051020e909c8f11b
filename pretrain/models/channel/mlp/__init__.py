"""MLP: a feed-forward network with a choice of activation, gated or not."""

"""Mixture of experts: each token goes through a few of many SwiGLU networks, which a router chooses."""

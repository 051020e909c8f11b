"""The optimizer, its parameter groups, and the learning rate over the run."""

"""Models: the contract of a sequence mixer, the mixers themselves, and the decoder that stacks them."""

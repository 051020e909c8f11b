"""Channel mixers: what follows a sequence mixer in a block and acts on each position by itself."""

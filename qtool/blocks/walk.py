"""Going through the blocks of a float model to see what its linears read, with nothing changed."""

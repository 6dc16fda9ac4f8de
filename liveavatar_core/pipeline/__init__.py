"""The grid of blocks, steps and layers: who owns which part, and how blocks travel through it."""

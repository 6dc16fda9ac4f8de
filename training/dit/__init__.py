"""Stage 4: the causal DiT. What it is shown, and how a whole sequence of blocks goes through it at once."""

"""One causal DiT: mathematics, layers and caches. No I/O, no devices, no threads, no checkpoint formats."""

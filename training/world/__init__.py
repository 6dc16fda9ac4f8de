"""Faces that talk, drawn in PyTorch: attributes, motion, shapes and paint. Every pixel is a function of parameters."""

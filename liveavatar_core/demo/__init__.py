"""A small model in the real file layouts, for trying the whole path without a download: the trained one in `models/`,
made by `training/`, or, where there is none and in tests, a tiny random one.

Real classes, real names, real formats; only the sizes are small. Pictures of random weights are noise: they show that
everything fits together and how fast, never how a video looks.

`files` where the parts lie · `choice` which of the two is used · `random_model` writes the random one.
"""

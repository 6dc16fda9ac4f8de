"""The engine of Live Avatar: portrait, speech and prompt in, video blocks out. Knows nothing of ComfyUI.

Where to look: `geometry` sizes · `config` settings · `model` the causal DiT · `sampling` noise and Euler ·
`encoders` VAE, speech features, pictures · `weights` checkpoint files · `pipeline` plan, stages, block loop ·
`runtime` what is loaded where, and streams · `io` sound and video files · `demo` a small model to try it all.
Importing this package imports none of them.
"""

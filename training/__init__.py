"""How the demo model was made: a drawn world that talks, and the stages that learn from it.

Nothing in liveavatar_core or nodes imports this. The models are the core's own classes; what is here draws pictures,
makes speech, arranges batches and minimises losses. README.md has the commands.
"""

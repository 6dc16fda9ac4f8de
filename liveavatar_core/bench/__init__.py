"""What the engine costs on this machine: time and memory against the card's own ceilings, and what each shortcut costs
in accuracy. `python -m liveavatar_core.bench --help`; the node and the tests call `measure` and `errors` themselves.
"""

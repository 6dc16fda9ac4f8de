"""Everything the engine raises on purpose. One sentence each: what was wrong, what was received, what to do."""


class LiveAvatarError(Exception):
    """Base of all errors meant for a reader; anything else that escapes is a bug."""


class ConfigError(LiveAvatarError):
    """A setting is outside what the model or the code allows."""


class InputError(LiveAvatarError):
    """A picture, a sound or a text cannot be used."""


class PlanError(LiveAvatarError):
    """The work cannot be placed on these devices."""


class WeightsError(LiveAvatarError):
    """A checkpoint is missing, damaged, or of another model."""


class OutputError(LiveAvatarError):
    """A result cannot be written."""


class Cancelled(LiveAvatarError):
    """The stream was stopped on request; blocks already delivered stay valid."""


class StageError(LiveAvatarError):
    """A stage failed while working on one block and step; `__cause__` holds the original error."""

    def __init__(self, stage: int, block: int, step: int, reason: str) -> None:
        what = "prefill" if step < 0 else f"block {block}, step {step}"
        super().__init__(f"stage {stage} failed at {what}: {reason}")
        self.stage, self.block, self.step, self.reason = stage, block, step, reason

"""The noise levels that a stream visits, as diffusers' scheduler has them.

In a file of its own since that takes seconds to import: stages in processes of their own are told the levels.
"""

from functools import cache

from diffusers import FlowMatchEulerDiscreteScheduler

from liveavatar_core.config import SamplingConfig


@cache
def sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """steps + 1 noise levels from 1 to 0. The scheduler shifts its end point twice, so the last step is almost null."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist())


def levels(sampling: SamplingConfig) -> tuple[float, ...]:
    """The noise levels a stream visits, from 1 to 0; without the last but one if that is skipped (SPEC 8.5.1)."""
    visited = sigmas(sampling.steps, sampling.shift)
    return (*visited[:-2], visited[-1]) if sampling.skip_last_step else visited

"""Prior noise: a little of the noise that sampling began with, added again to the later samples.

Li et al. 2023, Faster Diffusion, Section 3.3: where features are reused, images lose texture; 0.003 z_T added to the
sample before every call at t < 500 brings it back. It becomes a term of the schedule's sums, with no work of its own.
"""

from __future__ import annotations

from dataclasses import replace

from diffpress.errors import DiffpressError
from diffpress.plan import PRIOR, Sampling

BELOW = 500.0  # timesteps that get it


def with_prior_noise(sampling: Sampling, strength: float) -> Sampling:
    """`sampling` in which sample i gains strength * z_T before every call i at a timestep below `BELOW`.

    z_T has unit variance, and `strength` is a part of what the network is given: a sample of a solver that divides it
    by sqrt(1 + sigma^2) first gains as much more, so that DDIM and Euler, which are one method, stay one. What was
    added stays in the sample. Raises `DiffpressError` for solvers that are no sum of terms, and where no call is meant
    or the first is, before which there is no sum.
    """
    if sampling.solver != "linear":
        raise DiffpressError(f"no noise can be added between the steps of {sampling.solver}: set prior_noise to 0")
    if sampling.timesteps[0] < BELOW or sampling.timesteps[-1] >= BELOW:
        raise DiffpressError(
            f"prior noise is for the later steps, at timesteps below {BELOW:g}, but all of this schedule are on one "
            "side of it: set prior_noise to 0"
        )
    rows = list(sampling.terms)
    for index in range(1, len(rows)):
        if sampling.timesteps[index] < BELOW:
            rows[index - 1] = (*rows[index - 1], (PRIOR, 0, strength / sampling.input_scale[index]))
    return replace(sampling, terms=tuple(rows))

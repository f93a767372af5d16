"""What depends on the step, found by the timestep: a row of the schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowOf(nn.Module):
    """Timesteps [N] to their rows [N] in the schedule.

    Whole numbers all the way: a backend that computes in BF16 would round row 257 to 256.
    """

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        super().__init__()
        self.timesteps: Tensor
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.float32))

    def forward(self, timesteps: Tensor) -> Tensor:
        # The nearest, not the equal row: a runtime may round a fractional timestep.
        return (timesteps.float()[:, None] - self.timesteps[None]).abs().argmin(dim=1)

"""What the denoiser answers recorded calls, before anything is pruned and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.compress.numerics.errors import relative_l2
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError


class Outputs:
    """Outputs [2, C, H, W] of the denoiser on `calls` as it is now, which later ones are compared with."""

    @torch.no_grad()
    def __init__(self, work: Work, calls: Sequence[Call]) -> None:
        self._work, self.calls = work, calls
        self.wanted: list[Tensor] = [work.run(call).cpu() for call in calls]
        if not all(bool(output.isfinite().all()) for output in self.wanted):
            raise DiffpressError("the denoiser gives values that are not finite before anything is pruned")

    @torch.no_grad()
    def error(self) -> float:
        """||output - wanted|| / ||wanted|| over all calls, of the denoiser as it is now; NaN where it is not finite."""
        return relative_l2(
            (self._work.run(call).cpu().double(), wanted.double())
            for call, wanted in zip(self.calls, self.wanted, strict=True)
        )

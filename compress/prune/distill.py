"""`distill`: what pruning touched learns to answer as the whole network did, on recorded calls; no images are needed.

The loss is the mean squared error of the denoiser's output (Hinton et al. 2015 on regression, as in BK-SDM's output
term: Kim et al. 2023, Section 3.2). Weights that pruning made zero stay zero.
"""

from __future__ import annotations

import random
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

from diffpress.calibration.capture import Call
from diffpress.calibration.model import state_digest
from diffpress.calibration.processes import on_fastest_device
from diffpress.calibration.structure import widths
from diffpress.compress import training
from diffpress.compress.numerics.errors import relative_l2
from diffpress.compress.quantize.samples import chosen_calls
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

NAME = "distill"
JUDGED = 0.125  # of the recorded calls: they are not learned from, and say whether it helped


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DistillPass:
    """Train what pruning touched, right after it: modules that were cut whole, and layers with zeros."""

    iterations: Annotated[int, Field(ge=1, description="steps, a recorded call each")] = 2000
    rate: Annotated[float, Field(gt=0, description="learning rate (Adam), which falls along a cosine")] = 2e-5
    calls: Annotated[int, Field(ge=8, description="recorded calls at most, an eighth of them to judge by")] = 512

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where nothing is pruned, behind quantization, and without the whole network."""
        if work.quantization or work.temporal is not None or len(work.program.variants) > 1:
            raise DiffpressError(f"{NAME} trains float weights on plain steps: put it right behind the pruning")
        if not touched(work):
            raise DiffpressError(f"{NAME} recovers what pruning lost: put a pruning pass before it in the recipe")
        if work.original is None:
            raise DiffpressError(f"{NAME} learns from the whole network, which is not there")

    def apply(self, work: Work) -> str:
        """Train, or go on where an interrupted run stopped; says what became of the output's error."""
        unet = work.denoiser
        data = chosen_calls(work.record(), self.calls, work.seed)
        if len(data) < 2:
            raise DiffpressError(f"{NAME}: of {len(data)} recorded calls none is left to judge by: calibrate with more")
        held = set(random.Random(work.seed).sample(range(len(data)), max(1, round(JUDGED * len(data)))))
        file = training.state_file(NAME, (self, state_digest(unet)), work, data)
        with on_fastest_device(unet):
            wanted = answers(work, data)
            learned = [index for index in range(len(data)) if index not in held]
            values = {path: unet.get_parameter(path).detach().clone() for path in touched(work)}
            masks = {f"{name}.weight": unet.get_submodule(name).weight != 0 for name in work.sparse}
            for value in values.values():
                value.requires_grad_()
            runner = training.Runner(work)

            def given() -> dict[str, Tensor]:
                return {
                    f"unet.{path}": value * masks[path] if path in masks else value for path, value in values.items()
                }

            def loss(iteration: int) -> Tensor:
                index = learned[training.in_turn(iteration, len(learned), work.seed)]
                return mse_loss(functional_call(runner, given(), (data[index],)), wanted[index].to(unet.device))

            @torch.no_grad()
            def error() -> float:
                return relative_l2(
                    (functional_call(runner, given(), (data[index],)).cpu().double(), wanted[index].double())
                    for index in held
                )

            before = error()
            groups = [training.Group(values, self.rate, decays=True)]
            training.descend(loss, groups, self.iterations, file, work.progress, "distilling")
            after = error()
            change = f"error of the output on calls that were not learned from {before:.2%} -> {after:.2%}"
            if not after < before:
                return f"nothing: {change}, so the model stays as it was; try a lower rate"
            for path, value in given().items():
                unet.get_parameter(path.removeprefix("unet.")).data = value.detach()
        share = sum(value.numel() for value in values.values()) / sum(one.numel() for one in unet.parameters())
        return f"{share:.0%} of the parameters trained on {len(learned)} calls; {change}"


def touched(work: Work) -> list[str]:
    """Paths of the parameters of modules that were cut, and of layers with zeros, in the network's order."""
    cut, sparse = tuple(f"{path}." for path in widths(work.denoiser)), tuple(f"{name}." for name in work.sparse)
    return [path for path, _ in work.denoiser.named_parameters() if path.startswith((*cut, *sparse))]


@torch.no_grad()
def answers(work: Work, calls: list[Call]) -> list[Tensor]:
    """Outputs of the network as it was before any pass, on the CPU."""
    assert work.original is not None
    pruned: Any = work.pipeline.unet
    whole = work.original().to(pruned.device)
    work.pipeline.unet = whole
    try:
        return [work.run(call).cpu() for call in work.progress(calls, "asking the whole network")]
    finally:
        work.pipeline.unet = pruned

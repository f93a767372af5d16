"""Images on their way through a schedule, in torch: the network is asked and answered call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpress.calibration import conditions
from diffpress.calibration.capture import Call
from diffpress.calibration.conditions import Text
from diffpress.calibration.tabulated import Tabulated
from diffpress.plan import Sampling

CHUNK = 8  # images sampled as one batch


class Trajectory:
    """N images at one call of `sampling` after the other, starting from `noise` [N, C, h, w].

    `texts` are the features [halves, T, D] of each prompt, the unconditional half first where there are two.
    """

    def __init__(self, sampling: Sampling, texts: Sequence[Text], noise: Tensor) -> None:
        self.sampling, self.sample = sampling, noise * sampling.init_noise_sigma
        self._halves, self._text = len(texts[0]), conditions.interleaved(texts).to(noise.device)
        self._schedule = Tabulated(sampling, None)
        self._index = 0

    def inputs(self) -> tuple[Tensor, float, Text]:
        """What the denoiser is given at this call: sample [halves N, C, h, w], timestep, text [halves N, T, D]."""
        scaled = self._schedule.scale_model_input(self.sample)
        return torch.cat([scaled] * self._halves), self.sampling.timesteps[self._index], self._text

    def output(self, denoiser: Callable[..., Any]) -> Tensor:
        """What `denoiser` answers at this call, after guidance: [N, C, h, w]."""
        output: Tensor = denoiser(*self.inputs(), return_dict=False)[0]
        if self._halves == 2:
            plain, told = output.chunk(2)
            output = plain + self.sampling.guidance_scale * (told - plain)
        return output

    def advance(self, output: Tensor) -> None:
        """Go on to the next call with `output` as the answer to this one."""
        self.sample = self._schedule.step(output, None, self.sample).prev_sample
        self._index += 1


def first_calls(recordings: Iterable[Call], count: int | None = None) -> list[Call]:
    """The first call of each of the first prompts, of all if `count` is None; a prompt is told by its text."""
    found: list[Call] = []
    for call in recordings:
        if not any(conditions.equal(call.text, other.text) for other in found):
            found.append(call)
            if len(found) == count:
                break
    return found


def seeded(calls: Sequence[Call], seed: int) -> Tensor:
    """The noise [N, C, h, w] that recorded prompts start from: the i-th from seed + i."""
    shape = calls[0].sample[:1].shape
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(calls))])


def start(sampling: Sampling, calls: Sequence[Call], seed: int, device: Any) -> list[Trajectory]:
    """Trajectories of prompts with recorded `calls`, at most `CHUNK` in each."""
    noise, chunks = seeded(calls, seed).to(device), range(0, len(calls), CHUNK)
    return [
        Trajectory(sampling, [call.text for call in calls[at : at + CHUNK]], noise[at : at + CHUNK]) for at in chunks
    ]


def finish(
    trajectories: Sequence[Trajectory],
    denoiser: Callable[[], Callable[..., Any]],
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    text: str,
) -> Tensor:
    """The final latents [N, C, h, w], on the CPU. `denoiser` makes one for each chunk: it may keep features."""
    denoisers = [denoiser() for _ in trajectories]
    for _ in progress(trajectories[0].sampling.timesteps, text):
        for trajectory, made in zip(trajectories, denoisers, strict=True):
            trajectory.advance(trajectory.output(made))
    return torch.cat([trajectory.sample for trajectory in trajectories]).cpu()

"""`correct`: numbers in the schedule's table that undo what is systematic in the errors of a compressed pipeline.

Mean subtraction: every output loses the mean over prompts and pixels of (compressed - float) output, by call and
channel, as He et al. 2023, PTQD, Section 4.2, take the mean of the quantization error out. (Calibrated DPMs, Pang et
al. 2023, take out what a network's mean is off zero, which holds for epsilon without guidance.)

Epsilon scaling (Ning et al. 2024, see `epsilon`): the divisors 1 + sum_j p_j basis_j(call) that bring the final
latents nearest to the float model's converged solution. The paper searches a grid by the images' score. Here seeds and
prompts are paired, so that it is a least-squares problem, solved by Gauss-Newton: the latents' derivative by p is that
of the float network, since a quantized one answers small changes with rounding.

Both are found on one half of the calibration prompts and stay only where they gain on the other half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.calibration.processes import on_fastest_device
from diffpress.calibration.schedule import tabulate
from diffpress.calibration.tabulated import playing
from diffpress.compress import training
from diffpress.compress.cache.execute import CachedDenoiser, execution
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.epsilon import check_scheduler, scaled
from diffpress.compress.schedule.solver import make
from diffpress.compress.schedule.stepping import CHUNK, Trajectory, finish, first_calls, start
from diffpress.compress.work import Work, require_prompts
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling

NAME = "correct"
Candidate = tuple[str, Sampling, Tensor]  # a correction: what it is, the schedule, all prompts' final latents
Scaling = Literal["none", "constant", "linear"]
STEP = 2e-3  # of the finite differences by the divisors' parameters
TINY = 1e-9  # lengths below it are none
ROUNDING = 1e-5  # relative errors below it are those of sums, not of compression
LEAST = 1e-3  # of an error that has to go: less is not worth a table
FARTHEST = 0.5  # that a divisor may be from 1: DDIM in ten steps asks for 0.7 at its first call, 1.4 at its last
ROUNDS = 2  # of Gauss-Newton: the first leaves what is not linear


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CorrectPass:
    """Correct the mean and the scale of what the compressed denoiser answers; has to be the last pass."""

    fewest_prompts: ClassVar[int] = 2
    mean: Annotated[bool, Field(description="subtract the mean error of every call, by channel")] = True
    epsilon_scaling: Annotated[
        Scaling, Field(description="the divisor of epsilon: one number, or linear in the timestep")
    ] = "constant"
    reference_steps: Annotated[int, Field(ge=10, le=500, description="DPM++ steps that count as converged")] = 60

    def __post_init__(self) -> None:
        if not self.mean and self.epsilon_scaling == "none":
            raise DiffpressError("correct: with mean false and epsilon_scaling none it corrects nothing: turn one on")

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when it ran already, and where epsilon cannot be told from the output."""
        if NAME in work.tables:
            raise DiffpressError("correct: an earlier pass corrected the schedule already; keep one of the two")
        if work.sampling.stochastic:
            raise DiffpressError(
                f"correct: {work.sampling.scheduler} draws noise, so that it has no converged solution to come near: "
                "leave the pass out or take a deterministic solver"
            )
        if work.original is None:
            raise DiffpressError("correct: the float model cannot be opened anew here, which it compares with")
        if self.epsilon_scaling != "none":
            if work.sampling.solver != "linear":
                raise DiffpressError(f"correct: no divisor fits {work.sampling.solver}; set epsilon_scaling to none")
            try:
                check_scheduler(work.pipeline.scheduler)
            except DiffpressError as error:
                raise DiffpressError(f"correct: {error}; set epsilon_scaling to none") from error

    @torch.no_grad()
    def apply(self, work: Work) -> str:
        """Find the corrections, judge them, and put those that gain into the schedule; says what each did."""
        calls = first_calls(work.recorded())
        require_prompts(NAME, self.fewest_prompts, len(calls))
        assert work.original is not None  # see `requires`
        with on_fastest_device(work.denoiser):
            exact = work.original().to(work.denoiser.device)
            bench = _Bench(work, exact, calls, self.reference_steps)
            latents = bench.compressed(work.sampling, "sampling as it is")
            error, sampling = bench.errors(latents), work.sampling
            notes = [f"error to the converged solution {bench.told(error)} on prompts to fit and others to judge"]
            rows: list[dict[str, Any]] = [{"correction": "none", **bench.halves(error)}]
            wanted = {"mean": self.mean, "scale": self.epsilon_scaling != "none"}
            for kind in (kind for kind, on in wanted.items() if on):
                what, changed, after = (
                    bench.mean_errors() if kind == "mean" else bench.fit(self.epsilon_scaling, sampling, latents)
                )
                errors = bench.errors(after)
                kept = _gains(error[bench.fitted :], errors[bench.fitted :])
                rows.append({"correction": what, **bench.halves(errors), "kept": kept})
                notes.append(f"{what}: {bench.told(errors)} {'kept' if kept else 'gains nothing, left out'}")
                if kept:
                    sampling, latents, error = changed, after, errors
        if sampling != work.sampling:
            work.pipeline.scheduler, work.sampling = playing(work.pipeline.scheduler, sampling), sampling
        else:
            notes.append("the schedule stays as it was")
        work.tables[NAME] = rows
        return "; ".join(notes)


def basis(kind: Scaling, sampling: Sampling, horizon: float) -> list[list[float]]:
    """[P][calls] of which the divisors' distances from 1 are a combination."""
    ones, ramp = [1.0] * len(sampling.timesteps), [timestep / horizon for timestep in sampling.timesteps]
    return {"none": [], "constant": [ones], "linear": [ones, ramp]}[kind]


def combined(parameters: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    """The divisor of every call: 1 + sum_j parameters[j] * rows[j]."""
    return [
        1 + sum(p * value for p, value in zip(parameters, column, strict=True)) for column in zip(*rows, strict=True)
    ]


def nearest(columns: Sequence[Tensor], residual: Tensor, weights: Tensor) -> list[float]:
    """p that minimises sum_n weights[n] |residual[n] - sum_j p_j columns[j][n]|^2; tensors [N, ...]."""
    root = weights.double().sqrt()[:, None]
    matrix = torch.stack([(column.double().flatten(1) * root).flatten() for column in columns], dim=1)
    wanted = (residual.double().flatten(1) * root).flatten()
    return [float(p) for p in torch.linalg.lstsq(matrix.cpu(), wanted.cpu()[:, None]).solution[:, 0]]


def _gains(before: Tensor, after: Tensor) -> bool:
    """Whether errors [N] of the same images fell, in the geometric mean, by more than the difference's standard error.

    A picture that tips over to another one has a hundred times the error of the rest, which no correction explains.
    """
    gain = before.clamp_min(ROUNDING).log() - after.clamp_min(ROUNDING).log()
    spread = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return float(gain.mean()) > max(spread, LEAST)


def typical(errors: Tensor) -> float:
    """The geometric mean of errors [N]."""
    return float(errors.clamp_min(TINY).log().mean().exp())


class _Bench:
    """The compressed pipeline, the float network and the model's own solution, on the calibration prompts."""

    def __init__(self, work: Work, exact: Any, calls: Sequence[Call], reference_steps: int) -> None:
        self.work, self.exact, self.calls = work, exact, calls
        self.fitted = len(calls) // 2  # a half of the list: neighbours may be alike
        self.horizon = float(work.pipeline.scheduler.config.num_train_timesteps)
        own, scheduler = work.sampling, make("dpm++", work.pipeline.scheduler.config, "karras")
        converged = tabulate(scheduler, reference_steps, own.guidance_scale, own.height, own.width)
        self.reference = self._kept(converged, len(calls), lambda: exact, "sampling the converged solution")

    def errors(self, latents: Tensor) -> Tensor:
        """|x - reference| / |reference| [N] of the first N prompts' latents."""
        reference = self.reference[: len(latents)]
        found = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        if not bool(found.isfinite().all()):
            raise DiffpressError("the pipeline ends with values that are not finite")
        return found

    def halves(self, errors: Tensor) -> dict[str, float]:
        """The geometric mean of each half of the prompts."""
        return {"fitted": typical(errors[: self.fitted]), "judged": typical(errors[self.fitted :])}

    def told(self, errors: Tensor) -> str:
        """The same for people."""
        return " and ".join(f"{value:.3%}" for value in self.halves(errors).values())

    def compressed(self, sampling: Sampling, text: str) -> Tensor:
        """Final latents [N, C, h, w] of all prompts as the compressed pipeline makes them with a schedule."""
        work = self.work
        with simulated(work.denoiser, work.quantization, sampling.timesteps):
            return finish(self._start(sampling), self._stand_in, work.progress, text)

    def mean_errors(self) -> Candidate:
        """Offsets [calls][C]: the mean of (compressed - float) output over the first half of the prompts.

        Each call's is subtracted before the next is made: later ones are those of the corrected pipeline.
        """
        work, found = self.work, []
        walks = self._start(work.sampling)
        stand_ins = [self._stand_in() for _ in walks]
        with simulated(work.denoiser, work.quantization, work.sampling.timesteps):  # the float one is another
            for _ in work.progress(work.sampling.timesteps, "measuring mean errors"):
                outputs = [walk.output(made) for walk, made in zip(walks, stand_ins, strict=True)]
                exact = [walk.output(self.exact) for walk in walks[: -(-self.fitted // CHUNK)]]
                error = torch.cat(outputs)[: self.fitted] - torch.cat(exact)[: self.fitted]
                mean = error.double().mean(dim=(0, 2, 3)).float()
                found.append(tuple(float(offset) for offset in mean))
                for walk, output in zip(walks, outputs, strict=True):
                    walk.advance(output - mean[:, None, None])
        latents = torch.cat([walk.sample for walk in walks]).cpu()
        return "mean errors subtracted", replace(work.sampling, offsets=tuple(found)), latents

    def fit(self, kind: Scaling, sampling: Sampling, latents: Tensor) -> Candidate:
        """The divisors of epsilon of a kind with the least error on the first half; `latents` are those without."""
        rows = basis(kind, sampling, self.horizon)
        scheduler, half = self.work.pipeline.scheduler, self.fitted

        def exact() -> CachedDenoiser:
            return CachedDenoiser(self.exact, self.work.program, self.work.corrections)

        def at(parameters: Sequence[float]) -> Sampling:
            return scaled(sampling, scheduler, combined(parameters, rows))

        plain = replace(sampling, offsets=())  # what is off in the mean is off in the compressed network alone
        ends = []
        for index in range(-1, len(rows)):
            moved = combined([STEP * (j == index) for j in range(len(rows))], rows)
            schedule = scaled(plain, scheduler, moved)
            ends.append(self._kept(schedule, half, exact, "measuring what epsilon does to latents"))
        columns = [(end - ends[0]) / STEP for end in ends[1:]]
        parameters, best = [0.0] * len(rows), ([0.0] * len(rows), latents)
        for _ in range(ROUNDS):
            residual = (self.reference - latents)[:half]
            # So weighed, least squares lower the geometric mean: a picture that tipped over counts as any other.
            step = nearest(columns, residual, 1 / residual.flatten(1).norm(dim=1).clamp_min(TINY).square())
            parameters = [p + more for p, more in zip(parameters, step, strict=True)]
            farthest = max(abs(divisor - 1) for divisor in combined(parameters, rows))
            parameters = [p * min(1.0, FARTHEST / farthest) if farthest else p for p in parameters]
            latents = self.compressed(at(parameters), "sampling with scaled epsilon")
            if typical(self.errors(latents[:half])) < typical(self.errors(best[1][:half])):
                best = (parameters, latents)
        return f"epsilon divided by {_divisors(combined(best[0], rows))}", at(best[0]), best[1]

    def _start(self, sampling: Sampling) -> list[Trajectory]:
        return start(sampling, self.calls, self.work.seed, self.work.denoiser.device)

    def _stand_in(self) -> CachedDenoiser:
        return CachedDenoiser(self.work.denoiser, self.work.program, self.work.corrections)

    def _kept(self, sampling: Sampling, count: int, denoiser: Callable[[], Callable[..., Any]], text: str) -> Tensor:
        """Final latents of the first `count` prompts by the float network; an interrupted run finds them again."""
        context = [sampling.to_json(), self.work.program.to_json(), count, denoiser() is self.exact]
        context.append(execution(self.work.program, self.work.corrections).key)
        key = hashlib.sha256(json.dumps(context).encode()).hexdigest()[:16]
        file = self.work.scratch / f"{NAME}-{key}.safetensors"
        if not file.is_file():
            walks = start(sampling, self.calls[:count], self.work.seed, self.work.denoiser.device)
            latents = finish(walks, denoiser, self.work.progress, text)
            training.save({"latents": latents}, file)
        return load_file(file)["latents"]


def _divisors(values: Sequence[float]) -> str:
    """For people: one number where all are one, else those of the first and the last call."""
    same = len(set(values)) == 1
    return f"{values[0]:.4f}" if same else f"{values[0]:.4f} at the first call to {values[-1]:.4f} at the last"

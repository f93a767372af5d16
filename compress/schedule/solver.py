"""`schedule`: another solver, other steps. Everything that comes after is calibrated on them and bound to them.

The solvers are diffusers' own, made from the model's scheduler configuration as `from_config` does it, and become a
table of coefficients by probing; EVODiff alone is ours, on the steps of DPM-Solver++. The number and the place of the
steps is the strongest lever there is (Karras et al. 2022; Lu et al. 2022, DPM-Solver++; Zhao et al. 2023, UniPC).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.calibration.schedule import check_sigmas, check_timesteps, tabulate, with_starts
from diffpress.calibration.tabulated import playing
from diffpress.compress.schedule import published
from diffpress.compress.schedule.evodiff import to_evodiff
from diffpress.compress.schedule.evolve import Evolution
from diffpress.compress.schedule.search import CONVERGED, Found, Method, Sigmas, find
from diffpress.compress.schedule.sigmas import sigma_of
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling, listed

Solver = Literal[
    "ddim", "pndm", "euler", "heun", "dpm2", "dpm++", "dpm++-1", "dpm++-3", "dpm++-heun", "dpm++-single", "deis",
    "unipc", "unipc-3", "evodiff", "ddpm", "euler-ancestral", "dpm2-ancestral", "dpm++-sde", "lcm", "tcd",
]  # fmt: skip
Spacing = Literal[
    "linspace", "leading", "trailing", "karras", "exponential", "beta", "lu", "align-your-steps", "hyperparameters"
]  # fmt: skip

_DPM = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
# diffusers' class, and what its configuration has beside the model's.
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    # A latent is no picture: clipping it to -1..1, diffusers' default for a configuration that does not say, is wrong.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),  # two calls a step, as dpm2
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2}),  # known as DPM++ 2M
    "dpm++-1": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 1}),
    "dpm++-3": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 3}),
    "dpm++-heun": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2, "solver_type": "heun"}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {**_DPM, "solver_order": 2, "lower_order_final": True}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2", "solver_order": 2}),
    "unipc-3": ("UniPCMultistepScheduler", {"solver_type": "bh2", "solver_order": 3}),
    "evodiff": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2}),  # whose steps it walks in its own way
    # These draw noise on their way.
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {**_DPM, "algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),  # with an eta; without one it draws nothing
}
WITH_ETA = ("ddim", "tcd")
STRIDES = ("linspace", "leading", "trailing")  # values of a configuration's `timestep_spacing`
# The other spacings, of sigmas, each with a switch of its own.
SWITCHES = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
# Spacings that no solver has of its own: they become sigmas.
PUBLISHED: dict[str, Callable[[int, np.ndarray], tuple[float, ...]]] = {
    "align-your-steps": published.align_your_steps,
    "hyperparameters": published.hyperparameters,
}


def make(solver: Solver, config: Mapping[str, Any], spacing: Spacing | None = None, *, explicit: bool = False) -> Any:
    """diffusers' scheduler for `solver` on the betas of `config`, a scheduler's configuration.

    Without a spacing it is the configuration's own; `explicit` is for steps from a list, which no spacing may move.
    Raises `DiffpressError` for a spacing that the solver lacks.
    """
    import diffusers

    name, changes = SOLVERS[solver]
    made = getattr(diffusers, name)
    known = inspect.signature(made.__init__).parameters
    switches = {switch: spelled == spacing for spelled, switch in SWITCHES.items() if switch in known}
    if spacing is not None:
        _check_spacing(solver, spacing, known)
    if spacing is not None or explicit:
        changes = {**changes, **switches}
    if spacing in STRIDES and "timestep_spacing" in known:
        changes = {**changes, "timestep_spacing": spacing}
    return made.from_config(dict(config), **changes)


def _check_spacing(solver: str, spacing: str, known: Mapping[str, Any]) -> None:
    """Raises `DiffpressError` unless a configuration with the parameters `known` offers the spacing."""
    strides = STRIDES if "timestep_spacing" in known else STRIDES[:1]  # what a solver without the choice does
    offered = [*strides, *(name for name, switch in SWITCHES.items() if switch in known), *PUBLISHED]
    if spacing not in offered:
        raise DiffpressError(f"schedule: {solver} has no spacing '{spacing}', choose from: {', '.join(offered)}")
    if spacing == "beta" and find_spec("scipy") is None:
        raise DiffpressError("schedule: spacing 'beta' needs scipy: pip install scipy")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SchedulePass:
    """Sample with another solver and other steps; has to be the first pass.

    The steps are `steps` (the recipe's, where absent) at a `spacing` (the model's own, where absent), or stand at
    `timesteps`, one for each step, or at `sigmas`, one for each step and a last one where sampling ends, 0 for no
    noise, or where a `search` finds them for this model and solver. The reference that reports compare with stays the
    model's own scheduler at the recipe's steps.
    """

    solver: Annotated[Solver, Field(description="diffusers' solver, or evodiff; dpm++ is DPM-Solver++ 2M")] = "dpm++"
    steps: Annotated[int | None, Field(ge=1, le=1000, description="of the schedule; the recipe's if absent")] = None
    spacing: Annotated[Spacing | None, Field(description="where the steps stand; as the model has it if absent")] = None
    timesteps: Annotated[tuple[float, ...] | None, Field(description="where the steps stand, falling")] = None
    sigmas: Annotated[
        tuple[float, ...] | None, Field(description="their noise levels instead, and the one at the end")
    ] = None
    eta: Annotated[float, Field(ge=0, le=1, description="noise that ddim and tcd draw at each step, 1 for all")] = 0.0
    search: Annotated[Method | None, Field(description="find where the steps stand, on this model")] = None
    search_images: Annotated[int, Field(ge=4, description="that a search scores a schedule on")] = 16
    search_epochs: Annotated[int, Field(ge=1, description="of autodiffusion")] = 10

    def __post_init__(self) -> None:
        # What no model is needed for is refused where the recipe is read.
        given = [name for name in ("spacing", "timesteps", "sigmas", "search") if getattr(self, name) is not None]
        if len(given) > 1:
            raise DiffpressError(f"schedule: {given[0]} and {given[1]} both say where the steps stand: keep one")
        try:
            if self.timesteps is not None:
                check_timesteps(self.timesteps)
            if self.sigmas is not None:
                check_sigmas(self.sigmas)
        except DiffpressError as error:
            raise DiffpressError(f"schedule: {error}") from error
        if self.eta and self.solver not in WITH_ETA:
            raise DiffpressError(f"schedule: {self.solver} takes no eta, {' and '.join(WITH_ETA)} do: leave it out")
        count = self._listed()
        if count is not None and self.steps not in (None, count):
            end = ", the last where it ends" if self.sigmas is not None else ""
            raise DiffpressError(
                f"schedule: steps is {self.steps}, but {given[0]} makes {count}{end}: leave steps out or let them agree"
            )

    def _listed(self) -> int | None:
        """How many steps the lists have; None without one."""
        if self.timesteps is not None:
            return len(self.timesteps)
        return None if self.sigmas is None else len(self.sigmas) - 1

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` after passes that are bound to a schedule, and for steps the solver cannot make."""
        planned = any(variant.reads for variant in work.program.variants.values()) or work.program.guidance
        if planned or work.quantization or work.temporal is not None or work.originals or work.tables:
            raise DiffpressError("schedule has to be the first pass: earlier ones are bound to the schedule they saw")
        if self.search is not None and work.trajectories is None:
            raise DiffpressError("schedule: nothing here can run the model for a search: give sigmas or a spacing")
        # A search finds sigmas: that the solver takes such is known before.
        _, sampling = self._made(work, self._uniform(work) if self.search is not None else self.sigmas)
        if self.search is not None and sampling.stochastic:
            raise DiffpressError(
                f"schedule: {self.solver} draws noise, so that it has no exact solution for a search to come near: "
                "search with a deterministic solver, or give sigmas or a spacing"
            )

    def apply(self, work: Work) -> str:
        """Bind the pipeline, the plan and all later passes to the schedule; says which it is."""
        before, found = work.sampling, self._found(work) if self.search is not None else None
        scheduler, sampling = self._made(work, found.sigmas if found else self.sigmas, begins=True)
        work.follow(playing(scheduler, sampling), sampling)
        if found:
            work.tables["search"] = [asdict(found)]
        calls = "" if len(sampling.timesteps) == sampling.steps else f" ({len(sampling.timesteps)} calls)"
        where = f"{self.solver} {self.spacing}" if self.spacing else self.solver
        said = f"; {found.line()}" if found else ""
        return (
            f"{where}, {sampling.steps} steps{calls} at {listed(sampling.timesteps)} "
            f"in place of {before.steps} of {before.scheduler}{said}"
        )

    def _found(self, work: Work) -> Found:
        """What the search finds; on the model as it is, with the solver that will run."""
        assert self.search is not None and work.trajectories is not None
        begin, count = work.trajectories, self._steps(work)
        config, alphas = work.pipeline.scheduler.config, alphas_cumprod(work)
        plain: dict[str, Sigmas] = {"uniform": self._uniform(work)}
        for name, make_sigmas in {"karras": published.karras, **PUBLISHED}.items():
            if count > 1:
                plain[name] = make_sigmas(count, alphas)
        converged = make("dpm++", config, explicit=True)
        return find(
            self.search,
            lambda draw: begin(self.search_images, draw),
            lambda sigmas: self._made(work, sigmas)[1],
            self._table(work, converged, CONVERGED, sigmas=published.karras(CONVERGED, alphas)),
            plain,
            count,
            work.scratch / "search",
            seed=work.seed,
            solver=self.solver,
            progress=work.progress,
            evolution=Evolution(epochs=self.search_epochs),
        )

    def _uniform(self, work: Work) -> Sigmas:
        """Equally spaced timesteps from the noisiest on, which diffusers calls trailing, and a zero."""
        count, alphas = self._steps(work), alphas_cumprod(work)
        return (*(float(s) for s in sigma_of(np.linspace(len(alphas), 0, count, endpoint=False) - 1, alphas)), 0.0)

    def _steps(self, work: Work) -> int:
        return self._listed() or self.steps or work.sampling.steps

    def _made(self, work: Work, sigmas: Sequence[float] | None, begins: bool = False) -> tuple[Any, Sampling]:
        """The scheduler without the lists, and the whole schedule; one that `begins` may do so at any step."""
        steps, spacing = self._steps(work), self.spacing
        if spacing in PUBLISHED:
            sigmas, spacing = PUBLISHED[spacing](steps, alphas_cumprod(work)), None
        explicit = self.timesteps is not None or sigmas is not None
        scheduler = make(self.solver, work.pipeline.scheduler.config, spacing, explicit=explicit)
        sampling = self._table(work, scheduler, steps, self.timesteps, sigmas, walked=self.solver == "evodiff")
        if begins:
            places: dict[str, Any] = {"timesteps": self.timesteps, "sigmas": sigmas, "eta": self.eta}
            sampling = with_starts(sampling, scheduler, **places)
        largest = int(scheduler.config.num_train_timesteps) - 1
        # diffusers' strides miscount here and there: "trailing" at 61 steps has 62, the last at -1.
        if not all(0 <= t <= largest for t in sampling.timesteps):
            raise DiffpressError(
                f"schedule: {self.solver} at {steps} steps leaves the model's timesteps 0 to {largest} with this "
                "spacing: take another number of steps or another spacing"
            )
        return scheduler, sampling

    def _table(
        self,
        work: Work,
        scheduler: Any,
        steps: int,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        walked: bool = False,
    ) -> Sampling:
        """The schedule as coefficients; `walked` by EVODiff."""
        old = work.sampling
        size = old.guidance_scale, old.height, old.width
        try:
            linear = tabulate(scheduler, steps, *size, timesteps=timesteps, sigmas=sigmas, eta=self.eta)
            return to_evodiff(linear, scheduler, timesteps, sigmas) if walked else linear
        except DiffpressError as error:
            raise DiffpressError(f"schedule: {self.solver}: {error}") from error


def alphas_cumprod(work: Work) -> np.ndarray:
    """alphas_cumprod [T] of the model's training."""
    found: np.ndarray = work.pipeline.scheduler.alphas_cumprod.double().numpy()
    return found

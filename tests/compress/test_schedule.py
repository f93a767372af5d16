"""The schedule pass: what it makes is what diffusers makes, and what makes no sense is refused with one line."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.calibration.schedule import place, tabulate
from diffpress.calibration.tabulated import Tabulated, playing
from diffpress.compress import recipe
from diffpress.compress.run import run
from diffpress.compress.schedule.solver import SOLVERS, SchedulePass, make
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, LayerQuant, Sampling
from diffpress.runtime.noise import Generator
from diffpress.runtime.sampler import sample


def own_scheduler() -> Any:
    # All fields given, as a file that diffusers wrote has them: none is free for another class to fill in.
    config = {**diffusers.DDIMScheduler(**SCHEDULER).config, "_use_default_values": []}
    return diffusers.DDIMScheduler.from_config(config)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    scheduler = own_scheduler()
    sampling = tabulate(scheduler, 50, 3.0, 64, 64)
    pipeline = SimpleNamespace(scheduler=scheduler, unet=None)
    return Work(pipeline, sampling, 0, lambda _: pytest.fail("not recorded"), lambda items, _: items, tmp_path)


def made(work: Work, **fields: Any) -> Sampling:
    run([("schedule", SchedulePass(**fields))], work)
    return work.sampling


def model(scaled: torch.Tensor, timestep: Any) -> torch.Tensor:
    """A denoiser whose answer depends on its input and the time."""
    return torch.tanh(scaled) + float(timestep) / 1000


def walk(scheduler: Any, steps: int | None = None, **where: Any) -> torch.Tensor:
    """The sample that diffusers' own loop ends with."""
    scheduler.set_timesteps(**({"num_inference_steps": steps} | where if steps else where))
    given = {"generator": torch.Generator().manual_seed(8), "eta": 0.0}  # as a pipeline gives them
    options = {name: given[name] for name in given if name in inspect.signature(scheduler.step).parameters}
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False, **options)[0]
    return x


def played(sampling: Sampling) -> torch.Tensor:
    """The same by the runtime."""
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3)) * sampling.init_noise_sigma
    generator = Generator(8)
    *_, last = sample(
        sampling,
        lambda _, scaled, t: model(torch.from_numpy(scaled), t).numpy(),
        x.numpy(),
        draw=lambda: generator.randn(x.shape),
    )
    return torch.from_numpy(last)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, error: float = 1e-5) -> None:
    assert (got - wanted).norm() <= error * wanted.norm()


CASES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "ddim": ({"solver": "ddim"}, lambda c: diffusers.DDIMScheduler.from_config(c)),
    "dpm++": ({}, lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c)),
    "karras": (
        {"spacing": "karras"},
        lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, use_karras_sigmas=True),
    ),
    "trailing": (
        {"solver": "unipc", "spacing": "trailing"},
        lambda c: diffusers.UniPCMultistepScheduler.from_config(c, timestep_spacing="trailing"),
    ),
    "unipc": ({"solver": "unipc"}, lambda c: diffusers.UniPCMultistepScheduler.from_config(c)),
    "euler": (
        {"solver": "euler", "spacing": "linspace"},
        lambda c: diffusers.EulerDiscreteScheduler.from_config(c, timestep_spacing="linspace"),
    ),
}


@pytest.mark.parametrize("steps", [1, 5, 12, 25])
@pytest.mark.parametrize("case", CASES)
def test_a_solver_is_diffusers_own(case: str, steps: int, work: Work) -> None:
    fields, configured = CASES[case]
    sampling = made(work, steps=steps, **fields)
    wanted = walk(configured(own_scheduler().config), steps)
    assert (sampling.steps, sampling.guidance_scale, sampling.height) == (steps, 3.0, 64)
    assert_close(played(sampling), wanted)
    # A plain pair of scheduler and count needs no table in torch: other tools read this very configuration.
    assert not isinstance(work.pipeline.scheduler, Tabulated)
    assert_close(walk(work.pipeline.scheduler, steps), wanted)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_solver_makes_a_table(solver: str, work: Work) -> None:
    sampling = made(work, solver=solver, steps=6)
    assert sampling.scheduler == SOLVERS[solver][0]
    assert work.program.steps == (FULL,) * len(sampling.timesteps)
    assert_close(played(sampling), walk(work.pipeline.scheduler, 6))
    assert_close(walk(Tabulated(sampling, work.pipeline.scheduler), 6), walk(work.pipeline.scheduler, 6))


def test_everything_follows(work: Work) -> None:
    scratch, asked = work.scratch, []
    work.recorder = lambda _: asked.append(work.sampling) or "recordings"  # type: ignore[assignment,func-returns-value,return-value]
    work.record()
    results = run([("schedule", SchedulePass(steps=8, spacing="karras"))], work)
    work.record()
    work.record()
    assert [sampling.steps for sampling in asked] == [50, 8]
    assert len(work.program.steps) == 8 and work.plan().sampling.steps == 8
    assert work.scratch != scratch and work.scratch.is_relative_to(scratch)
    summary = results[0].summary
    assert summary.startswith("dpm++ karras, 8 steps at 999 ") and summary.endswith("of 50 of DDIMScheduler")
    assert made(work, solver="ddim").steps == 8  # the count that stands, where none is given


SIGMAS = (14.6, 6.0, 2.5, 1.2, 0.5, 0.1, 0.0)


def test_explicit_timesteps_are_what_diffusers_does_with_them(work: Work) -> None:
    timesteps = (999, 850, 700, 455, 233, 24)
    for solver, name in (("dpm++", "DPMSolverMultistepScheduler"), ("euler", "EulerDiscreteScheduler")):
        sampling = made(work, solver=solver, timesteps=timesteps)
        assert sampling.timesteps == timesteps and sampling.steps == len(timesteps)
        assert isinstance(work.pipeline.scheduler, Tabulated)
        wanted = walk(getattr(diffusers, name).from_config(own_scheduler().config), timesteps=list(timesteps))
        assert_close(played(sampling), wanted)
        assert_close(walk(work.pipeline.scheduler, len(timesteps)), wanted)


def test_explicit_sigmas_are_what_diffusers_does_with_them(work: Work) -> None:
    sampling = made(work, solver="euler", sigmas=SIGMAS)
    wanted = walk(diffusers.EulerDiscreteScheduler.from_config(own_scheduler().config), sigmas=list(SIGMAS))
    assert_close(played(sampling), wanted)
    assert_close(walk(work.pipeline.scheduler, 6), wanted)
    assert any(t % 1 for t in sampling.timesteps)


@pytest.mark.parametrize("solver", ["dpm++", "dpm++-3", "dpm++-single", "unipc", "deis", "euler"])
def test_a_solvers_own_places_given_by_hand_change_nothing(solver: str, work: Work) -> None:
    automatic = made(work, solver=solver, steps=8, spacing="linspace")
    own = work.pipeline.scheduler
    own.set_timesteps(8)
    assert_close(played(made(work, solver=solver, timesteps=automatic.timesteps)), played(automatic))
    # Euler's fractional timesteps become sigmas by another interpolation than sigmas become timesteps.
    error = 2e-3 if solver == "euler" else 1e-5
    assert_close(played(made(work, solver=solver, sigmas=tuple(own.sigmas.tolist()))), played(automatic), error)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_evodiff_stands_where_dpm_does_and_predicts_the_same_data(kind: str, work: Work) -> None:
    work.pipeline.scheduler = diffusers.DDIMScheduler.from_config(own_scheduler().config, prediction_type=kind)
    for fields in ({"steps": 6, "spacing": "karras"}, {"timesteps": (900, 500, 21)}, {"sigmas": SIGMAS}):
        made(work, **fields)
        table = made(work, solver="dpm++", **fields)
        sampling = made(work, solver="evodiff", **fields)
        assert (sampling.solver, sampling.scheduler) == ("evodiff", "DPMSolverMultistepScheduler")
        assert sampling.timesteps == table.timesteps
        assert isinstance(work.pipeline.scheduler, Tabulated) and work.pipeline.scheduler.sampling == sampling
        # Without noise at the end both solvers' last step is the prediction of the last call, as diffusers makes it.
        assert sampling.levels[-1] == (1.0, 0.0)
        got, wanted = ({term[0]: term[2] for term in row.terms[-1]} for row in (sampling, table))
        assert got == pytest.approx({"sample": 0.0} | wanted, rel=1e-5, abs=1e-6)
        # The first step is DDIM's, which is DPM-Solver++'s first.
        (alpha, sigma), (after, noisy) = sampling.levels[:2]
        shrink, reach = noisy / sigma, after - alpha * noisy / sigma
        a, b = (term[2] for term in sampling.terms[0])
        first = {term[0]: term[2] for term in table.terms[0]}
        assert shrink + reach * a == pytest.approx(first["sample"], rel=1e-4)
        assert reach * b == pytest.approx(first["output"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"final_sigmas_type": "sigma_min"}, "do not fall"), ({"prediction_type": "flow_prediction"}, "one of: epsilon")],
)
def test_evodiff_refuses_a_model_that_it_cannot_walk(changes: dict[str, str], told: str, work: Work) -> None:
    # Karras' sigmas end where this model ends already.
    work.pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(own_scheduler().config, **changes)
    with pytest.raises(DiffpressError, match=f"schedule: evodiff: .*{told}") as caught:
        made(work, solver="evodiff", steps=6, spacing="karras")
    assert "\n" not in str(caught.value)


def test_sampling_may_end_above_zero(work: Work) -> None:
    short = made(work, sigmas=(14.6, 3.0, 0.7, 0.1))
    assert short.steps == 3 and np.isfinite(played(short).numpy()).all()
    assert made(work, sigmas=(14.6, 3.0, 0.7, 0.0)).terms[-1] != short.terms[-1]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps": 0}, "'steps'"),
        ({"solver": "magic"}, "'solver'"),
        ({"spacing": "random"}, "'spacing'"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": [900, 900, 100]}, "timesteps holds 900 twice"),
        ({"timesteps": [100, 900]}, "rises from 100 to 900"),
        ({"timesteps": [900, -1]}, "none below 0"),
        ({"timesteps": [float("nan")]}, "finite"),
        ({"sigmas": [1.0]}, "makes no step"),
        ({"sigmas": [2.0, 2.0, 1.0]}, "sigmas holds 2 twice"),
        ({"sigmas": [2.0, -1.0]}, "above 0"),
        ({"sigmas": [1.0, 2.0]}, "rises"),
        ({"timesteps": [900, 100], "sigmas": [2.0, 1.0]}, "keep one"),
        ({"timesteps": [900, 100], "spacing": "karras"}, "keep one"),
        ({"timesteps": [900, 100], "steps": 3}, "steps is 3, but timesteps makes 2"),
        ({"sigmas": [9.0, 1.0, 0.0], "steps": 3}, "steps is 3, but sigmas makes 2"),
    ],
)
def test_what_is_wrong_is_told_when_the_recipe_is_read(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DiffpressError, match=told) as caught:
        recipe.Recipe(name="x", passes=({"schedule": fields},)).built()
    assert "\n" not in str(caught.value) and "schedule" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"timesteps": (1000, 500)}, "timestep 1000 is outside .* from 999 to 0"),
        ({"sigmas": (20.0, 1.0, 0.0)}, "sigma 20 is outside"),
        ({"sigmas": (9.0, 0.01, 0.0)}, "sigma 0.01 is outside"),
        ({"solver": "ddim", "timesteps": (900, 500)}, "use euler"),
        ({"solver": "pndm", "sigmas": (9.0, 0.0)}, "use euler"),
        ({"solver": "heun", "sigmas": (9.0, 3.0, 0.0)}, "use euler"),
        ({"solver": "deis", "sigmas": (9.0, 3.0, 0.0)}, "divides by zero"),
        ({"solver": "deis", "timesteps": (900, 0)}, "leave it out"),
        ({"solver": "lcm", "steps": 51}, "cannot make 51 steps"),
        ({"solver": "lcm", "timesteps": (900, 500)}, "use euler"),
        ({"solver": "euler-ancestral", "search": "gits"}, "draws noise, so that it has no exact solution"),
        ({"solver": "evodiff", "timesteps": (1000, 500)}, "timestep 1000 is outside"),
        ({"solver": "ddim", "spacing": "karras"}, "choose from: linspace, leading, trailing"),
        ({"solver": "dpm++-single", "spacing": "trailing"}, "choose from: linspace, karras"),
        ({"solver": "ddim", "spacing": "trailing", "steps": 61}, "timesteps 0 to 999"),
        ({"solver": "ddim", "steps": 1000}, "cannot make 1000 steps"),
    ],
)
def test_what_does_not_fit_the_model_or_the_solver_is_refused(fields: dict[str, Any], told: str, work: Work) -> None:
    before = work.sampling
    work.trajectories = lambda *_: pytest.fail("not asked")
    with pytest.raises(DiffpressError, match=told) as caught:
        made(work, **fields)
    assert "\n" not in str(caught.value)
    assert work.sampling is before


@pytest.mark.parametrize("solver", ["ddim", "tcd"])
def test_eta_is_what_diffusers_does_with_it(solver: str, work: Work) -> None:
    plain, sampling = made(work, solver=solver, steps=6), made(work, solver=solver, steps=6, eta=0.5)
    assert sampling.stochastic and not plain.stochastic
    assert isinstance(work.pipeline.scheduler, Tabulated)  # a pipeline hands its scheduler another eta
    own = work.pipeline.scheduler.base
    step = own.step
    own.step = lambda output, t, x, generator=None, return_dict=True: step(
        output, t, x, eta=0.5, generator=generator, return_dict=return_dict
    )
    wanted = walk(own, 6)
    del own.step
    assert_close(played(sampling), wanted)
    assert_close(walk(work.pipeline.scheduler, 6), wanted)
    with pytest.raises(DiffpressError, match="euler takes no eta, ddim and tcd do"):
        SchedulePass(solver="euler", eta=0.5)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
@pytest.mark.parametrize("where", [{"steps": 6}, {"sigmas": SIGMAS}, {"timesteps": (999, 850, 700, 455, 233, 24)}])
def test_a_schedule_begins_at_any_step(solver: Any, where: dict[str, Any], work: Work) -> None:
    sampling = made(work, solver=solver, **where)
    assert len(sampling.starts) == 5 and None not in sampling.starts
    scheduler = make(solver, own_scheduler().config, explicit="steps" not in where)
    if "steps" in where:
        scheduler.set_timesteps(6)
    else:
        place(scheduler, where.get("timesteps"), where.get("sigmas"))
    scheduler.set_begin_index(2)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    assert_close(played(sampling.starting(2)), x)
    assert work.plan().made_for.sampling.starts == ()  # type: ignore[union-attr]


def test_it_has_to_come_first(work: Work) -> None:
    with pytest.raises(DiffpressError, match="has to be the first pass"):
        recipe.Recipe(name="x", passes=("quantize", {"schedule": {}})).built()
    work.quantization["conv"] = LayerQuant(np.ones(1, np.float32), np.ones(1, np.float32))
    with pytest.raises(DiffpressError, match="has to be the first pass"):
        made(work, steps=8)


def test_a_table_takes_no_other_count_and_ends(work: Work) -> None:
    sampling = made(work, timesteps=(900, 500))
    scheduler = work.pipeline.scheduler
    with pytest.raises(DiffpressError, match="2 steps"):
        scheduler.set_timesteps(3)
    walk(scheduler, 2)
    with pytest.raises(DiffpressError, match="are made"):
        scheduler.step(torch.zeros(1), 0, torch.zeros(1))
    assert playing(scheduler, sampling).base is scheduler.base
    assert set(scheduler.step.__code__.co_varnames) >= {"return_dict"} and scheduler.config.num_train_timesteps == 1000
    scheduler.set_timesteps(2)
    assert scheduler.step(torch.zeros(1, 4, 2, 2), 0, torch.ones(1, 4, 2, 2)).prev_sample.shape == (1, 4, 2, 2)

"""Plans of guidance: the numerics against brute force, the pass on a small network, and what it refuses."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress import recipe
from diffpress.compress.cache.deepcache import CachePass
from diffpress.compress.quantize.sensitivity import final_latents
from diffpress.compress.run import run
from diffpress.compress.schedule import economy, guidance
from diffpress.compress.schedule.guidance import GuidancePass
from diffpress.compress.schedule.solver import SchedulePass
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import CONDITIONAL, FULL, REUSE, LayerQuant, Sampling, StepProgram, Variant
from diffpress.runtime.sampler import sample


def test_full_steps_are_spread_evenly() -> None:
    assert economy.spread(6, 3) == [0, 2, 4] and economy.spread(7, 3) == [0, 3, 5] and economy.spread(5, 1) == [0]
    for steps, full in itertools.product(range(1, 30), range(1, 30)):
        if full <= steps:
            plan = economy.spread(steps, full)
            gaps = np.diff([*plan, steps])
            assert plan[0] == 0 and len(plan) == full and gaps.max() - gaps.min() <= 1


def cost_of(costs: np.ndarray, full: Sequence[int]) -> float:
    last, total = 0, 0.0
    for index in range(len(costs)):
        if index in full:
            last = index
        else:
            total += costs[last, index]
    return total


@pytest.mark.parametrize("limited", [False, True])
def test_the_shortest_path_is_the_best_of_all_plans(limited: bool) -> None:
    random = np.random.default_rng(0)
    for steps, full in itertools.product((1, 2, 5, 8), (1, 2, 3, 5, 8)):
        costs = random.uniform(0.1, 1, (steps, steps))
        # The steps that may be full after refresh j are those whose last writer is no later than j.
        earliest = [int(random.integers(0, index + 1)) for index in range(steps)] if limited else [0] * steps
        plans = [
            (0, *rest)
            for count in range(min(full, steps))
            for rest in itertools.combinations(range(1, steps), count)
            if all(earliest[k] <= j for j, k in itertools.pairwise((0, *rest)))
        ]
        found = economy.refreshes(costs, full, earliest if limited else None)
        assert tuple(found) in plans
        assert cost_of(costs, found) == pytest.approx(min(cost_of(costs, plan) for plan in plans))
    with pytest.raises(DiffpressError, match="at least one step"):
        economy.refreshes(np.ones((3, 3)), 0)


def test_what_may_be_refreshed_follows_from_what_is_read() -> None:
    variants = {FULL: Variant(writes=("deep",)), "cached": Variant(reads=("deep",)), "plain": Variant()}
    program = StepProgram((FULL, "cached", FULL, "cached", "plain", "cached"), variants)
    assert economy.earliest_refresh(program) == [0, 0, 0, 2, 0, 2]


def test_the_earliest_refresh_of_steps_that_read_two_features_and_earlier_values() -> None:
    variants = {
        FULL: Variant(writes=("a", "b")),
        "cached": Variant(reads=("a", "a@1"), writes=("b",)),
        "cached_2": Variant(reads=("a", "b", "b@1")),
    }
    program = StepProgram((FULL, FULL, "cached", "cached_2", FULL, "cached_2"), variants)
    assert economy.earliest_refresh(program) == [0, 0, 1, 2, 0, 4]


def test_effects_are_how_the_last_sample_changes_with_an_output(work: Work) -> None:
    run([("schedule", SchedulePass(steps=7, spacing="karras"))], scheduled(work))
    sampling = work.sampling

    def last(bump: int) -> float:
        def denoise(index: int, scaled: np.ndarray, timestep: float) -> np.ndarray:
            return np.full((1, 1, 1, 1), float(index == bump), np.float32)

        *_, end = sample(sampling, denoise, np.zeros((1, 1, 1, 1), np.float32))
        return float(end.item())

    np.testing.assert_allclose(economy.effects(sampling), [abs(last(i)) for i in range(7)], rtol=1e-4, atol=1e-6)


def test_distances_are_means_over_images() -> None:
    differences = [torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    got = economy.distances(differences)
    assert got.shape == (3, 3) and not np.diag(got).any()
    norms = [float(np.linalg.norm((differences[0][n] - differences[2][n]).numpy())) for n in range(3)]
    assert got[0, 2] == pytest.approx(float(np.mean(norms))) and got[2, 0] == pytest.approx(got[0, 2])


def test_neighbours_move_one_refresh_by_one_step() -> None:
    assert economy.neighbours([0, 2, 3], 5) == [[0, 1, 3], [0, 2, 4]]
    assert economy.neighbours([0], 4) == []


def applied(work: Work, **fields: Any) -> str:
    return run([("guidance", GuidancePass(**fields))], work)[0].summary


def test_uniform_plans(work: Work) -> None:
    summary = applied(work, every=2)
    assert work.program == StepProgram((FULL,) * 4, guidance=(FULL, REUSE) * 2)
    assert "2 of 4 steps" in summary and "#-#-" in summary and "75% of the work" in summary
    work.program = StepProgram((FULL,) * 4)
    applied(work, budget=0.75)
    assert work.program.guidance_marks() == "#-##"
    assert work.plan().program.guidance == work.program.guidance


def test_an_interval_of_noise_levels(work: Work) -> None:
    alphas = scheduled(work).pipeline.scheduler.alphas_cumprod
    levels = [float((1 / alphas[int(t)] - 1) ** 0.5) for t in work.sampling.timesteps]
    applied(work, mode="interval", sigmas=(levels[3] * 1.001, levels[1] * 1.001))
    assert work.program.guidance == (CONDITIONAL, FULL, FULL, CONDITIONAL)


def errors_of(work: Work, plans: Sequence[tuple[str, ...]], prompts: int = 2) -> dict[tuple[str, ...], float]:
    """Of the final latents, by the plain loop, for every plan."""
    calls = list(work.record())
    texts = [calls[0], calls[2]][:prompts]
    steps = (FULL,) * len(work.sampling.timesteps)
    wanted = final_latents(work, texts, StepProgram(steps))
    found = {}
    for plan in plans:
        got = final_latents(work, texts, StepProgram(steps, guidance=plan))
        found[plan] = float(np.mean([(a - b).norm() / b.norm() for a, b in zip(got, wanted, strict=True)]))
    return found


def test_the_calibrated_interval_is_the_best_of_all(work: Work) -> None:
    summary = applied(work, mode="interval", budget=0.5)
    plans = [tuple(FULL if s <= i < s + 2 else CONDITIONAL for i in range(4)) for s in range(3)]
    errors = errors_of(work, plans)
    assert work.program.guidance == min(errors, key=errors.__getitem__)
    assert f"{errors[work.program.guidance]:.2%} from the latents of full guidance" in summary


def test_the_calibrated_reuse_is_no_worse_than_uniform_and_goes_on(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    applied(work, plan="calibrated", every=2)
    plans = [economy.guidance_of(4, (0, k), REUSE) for k in (1, 2, 3)]
    errors = errors_of(work, plans)
    assert work.program.guidance == min(errors, key=errors.__getitem__)  # three plans, next to each other
    first, work.program = work.program, StepProgram((FULL,) * 4)
    # What was measured is read: nothing runs again.
    monkeypatch.setattr(guidance, "final_latents", lambda *_: pytest.fail("measured again"))
    applied(work, plan="calibrated", every=2)
    assert work.program == first


def test_trials_are_counted(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    real = guidance.final_latents
    monkeypatch.setattr(guidance, "final_latents", lambda *given: runs.append(given) or real(*given))  # type: ignore[func-returns-value]
    applied(work, plan="calibrated", every=2, trials=1, prompts=1)
    assert len(runs) == 3  # the differences, the reference, the uniform plan
    assert work.program.guidance == economy.guidance_of(4, (0, 2), REUSE)


def test_prompts_are_sampled_in_batches_as_if_they_were_one(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = guidance._Trials(work, 2, 9)
    wanted, apart = torch.stack(whole._latents()), whole.distances()
    monkeypatch.setattr(guidance, "BATCH", 1)
    work.scratch = work.scratch / "other"
    single = guidance._Trials(work, 2, 9)
    torch.testing.assert_close(torch.stack(single._latents()), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(single.distances(), apart, rtol=1e-3)


def test_a_plan_fits_the_cache_that_stands(work: Work) -> None:
    run([("cache", CachePass(interval=2, branch=0))], work)
    with pytest.raises(DiffpressError, match=r"guidance: step 3 computes both halves .* step 2 wrote feature 'up_0'"):
        GuidancePass(every=3).requires(work)
    applied(work, plan="calibrated", every=2)
    assert work.program.marks() == "#-#-" and work.program.guidance_marks() in ("#-#-", "##--")


def test_a_schedule_comes_before_and_a_cache_and_layers_after(work: Work) -> None:
    run([("schedule", SchedulePass(steps=6, spacing="karras")), ("guidance", GuidancePass())], scheduled(work))
    with pytest.raises(DiffpressError, match="has to be the first pass"):
        SchedulePass(steps=5).requires(work)
    run([("cache", CachePass(interval=2, branch=0))], work)
    assert (work.program.marks(), work.program.guidance_marks()) == ("#-#-#-", "#-#-#-")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"every": 2, "budget": 0.5}, "every and budget both say"),
        ({"budget": 0.5, "sigmas": (1.0, 2.0), "mode": "interval"}, "budget and sigmas both say"),
        ({"every": 1}, "'every'"),
        ({"budget": 1.0}, "'budget'"),
        ({"mode": "interval", "plan": "uniform"}, "an interval is not uniform"),
        ({"sigmas": (1.0, 2.0)}, "sigmas are for mode interval"),
        ({"mode": "interval", "sigmas": (2.0, 1.0)}, "the lower one first"),
        ({"mode": "drop"}, "'mode'"),
        ({"prompts": 0}, "'prompts'"),
    ],
)
def test_what_is_wrong_is_told_when_the_recipe_is_read(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DiffpressError, match=told) as caught:
        recipe.Recipe(name="x", passes=({"guidance": fields},)).built()
    assert "\n" not in str(caught.value) and "guidance" in str(caught.value)


def test_what_does_not_fit_is_refused(work: Work) -> None:
    def told(text: str, **fields: Any) -> None:
        with pytest.raises(DiffpressError, match=text) as caught:
            GuidancePass(**fields).requires(work)
        assert "\n" not in str(caught.value)

    told("nothing is left out of 4 steps", plan="calibrated", budget=0.9)
    told("nothing is left out of 4 steps", budget=0.9)
    work.quantization["conv"] = LayerQuant(np.ones(1, np.float32), np.ones(1, np.float32))
    told("before passes that calibrate layers")
    work.quantization.clear()
    work.program = StepProgram((FULL,) * 4, guidance=(FULL, REUSE) * 2)
    told("an earlier pass planned guidance")
    work.program = StepProgram((FULL,) * 4)
    work.sampling = Sampling.from_json({**work.sampling.to_json(), "guidance_scale": 1.0})
    told("guidance_scale 1 runs one half")
    scheduled(work)
    work.sampling = Sampling.from_json({**work.sampling.to_json(), "guidance_scale": 3.0})
    told("no step lies within these sigmas", mode="interval", sigmas=(500.0, 600.0))
    told("nothing is left out", mode="interval", sigmas=(0.0, 600.0))


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def scheduled(work: Work) -> Work:
    work.pipeline.scheduler = scheduler()
    return work

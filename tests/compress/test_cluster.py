"""Steps that share variants: as good as trying everything, never more than a step may take, and programs that run."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.calibration.model import load_pipeline
from diffpress.compress.cache import cluster
from diffpress.compress.cache.cluster import Taken, clustered, program_from
from diffpress.compress.families.unet_graph import WHOLE, modules
from diffpress.plan import FULL, REUSE, StepProgram

NAMES = "abcdef"


def weight(taken: Taken, weights: dict[str, float]) -> float:
    return sum(weights[name] for name in taken)


def kept(sets: Sequence[Taken], weights: dict[str, float], rows: Sequence[float]) -> float:
    return sum(row * weight(taken, weights) for row, taken in zip(rows, sets, strict=True))


def brute(sets: Sequence[Taken], weights: dict[str, float], rows: Sequence[float], most: int) -> float:
    """Every choice of variants among all subsets of all names."""
    variants = [frozenset(c) for n in range(1, len(weights) + 1) for c in itertools.combinations(sorted(weights), n)]
    return max(
        sum(
            row * max((weight(one, weights) for one in chosen if one <= own), default=0.0)
            for row, own in zip(rows, sets, strict=True)
        )
        for chosen in itertools.combinations(variants, min(most, len(variants)))
    )


def cases(count: int, names: str) -> list[tuple[list[Taken], dict[str, float], list[float]]]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        sets = [frozenset(n for n in names if random.random() < 0.6) for _ in range(random.integers(1, 9))]
        weights = {name: float(random.uniform(0.1, 3)) for name in names}
        found.append((sets, weights, [float(random.choice([0.5, 1.0])) for _ in sets]))
    return found


@pytest.mark.parametrize("most", [1, 2, 3])
def test_clusters_are_the_best_of_all(most: int) -> None:
    for sets, weights, rows in cases(12, NAMES[:4]):
        got = clustered(sets, weights, most, rows)
        assert all(taken <= own for taken, own in zip(got, sets, strict=True))
        assert len(set(got) - {frozenset()}) <= most
        assert kept(got, weights, rows) == pytest.approx(brute(sets, weights, rows, most))


def test_greedy_choice_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for sets, weights, rows in cases(30, NAMES):
        best = kept(clustered(sets, weights, 3, rows), weights, rows)
        with monkeypatch.context() as patched:
            patched.setattr(cluster, "EXACT", 0)
            patched.setattr(cluster, "CANDIDATES", 4)
            got = clustered(sets, weights, 3, rows)
        assert all(taken <= own for taken, own in zip(got, sets, strict=True)) and len(set(got) - {frozenset()}) <= 3
        shares.append(kept(got, weights, rows) / best if best else 1.0)
    assert min(shares) > 1 - 1 / np.e and np.mean(shares) > 0.97


def test_few_sets_stay_as_they_are() -> None:
    weights = dict.fromkeys(NAMES, 1.0)
    sets = [frozenset(), frozenset("ab"), frozenset("c"), frozenset(), frozenset("ab"), frozenset("def")]
    assert clustered(sets, weights) == sets
    assert clustered([frozenset()] * 3, weights) == [frozenset()] * 3
    # A step that alone has its variant does without it where three others keep more.
    crowded = [*sets, frozenset("cd"), frozenset("cd")]
    assert clustered(crowded, weights)[2] == frozenset()
    same = clustered([frozenset("ab"), frozenset("abc")], {**weights, "c": 0.0})
    assert len(set(same)) == 1  # nothing is gained by another variant


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline)).unet


def test_a_program_of_many_sets_has_four_variants(unet: Any) -> None:
    names = list(modules(unet))[:6]
    sets = [frozenset(), *(frozenset(names[:count]) for count in range(1, 7)), frozenset({WHOLE}), frozenset()]
    work: Any = SimpleNamespace(denoiser=unet, program=StepProgram((FULL,) * len(sets)))
    program, share = program_from(work, sets, dict.fromkeys([*names, WHOLE], 1.0))
    assert len(program.variants) == 4 and 0.5 < share < 1
    for step, own in zip(program.steps, sets, strict=True):
        assert set(program.variants[step].reads) <= own


def test_both_halves_of_guidance_do_not_read_what_one_wrote(unet: Any) -> None:
    one, other = list(modules(unet))[:2]
    sets = [frozenset(), frozenset({one}), frozenset({one, other}), frozenset({one, other})]
    guidance = (FULL, REUSE, FULL, REUSE)
    work: Any = SimpleNamespace(denoiser=unet, program=StepProgram((FULL,) * 4, guidance=guidance))
    program, share = program_from(work, sets, {one: 2.0, other: 1.0})
    taken = [set(program.variants[step].reads) for step in program.steps]
    # Step 1 computed `other` for the conditional half: step 2 computes it again.
    assert taken == [set(), {one}, {one}, {one, other}] and program.guidance == guidance
    assert share == pytest.approx((0.5 * 2 + 2 + 0.5 * 3) / (0.5 * 2 + 3 + 0.5 * 3))

"""Align Your Steps: noise levels that bound the divergence between the stepped and the exact reverse process.

Sabour et al. 2024, Align Your Steps: Optimizing Sampling Schedules in Diffusion Models. With x = x0 + t eps, t the
noise level sigma, and D(x, t) the denoiser, a first-order solver holds D constant from t_i down to t_(i+1). Girsanov's
theorem bounds what that costs, in nats, with x_(t_i) = x_t + sqrt(t_i^2 - t^2) eps (equation 10):

    KL <= KLUB = sum_i integral over t in [t_(i+1), t_i] of t^-3 E|D(x_t, t) - D(x_(t_i), t_i)|^2 dt.

Sigmas run from large to small here, as in diffusers; the paper counts up. For data N(0, c^2) in d dimensions
D = c^2 x / (t^2 + c^2), the expectation is d c^4 (1 / (t^2 + c^2) - 1 / (t_i^2 + c^2)) (lemma 3.3), and with
r_i = (1 + c^2 / t_(i+1)^2) / (1 + c^2 / t_i^2) the integral has the closed form

    KLUB = d / 2 sum_i (r_i - 1 - log r_i).                                                                    (G)

The r_i have a fixed product and r - log r is convex in log r, so the best schedule has equal ones: `surrogate`. (The
paper's equation 31 is the same condition, for one point between its neighbours.) The integrand of (G) is also the
density that t is drawn from where the data are not Gaussian.

The bound is on paths. The schedule of the very least bound spends its steps too late for the images at the end (the
paper's Appendix A.3): judge rounds by a score, or weigh early steps, see `optimise` and `klub_matrix`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffpress.compress.schedule.gits import Denoise
from diffpress.compress.schedule.sigmas import checked
from diffpress.errors import DiffpressError

# Draws of x0 + sigma eps [n, ...] for n and sigma [n]. The two `denoise` calls that follow are about the same n rows.
SampleAt = Callable[[int, Tensor, torch.Generator], Tensor]
SPREAD = 0.5  # c of the importance distribution, in units of the data (Section 3.3)
NARROWEST = 1 / 8  # of the distance to a neighbour: the smallest neighbourhood that candidates are taken from


def table(name: str) -> list[float]:
    """The paper's sigmas for "StableDiffusion", "StableDiffusionXL" or "StableDiffusionVideo": ten and a final zero."""
    from diffusers.schedulers import AysSchedules

    names = sorted(key.removesuffix("Sigmas") for key in AysSchedules if key.endswith("Sigmas"))
    if name not in names:
        raise DiffpressError(f"there is no Align Your Steps table '{name}': choose one of {', '.join(names)}")
    return [float(sigma) for sigma in AysSchedules[f"{name}Sigmas"]]


def interpolated(sigmas: Sequence[float], steps: int, sigma_min: float | None = None) -> list[float]:
    """`sigmas` (n + 1 values) at another number of steps: steps + 1 values, log sigma linear in the index.

    A final zero has no logarithm: the model's `sigma_min` takes its place meanwhile, as in the paper's own tables.
    Twice the steps is a logarithmic midpoint in every interval.
    """
    values = checked(sigmas, zero_allowed=True)
    ends_in_zero = values[-1] == 0
    if ends_in_zero:
        if sigma_min is None or not 0 < sigma_min < values[-2]:
            raise DiffpressError(
                "sigmas that end in zero are interpolated towards the smallest of the model: "
                f"give sigma_min between 0 and {values[-2]:g}"
            )
        values[-1] = sigma_min
    if steps < 1:
        raise DiffpressError(f"a schedule has at least one step, not {steps}")
    places = np.linspace(0, len(values) - 1, steps + 1)
    found = np.exp(np.interp(places, np.arange(len(values)), np.log(values)))
    return [values[0], *found[1:-1].tolist(), 0.0 if ends_in_zero else values[-1]]


def surrogate(sigma_max: float, sigma_min: float, steps: int, c: float) -> list[float]:
    """The steps + 1 sigmas of least KLUB for data N(0, c^2): log(1 + c^2 / sigma^2) is linear in the index."""
    if steps < 1:
        raise DiffpressError(f"a schedule has at least one step, not {steps}")
    first, last = checked([sigma_max, sigma_min])
    inner = np.linspace(math.log1p((c / first) ** 2), math.log1p((c / last) ** 2), steps + 1)[1:-1]
    return [first, *(c / np.sqrt(np.expm1(inner))).tolist(), last]


def gaussian_klub(sigmas: Sequence[float], c: float) -> float:
    """The KLUB, in nats per dimension, for data N(0, c^2): equation (G)."""
    logs = np.diff(np.log1p((c / np.array(checked(sigmas))) ** 2))
    return float((np.expm1(logs) - logs).sum() / 2)


def klub(
    denoise: Denoise,
    sample_at: SampleAt,
    sigmas: Sequence[float],
    samples: int,
    generator: torch.Generator,
    c: float = SPREAD,
) -> float:
    """Monte Carlo estimate of the KLUB of `sigmas`, in nats, from 2 * `samples` evaluated rows (algorithm 2).

    t is drawn, stratified, from the density that (G) has for data N(0, c^2); there every sample has the same mean.
    """
    ones = 1 + (c / torch.tensor(checked(sigmas), dtype=torch.float64)) ** 2
    logs = ones.log().diff()
    mass = (torch.expm1(logs) - logs) / 2
    ends = mass.cumsum(0)
    # Permuted, so that no row of `sample_at` always meets the same t.
    places = torch.randperm(samples, generator=generator) + torch.rand(
        samples, generator=generator, dtype=torch.float64
    )
    reached = places / samples * ends[-1]
    segment = torch.searchsorted(ends, reached).clamp_max(len(mass) - 1)
    # Within the segment: the log ratio l at which e^l - 1 - l is twice the mass passed. Newton's method falls
    # to it from above: l^2 / 2 <= e^l - 1 - l and l <= log r, the segment's, bound the start.
    inside = 2 * (reached - (ends - mass)[segment]).clamp_min(0)
    height = torch.minimum((2 * inside).sqrt(), torch.log1p(inside + logs[segment])).clamp_min(1e-12)
    for _ in range(8):
        slope = torch.expm1(height)
        height = (height - (slope - height - inside) / slope).clamp_min(1e-12)
    start = ones[segment]
    expected = -torch.expm1(-height) * c**2 / start  # lemma 3.3, per dimension
    t, upper = c / (start * height.exp() - 1).sqrt(), c / (start - 1).sqrt()

    x = sample_at(samples, t.float(), generator)
    more = (upper.square() - t.square()).clamp_min(0).sqrt().to(x).reshape(-1, *[1] * (x.ndim - 1))
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    change = denoise(x, t.to(x)) - denoise(x + more * noise, upper.to(x))
    return float((change.flatten(1).double().square().sum(1).cpu() / expected).mean() * ends[-1])


@dataclass(frozen=True)
class Progress:
    """Where `optimise` stands after a round. Plain numbers: `dataclasses.asdict` stores it."""

    sigmas: tuple[float, ...]
    level: int = 0  # how often the number of steps was doubled
    round: int = 0  # rounds done at this level
    klub: float = math.nan  # of `sigmas`, in nats; always estimated with the same draws within a level
    ended: bool = False  # `sigmas` are this level's result
    best: tuple[float, ...] = ()  # of least score, where rounds are scored
    score: float = math.inf  # of `best`
    stale: int = 0  # rounds since `best`


def optimise(
    denoise: Denoise,
    sample_at: SampleAt,
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    samples: int = 256,
    c: float = SPREAD,
    candidates: int = 11,
    rounds: int = 20,
    tolerance: float = 3e-3,
    doublings: int = 0,
    score: Callable[[Sequence[float]], float] | None = None,
    patience: int = 2,
    start: Progress | None = None,
) -> Iterator[Progress]:
    """Coordinate search for the least KLUB from `sigmas`, one `Progress` a round (Appendix B.1, algorithm 1).

    Every point tries `candidates` places between its neighbours, itself among them, all on the same draws; the
    neighbourhood halves each round down to an eighth. A level ends after `rounds`, or when no point gains more than
    `tolerance` (a ratio) in the smallest neighbourhood, or, with a `score` (less is better), after `patience` rounds
    without a better one, and then returns to the best: paths that are aligned too well make ends that are not
    (Appendix A.3). Then the steps double, `doublings` times, and only the new points move.

    A round costs about 2 * samples * candidates evaluated rows for each point that moves. `start`, a Progress that was
    yielded before, goes on from there and gives what an uninterrupted run with the same arguments gives.
    """

    def bound(sigmas: Sequence[float], *place: int) -> float:
        draws = int(np.random.SeedSequence((seed, *place)).generate_state(1)[0])  # the same for the same place
        return klub(denoise, sample_at, sigmas, samples, torch.Generator().manual_seed(draws), c)

    state = start or Progress(tuple(checked(sigmas)))
    while True:
        if state.ended:
            if state.level >= doublings:
                return
            finer = interpolated(state.sigmas, 2 * (len(state.sigmas) - 1))
            state = Progress(tuple(finer), state.level + 1)
        if score is not None and state.level == 0 and not state.best:
            state = replace(state, best=state.sigmas, score=score(state.sigmas))
        width = max(0.5**state.round, NARROWEST)
        shares = np.linspace(-1, 1, 2 * (candidates // 2) + 3)[1:-1] * width
        points, moved = list(state.sigmas), False
        for i in range(1, len(points) - 1, 1 if state.level == 0 else 2):
            place = (state.level, state.round, i)
            others = [_between(points[i - 1 : i + 2], share) for share in shares if share]
            bounds = [bound([points[i - 1], other, points[i + 1]], *place) for other in others]
            least = int(np.argmin(bounds))
            if bounds[least] < (1 - tolerance) * bound(points[i - 1 : i + 2], *place):
                points[i], moved = others[least], True
        total = bound(points, state.level)
        state = replace(state, sigmas=tuple(points), round=state.round + 1, klub=total)
        ended = state.round >= rounds or (not moved and width == NARROWEST)
        if score is not None and state.level == 0:
            value = score(state.sigmas)
            if value < state.score:
                state = replace(state, best=state.sigmas, score=value, stale=0)
            else:
                state = replace(state, stale=state.stale + 1)
            ended = ended or state.stale >= patience
            if ended:
                state = replace(state, sigmas=state.best)
        state = replace(state, ended=ended)
        yield state


def _between(three: Sequence[float], share: float) -> float:
    """The middle of three sigmas, moved by a share in (-1, 1) of the logarithmic distance to a neighbour."""
    other = three[0] if share > 0 else three[2]
    return float(three[1] * (other / three[1]) ** abs(share))


def noised(x0: Tensor, sigmas: Sequence[float], generator: torch.Generator) -> Iterator[Tensor]:
    """One path of the forward process over `sigmas`: x [N, ...] at the smallest first, each with more noise on it."""
    x, before = x0, 0.0
    for sigma in reversed(checked(sigmas)):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        x = x + math.sqrt(sigma**2 - before**2) * noise
        before = sigma
        yield x


def klub_matrix(denoised: Tensor, sigmas: Sequence[float], c: float = SPREAD) -> Tensor:
    """The KLUB [P, P] of one step from sigma_i to sigma_j > i, in nats, from D [P, N, ...] along `noised` paths.

    Our addition: bounds of steps add up (equation 11), so that P * N evaluated rows and `shortest(costs, steps, gamma)`
    give the schedule of least bound on the grid for every number of steps (gamma 1), where `optimise` takes many more
    rows for one. A gamma of 0.6 to 0.8 weighs early steps more, which stands for the early stop; choose it by a score.
    Between two points of the grid the ratio to the Gaussian integrand is linear, which is exact for data N(0, c^2).
    """
    ones = 1 + (c / torch.tensor(checked(sigmas), dtype=torch.float64)) ** 2
    if len(denoised) != len(ones):
        raise DiffpressError(f"{len(ones)} sigmas and {len(denoised)} rows of denoised samples do not fit together")
    flat = denoised.reshape(len(ones), -1).double()
    gram = (flat @ flat.T).cpu() / denoised.shape[1]
    squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram  # E|D_i - D_j|^2
    costs = torch.zeros_like(gram)
    for i in range(len(ones) - 1):
        logs = (ones[i + 1 :] / ones[i]).log()
        ratio = squares[i, i + 1 :] / (-torch.expm1(-logs) * c**2 / ones[i])
        cells = ((torch.expm1(logs) - logs) / 2).diff(prepend=torch.zeros(1, dtype=torch.float64))
        # At the step's own start both integrands are zero: its ratio is the nearest one's.
        costs[i, i + 1 :] = (cells * (ratio + torch.cat([ratio[:1], ratio[:-1]])) / 2).cumsum(0)
    return costs

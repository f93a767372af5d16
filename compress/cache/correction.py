"""Least-squares corrections of cached features: what the float network would compute, from what was kept.

Liu et al. 2025, "CacheQuant: Comprehensively Accelerated Diffusion Models", decoupled error correction: per channel and
cached step a regression of the true feature on the cached one. Here its target is the float network's feature, so that
one table undoes the cache's error and the quantization error of what was kept. At depth 2 the value before the last one
is a second regressor: an extrapolation (Liu et al. 2025, TaylorSeer) whose coefficients are measured.

Features are fitted along the trajectory that they correct: images of calibration prompts go through the sampler
together, and each step takes the corrected feature before the next one is fitted. One half of the prompts fits, the
other half judges which depth a feature of a step gets, if any. Steps at one timestep, which PNDM has, take what the
first of them that reads found: nothing tells the denoiser's calls there apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffpress.calibration.conditions import Text
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.cache.execute import CachedDenoiser
from diffpress.compress.cache.program import program_of
from diffpress.compress.families.unet_graph import UNetGraph
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.schedule.stepping import Trajectory, first_calls, start
from diffpress.compress.work import Work, require_prompts
from diffpress.errors import DiffpressError
from diffpress.plan import EARLIER, FULL, Correction, Corrections, StepProgram

NAME = "cache-correct"  # of the rows in `work.tables`
FEWEST_PROMPTS = 2  # one finds, the other judges
RIDGE = 1e-8  # of a regressor's mean square: keeps constant channels finite and is not seen in others
SMALLEST = 1e-30  # a mean square below it is none


def gram(value: Tensor, earlier: Tensor | None, target: Tensor) -> Tensor:
    """All that least squares need: sums of products [C, K, K] of (value, earlier if any, 1, target - value).

    Features are [N, C, H, W] or [N, tokens, C]. The sums add up, over batches and over channels.
    """
    value, target = value.double(), target.double()
    regressors = [value, *([] if earlier is None else [earlier.double()]), torch.ones_like(value)]
    columns = torch.stack([*regressors, target - value])  # the difference: what is alike has a residual of 0 exactly
    columns = columns.movedim(2 if value.ndim == 4 else -1, 0).flatten(2)  # [C, K, positions]
    return columns @ columns.mT


def solve(sums: Tensor, depth: int) -> Tensor:
    """[C, depth + 1]: the scales and the offset of the least error, from `gram` of at least this depth.

    Scales are drawn to (1, 0) by `RIDGE`; where nothing tells otherwise, and where there is no error, they are that.
    """
    columns = [*range(depth), -2, -1]
    second = (sums / sums[:, -2:-1, -2:-1])[:, columns][:, :, columns]
    mean = second[:, :, -2]
    covariance = second - mean[:, :, None] * mean[:, None, :]
    ridge = (RIDGE * second.diagonal(dim1=1, dim2=2)[:, :depth]).clamp_min(SMALLEST)
    left = covariance[:, :depth, :depth] + torch.diag_embed(ridge)
    change = torch.linalg.solve(left, covariance[:, :depth, -1:])[..., 0]
    offset = mean[:, -1] - (change * mean[:, :depth]).sum(dim=1)
    change[:, 0] += 1
    return torch.cat([change, offset[:, None]], dim=1)


def error(sums: Tensor, coefficients: Tensor) -> float:
    """|target - corrected| / |target| of the features behind `gram`'s sums, for `solve`'s coefficients or others."""
    columns, depth = sums.shape[1], coefficients.shape[1] - 1
    weights = sums.new_zeros(len(sums), columns)
    weights[:, :depth], weights[:, -2], weights[:, -1] = -coefficients[:, :depth], -coefficients[:, -1], 1.0
    weights[:, 0] += 1  # target - a value = (target - value) - (a - 1) value
    target = torch.zeros_like(weights)
    target[:, [0, -1]] = 1.0
    squares = [float(torch.einsum("ci,cij,cj->", w, sums, w).clamp_min(0)) for w in (weights, target)]
    return (squares[0] / squares[1]) ** 0.5 if squares[1] else squares[0] ** 0.5


def neutral(program: StepProgram, timesteps: Sequence[float], depth: int = 1) -> Corrections:
    """Corrections that change nothing, of every feature that `program` reads; their depth says what is read."""
    scale = np.zeros((len(timesteps), depth, 1), np.float32)
    scale[:, 0] = 1.0
    names = dict.fromkeys(name for variant in program.variants.values() for name in variant.features)
    entry = Correction(scale, np.zeros((len(timesteps), 1), np.float32))
    return Corrections(tuple(timesteps), dict.fromkeys(names, entry))


def reading(unet: Any, program: StepProgram, corrections: Corrections | None) -> StepProgram:
    """`program` with the reads and writes that `corrections` ask for.

    Raises `DiffpressError` where a step reads a feature's earlier value that there is not yet: see `warmed`.
    """
    reads = [program.variants[name].features for name in program.steps]
    together = max(variant.together for variant in program.variants.values())
    return program_of(unet, reads, program.guidance, corrections, together)


def warmed(unet: Any, program: StepProgram) -> StepProgram:
    """`program` with steps made full until all that a step reads was computed twice: what depth 2 asks for."""
    wanted = {name for variant in program.variants.values() for name in variant.features}
    known: Counter[str] = Counter()
    graphs: dict[tuple[str, ...], UNetGraph] = {}
    reads = []
    for step in program.steps:
        features = program.variants[step].features
        taken = features if all(known[name] > 1 for name in features) else ()
        if taken not in graphs:
            graphs[taken] = UNetGraph(unet, taken)
        known.update(name for name in wanted if graphs[taken].computes(name))
        reads.append(taken)
    together = max(variant.together for variant in program.variants.values())
    return program_of(unet, reads, program.guidance, together=together)


def fit(
    work: Work, program: StepProgram, depth: int = 1, per_channel: bool = True, prompts: int | None = None
) -> Corrections:
    """Corrections of every feature that `program` reads, found on the first `prompts` calibration prompts (all, if
    None) along the trajectory of `program` itself, with `work.quantization` active.

    With depth 2 a feature's correction has depth 2 if some step gains by it; make the program that runs with
    `reading(unet, program, corrections)`. `work.tables["cache-correct"]` gets a row per step and feature: the relative
    errors `before` and `after` on the prompts that judge, and the `depth` that was kept, 0 where nothing gains.

    Raises `DiffpressError` for less than two prompts, for depth 2 where a step reads what was computed only once (see
    `warmed`), and where the float model cannot be opened anew though the work's is quantized.
    """
    calls = first_calls(work.recorded(), prompts)
    require_prompts(NAME, FEWEST_PROMPTS, len(calls))
    timesteps = work.sampling.timesteps
    provisional = neutral(program, timesteps, depth)
    program = reading(work.denoiser, program, provisional)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    rows: list[dict[str, Any]] = []
    with on_fastest_device(work.denoiser):
        exact = reference(work).to(work.denoiser.device)
        walks = start(work.sampling, calls, work.seed, work.denoiser.device)
        with simulated(work.denoiser, work.quantization, timesteps), torch.no_grad():
            running = [CachedDenoiser(work.denoiser, program, provisional) for _ in walks]
            for index in work.progress(range(len(timesteps)), "correcting cached features"):
                names = program.variants[program.steps[index]].features
                twins = [step for step, timestep in enumerate(timesteps) if timestep == timesteps[index]]
                if names:
                    halves = 2 if program.guided(index) == FULL else 1
                    sums = _sums(walks, running, UNetGraph(exact, writes=names), halves, depth, len(calls) // 2)
                    for name, (fitting, judging) in sums.items():
                        if not per_channel:
                            fitting, judging = (each.sum(dim=0, keepdim=True) for each in (fitting, judging))
                        scale, offset = found.setdefault(name, _ones(len(timesteps), depth, len(fitting)))
                        row = next((row for row in rows if row["step"] in twins and row["feature"] == name), None)
                        if row is None:
                            best, row = _best(fitting, judging, depth)
                            scale[twins, : best.shape[1] - 1] = best[:, :-1].T.cpu().numpy()
                            offset[twins] = best[:, -1].cpu().numpy()
                        else:
                            kept = torch.from_numpy(np.concatenate([scale[index], offset[index][None]])).T
                            row = {**row, **_errors(judging, kept.to(judging))}
                        rows.append({**row, "step": index, "feature": name})
                    corrected = {**provisional.features, **{name: Correction(*entry) for name, entry in found.items()}}
                    for each in running:
                        each.correct(Corrections(timesteps, corrected))
                for walk, each in zip(walks, running, strict=True):
                    walk.advance(walk.output(each))
    work.tables[NAME] = rows
    return Corrections(timesteps, {name: _least(*entry) for name, entry in found.items()})


def reference(work: Work) -> Any:
    """The network whose features are the true ones: the float model, as it was read where the work's is quantized."""
    if not work.quantization:
        return work.denoiser
    if work.original is None:
        raise DiffpressError(f"{NAME}: the float model cannot be opened anew here, which features are compared with")
    return work.original()


def told(rows: Iterable[Mapping[str, Any]]) -> str:
    """The errors of `fit`'s rows for people: the root mean squares over steps and features, before and after."""
    entries = list(rows)
    means = [(sum(row[key] ** 2 for row in entries) / len(entries)) ** 0.5 for key in ("before", "after")]
    kept = sum(row["depth"] > 0 for row in entries)
    return f"relative error of features {means[0]:.2%} before and {means[1]:.2%} after, {kept} of {len(entries)} gain"


def _sums(
    walks: Sequence[Trajectory],
    running: Sequence[CachedDenoiser],
    graph: UNetGraph,
    halves: int,
    depth: int,
    fitted: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """`gram` of what `graph` writes, of the first `fitted` prompts and of the others, at the call walks stand at."""
    found: dict[str, list[list[Tensor]]] = {name: [[], []] for name in graph.writes}
    first = 0
    for walk, each in zip(walks, running, strict=True):
        count, true = len(walk.sample), _true(walk, graph, halves)
        for name, target in zip(graph.writes, true, strict=True):
            values = [each.features[key][-len(target) :] for key in (name, name + EARLIER)[:depth]]
            # Rows are halves of guidance, then prompts.
            parts = [tensor.unflatten(0, (-1, count)) for tensor in (*values, target)]
            middle = min(max(fitted - first, 0), count)
            for half, chosen in enumerate((slice(0, middle), slice(middle, count))):
                cut = [part[:, chosen].flatten(0, 1) for part in parts]
                if len(cut[0]):
                    found[name][half].append(gram(cut[0], cut[1] if depth > 1 else None, cut[-1]))
        first += count
    return {
        name: (torch.stack(fitting).sum(dim=0), torch.stack(judging).sum(dim=0))
        for name, (fitting, judging) in found.items()
    }


def _true(walk: Trajectory, graph: UNetGraph, halves: int) -> list[Tensor]:
    """What `graph` writes for the sample that `walk` stands at; of the conditional half alone where `halves` is 1."""
    kept: list[Tensor] = []

    def denoiser(sample: Tensor, timestep: float, text: Text, return_dict: bool) -> tuple[Tensor]:
        rows = min(len(sample), halves * len(walk.sample))
        time = torch.tensor([timestep], dtype=torch.float32, device=sample.device)
        output, *features = graph(sample[-rows:], time, text[-rows:])
        kept.extend(features)
        return (output if rows == len(sample) else torch.cat([output, output]),)

    walk.output(denoiser)
    return kept


def _best(fitting: Tensor, judging: Tensor, depth: int) -> tuple[Tensor, dict[str, Any]]:
    """Coefficients [C, kept + 1] of the least error on `judging`, at most `depth`, and what they are worth."""
    tried = [_nothing(fitting), *(solve(fitting, count) for count in range(1, depth + 1))]
    found = [_errors(judging, coefficients) for coefficients in tried]
    kept = min(range(len(tried)), key=lambda count: found[count]["after"])
    return tried[kept], {**found[kept], "depth": kept}


def _errors(judging: Tensor, coefficients: Tensor) -> dict[str, float]:
    return {"before": error(judging, _nothing(judging)), "after": error(judging, coefficients)}


def _nothing(sums: Tensor) -> Tensor:
    """Coefficients [C, 2] that change nothing."""
    return torch.tensor([[1.0, 0.0]]).to(sums).expand(len(sums), 2)


def _ones(steps: int, depth: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    scale = np.zeros((steps, depth, channels), np.float32)
    scale[:, 0] = 1.0
    return scale, np.zeros((steps, channels), np.float32)


def _least(scale: np.ndarray, offset: np.ndarray) -> Correction:
    """Without an earlier value that no step takes: it would be kept for nothing."""
    return Correction(scale if scale[:, 1:].any() else scale[:, :1], offset)

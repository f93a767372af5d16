"""Times candidates image by image, stage by stage, step by step, and finds the fastest backend of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from diffpress.benchmarks.candidates import Candidate
from diffpress.benchmarks.latency import alternate, summary
from diffpress.errors import DiffpressError

ROUNDS = 15  # of single images, fewer where one takes long
SECONDS = 120  # that the rounds may take together


@dataclass(frozen=True)
class Timings:
    """Times in ms by candidate: whole images, the stages of each, every step of each."""

    images: dict[str, list[float]]
    stages: dict[str, list[dict[str, float]]]
    steps: dict[str, list[list[float]]]

    def stage_medians(self) -> dict[str, dict[str, float]]:
        """Median of text, denoise and decode."""
        return {
            name: {stage: float(np.median([row[stage] for row in rows])) for stage in rows[0]}
            for name, rows in self.stages.items()
        }

    def stage_summaries(self) -> dict[str, dict[str, dict[str, float | int]]]:
        """p50, p90 and p99 of text, denoise and decode."""
        return {
            name: {stage: summary([row[stage] for row in rows]) for stage in rows[0]}
            for name, rows in self.stages.items()
        }

    def step_summaries(self) -> dict[str, list[dict[str, float | int]]]:
        """p50, p90 and p99 of each step over the rounds."""
        return {name: [summary(times) for times in zip(*rows, strict=True)] for name, rows in self.steps.items()}

    def step_medians(self) -> dict[str, list[float]]:
        """Median of each step over the rounds."""
        return {name: np.median(np.array(rows), axis=0).tolist() for name, rows in self.steps.items()}


def single(candidate: Candidate, texts: Sequence[str]) -> Callable[[int], Any]:
    """A function of the round that draws one image: the round's prompt, and the round as its seed."""
    return lambda turn: candidate([texts[turn % len(texts)]], [turn])


def time_all(pipelines: Mapping[str, Candidate], texts: Sequence[str], quiet: bool, rounds: int = ROUNDS) -> Timings:
    """Single images, alternating; the number of rounds shrinks where they would take longer than `SECONDS`."""
    kept: dict[str, list[tuple[dict[str, float], list[float]]]] = {name: [] for name in pipelines}

    def recorded(name: str) -> Callable[[int], None]:
        draw = single(pipelines[name], texts)

        def call(turn: int) -> None:
            images = draw(turn)
            kept[name].append((images.stage_ms, images.step_ms))

        return call

    calls = {name: recorded(name) for name in pipelines}
    round_s = sum(times[0] for times in alternate(calls, 1).values()) / 1000
    rounds = int(np.clip(SECONDS / round_s, min(3, rounds), rounds))
    with tqdm(total=rounds * len(calls), desc="timing", unit="image", disable=quiet) as bar:
        images = alternate(calls, rounds, warmup=0, on_call=lambda _: bar.update())
    stages = {name: [stages for stages, _ in rows[-rounds:]] for name, rows in kept.items()}
    steps = {name: [steps for _, steps in rows[-rounds:]] for name, rows in kept.items()}
    return Timings(images, stages, steps)


def fastest(
    pairs: Iterable[tuple[str, str]], open_pipeline: Callable[[str, str], Candidate], prompt: str
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Try every (backend, precision): the fastest as {name, precision}, and what each took or why it failed.

    Raises `DiffpressError` when none draws a sound image.
    """
    tried: list[dict[str, Any]] = []
    calls: dict[str, Callable[[int], Any]] = {}
    for backend, precision in pairs:
        entry: dict[str, Any] = {"backend": backend, "precision": precision}
        try:
            pipeline = open_pipeline(backend, precision)
            problem = pipeline([prompt], [0]).problem
        except DiffpressError as error:
            problem = str(error)
        if problem:
            entry["problem"] = problem
        else:
            calls[f"{backend} {precision}"] = single(pipeline, [prompt])
        tried.append(entry)
    if not calls:
        reasons = "; ".join(str(entry["problem"]) for entry in tried)
        raise DiffpressError(f"no backend runs this bundle: {reasons or 'install one, diffpress[cpu]'}")
    for name, times in alternate(calls, rounds=5).items():
        entry = next(entry for entry in tried if f"{entry['backend']} {entry['precision']}" == name)
        entry["p50_ms"] = summary(times)["p50_ms"]
    best = min((entry for entry in tried if "p50_ms" in entry), key=lambda entry: entry["p50_ms"])
    return {"name": best["backend"], "precision": best["precision"]}, tried

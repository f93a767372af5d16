"""What tables of recipes on `shapes` share: rows and where they are kept, the references, distances to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffpress import api
from diffpress import bundle as bundles
from diffpress.benchmarks import candidates, machine, prompts, scores
from diffpress.benchmarks.candidates import Drawn
from diffpress.compress.recipe import Recipe
from diffpress.compress.run import run
from diffpress.compress.schedule.published import karras
from diffpress.compress.schedule.solver import alphas_cumprod
from diffpress.compress.work import Work
from diffpress.plan import Sampling, StepProgram
from diffpress.runtime.pipeline import Pipeline

CONVERGED = 200  # steps of DPM-Solver++ on Karras sigmas that count as the solution
BATCH = 16


@dataclass(frozen=True)
class Row:
    """A recipe to measure: its passes and how it is calibrated. `quick` rows are those of --quick."""

    group: str
    passes: tuple[Any, ...]
    calibration: Mapping[str, Any] | None = None
    quick: bool = False

    def beginning(self, count: int) -> tuple[Any, ...]:
        """What the first `count` passes depend on."""
        return self.calibration, self.passes[:count]

    def document(self, name: str) -> dict[str, Any]:
        """The recipe as a file would have it."""
        return {"name": name, "passes": self.passes} | ({"calibration": self.calibration} if self.calibration else {})

    def recipe(self, name: str) -> Recipe:
        """As `diffpress compress` would read it."""
        return Recipe.model_validate(self.document(name))


def file_name(name: str) -> str:
    """A row's name as that of a file or folder."""
    return re.sub("[^a-z0-9]+", "-", name.lower().replace("++", "pp"))


def export(folder: Path, backend: str, precision: str = "fp32") -> Pipeline:
    """The uncompressed export, which takes any schedule; made in `folder` where it is not there."""
    if not (folder / bundles.MANIFEST).exists():
        api.compress("shapes", "fp32", folder, quiet=True)
    return Pipeline.load(folder, backend, precision)


def following(exported: Pipeline, sampling: Sampling, program: StepProgram) -> Pipeline:
    """The export on another schedule, without opening its graphs again."""
    return replace(exported, sampling=sampling, denoiser=replace(exported.denoiser, program=program))


def drawn_once(file: Path, candidate: candidates.Candidate, chosen: prompts.Prompts) -> Drawn:
    """What an earlier run drew, or what `candidate` draws now."""
    drawn = candidates.stored(file)
    if drawn is None:
        drawn = candidates.draw(candidate, chosen.texts, list(range(len(chosen.texts))), BATCH)
        candidates.store(file, drawn)
    return drawn


def references(folder: Path, exported: Pipeline, base: Work, chosen: prompts.Prompts) -> tuple[Drawn, Drawn]:
    """The pipeline's own images (50 DDIM steps), and those of a converged solution of the same seeds."""
    own = drawn_once(folder / "own.npz", following(exported, base.sampling, base.program), chosen)
    sigmas = karras(CONVERGED, alphas_cumprod(base))
    passes = [{"schedule": {"solver": "dpm++", "sigmas": sigmas}}]
    recipe = Recipe.model_validate({"name": "converged", "passes": passes})
    work = api.begin("shapes", recipe, quiet=True)
    run(recipe.built(), work)
    return own, drawn_once(folder / "converged.npz", following(exported, work.sampling, work.program), chosen)


def compared(drawn: Drawn, references: tuple[Drawn, Drawn], judging: scores.Judging) -> dict[str, Any]:
    """Distances to the pipeline's own images and to the converged ones, and what the images show."""
    own, converged = (scores.distances(drawn, reference) for reference in references)
    content = judging.content(drawn.pixels)
    names = ("latent_rel_l2", "latent_rel_l2_median")
    return {
        **{key: own[key] for key in (*names, "psnr_db", "ssim")},
        **{key.replace("l2", "l2_converged"): converged[key] for key in names},
        **{key: getattr(content, key) for key in ("clip_score", "frechet", "attribute_accuracy")},
    }


def head(sampling: Sampling) -> dict[str, Any]:
    """How every table begins: the machine, versions, and the schedule of the reference."""
    return {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "sampling": {"scheduler": sampling.scheduler, "steps": sampling.steps, "guidance": sampling.guidance_scale},
    }

"""What trials are measured against, on whichever machine they run: the uncompressed export and the reference's images.

Both are made once in the search's folder, by the first process that asks. Trials are judged on other prompts and other
noise than the finalists, and both on others than calibration and `diffpress bench` use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffpress import bundle as bundles
from diffpress.benchmarks import candidates, quality, scores
from diffpress.benchmarks.candidates import Candidate, Drawn, Reference
from diffpress.benchmarks.latency import alternate, paired_ratio
from diffpress.benchmarks.prompts import VARIED, Prompts
from diffpress.bundle import Bundle
from diffpress.paths import write_json
from diffpress.plan import Sampling, StepProgram
from diffpress.runtime import backends
from diffpress.runtime.lock import locked
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.program import open_denoiser

Stage = Literal["trials", "finals"]
SEEDS = {"trials": 7_000_003, "finals": 11_000_003}  # of captions and noise
OPEN_BYTES = 2e9  # of denoisers that are open together, so that they are timed in the same rounds
FRESH = 2  # times as many images judge the finalists
EXPORT = "export"


@dataclass(frozen=True)
class Settings:
    """What is the same for all trials of a search, on every machine."""

    model: str
    steps: int
    guidance_scale: float | None
    seed: int
    images: int
    shapes: bool
    calibration: tuple[str, ...] | None = None  # prompts; None for those that are built in
    judged: tuple[str, ...] = VARIED  # prompts of trials and finals in turn; `shapes` has captions of its own

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Settings:
        """From JSON."""
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists})

    def prompts(self, stage: Stage) -> Prompts:
        """What is drawn at a stage, never what the other draws."""
        count = self.images * (FRESH if stage == "finals" else 1)
        if self.shapes:
            from diffpress.benchmarks.shapes.scenes import held_out_captions

            pairs = held_out_captions(count, seed=SEEDS[stage] + self.seed)
            return Prompts([text for _, text in pairs], "held-out captions of shapes", [scene for scene, _ in pairs])
        own = self.judged[stage == "finals" :: 2]
        return Prompts([own[index % len(own)] for index in range(count)], "prompts")

    def noise(self, stage: Stage) -> list[int]:
        """Seeds of the images of a stage."""
        first = SEEDS[stage] + 1000 * self.seed
        return [first + index for index in range(len(self.prompts(stage).texts))]


@dataclass(frozen=True)
class Made:
    """A compressed denoiser as it would ship, in a folder: a file by variant, and when each runs."""

    files: Mapping[str, Path]
    program: StepProgram
    sampling: Sampling
    bytes: int

    def write(self, folder: Path) -> None:
        """Into the folder of its files, last, so that what can be read is whole."""
        entry = {
            "files": {name: file.name for name, file in self.files.items()},
            "program": self.program.to_json(),
            "sampling": self.sampling.to_json(),
            "bytes": self.bytes,
        }
        write_json(folder / "made.json", entry)

    @classmethod
    def read(cls, folder: Path) -> Made | None:
        """What is there already; None where it is not whole."""
        file = folder / "made.json"
        if not file.is_file():
            return None
        entry = json.loads(file.read_text("utf-8"))
        files = {name: folder / own for name, own in entry["files"].items()}
        program, sampling = StepProgram.from_json(entry["program"]), Sampling.from_json(entry["sampling"])
        return cls(files, program, sampling, entry["bytes"])


class Ground:
    """The measuring place of one process; what it needs is made in `place` where it is not there yet."""

    def __init__(self, settings: Settings, place: Path, stage: Stage, threads: int | None = None) -> None:
        self.settings, self.place, self.stage, self.threads = settings, place, stage, threads
        self.prompts, self.seeds = settings.prompts(stage), settings.noise(stage)
        self._exported: dict[tuple[str, str], Pipeline] = {}

    @cached_property
    def bundle(self) -> Bundle:
        """The model exported without compression."""
        from diffpress import api

        folder = self.place / EXPORT
        self.place.mkdir(parents=True, exist_ok=True)
        with locked(self.place / f".{EXPORT}.lock", "exporting the model", progress=False):
            if not (folder / bundles.MANIFEST).exists():
                recipe = self.place / f"{EXPORT}.yaml"
                guidance = {} if (scale := self.settings.guidance_scale) is None else {"guidance_scale": scale}
                recipe.write_text(json.dumps({"steps": self.settings.steps, "passes": [], **guidance}), "utf-8")
                api.compress(self.settings.model, str(recipe), folder, seed=self.settings.seed, quiet=True)
        return bundles.read(folder)

    def exported(self, backend: str, precision: str = "fp32") -> Pipeline:
        """The export on a backend."""
        key = backend, precision
        if key not in self._exported:
            self._exported[key] = Pipeline.load(self.bundle, backend, precision, self.threads)
        return self._exported[key]

    @cached_property
    def eager(self) -> Reference:
        """The model in diffusers, on its own schedule."""
        return Reference.load(self.settings.model, *candidates.own_schedule(self.bundle.manifest))

    @cached_property
    def reference(self) -> Drawn:
        """The images of diffusers."""
        file = self.place / f"reference-{self.stage}.npz"
        export = self.bundle  # before the lock: making it takes one of its own
        with locked(self.place / f".reference-{self.stage}.lock", "drawing references", progress=False):
            drawn = candidates.stored(file)
            if drawn is None:
                batch = candidates.batch_size(export.manifest["latent"])
                drawn = candidates.draw(self.eager, self.prompts.texts, self.seeds, batch)
                candidates.store(file, drawn)
        return drawn

    @cached_property
    def judging(self) -> scores.Judging:
        """What judges images by themselves."""
        return scores.Judging(self.prompts)

    @cached_property
    def _content(self) -> scores.Content:
        return self.judging.content(self.reference.pixels)

    def opened(self, made: Made, backend: str, precision: str) -> Pipeline:
        """The export with a compressed denoiser in place of its own, on the schedule of that."""
        base = self.exported(backend, precision)
        graphs = {name: _dialect(file, backend) for name, file in made.files.items()}
        denoiser = open_denoiser(
            made.program,
            graphs,
            lambda file: backends.open_session(file, backend, precision, self.threads),
            base.texts.added,
        )
        return replace(base, sampling=made.sampling, denoiser=denoiser)

    def judge(self, candidate: Candidate) -> dict[str, Any]:
        """What `candidate` draws beside the reference, as `report.json` has it, with `errors`: the latents' by image.

        Of broken images `faults` alone.
        """
        batch = candidates.batch_size(self.bundle.manifest["latent"])
        drawn = candidates.draw(candidate, self.prompts.texts, self.seeds, batch)
        faults = quality.faults(drawn.pixels, drawn.latents)
        if faults:
            return {"faults": faults}
        own, reference = self.judging.content(drawn.pixels), self._content
        compared = {
            name: {"reference": getattr(reference, name), "compressed": getattr(own, name)}
            for name in ("clip_score", "attribute_accuracy", "frechet")
        }
        return {
            "quality": {**scores.distances(drawn, self.reference), **compared},
            "errors": [float(error) for error in quality.relative_l2(drawn.latents, self.reference.latents)],
            "faults": [],
        }

    def sizes(self, made: Made) -> dict[str, Any]:
        """Bytes of the denoiser, as `report.json` has them."""
        whole = self.bundle.manifest["sizes"]["denoiser_reference"]
        return {"size_bytes": {"denoiser_reference": whole, "denoiser_compressed": made.bytes}}


def faster(slow: Candidate, fast: Candidate, texts: Sequence[str], rounds: int) -> float:
    """How many times faster `fast` draws an image than `slow`: the median of paired ratios of alternating runs."""
    calls = {"slow": slow, "fast": fast}
    times = alternate({name: _single(one, texts) for name, one in calls.items()}, rounds)
    return paired_ratio(times["slow"], times["fast"])


def _single(candidate: Candidate, texts: Sequence[str]) -> Any:
    return lambda turn: candidate([texts[turn % len(texts)]], [turn])


def _dialect(file: Path, backend: str) -> Path:
    """What a backend opens in place of a graph, where it has a dialect and the graph was written in it."""
    own = file.with_name(f"{file.stem}{bundles.DIALECT}")
    return own if backend == backends.ONNXRUNTIME and own.is_file() else file

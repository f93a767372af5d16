"""Who is compared with whom: contenders, ours and the peers', what they draw, and on which schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from diffpress.api import SHAPES_GUIDANCE
from diffpress.calibration.model import SHAPES, folder_of
from diffpress.compress.recipe import SCHEDULE, parts, presets

if TYPE_CHECKING:
    from diffpress.compress.schedule.solver import Solver, Spacing

REFERENCE = "diffusers FP32"  # eager; what all rows are compared with, at its own 50 steps
DEEP = "DeepCache, interval"
COMPILED, ORT, OPENVINO = "torch.compile FP32", "ONNX Runtime FP32", "OpenVINO FP32"
MODELOPT = "INT8_DEFAULT_CFG"
CALL = "sd15"  # the model of which single calls of the denoiser are measured
CALLS = 10  # steps of its schedule: two whole turns of a cache that runs every fifth step in full
OWN = "own"  # the schedule of a recipe that brings one
TOO_LONG = "it finetunes, which takes the better part of a day at this size on a CPU"


@dataclass(frozen=True)
class Schedule:
    """`steps` steps of a solver; without a spacing they stand as the model's scheduler has them."""

    solver: Solver
    spacing: Spacing | None
    steps: int
    words: str

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.words}, {self.steps} steps"


# Karras sigmas for all, peers and ours: of DPM-Solver++ at so few steps they are the better spacing by far.
DDIM = Schedule("ddim", None, 50, "DDIM")
DPM_20, DPM_12 = (Schedule("dpm++", "karras", steps, "DPM-Solver++") for steps in (20, 12))
SCHEDULES = {schedule.name: schedule for schedule in (DDIM, DPM_20, DPM_12)}
CONVERGED = Schedule("dpm++", "karras", 200, "DPM-Solver++")  # whose result counts as the solution
SHORT = Schedule("ddim", None, CALLS, "DDIM")


@dataclass(frozen=True)
class Contender:
    """Something that draws. `make` names what opens it in `peers_worker`, `options` are for that.

    `plain` is the contender without compression in the same library. `environment` names one of ENVIRONMENTS.
    `not_called` says why single calls of a large denoiser are not measured.
    """

    name: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: bool = True
    plain: str = REFERENCE
    environment: str | None = None
    quick: bool = False
    not_called: str | None = None

    def schedules(self, model: Model) -> list[str]:
        """Names of those it draws on: a recipe that brings its own has no other."""
        own = "recipe" in self.options and brings_schedule(self.options["recipe"])
        return [OWN] if own else list(model.schedules)


_SAME = ("diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0")  # as in constraints.txt
# What cannot stand beside the versions that diffpress is tested with; `peers_venv` pins torch to what runs here.
ENVIRONMENTS: Mapping[str, tuple[str, ...]] = {
    # Its exporter knows transformers 4 alone, which no newer diffusers takes.
    "optimum-onnx": ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.*", "diffusers==0.35.*", "accelerate"),
    # Pinned, since pip tries versions for half an hour otherwise.
    "pruna": ("pruna==0.3.4", *_SAME, "torchao==0.16.0", "peft==0.18.1", "optimum-quanto==0.2.7"),
    # diffusers imports it wherever it is, and says so on stderr.
    "torchao": ("torchao==0.18.0", *_SAME),
}


def contenders() -> dict[str, Contender]:
    """All by name, the reference first, ours last."""
    half, last = {"dtype": "bfloat16"}, {"channels_last": True}
    compiled = {**last, "compile": True}
    found = [
        Contender(REFERENCE, "torch", quick=True),
        Contender("diffusers BF16", "torch", half, quick=True),
        Contender("diffusers FP32, channels-last", "torch", last),
        Contender("diffusers BF16, channels-last", "torch", {**half, **last}),
        Contender(COMPILED, "torch", compiled),
        Contender("torch.compile BF16", "torch", {**half, **compiled}),
        *(Contender(f"{DEEP} {k}", "torch", {"deepcache": k}, quick=k == 3) for k in (2, 3, 5)),
        Contender(f"{DEEP} 3, BF16", "torch", {"deepcache": 3, **half}, plain="diffusers BF16"),
        Contender("ToMe, half of the tokens", "torch", {"tome": 0.5}, quick=True),
        Contender("torchao INT8, exported for x86", "torch", {"pt2e": True}, plain=COMPILED, environment="torchao"),
        Contender(
            "torchao INT8, dynamic, compiled",
            "torch",
            {"torchao": True, **compiled},
            plain=COMPILED,
            environment="torchao",
        ),
        Contender("modelopt INT8, simulated in torch", "torch", {"modelopt": MODELOPT}),
        Contender("modelopt INT8, its ONNX in ONNX Runtime", "modelopt-onnx", {"config": MODELOPT}, plain=ORT),
        Contender(ORT, "onnxruntime", plain=ORT, quick=True),
        Contender("optimum-onnx FP32", "optimum", plain=ORT, environment="optimum-onnx"),
        Contender(OPENVINO, "openvino", {"precision": "f32"}, plain=OPENVINO),
        Contender("OpenVINO BF16", "openvino", {"precision": "bf16"}, plain=OPENVINO, quick=True),
        Contender("OpenVINO INT8 (NNCF)", "openvino", {"precision": "f32", "nncf": True}, plain=OPENVINO),
        Contender("OpenVINO INT8 (NNCF), rest BF16", "openvino", {"precision": "bf16", "nncf": True}, plain=OPENVINO),
        Contender("pruna, DeepCache", "pruna", {"deepcache": {"interval": 3}}, environment="pruna"),
        Contender(
            "pruna, DeepCache, torch.compile",
            "pruna",
            {"deepcache": {"interval": 3}, "torch_compile": {"mode": "default"}},
            environment="pruna",
        ),
    ]  # fmt: skip
    exact = "diffpress fp32, in FP32"
    found.append(Contender(exact, "diffpress", {"recipe": "fp32", "precision": "fp32"}, False, exact))
    for name in presets():
        quick = name in ("balanced", "fast")
        found.append(
            Contender(
                f"diffpress {name}",
                "diffpress",
                {"recipe": name},
                False,
                exact,
                quick=quick,
                not_called=TOO_LONG if finetunes(name) else None,
            )
        )
    return {contender.name: contender for contender in found}


def brings_schedule(recipe: str) -> bool:
    """Whether a preset chooses its own solver and steps."""
    return SCHEDULE in passes(recipe)


def finetunes(recipe: str) -> bool:
    """Whether a preset trains what it pruned."""
    return "distill" in passes(recipe)


def passes(recipe: str) -> list[str]:
    """Names of a preset's passes, in their order."""
    return [parts(entry)[0] for entry in yaml.safe_load(presets()[recipe].read_text("utf-8"))["passes"]]


@dataclass(frozen=True)
class Model:
    """What is drawn: a diffusers folder with its sizes, and the schedules by name.

    `latent` is [C, h, w], `text` [T, D], `side` an image's in pixels.
    """

    name: str
    source: str
    latent: tuple[int, int, int]
    text: tuple[int, int]
    side: int
    guidance: float
    schedules: Mapping[str, Schedule]

    @classmethod
    def read(cls, name: str, source: str, guidance: float, schedules: Mapping[str, Schedule]) -> Model:
        """From the folder's configurations."""
        folder = folder_of(source)
        assert folder is not None
        unet, vae, text = (
            json.loads((folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae", "text_encoder")
        )
        side, factor = unet["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
        tokens = text["max_position_embeddings"], unet["cross_attention_dim"]
        latent = unet["in_channels"], side, side
        return cls(name, source, latent, tokens, side * factor, guidance, schedules)


def shapes(quick: bool = False) -> Model:
    """The embedded pipeline, whose images are judged."""
    chosen = {name: schedule for name, schedule in SCHEDULES.items() if not quick or schedule is not DPM_20}
    return Model.read(SHAPES, SHAPES, SHAPES_GUIDANCE, chosen)


def sd15(folder: Path, quick: bool = False) -> Model:
    """A pipeline of Stable Diffusion 1.5's size with random weights, written into `folder` where it is missing.

    A quarter of the width with `quick`: to see that everything runs.
    """
    if not (folder / "model_index.json").exists():
        from diffpress.benchmarks import scale_models

        partial = folder.with_name(f"{folder.name}.partial")
        for part in ("unet", "vae"):
            (partial / part).mkdir(parents=True, exist_ok=True)
        divide = 4 if quick else 1
        model = scale_models.MODELS[CALL]
        scale_models.create(scale_models.smaller(model, divide, 256) if quick else model, partial, divide)
        partial.rename(folder)
    return Model.read(CALL, str(folder), 7.5, {SHORT.name: SHORT})


def scheduler(model: Model, schedule: Schedule) -> dict[str, Any]:
    """diffusers' scheduler as {class, config}, from the model's own configuration."""
    from diffpress.compress.schedule.solver import make

    made = make(schedule.solver, _config(model), schedule.spacing)
    return {"class": type(made).__name__, "config": dict(made.config)}


def signal_and_noise(model: Model, timesteps: Sequence[float]) -> list[tuple[float, float]]:
    """By timestep, how much of the image and how much noise a sample holds: sqrt(a) and sqrt(1 - a) of a cumulated."""
    from diffpress.compress.schedule.solver import make

    alphas = make("ddim", _config(model)).alphas_cumprod.double().numpy()
    found = np.interp(timesteps, np.arange(len(alphas)), alphas)
    return [(float(a), float(b)) for a, b in zip(np.sqrt(found), np.sqrt(1 - found), strict=True)]


def _config(model: Model) -> dict[str, Any]:
    folder = folder_of(model.source)
    assert folder is not None
    found: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    return found


def calibration_texts(count: int) -> list[str]:
    """Captions of `shapes` that recipes are calibrated with by default: of combinations that are not measured."""
    from diffpress.benchmarks.shapes import scenes

    return [caption for _, caption, _ in scenes.dataset(count, seed=5)]

"""Whether shipped graphs draw what torch simulates: `python -m diffpress.benchmarks.faithful --json FILE`.

For each format `shapes` is compressed, and the images of the bundle in ONNX Runtime are compared with those of the
simulation of its plan, by the relative error of the final latents. Beside it stands how far the simulation is from
itself when it draws the same images in batches of another size: that changes nothing but the last bits of its sums.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffpress import api
from diffpress.benchmarks import machine, prompts, quality
from diffpress.benchmarks.candidates import Drawn, Reference, draw
from diffpress.compress.numerics.simulate import simulated
from diffpress.compress.recipe import Recipe
from diffpress.plan import Plan
from diffpress.runtime.pipeline import Pipeline

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8"},
    "int4 weights": {"format": "int4"},
}
BATCH, OTHER = 8, 3


def apart(drawn: Drawn, reference: Drawn) -> dict[str, float]:
    """Relative error of the final latents: median, mean and largest of the images."""
    error = quality.relative_l2(drawn.latents, reference.latents)
    return {"median": float(np.median(error)), "mean": float(error.mean()), "largest": float(error.max())}


def measure(name: str, fields: dict[str, Any], chosen: prompts.Prompts, folder: Path) -> dict[str, Any]:
    """The row of one format, from a bundle written into `folder`."""
    document = {"name": "faithful", "passes": [{"quantize": fields}]}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    bundle = api.compress("shapes", str(file), folder / "bundle", quiet=True)
    plan = Plan.load(bundle.path / "plan")
    work = api.begin("shapes", Recipe.model_validate(document), quiet=True)
    seeds = list(range(len(chosen.texts)))
    torch_pipeline = Reference(work.pipeline, work.sampling)
    plain = draw(torch_pipeline, chosen.texts, seeds, BATCH)
    with simulated(work.denoiser, plan.quantization, plan.sampling.timesteps):
        wanted = draw(torch_pipeline, chosen.texts, seeds, BATCH)
        again = draw(torch_pipeline, chosen.texts, seeds, OTHER)
    shipped = draw(Pipeline.load(str(bundle.path), "onnxruntime", "fp32"), chosen.texts, seeds, BATCH)
    return {
        "name": name,
        "shipped_from_simulation": apart(shipped, wanted),
        "simulation_from_itself": apart(again, wanted),
        "simulation_from_float": apart(wanted, plain),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    chosen = prompts.choose(options.images, shapes=True)
    rows = []
    for name, fields in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, fields, chosen, Path(folder)))
    document = {"machine": machine.machine(), "versions": machine.versions(), "images": options.images, "rows": rows}
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

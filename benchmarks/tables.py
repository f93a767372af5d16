"""Writes the tables of the READMEs from committed results: `python -m diffpress.benchmarks.tables [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; no number in it is typed by hand. The shipped
recipes get the comment that states their measured result in the same way.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffpress.benchmarks import (
    caching_tables,
    markdown,
    peers_tables,
    pruning_tables,
    recipe_tables,
    scale_tables,
    search_tables,
    steps_tables,
    verdict,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

# The rows of the quantization table that the README tells.
TOLD = {
    "fp32",
    "int8, single calibration",
    "int8, uniform calibration",
    "int8, entropy ranges",
    "int8, shortcuts quantized, too",
    "int8, shortcuts quantized and split",
    "int8, a scale per step",
    "fp8",
    "fp4 weights, fp8 inputs",
    "int4 weights, blocks of 64",
    "int4 weights, AWQ",
    "int4 weights, AWQ, linear layers",
    *(
        f"{bits} {name}"
        for bits in ("W4A8", "W4A4")
        for name in (
            "round to nearest, every layer",
            "round to nearest",
            "Q-Diffusion",
            "Q-Diffusion, time layers to nearest",
            "Q-Diffusion, time layers reconstructed",
            "QuEST",
            "TFMQ-DM",
            "Temporal Feature Matters",
        )
    ),
    "modelopt INT8_DEFAULT_CFG",
    "modelopt FP8_DEFAULT_CFG",
    "modelopt INT4_AWQ_CFG",
}
PEERS = {
    "modelopt INT8_DEFAULT_CFG": "int8, uniform calibration",
    "modelopt INT8_DEFAULT_CFG, shortcuts in float": "int8, uniform calibration",
    "modelopt INT8_SMOOTHQUANT_CFG": "int8, SmoothQuant",
    "modelopt FP8_DEFAULT_CFG": "fp8",
    "modelopt FP8_DEFAULT_CFG, shortcuts in float": "fp8",
    "modelopt INT4_AWQ_CFG": "int4 weights, AWQ, linear layers",  # it leaves convolutions in float
}


def demo() -> str:
    """What `make demo` printed as its table, from results/demo.json."""
    report = json.loads((RESULTS / "demo.json").read_text("utf-8"))
    return "```\n" + verdict.table(report) + "\n```"


def shapes() -> str:
    """How good the embedded pipeline is, from results/shapes.json."""
    data = json.loads((RESULTS / "shapes.json").read_text("utf-8"))
    kinds = ("colour", "shape", "size", "relation")
    rows: list[tuple[str, Mapping[str, Any]]] = [
        (f"reader on {data['reader']['renders']} real renders", data["reader"])
    ]
    for part, label in (("one_object", "one object"), ("two_objects", "two objects")):
        found = data["generated"][part]
        rows += [
            (f"{label}, {found['images']} generated images", found["right"]),
            (f"{label}, judged by shuffled captions", found["shuffled_captions"]),
            (f"{label}, chance", found["chance"]),
        ]
    lines = ["| | colours | shapes | sizes | relation |", "|---|--:|--:|--:|--:|"]
    lines += [markdown.row((name, *(markdown.cell(row.get(kind), ".1%") for kind in kinds))) for name, row in rows]
    clip, vae, score = data["clip"], data["vae"], data["clip_score"]
    lines += [
        "",
        f"The CLIP finds the caption of an image among {clip['batch']} (half of them near misses) in "
        f"{clip['image_to_text']:.1%} of cases, and tells it from its near miss in {clip['near_miss']:.1%}; its score "
        f"is {score['real']:.2f} on real renders and {score['generated']:.2f} on generated images. "
        f"The VAE gives renders back at {vae['psnr_db']:.1f} dB.",
    ]
    return "\n".join(lines)


def shapes_claims() -> str:
    """What `shapes` was asked to reach, and what it reached."""
    data = json.loads((RESULTS / "shapes.json").read_text("utf-8"))
    one, two = (data["generated"][part] for part in ("one_object", "two_objects"))
    worst = min(data["reader"][kind] for kind in ("colour", "shape", "size", "relation"))
    gap = max(
        part["shuffled_captions"][kind] - part["chance"][kind] for part in (one, two) for kind in ("colour", "shape")
    )
    rows = [
        ("reader on real renders, worst attribute", "98 %", f"{worst:.1%}", worst >= 0.98),
        ("one object, colours", "97 %", f"{one['right']['colour']:.1%}", one["right"]["colour"] >= 0.97),
        ("one object, shapes", "95 %", f"{one['right']['shape']:.1%}", one["right"]["shape"] >= 0.95),
        ("two objects, colours", "90 %", f"{two['right']['colour']:.1%}", two["right"]["colour"] >= 0.90),
        ("two objects, shapes", "90 %", f"{two['right']['shape']:.1%}", two["right"]["shape"] >= 0.90),
        ("shuffled captions above chance, at most", "5 points", f"{100 * gap:.1f} points", gap <= 0.05),
    ]
    return markdown.claims("held-out captions, 50 DDIM steps", rows)


def _quantized() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / "quantization.json").read_text("utf-8"))
    return data


def quantization_all() -> str:
    """Every quantization method on `shapes`, from results/quantization.json."""
    return _quantization(_quantized()["rows"])


def quantization() -> str:
    """The rows of it that decide something."""
    return _quantization([row for row in _quantized()["rows"] if row["name"] in TOLD])


def _quantization(rows: list[Mapping[str, Any]]) -> str:
    data = _quantized()
    lines = [
        "| | bits | denoiser | latent error | median | PSNR | SSIM | CLIP | Fréchet | attributes | calibration | deploys |",  # noqa: E501
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    group = ""
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** |" + " |" * 11)
        cells = [
            row["name"],
            f"W{row['bits_w']}A{row['bits_a']}",
            f"{row['bytes'] / 1e6:.1f} MB",
            markdown.cell(row["latent_rel_l2"], ".3f"),
            markdown.cell(row["latent_rel_l2_median"], ".3f"),
            markdown.cell(row["psnr_db"], ".1f"),
            markdown.cell(row["ssim"], ".3f"),
            markdown.cell(row["clip_score"], ".2f"),
            markdown.cell(row["frechet"], ".2f"),
            markdown.cell(row["attribute_accuracy"], ".1%"),
            f"{row['seconds']:.0f} s",
            markdown.cell(row["deploys"], ".0%"),
        ]
        lines.append(markdown.row(cells))
    sampling = data["sampling"]
    lines += [
        "",
        f"{data['images']} images of held-out captions, {sampling['steps']} steps of {sampling['scheduler']}, guidance "
        f"{sampling['guidance']:g}; {data['machine']['processor']}, {data['machine']['cores']} cores.",
    ]
    return "\n".join(lines)


def quantization_claims() -> str:
    """What quantization was asked to reach on `shapes`, and what it reached."""
    rows = {row["name"]: row for row in _quantized()["rows"]}
    made: list[tuple[str, str, str, bool]] = []

    def points(name: str) -> float:
        return 100.0 * float(rows[name]["attribute_accuracy"] - rows["fp32"]["attribute_accuracy"])

    def error(name: str, key: str = "latent_rel_l2") -> float:
        return float(rows[name][key])

    for name in ("int8, uniform calibration", "fp8", "int4 weights, AWQ"):
        made.append((f"{name}: attributes", "at most 1 point lower", f"{points(name):+.1f}", points(name) >= -1))
    four_eight = [name for name, row in rows.items() if row["group"] == "W4A8" and "nearest" not in name]
    best = min(four_eight, key=error)
    made.append((f"{best}: attributes", "at most 2 points lower", f"{points(best):+.1f}", points(best) >= -2))
    for nearest in ("W4A8 round to nearest, every layer", "W4A8 round to nearest"):
        for key, word in (("latent_rel_l2", "mean"), ("latent_rel_l2_median", "median")):
            share = error(best, key) / error(nearest, key)
            made.append((f"{best}: {word} latent error of {nearest}", "at most 50 %", f"{share:.0%}", share <= 0.5))
    whole = float(rows["fp32"]["attribute_accuracy"])
    for name, asked in {
        "W4A4 QuEST": "at least 70 %",
        "W4A4 round to nearest, every layer": "less than 70 %",
        "W4A4 round to nearest": "less than 70 %",
    }.items():
        kept = float(rows[name]["attribute_accuracy"]) / whole
        made.append((f"{name}: attributes of FP32's", asked, f"{kept:.0%}", (kept >= 0.7) == ("least" in asked)))
    for peer, ours in PEERS.items():
        more = rows[peer]["bytes"] / rows[ours]["bytes"] - 1
        what = f"{ours}: latent error against {peer}" + (f" ({more:.0%} more bytes)" if more > 0.05 else "")
        for key, word in (("latent_rel_l2", "mean"), ("latent_rel_l2_median", "median")):
            pair = error(ours, key), error(peer, key)
            made.append((f"{what}, {word}", "lower", f"{pair[0]:.3f} : {pair[1]:.3f}", pair[0] <= pair[1]))
    return markdown.claims("on `shapes`, simulated", made)


def faithful() -> str:
    """Shipped graphs against the simulation, from results/faithful.json."""
    data = json.loads((RESULTS / "faithful.json").read_text("utf-8"))
    lines = [
        "| error of the final latents, median (largest) | shipped graph from simulation | simulation from itself | simulation from FP32 |",  # noqa: E501
        "|---|--:|--:|--:|",
    ]
    for row in data["rows"]:
        found = [row[key] for key in ("shipped_from_simulation", "simulation_from_itself", "simulation_from_float")]
        cells = [f"{pair['median']:.2%} ({pair['largest']:.1%})" for pair in found]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines += ["", f"{data['images']} images of held-out captions, ONNX Runtime; {data['machine']['processor']}."]
    return "\n".join(lines)


def unet_speed() -> str:
    """One call of a U-Net of Stable Diffusion 1.5's size, from results/unet_speed.json."""
    data = json.loads((RESULTS / "unet_speed.json").read_text("utf-8"))
    keys = ("speedup_vs_fp32", "speedup_vs_bf16")
    lines = ["| | vs FP32 | vs BF16 |", "|---|--:|--:|"]
    for row in data["rows"]:
        cells = [markdown.cell(row.get(key), ".2f", "x") for key in keys]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    tops = ", ".join(f"{name} {value:.2f}" for name, value in data["ceilings_tera_operations_per_s"].items())
    machine = data["machine"]
    lines += ["", f"Ceilings by large matrix products, 10^12 operations a second: {tops}; {machine['processor']}."]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "caching": caching_tables.caching,
    "caching_all": caching_tables.caching_all,
    "caching_claims": caching_tables.claims,
    "claims": recipe_tables.claims,
    "demo": demo,
    "faithful": faithful,
    "max_claims": recipe_tables.max_claims,
    "peers": peers_tables.peers,
    "peers_all": peers_tables.peers_all,
    "peers_claims": peers_tables.claims,
    "presets": recipe_tables.presets,
    "pruning": pruning_tables.pruning,
    "pruning_all": pruning_tables.pruning_all,
    "pruning_claims": pruning_tables.claims,
    "quantization": quantization,
    "quantization_all": quantization_all,
    "quantization_claims": quantization_claims,
    "scale": scale_tables.scale,
    "scale_engines": scale_tables.engines,
    "scale_pruning": scale_tables.pruning,
    "search": search_tables.search,
    "search_claims": search_tables.claims,
    "shapes": shapes,
    "shapes_claims": shapes_claims,
    "steps": steps_tables.steps,
    "steps_all": steps_tables.steps_all,
    "steps_claims": steps_tables.steps_claims,
    "steps_corrections": steps_tables.corrections,
    "steps_guidance": steps_tables.guidance,
    "unet_speed": unet_speed,
}
RECIPES = sorted((ROOT / "compress" / "recipes").glob("*.yaml"))
PLOTS = {"steps.svg": steps_tables.plot, "caching.svg": caching_tables.plot, "peers.svg": peers_tables.plot}
PAGES = ("quantization.md", "steps.md", "caching.md", "pruning.md", "peers.md")
DOCS = [ROOT / "docs" / name for name in (*PAGES, *PLOTS)]
FILES = (ROOT / "README.md", ROOT / "benchmarks" / "shapes" / "README.md", *DOCS, *RECIPES)


def filled(file: Path) -> str:
    """The text of `file` with every table, or a recipe's first line, made anew."""
    if file.suffix == ".svg":
        return PLOTS[file.name]()
    text = file.read_text("utf-8")
    if file.suffix == ".yaml":
        rest = [line for line in text.splitlines(keepends=True) if not line.startswith("# On `shapes`")]
        return recipe_tables.comment(file.stem) + "".join(rest)
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


def main() -> None:
    """Command line: rewrite the files, or with --check say whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a table is out of date")
    options = parser.parse_args()
    stale = [file for file in FILES if file.read_text("utf-8") != filled(file)]
    if options.check:
        sys.exit(f"out of date: {', '.join(file.name for file in stale)}" if stale else 0)
    for file in stale:
        file.write_text(filled(file), "utf-8")


if __name__ == "__main__":
    main()

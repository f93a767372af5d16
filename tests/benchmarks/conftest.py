"""What tests of the benchmarks share: a fake pipeline, and a whole report with made-up numbers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks.report import Picture


@pytest.fixture
def fake_candidate() -> Callable[..., Any]:
    """Makes pipelines whose pictures are noise of the seed, off by `error` in latents and `shift` in pixels."""

    def make(error: float = 0.0, shift: int = 0, steps: int = 3, problem: str | None = None) -> Any:
        def draw(prompts: list[str], seeds: list[int], *, keep_latents: bool = False) -> Any:
            pixels, latents = [], []
            for seed in seeds:
                random = np.random.default_rng(seed)
                pixels.append(random.integers(0, 200, (64, 64, 3)) + shift)
                latents.append(random.normal(size=(4, 8, 8)))
            final = np.stack(latents) * (1 + error)
            return SimpleNamespace(
                pixels=np.stack(pixels).astype(np.uint8),
                latents=[final * (i + 1) / steps for i in range(steps)] if keep_latents else [],
                stage_ms={"text": 1.0, "denoise": 3.0 * steps, "decode": 2.0},
                step_ms=[3.0] * steps,
                problem=problem,
            )

        draw.on = lambda sampling: make(steps=sampling.steps)  # type: ignore[attr-defined]
        return draw

    return make


@pytest.fixture
def made_up_report() -> dict[str, Any]:
    """A report as `bench` returns it for shapes; change it freely."""

    def latency(p50: float) -> dict[str, float | int]:
        return {"p50_ms": p50, "p90_ms": p50 * 1.1, "p99_ms": p50 * 1.2, "runs": 9}

    stages = {"text": 2.0, "denoise": 90.0, "decode": 8.0}
    names = ("reference_eager", "uncompressed_export", "compressed")
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "bundle": "balanced",
        "model": {"source": "shapes", "class": "StableDiffusionPipeline"},
        "recipe": "balanced",
        "passes": [{"name": "quantize", "summary": "10 layers to INT8", "seconds": 1.0}],
        "sampling": {"scheduler": "DDIMScheduler", "steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64},
        "program": {"marks": "#--#", "steps": ["full", "cached", "cached", "full"]},
        "engines": [{"target": "sm89", "path": "engines/sm89/full.engine", "precision": "int8", "bytes": 4_000_000}],
        "prompts": {"source": "held-out captions of shapes", "count": 20, "seeds": "0..19"},
        "latency": {name: latency(value) for name, value in zip(names, (700.0, 250.0, 100.0), strict=True)},
        "speedup": {"vs_eager": 7.0, "vs_eager_same_schedule": 7.0, "vs_uncompressed_export": 2.5},
        "same_precision": {"precision": "bf16", "latency": latency(180.0), "speedup": 1.8},
        "stages_ms": dict.fromkeys((*names, "uncompressed_export_same_precision"), stages),
        "steps_ms": {name: [3.0, 1.0, 1.0, 3.0] for name in (*names, "uncompressed_export_same_precision")},
        "size_bytes": {
            "denoiser_reference": 20_000_000,
            "denoiser_compressed": 5_000_000,
            "bundle": 9_000_000,
            "folders": {"unet/": 5_000_000, "vae_decoder/": 4_000_000},
        },
        "peak_rss_bytes": dict(zip(names, (500_000_000, 200_000_000, 180_000_000), strict=True)),
        "quality": {
            "images": 20,
            "psnr_db": 30.0,
            "psnr_db_worst": 21.0,
            "ssim": 0.95,
            "latent_rel_l2": 0.1,
            "clip_score": {"reference": 31.0, "compressed": 30.9},
            "attribute_accuracy": {"reference": 0.99, "compressed": 0.985},
            "frechet": {"reference": 5.0, "compressed": 5.1},
        },
        "attributes": {
            side: {"colour": 0.99, "shape": 0.98, "size": 0.97, "relation": None, "axis": 1.0}
            for side in ("reference", "compressed")
        },
        "per_step": {
            "images": 16,
            "latent_rel_l2": {
                "uncompressed_export": [1e-6, 2e-6, 3e-6, 4e-6],
                "compressed": [1e-3, 1e-2, 5e-2, 1e-1],
            },
        },
        "fewer_plain_steps": {
            "schedule": "DPM-Solver++ Karras",
            "backend": "openvino",
            "precision": "bf16",
            "steps": 15,
            "latency_ms": 98.0,
            "latency_ratio": 0.98,
            "images": 20,
            "psnr_db": 26.0,
            "psnr_db_worst": 20.0,
            "ssim": 0.93,
            "latent_rel_l2": 0.2,
            "clip_score": 30.8,
            "attribute_accuracy": 0.98,
            "frechet": 5.4,
            "attributes": None,
            "trials": [{"steps": 15, "latency_ms": 98.0, "ratio": 0.98}],
        },
        "faults": [],
        "speedup_interval": {"vs_eager": [6.8, 7.2], "vs_uncompressed_export": [2.4, 2.6]},
        "throughput": [
            {"batch": 1, "images_per_second": {"compressed": 10.0}, "speedup": {}, "refused": {}},
            {"batch": 2, "images_per_second": {}, "speedup": {}, "refused": {"compressed": "one image at once"}},
        ],
        "cold_start_ms": dict(zip(names, (9000.0, 1500.0, 1200.0), strict=True)),
        "roofline": {
            "ceilings": {"operations_per_s": {"bf16": 1e12}, "bytes_per_s": {"1024": 1e10}, "method": "made up"},
            "graphs": [],
            "images": [
                {"candidate": "compressed", "backend": "openvino", "precision": precision, "share_of_ceiling": share}
                for precision, share in (("fp32", 0.5), ("bf16", 0.25))
            ],
        },
        "metrics": {
            "lpips": {"by": None, "note": "not measured, give --lpips-weights"},
            "clip_score": {"by": "CLIP of shapes", "note": None},
        },
        "backend": {"name": "openvino", "precision": "bf16"},
        "backends_tried": [
            {"backend": "openvino", "precision": "bf16", "p50_ms": 100.0},
            {"backend": "onnxruntime", "precision": "fp32", "problem": "it <broke>"},
        ],
        "machine": {
            "processor": "a processor",
            "cores": 2,
            "instructions": ["avx2"],
            "memory_bytes": 25_000_000_000,
            "system": "Linux",
            "python": "3.11",
        },
        "versions": {"diffpress": "0.1.0", "openvino": "2026.4.1"},
        "reproduce": ["diffpress compress shapes --recipe balanced --output b", "diffpress bench b --against shapes"],
        "pictures": [
            {"image": 0, "prompt": "a <red> & blue star", "seed": 0, "note": "", "psnr_db": 33.3},
            {"image": 7, "prompt": "a ring", "seed": 7, "note": "worst", "psnr_db": 21.0},
        ],
    }


def candidate(
    name: str, speedup: float, psnr: float | None, front: bool, schedule: str | None = None, steps: int | None = None
) -> dict[str, Any]:
    """A row of a report's "candidates"."""
    ssim = 1.0 if psnr is None else 0.991
    row = {"name": name, "schedule": schedule, "steps": steps, "speedup": speedup, "images": 16, "front": front}
    return row | {"psnr_db": psnr, "ssim": ssim, "latent_rel_l2": 0.0 if psnr is None else 0.05}


@pytest.fixture
def full_report(made_up_report: dict[str, Any]) -> dict[str, Any]:
    """A report of 50 steps with everything that a report may have; no two of its numbers are alike by chance."""
    marks = "#--" * 16 + "##"
    variants = [{"#": "full", "-": "cached"}[mark] for mark in marks]
    plain, names = "uncompressed_export_same_precision", ("reference_eager", "uncompressed_export", "compressed")
    reused = {"full": 4.31, "cached": 1.27}
    times = {name: [24.7] * 50 for name in names} | {plain: [7.9] * 50}
    times["uncompressed_export"] = [8.83] * 50
    times["compressed"] = [reused[variant] for variant in variants]
    whole = {"reference_eager": 1318.4, "uncompressed_export": 476.2, "compressed": 140.7, plain: 426.9}
    stages = {name: {"text": 13.1, "denoise": sum(times[name]), "decode": 26.2} for name in times}
    for name in names:
        row = made_up_report["latency"][name]
        row |= {"p50_ms": whole[name], "p90_ms": whole[name] * 1.13, "p99_ms": whole[name] * 1.37}
    layers = [
        {
            "layer": f"up_blocks.{index // 9}.attentions.{index % 3}.transformer_blocks.0.attn{index % 2 + 1}.to_q",
            "kind": "Linear",
            "shape": [320, 320 + 64 * index],
            "format": "int4 x int8" if index == 5 else "int8",
            "ships_as": "float32" if index in (0, 26) else "int8",
            "exact": index != 5,
            "bytes": (4 if index in (0, 26) else 1) * 320 * (320 + 64 * index),
            "float_bytes": 4 * 320 * (320 + 64 * index),
            "error": None if index in (0, 26) else 0.0021 * (index + 1),
        }
        for index in range(27)
    ]
    operators = [
        {
            "name": f"/up_blocks.{index}/resnets.0/conv1/{kind}",
            "operator": kind,
            "type": "int8",
            "operations": count,
            "bytes": 7.3e6,
            "seconds_at_ceiling": 0.00037,
            "share": 0.19,
            "bound": "arithmetic",
            "measured_seconds": None if index else 0.00083,
        }
        for index, (kind, count) in enumerate((("Conv", 1.93e9), ("MatMul", 0.87e9)))
    ]
    graph = {
        "graph": "full",
        "candidate": "compressed",
        "backend": "openvino",
        "precision": "bf16",
        "rows": 2,
        "calls_per_image": 18,
        "reason": None,
        "operations": 2.91e9,
        "bytes": 43_700_000,
        "seconds_at_ceiling": 0.00193,
        "measured_seconds": 0.00431,
        "share_of_ceiling": 0.448,
        "bound": "arithmetic",
        "by_operator": operators,
        "slowest": [{"name": "up_blocks.3.resnets.2.conv2", "operator": "Convolution", "share": 0.127}],
    }
    refused = {**graph, "graph": "cached", "calls_per_image": 32, "reason": "it <broke>", "by_operator": []}
    refused |= dict.fromkeys(
        ("operations", "bytes", "seconds_at_ceiling", "measured_seconds", "share_of_ceiling", "bound")
    )
    refused |= {"slowest": None}
    per_second = {"reference_eager": 0.76, "uncompressed_export": 2.1, "compressed": 7.11}
    made_up_report["fewer_plain_steps"] |= {"steps": 19, "schedule": "UniPC Karras", "psnr_db": 39.8, "ssim": 0.981}
    made_up_report["quality"] |= {
        "psnr_db": 44.2,
        "psnr_db_worst": 31.7,
        "ssim": 0.9934,
        "latent_rel_l2": 0.0371,
        "lpips": 0.0173,
    }
    made_up_report["speedup"] = {"vs_eager": 9.37, "vs_uncompressed_export": 3.38}
    made_up_report["per_step"]["latent_rel_l2"] = {
        "uncompressed_export": [1.1e-6 * (i + 1) for i in range(50)],
        "compressed": [7.3e-4 * (i + 1) for i in range(50)],
    }
    return made_up_report | {
        "stages_ms": stages,
        "steps_ms": times,
        "program": {
            "marks": marks,
            "steps": variants,
            "segments": [
                {"name": "down_blocks.1 to up_blocks.1", "marks": marks},
                {"name": "the rest", "marks": "#" * 50},
            ],
        },
        "sampling": made_up_report["sampling"] | {"steps": 50},
        "candidates": [
            candidate("reference_eager", 1.0, None, True),
            candidate("uncompressed_export", 2.77, 84.6, True),
            candidate(plain, 3.09, 54.9, True),
            candidate("compressed", 9.37, 44.9, True),
            candidate("fewer_plain_steps", 9.46, 39.7, True, "UniPC Karras", 19),
            candidate("trial", 9.46, 36.2, False, "DDIM", 19),
            candidate("trial", 9.46, 38.8, False, "DPM-Solver++ Karras", 19),
            candidate("trial", 9.46, 33.1, False, "DPM-Solver++", 19),
            candidate("trial", 9.02, 40.1, False, "UniPC Karras", 20),
        ],
        "speedup_interval": {"vs_eager": [9.11, 9.68], "vs_uncompressed_export": [3.29, 3.46]},
        "quality_interval": {
            "psnr_db": [43.1, 45.3],
            "ssim": [0.9921, 0.9946],
            "clip_score": {"reference": [30.52, 31.44], "compressed": [30.41, 31.35]},
            "attribute_accuracy": {"reference": [0.981, 0.997], "compressed": [0.974, 0.993]},
        },
        "throughput": [
            {"batch": batch, "images_per_second": {name: rate * batch**0.2 for name, rate in per_second.items()}}
            for batch in (1, 2, 4, 8)
        ],
        "cold_start_ms": {"reference_eager": 9_640.0, "uncompressed_export": 2_310.0, "compressed": 1_870.0},
        "cold_start_parts_ms": {
            name: {"import": ms * 0.31, "load": ms * 0.43, "first_image": ms * 0.26}
            for name, ms in (("reference_eager", 9_640), ("uncompressed_export", 2_310), ("compressed", 1_870))
        },
        "peak_device_bytes": {
            "reference_eager": 5_130_000_000,
            "uncompressed_export": None,
            "compressed": 2_170_000_000,
        },
        "metrics": {
            "lpips": {"by": "alex.pth", "note": None},
            "clip_score": {"by": None, "note": "not measured, give --clip-model"},
            "frechet": {"by": "inception.pt", "note": None, "to": "the reference's images"},
        },
        "roofline": {
            "ceilings": {
                "operations_per_s": {"fp32": 1.51e11, "int8": 6.03e11},
                "bytes_per_s": {"262144": 1.27e11, "268435456": 2.27e10},
                "method": "products",
            },
            "graphs": [graph, refused, {**graph, "candidate": "uncompressed_export", "precision": "fp32"}],
            "images": [
                {key: graph[key] for key in ("candidate", "backend", "precision")}
                | {"operations": 7.7e10, "bytes": 5.9e9, "seconds_at_ceiling": 0.0457, "measured_seconds": 0.1177}
                | {"share_of_ceiling": 0.388}
            ],
        },
        "gates": [
            {"gate": "speedup >= 6", "measured": 9.37, "limit": 6, "unit": "", "passed": True},
            {"gate": "clip >= -0.2%", "measured": -0.3226, "limit": -0.2, "unit": "%", "passed": False},
        ],
        "passed": False,
        "layers": layers,
        "recipe_in_full": {"name": "balanced", "passes": [{"quantize": {"format": "int8", "range": "l2.4"}}]},
    }


@pytest.fixture
def pictures(made_up_report: dict[str, Any]) -> list[Picture]:
    """Those of the made-up report; its last one has no plain rival."""
    random = np.random.default_rng(0)
    a, b, c = random.integers(0, 255, (3, 16, 16, 3)).astype(np.uint8)
    return [Picture(0, a, b, c), Picture(1, a, b)]

"""What tests of the benchmarks share: a fake pipeline, and a whole report with made-up numbers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


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
        "speedup": {"vs_eager": 7.0, "vs_uncompressed_export": 2.5},
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
    }

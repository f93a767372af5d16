import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress import bundle
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, Plan, Sampling, StepProgram, TemporalTable
from diffpress.runtime import backends
from diffpress.runtime.noise import randn
from diffpress.runtime.opening import choose
from diffpress.runtime.pipeline import Pipeline, find_problem
from diffpress.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "a large blue star left of a small green square"]
STEPS = ("full", "cached", "cached", "full", "cached")
FP32 = [pair for pair in backends.available() if pair[1] == "fp32"]
Make = Callable[..., Path]


def expected(
    toy: Any, path: Path, sampling: Sampling, prompts: Sequence[str], seeds: Sequence[int], negative: str, scale: float
) -> np.ndarray:
    """The last latents, in numpy, one image and one guidance half at a time."""
    steps = StepProgram.from_json(bundle.read(path).manifest["program"]).steps
    tokenizer, found = Tokenizer.load(path / "tokenizer"), []
    for prompt, seed in zip(prompts, seeds, strict=True):
        x, before = randn(seed, (1, 4, 4, 4)) * sampling.init_noise_sigma, None
        kept: dict[str, np.ndarray] = {}
        for index, timestep in enumerate(sampling.timesteps):
            halves = {}
            for text in (negative, prompt):
                if steps[index] == "full":
                    kept[text] = toy.feature(x * 0.5, timestep, toy.text(tokenizer.encode([text])))
                halves[text] = toy.output(x * 0.5, kept[text])
            output = halves[prompt]
            if scale > 1:
                output = halves[negative] + scale * (halves[prompt] - halves[negative])
            x = 0.9 * x - (0.2 * output if before is None else 0.3 * output - 0.1 * before)
            before = output
        found.append(x)
    return np.concatenate(found)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(("backend", "precision"), FP32)
@pytest.mark.parametrize("scale", [3.0, 1.0])
@pytest.mark.parametrize("timestep_shape", [(1,), (), ("N",)])
def test_pictures_equal_the_arithmetic_in_numpy(
    make: Make, toy: Any, backend: str, precision: str, scale: float, timestep_shape: tuple[int | str, ...]
) -> None:
    path = make(timestep_shape=timestep_shape)
    pipeline = Pipeline.load(path, backend, precision, threads=1)
    images = pipeline(PROMPTS, [3, 4], "a pink star", guidance_scale=scale, keep_latents=True)
    wanted = expected(toy, path, pipeline.sampling, PROMPTS, [3, 4], "a pink star", scale)
    assert len(images.latents) == len(STEPS)
    close(images.latents[-1], wanted)
    decoded = toy.decode(wanted / 0.5 + 0.25)
    pixels = ((decoded / 2 + 0.5).clip(0, 1) * 255).transpose(0, 2, 3, 1)
    assert images.pixels.shape == (2, 8, 8, 3)
    assert images.pixels.dtype == np.uint8
    assert np.abs(images.pixels - pixels).max() < 0.6
    assert images.problem is None
    assert list(images.stage_ms) == ["text", "denoise", "decode"]
    assert len(images.step_ms) == len(STEPS)
    assert sum(images.step_ms) <= images.stage_ms["denoise"]


@pytest.mark.parametrize(("backend", "precision"), backends.available())
def test_a_batch_equals_its_images_and_a_call_leaves_nothing_behind(make: Make, backend: str, precision: str) -> None:
    pipeline = Pipeline.load(make(), backend, precision, threads=1)
    together = pipeline(PROMPTS, [3, 2**63], keep_latents=True)
    for index, (prompt, seed) in enumerate(zip(PROMPTS, [3, 2**63], strict=True)):
        alone = pipeline([prompt], [seed], keep_latents=True)
        for batch, single in zip(together.latents, alone.latents, strict=True):
            close(batch[index : index + 1], single, 1e-5 if precision == "fp32" else 3e-2)
    again = pipeline(PROMPTS, [3, 2**63], keep_latents=True)
    np.testing.assert_array_equal(again.latents[-1], together.latents[-1])


def test_backends_agree(make: Make) -> None:
    path = make()
    first, *others = [Pipeline.load(path, *pair)(PROMPTS, [1, 2], keep_latents=True) for pair in backends.available()]
    assert others
    for other, (_, precision) in zip(others, backends.available()[1:], strict=True):
        close(other.latents[-1], first.latents[-1], 1e-5 if precision == "fp32" else 3e-2)


def test_on_step_sees_every_step_and_latents_are_kept_only_on_request(make: Make) -> None:
    seen: list[tuple[int, np.ndarray]] = []
    pipeline = Pipeline.load(make())
    images = pipeline(PROMPTS[:1], [0], on_step=lambda index, sample: seen.append((index, sample)))
    assert images.latents == []
    assert [index for index, _ in seen] == list(range(len(STEPS)))
    kept = pipeline(PROMPTS[:1], [0], keep_latents=True).latents
    assert all((a == b).all() for (_, a), b in zip(seen, kept, strict=True))


def replaced(path: Path, steps: int) -> Sampling:
    data = bundle.read(path).manifest["sampling"]
    short = {key: data[key][:steps] for key in ("timesteps", "input_scale", "terms")}
    return Sampling.from_json({**data, **short, "steps": steps})


def test_a_plain_bundle_takes_another_schedule(make: Make) -> None:
    path = make(steps=("full",) * 5)
    whole = Pipeline.load(path)(PROMPTS, [1, 2], keep_latents=True)
    short = Pipeline.load(path, sampling=replaced(path, 3))(PROMPTS, [1, 2], keep_latents=True)
    assert len(short.latents) == 3
    np.testing.assert_array_equal(short.latents[2], whole.latents[2])


def test_a_bound_bundle_takes_no_other_schedule(make: Make, tmp_path: Path) -> None:
    path = make()
    with pytest.raises(DiffpressError, match="step program is bound"):
        Pipeline.load(path, sampling=replaced(path, 3))
    Pipeline.load(path, sampling=replaced(path, 5))  # its own is no other


def one_step_back(path: Path) -> dict[str, Any]:
    """The manifest's sampling with a solver that has no memory."""
    data = bundle.read(path).manifest["sampling"]
    return {**data, "terms": [[["sample", 0, 0.9], ["output", 0, -0.2 - 0.01 * row]] for row in range(len(STEPS))]}


@pytest.mark.parametrize(("backend", "precision"), FP32)
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_sampling_begins_in_the_middle(make: Make, backend: str, precision: str, scale: float) -> None:
    path = make()  # once: its tokenizer is trained
    program = StepProgram.from_json(bundle.read(path).manifest["program"])

    def opened(steps: Sequence[str]) -> Pipeline:
        changes = {"sampling": one_step_back(path), "program": replace(program, steps=tuple(steps)).to_json()}
        bundle.write_manifest(path, bundle.read(path).manifest | changes)
        return Pipeline.load(path, backend, precision, threads=1)

    def latents(pipeline: Pipeline, **options: Any) -> list[np.ndarray]:
        return pipeline(PROMPTS, [3, 4], guidance_scale=scale, keep_latents=True, **options).latents

    plain = opened((FULL,) * 5)
    whole, seen = latents(plain), list[int]()
    began = latents(plain, start=2, latents=whole[1], on_step=lambda index, _: seen.append(index))
    assert seen == [2, 3, 4]
    np.testing.assert_array_equal(began, whole[2:])
    np.testing.assert_array_equal(latents(plain), whole)  # and nothing of that is left

    cached = opened(STEPS)
    whole = latents(cached)
    np.testing.assert_array_equal(latents(cached, start=3, latents=whole[2]), whole[3:])  # a key step
    began = latents(cached, start=2, latents=whole[1])  # full, where the plan reads
    wanted = latents(opened(("full", "cached", "full", "full", "cached")), start=2, latents=whole[1])
    np.testing.assert_array_equal(began, wanted)
    noise = randn(3, (2, 4, 4, 4))
    np.testing.assert_array_equal(latents(cached, latents=noise), latents(cached, latents=noise, start=0))


def test_a_start_that_cannot_be_is_refused(make: Make) -> None:
    pipeline = Pipeline.load(make())
    latents = np.zeros((2, 4, 4, 4), np.float32)
    with pytest.raises(DiffpressError, match=r"its solver .* looks back"):
        pipeline(PROMPTS, [3, 4], start=2, latents=latents)
    with pytest.raises(DiffpressError, match="needs the latents"):
        pipeline(PROMPTS, [3, 4], start=2)
    with pytest.raises(DiffpressError, match="give 0 to 4"):
        pipeline(PROMPTS, [3, 4], start=5, latents=latents)
    for wrong in (latents[:1], latents + np.nan):
        with pytest.raises(DiffpressError, match=r"must be finite and of \[2, 4, 4, 4\]"):
            pipeline(PROMPTS, [3, 4], latents=wrong)


def test_a_temporal_table_takes_no_other_schedule(make: Make) -> None:
    path = make(steps=("full",) * 4)
    plan = Plan.load(path / "plan")
    table = TemporalTable(plan.sampling.timesteps, {"time": np.zeros((4, 2), np.float32)})
    Plan(plan.sampling, plan.program, temporal=table).save(path / "plan")
    bundle.update(bundle.read(path))
    Pipeline.load(path)
    with pytest.raises(DiffpressError, match="temporal table is bound"):
        Pipeline.load(path, sampling=replaced(path, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [], "seeds": []}, "no prompt"),
        ({"prompts": "a red circle", "seeds": [1]}, "list of texts"),
        ({"prompts": [7], "seeds": [1]}, "list of texts"),
        ({"prompts": PROMPTS, "seeds": [1]}, "2 prompts but 1 seeds"),
        ({"prompts": PROMPTS[:1], "seeds": [2**64]}, "64 bits"),
        ({"prompts": PROMPTS[:1], "seeds": [0.5]}, "whole number"),
        ({"prompts": PROMPTS[:1], "seeds": [1], "guidance_scale": float("nan")}, "finite"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        Pipeline.load(make())(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tpu"}, "no backend 'tpu'"),
        ({"backend": "openvino", "precision": "fp8"}, "no precision 'fp8'"),
        ({"precision": "fp8"}, "no precision 'fp8'"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "ONNX Runtime computes in fp32"),
        ({"threads": 0}, "at least 1"),
    ],
)
def test_what_does_not_run_here_is_refused(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        Pipeline.load(make(), **arguments)


def test_a_changed_byte_is_found(make: Make) -> None:
    path = make()
    file = path / "unet/cached.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DiffpressError, match=r"cached\.onnx has changed"):
        Pipeline.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graphs": {"full": "unet/model.onnx"}}, "no graph for variant 'cached'"),
        ({"graphs": {"full": "unet/cached.onnx", "cached": "unet/cached.onnx"}}, "lacks feature_0"),
        ({"graphs": {"full": "unet/model.onnx", "cached": "unet/model.onnx"}}, "lacks feature_0"),
        ({"program": StepProgram(("full",)).to_json()}, "1 rows, the schedule 5 calls"),
        ({"graphs": {"full": "../model.onnx"}}, "does not list"),
        ({"text": {}}, "not as diffpress wrote it"),
        ({"sampling": {"steps": 5}}, "not as diffpress wrote it"),
        ({"program": []}, "not as diffpress wrote it"),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused(make: Make, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        Pipeline.load(make(**changes))


RUNS = [("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32")]


@pytest.mark.parametrize(
    ("asked", "preferred", "runnable", "chosen"),
    [
        (("auto", "auto"), None, RUNS, ("openvino", "fp32")),
        (("auto", "auto"), ("openvino", "bf16"), RUNS, ("openvino", "bf16")),
        (("auto", "auto"), ("openvino", "bf16"), RUNS[::2], ("openvino", "fp32")),
        (("auto", "auto"), ("openvino", "bf16"), RUNS[2:], ("onnxruntime", "fp32")),
        (("auto", "bf16"), None, RUNS, ("openvino", "bf16")),
        (("auto", "fp32"), ("openvino", "bf16"), RUNS, ("openvino", "fp32")),
        (("openvino", "auto"), ("openvino", "bf16"), RUNS, ("openvino", "bf16")),
        (("onnxruntime", "auto"), ("openvino", "bf16"), RUNS, ("onnxruntime", "fp32")),
        (("onnxruntime", "bf16"), None, RUNS, ("onnxruntime", "bf16")),  # what is asked for is checked, not changed
    ],
)
def test_auto_takes_the_measured_default_where_it_runs(
    asked: tuple[str, str],
    preferred: tuple[str, str] | None,
    runnable: list[tuple[str, str]],
    chosen: tuple[str, str],
) -> None:
    default = None if preferred is None else {"name": preferred[0], "precision": preferred[1]}
    assert choose(*asked, default, runnable) == chosen


def test_nothing_installed_says_what_to_install() -> None:
    with pytest.raises(DiffpressError, match="pip install"):
        choose("auto", "auto", None, [])


def test_nan_and_constant_images_are_named() -> None:
    latents, decoded = np.zeros((4, 4, 2, 2)), np.zeros((4, 3, 4, 4))
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 4, 3)).astype(np.uint8)
    assert find_problem(latents, decoded, pixels) is None
    latents[1, 0, 0, 0], decoded[2, 0, 0, 0], pixels[3] = np.nan, np.inf, 7
    problem = find_problem(latents, decoded, pixels) or ""
    assert "image 0" not in problem
    assert "image 1: the denoiser" in problem
    assert "image 2: the decoder" in problem
    assert "image 3: every pixel" in problem


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "tokenizers", "onnx", "openvino_telemetry"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from diffpress.runtime import backends, image, pipeline
for backend, precision in backends.available():
    images = pipeline.Pipeline.load(sys.argv[1], backend, precision)(["a red circle"], [7])
    image.save_png(f"{sys.argv[2]}/{backend}-{precision}.png", images.pixels[0])
"""


def test_runs_where_torch_diffusers_and_transformers_cannot_be_imported(make: Make, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(home)}
    command = [sys.executable, "-c", BLOCKED, str(make()), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    names = {f"{backend}-{precision}.png" for backend, precision in backends.available()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert not list(home.iterdir())

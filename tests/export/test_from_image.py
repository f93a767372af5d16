"""Text-to-image, image-to-image and inpainting from one exported bundle, against diffusers' own three pipelines."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffpress import api, cli
from diffpress.benchmarks.shapes.models import SCHEDULER
from diffpress.bundle import Bundle
from diffpress.calibration.model import load_pipeline
from diffpress.calibration.schedule import tabulate, with_starts
from diffpress.errors import DiffpressError
from diffpress.plan import Sampling
from diffpress.runtime.from_image import Source
from diffpress.runtime.image import open_picture
from diffpress.runtime.pipeline import Pipeline

PROMPTS, SEEDS, NEGATIVE = ["a red ring", "a blue star"], [3, 2**35], "green"
STEPS, SCALE, SIDE = 6, 3.0, 32
STOCHASTIC: dict[str, Any] = {"solver": "ddim", "eta": 0.5, "steps": 4}
MULTI = "DPMSolverMultistepScheduler"
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++ 2m": (MULTI, {}),
    "dpm++ 3m karras": (MULTI, {"solver_order": 3, "use_karras_sigmas": True}),
    "dpm++ 2m sde": (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@pytest.fixture(scope="module")
def plain(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return api.compress(
        str(tiny_pipeline), "fp32", tmp_path_factory.mktemp("plain") / "bundle", steps=STEPS, quiet=True
    )


@pytest.fixture(scope="module")
def reference(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


def make(name: str) -> Any:
    cls, config = SCHEDULERS[name]
    return getattr(diffusers, cls).from_config(dict(SCHEDULER), **config)


def opened(plain: Bundle, name: str) -> Pipeline:
    scheduler = make(name)
    sampling = with_starts(tabulate(scheduler, STEPS, SCALE, SIDE, SIDE), scheduler)
    return Pipeline.load(plain, "onnxruntime", "fp32", sampling=sampling)


def latents(pipeline: Pipeline, prompts: list[str], seeds: list[int], **options: Any) -> np.ndarray:
    drawn = pipeline(prompts, seeds, NEGATIVE, keep_latents=True, **options)
    assert drawn.problem is None and drawn.pixels.shape == (len(prompts), SIDE, SIDE, 3)
    return drawn.latents[-1]


def theirs(reference: Any, kind: str, name: str, prompts: list[str], seeds: list[int], **options: Any) -> np.ndarray:
    """Latents of diffusers' pipeline, with a generator for each image."""
    cls = getattr(diffusers, f"StableDiffusion{kind}Pipeline")
    pipeline = cls(**reference.components, requires_safety_checker=False)
    pipeline.scheduler = make(name)
    pipeline.set_progress_bar_config(disable=True)
    found: np.ndarray = pipeline(
        prompts,
        negative_prompt=[NEGATIVE] * len(prompts),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **options,
    ).images.numpy()
    return found


def close(got: np.ndarray, wanted: np.ndarray, error: float = 1e-4) -> None:
    assert np.linalg.norm(got - wanted) <= error * np.linalg.norm(wanted)


def picture(seed: int, side: int = SIDE) -> Image.Image:
    random = np.random.default_rng(seed).integers(0, 256, (side, side + seed, 3)).astype(np.uint8)
    return Image.fromarray(random)


def hole() -> Image.Image:
    """Grey around a white square that no grid of latents fits."""
    pixels = np.full((SIDE, SIDE), 90, np.uint8)
    pixels[6:21, 9:27] = 200
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image_is_diffusers(name: str, plain: Bundle, reference: Any) -> None:
    wanted = theirs(reference, "", name, PROMPTS, SEEDS)
    close(latents(opened(plain, name), PROMPTS, SEEDS), wanted)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_is_diffusers(name: str, plain: Bundle, reference: Any) -> None:
    pictures, pipeline = [picture(0), picture(0).transpose(Image.Transpose.ROTATE_90)], opened(plain, name)
    for strength in (0.5, 0.8, 1.0) if name == "unipc" else (0.7,):
        wanted = theirs(reference, "Img2Img", name, PROMPTS, SEEDS, image=pictures, strength=strength)
        close(latents(pipeline, PROMPTS, SEEDS, source=Source(pictures, strength)), wanted)


@pytest.mark.parametrize("strength", [0.7, None])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainting_is_diffusers(name: str, strength: float | None, plain: Bundle, reference: Any) -> None:
    image, mask, pipeline = picture(7, 45), hole(), opened(plain, name)  # of another size than the model's
    for prompt, seed in list(zip(PROMPTS, SEEDS, strict=True))[: 2 if name == "euler-ancestral" else 1]:
        options: dict[str, Any] = {"image": image, "mask_image": mask, "height": SIDE, "width": SIDE}
        wanted = theirs(
            reference, "Inpaint", name, [prompt], [seed], strength=1.0 if strength is None else strength, **options
        )
        got = latents(pipeline, [prompt], [seed], source=Source(image, strength, mask))
        close(got, wanted)


def test_a_batch_from_pictures_equals_its_images(plain: Bundle) -> None:
    pipeline, pictures = opened(plain, "euler-ancestral"), [picture(0), picture(3)]
    for source in (Source(pictures, 0.6), Source(pictures[0], 0.6), Source(pictures, 0.6, [hole(), picture(5)])):
        together = latents(pipeline, PROMPTS, SEEDS, source=source)
        for index in range(2):
            one: dict[str, Any] = {"strength": 0.6}
            for key in ("image", "mask"):
                value = getattr(source, key)
                one[key] = value[index] if isinstance(value, list) else value
            alone = latents(pipeline, PROMPTS[index : index + 1], SEEDS[index : index + 1], source=Source(**one))
            close(together[index : index + 1], alone, 1e-5)


def test_outside_of_the_mask_the_picture_stays(plain: Bundle) -> None:
    pipeline, nothing = opened(plain, "dpm++ 2m"), Image.new("L", (SIDE, SIDE), 0)
    kept = latents(pipeline, PROMPTS[:1], [1], source=Source(picture(0), 0.9, nothing))
    again = latents(pipeline, PROMPTS[1:], [1], source=Source(picture(0), 0.4, nothing))
    np.testing.assert_array_equal(kept, again)  # whatever was drawn: the encoded picture
    painted = latents(pipeline, PROMPTS[:1], [1], source=Source(picture(0), 0.9, hole()))
    same = (painted == kept).all((0, 1))
    assert same[0].all() and same[:, 0].all() and not same[3:5, 3:6].any()


def test_steps_are_counted_over_the_whole_schedule(plain: Bundle) -> None:
    seen: list[int] = []
    pipeline = opened(plain, "dpm++ 2m")
    pipeline(PROMPTS[:1], [1], source=Source(picture(0), 0.5), on_step=lambda index, _: seen.append(index))
    assert seen == [3, 4, 5]
    assert list(pipeline(PROMPTS[:1], [1], source=Source(picture(0), 0.2)).stage_ms) == [
        "text",
        "image",
        "denoise",
        "decode",
    ]


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        (Source(picture(0), 0.0), {}, "strength is 0: give a number above 0 and at most 1"),
        (Source(picture(0), 1.5), {}, "strength is 1.5"),
        (Source(picture(0), float("nan")), {}, "strength is nan"),
        (Source(picture(0), 0.1), {}, "0.1 of 6 steps makes none: give at least 0.17"),
        (Source([picture(0)] * 3), {}, "2 prompts but 3 of image"),
        (Source(picture(0), None, [hole()] * 3), {}, "2 prompts but 3 of mask"),
        (Source("photo.png"), {}, "must be a PIL image"),  # type: ignore[arg-type]
        (Source(picture(0)), {"start": 2}, "give one of the two"),
    ],
)
def test_pictures_that_make_no_sense_are_refused(
    plain: Bundle, source: Source, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(DiffpressError, match=told) as caught:
        opened(plain, "ddim")(PROMPTS, SEEDS, source=source, **options)
    assert "\n" not in str(caught.value)


def test_the_bundle_begins_at_any_step(plain: Bundle, reference: Any) -> None:
    """What compress wrote, not a table made here: the model's own DDIM."""
    pipeline = Pipeline.load(plain, "onnxruntime", "fp32")
    assert pipeline.sampling.levels and Sampling.from_json(pipeline.sampling.to_json()) == pipeline.sampling
    wanted = theirs(reference, "Img2Img", "ddim", PROMPTS[:1], [1], image=picture(0), strength=0.5)
    close(latents(pipeline, PROMPTS[:1], [1], source=Source(picture(0), 0.5), guidance_scale=SCALE), wanted)


def test_a_cached_bundle_draws_from_pictures(tiny_balanced: Bundle) -> None:
    pipeline = Pipeline.load(tiny_balanced, "onnxruntime", "fp32")
    for source in (Source(picture(0), 0.6), Source(picture(0), 0.6, hole())):
        assert pipeline(PROMPTS, SEEDS, source=source).problem is None
    told = pipeline.caution(2.0) or ""
    assert "cached steps were made for guidance scale" in told and "\n" not in told
    assert pipeline.caution(pipeline.sampling.guidance_scale) is None


def test_the_command_line_draws_from_a_picture(
    plain: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(9, 50).save(tmp_path / "photo.jpg", quality=95)
    hole().save(tmp_path / "hole.png")
    (tmp_path / "note.png").write_text("no picture")
    out = tmp_path / "out.png"
    words = ["run", str(plain.path), "a red ring", "-o", str(out), "--backend", "onnxruntime", "--quiet", "--seed", "5"]
    image = ["--image", str(tmp_path / "photo.jpg")]
    for more in (
        image,
        [*image, "--strength", "0.5", "--negative", "green"],
        [*image, "--mask", str(tmp_path / "hole.png")],
    ):
        assert cli.main([*words, *more]) == 0, capsys.readouterr().err
        with Image.open(out) as drawn:
            assert drawn.size == (SIDE, SIDE)
    last = np.asarray(open_picture(out))
    source = Source(open_picture(tmp_path / "photo.jpg"), None, open_picture(tmp_path / "hole.png"))
    np.testing.assert_array_equal(
        last, Pipeline.load(plain, "onnxruntime")(["a red ring"], [5], source=source).pixels[0]
    )
    capsys.readouterr()
    for more, told in (
        (["--image", str(tmp_path / "none.png")], "there is no image at"),
        (["--image", str(tmp_path / "note.png")], "is not an image that can be read"),
        (["--image", str(tmp_path)], "there is no image at"),
        ([*image, "--mask", str(tmp_path / "none.png")], "there is no image at"),
        ([*image, "--strength", "1.2"], "strength is 1.2: give a number above 0"),
        ([*image, "--strength", "0.01"], "makes none: give at least 0.17"),
        (["--strength", "0.5"], "--strength is for drawing over a picture"),
        (["--mask", str(tmp_path / "hole.png")], "--mask is for drawing over a picture"),
    ):
        assert cli.main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1


def test_a_recipe_with_a_stochastic_solver_ships_its_noise(tiny_pipeline: Path, reference: Any, tmp_path: Path) -> None:
    recipe = {"steps": 6, "calibration": {"prompts": 1}, "passes": [{"schedule": STOCHASTIC}, "temporal-table"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    bundle = api.compress(str(tiny_pipeline), str(tmp_path / "recipe.yaml"), tmp_path / "bundle", quiet=True)
    pipeline = Pipeline.load(bundle, "onnxruntime", "fp32")
    assert pipeline.sampling.stochastic and pipeline.sampling.steps == 4
    drawn = {"generator": [torch.Generator().manual_seed(seed) for seed in SEEDS], "output_type": "latent"}
    wanted = reference(PROMPTS, num_inference_steps=4, guidance_scale=SCALE, eta=STOCHASTIC["eta"], **drawn)
    got = pipeline(PROMPTS, SEEDS, guidance_scale=SCALE, keep_latents=True)
    close(got.latents[-1], wanted.images.numpy())

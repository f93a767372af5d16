"""How good `shapes` is: `python -m diffpress.benchmarks.shapes.evaluate --json FILE --grid FILE.png`.

Measures the reader on real renders, the pipeline on held-out captions (beside shuffled ones), the VAE's reconstruction
and the CLIP's retrieval. `--weights` takes the folder of the committed weights or the work folder of a training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffpress.api import SHAPES_GUIDANCE
from diffpress.benchmarks import quality
from diffpress.benchmarks.pictures import Labelled, grid
from diffpress.benchmarks.shapes import PIPELINE, scenes
from diffpress.benchmarks.shapes.judge import Found, Judge, confirmed, normalised, pixels_to_tensor, shares
from diffpress.benchmarks.shapes.networks import Networks, open_networks
from diffpress.errors import DiffpressError

RENDERS_SEED = 2_000_003  # of no training data
Pairs = Sequence[tuple[scenes.Scene, str]]


def real_scenes(two_objects: int = 2000) -> list[scenes.Scene]:
    """Every scene of one object there is (480), and `two_objects` random ones of two, held out or not."""
    single = [
        scenes.Scene((scenes.Thing(colour, shape, size),), "single", background)
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
        for size in scenes.SIZES
        for background in scenes.BACKGROUNDS
    ]
    rng = np.random.default_rng(RENDERS_SEED)
    return single + [scenes.sample_scene(rng, things=2) for _ in range(two_objects)]


def renders(items: Sequence[scenes.Scene], seed: int = RENDERS_SEED) -> np.ndarray:
    """Draws each scene with its own seed: uint8 [N, 64, 64, 3]."""
    return np.stack([scenes.render(scene, np.random.default_rng([seed, 1, i])) for i, scene in enumerate(items)])


def reader_accuracy(judge: Judge) -> dict[str, Any]:
    """Share of attributes the reader names rightly on fresh renders."""
    truths = real_scenes()
    return {"renders": len(truths), **shares(confirmed(judge.read(renders(truths)), truths))}


def generate(pipeline: Any, captions: Sequence[str], steps: int, guidance: float, batch: int, seed: int) -> np.ndarray:
    """One image for each caption, its noise seeded by its place: uint8 [N, 64, 64, 3]."""
    images = []
    for start in tqdm(range(0, len(captions), batch), desc="generating", unit="batch"):
        some = list(captions[start : start + batch])
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        drawn = pipeline(some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="np")
        images.append((drawn.images * 255).round().astype(np.uint8))
    return np.concatenate(images)


def _shuffled(truths: Sequence[scenes.Scene], seed: int = 0) -> list[scenes.Scene]:
    """Another caption's scene for each image, of the same number of objects: a rotation of a random order."""
    result: list[scenes.Scene] = list(truths)
    for count in (1, 2):
        places = [i for i, scene in enumerate(truths) if len(scene.things) == count]
        order = np.random.default_rng(seed).permutation(places)
        for place, other in zip(order, np.roll(order, 1), strict=True):
            result[int(place)] = truths[int(other)]
    return result


def _chance(found: Found, truths: Sequence[scenes.Scene]) -> dict[str, float]:
    """The accuracy of an image that knows nothing of its caption, given how often each value is seen and asked for."""
    result = {}
    for kind, names in (("colour", list(scenes.COLOURS)), ("shape", scenes.SHAPES), ("size", list(scenes.SIZES))):
        slots = []
        for place, slot in enumerate(("first", "second")):
            rows = [i for i, scene in enumerate(truths) if place < len(scene.things)]
            if not rows:
                continue
            seen = np.bincount(found[f"{slot}_{kind}"][rows], minlength=len(names)) / len(rows)
            named = [list(names).index(getattr(truths[i].things[place], kind)) for i in rows]
            asked = np.bincount(named, minlength=len(names)) / len(rows)
            slots.append(float(seen @ asked))
        result[kind] = float(np.mean(slots))
    return result


def attribute_accuracy(judge: Judge, images: np.ndarray, truths: Sequence[scenes.Scene]) -> dict[str, Any]:
    """Confirmed attributes of generated images by number of objects, with shuffled captions and chance beside them."""
    found = judge.read(images)
    marks, shuffled = confirmed(found, truths), confirmed(found, _shuffled(truths))
    result: dict[str, Any] = {"images": len(images)}
    counts = np.array([len(scene.things) for scene in truths])
    for name, rows in (("one_object", counts == 1), ("two_objects", counts == 2), ("all", counts > 0)):
        some = np.flatnonzero(rows)
        if not len(some):
            continue
        result[name] = {
            "images": len(some),
            "right": shares({kind: values[some] for kind, values in marks.items()}),
            "shuffled_captions": shares({kind: values[some] for kind, values in shuffled.items()}),
            "chance": _chance({head: values[some] for head, values in found.items()}, [truths[int(i)] for i in some]),
        }
    return result


@torch.no_grad()
def reconstruction(vae: Any, count: int = 256) -> dict[str, Any]:
    """PSNR in dB and SSIM of the VAE on fresh renders."""
    images = renders(real_scenes(count)[-count:])
    decoded = [vae.decode(vae.encode(rows).latent_dist.mean).sample for rows in pixels_to_tensor(images).split(32)]
    pixels = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    values = quality.psnr(pixels, images)
    return {
        "renders": count,
        "psnr_db": float(values.mean()),
        "psnr_db_worst": float(values.min()),
        "ssim": float(quality.ssim(pixels, images).mean()),
    }


def retrieval(judge: Judge, batches: int = 8, pairs: int = 32) -> dict[str, Any]:
    """CLIP: does an image find its caption among a batch in which each scene stands beside its near miss?

    `near_miss` asks only between the two captions of the pair, where chance is 0.5.
    """
    size = 2 * pairs
    drawn = list(scenes.dataset(batches * size, RENDERS_SEED + 1, held_out=None))
    image = normalised(judge.features(np.stack([pixels for _, _, pixels in drawn])))
    text = normalised(judge.caption_features([words for _, words, _ in drawn]))
    to_text, to_image, misses = [], [], []
    own = np.arange(size)
    for start in range(0, len(drawn), size):
        cosine = image[start : start + size] @ text[start : start + size].T
        to_text.append((cosine.argmax(1) == own).mean())
        to_image.append((cosine.argmax(0) == own).mean())
        misses.append((cosine[own, own] > cosine[own, own ^ 1]).mean())
    return {
        "batch": size,
        "batches": batches,
        "image_to_text": float(np.mean(to_text)),
        "text_to_image": float(np.mean(to_image)),
        "near_miss": float(np.mean(misses)),
        "chance": 1 / size,
    }


def picture_grid(judge: Judge | None, images: np.ndarray, pairs: Pairs, count: int = 24) -> Any:
    """The first `count` images over their captions; a green edge where the reader confirms colours and shapes."""
    good: list[bool | None] = [None] * len(images)
    if judge is not None:
        marks = confirmed(judge.read(images), [scene for scene, _ in pairs])
        good = [bool(np.nanmin([marks["colour"][i], marks["shape"][i]]) > 0) for i in range(len(images))]
    rows = zip(images[:count], pairs[:count], good[:count], strict=True)
    return grid([Labelled(image, words, mark) for image, (_, words), mark in rows], columns=6)


def evaluate(networks: Networks, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Everything that can be measured with the networks there are, and the picture grid (None without a pipeline)."""
    result: dict[str, Any] = {"weights": options.weights.name}
    reading = networks.reader is not None
    judge = Judge(networks.reader, networks.clip, networks.tokenizer)
    if reading:
        result["reader"] = reader_accuracy(judge)
    if networks.clip is not None:
        result["clip"] = retrieval(judge)
    if networks.vae is not None:
        result["vae"] = reconstruction(networks.vae)
    if networks.pipeline is None:
        return result, None
    pairs = scenes.held_out_captions(options.images)
    truths, captions = [scene for scene, _ in pairs], [words for _, words in pairs]
    images = generate(networks.pipeline, captions, options.steps, options.guidance, options.batch, options.seed)
    result["sampling"] = {"scheduler": type(networks.pipeline.scheduler).__name__, "steps": options.steps}
    result["sampling"] |= {"guidance_scale": options.guidance, "seed": options.seed}
    if reading:
        result["generated"] = attribute_accuracy(judge, images, truths)
    if networks.clip is not None:
        result["clip_score"] = {
            "generated": judge.clip_score(images, captions),
            "real": judge.clip_score(renders(truths), captions),
        }
    return result, picture_grid(judge if reading else None, images, pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the evaluation; the JSON goes to standard output where no file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=PIPELINE.parent, help="committed weights or a training's work")
    parser.add_argument("--images", type=int, default=510, help="held-out captions to draw")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=SHAPES_GUIDANCE)
    parser.add_argument("--batch", type=int, default=30, help="images drawn together")
    parser.add_argument("--seed", type=int, default=0, help="of the first image's noise")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--grid", type=Path, help="write a labelled picture grid here (.png)")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.batch < 1 or options.steps < 1:
        parser.error("--images, --batch and --steps must be 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result, sheet = evaluate(open_networks(options.weights), options)
    except DiffpressError as error:
        parser.error(str(error))
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")
    if options.grid and sheet is not None:
        sheet.save(options.grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())

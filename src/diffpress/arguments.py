"""What each command of the command line takes, with an example of its use."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from diffpress import __version__, gates
from diffpress.errors import DiffpressError

Command = Callable[[argparse.Namespace], None]

BUNDLE = "a folder that 'diffpress compress' made"
# As in runtime.backends, which would cost an import of numpy here.
ENGINES = ("tensorrt", "tensorrt-rtx")
GRAPHS = ("openvino", "openvino-gpu", "onnxruntime")
PROVIDERS = ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
BACKENDS = ("auto", *ENGINES, *GRAPHS, *PROVIDERS)
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "tf32")

# Name -> what it does, and an example with what a first user wants to know.
TEACHING = {
    "compress": (
        "compress a pipeline into a bundle",
        """  diffpress compress ./stable-diffusion-v1-5 --recipe balanced --output sd15/
makes sd15/: INT8 graphs, cached steps and everything that 'diffpress run' needs. Recipes: fp32 (export only), int8,
cache, cachequant, balanced, fast, max, or a YAML file of your own. With --target sm89 the engines for that GPU are
built as well. --gate "speedup >= 3" --gate "psnr >= 30" measures the bundle afterwards; one that fails exits
with code 3.""",
    ),
    "build": (
        "build a bundle's TensorRT engines, without a GPU",
        """  diffpress build sd15/ --target sm89 --target sm120
writes sd15/engines/sm89/ (GeForce RTX 40) and sd15/engines/sm120/ (RTX 50). GPUs go by name as well: rtx-4090,
jetson-orin, dgx-spark; 'all' is every target that has the bundle's formats. What the engines need of a GPU's memory is
printed first. With --batch 1,2,4 they take one, two or four images at once, each at its best.
Needs pip install 'diffpress[tensorrt-rtx]'.""",
    ),
    "run": (
        "draw an image with a bundle, without torch",
        """  diffpress run sd15/ "a lighthouse at dusk" -o out.png --seed 7
The same bundle, prompt and seed give the same image. --image photo.png --strength 0.6 draws over a picture,
with --mask hole.png only where that is white. Needs numpy and one inference library: 'diffpress[cpu]'.""",
    ),
    "pack": (
        "pack what one kind of target needs of a bundle into a file",
        """  diffpress pack sd15/ --target sm87 -o box.tar
The target takes diffpress, a backend and this file: diffpress run box.tar "a lighthouse at dusk" -o out.png
It holds the target's engines, or its graphs where only the target builds (Jetson Orin's sm87, Hopper's sm90):
then the first start builds, once. --target cpu packs the graphs for ONNX Runtime and OpenVINO.""",
    ),
    "unpack": (
        "unpack a package into a folder",
        """  diffpress unpack box.tar -o box/
Not needed to run it: run unpacks a package beside itself, once.""",
    ),
    "bench": (
        "measure a bundle's speed and quality against its model",
        """  diffpress bench sd15/ --against ./stable-diffusion-v1-5 --images 50
writes sd15/report/report.html: speed and quality side by side with diffusers and with the uncompressed export.
With --gate "attribute_accuracy >= -1pt" it exits with code 3 where that does not hold: pt are percentage points and
% percent, against the model; a plain number is the figure itself.
Interrupted, it goes on with the images it lacks. Metrics whose weights are not given are left out, never downloaded.
Under 'accelerate launch' all processes draw.""",
    ),
    "compare": (
        "show bundles that were measured side by side",
        """  diffpress compare sd15-int8/ sd15-fast/ --html compare.html
prints speed, sizes, quality and gates of each, from its report. Takes bundles and report.json files of one model, the
same prompts and the same reference; where their machines differ it shows ratios and no times.""",
    ),
    "search": (
        "find the recipe that loses least within limits",
        """  diffpress search ./stable-diffusion-v1-5 --space default --budget "speedup >= 6" --output found/
tries 40 recipes and writes found/: report.html with the front, recipe.yaml, and the bundle of the best within the
limits. The same command goes on where it was interrupted. A space is a YAML file in a recipe's words, with lists and
ranges in place of values. With --ray the trials run on a Ray cluster. Needs pip install 'diffpress[search]'.""",
    ),
    "inspect": (
        "show what is inside a bundle and whether it is whole",
        """  diffpress inspect sd15/
Exits with code 2 when a file is missing or has changed.""",
    ),
    "demo": (
        "compress, build, run and measure the embedded pipeline",
        """  diffpress demo --output demo/
takes under 10 minutes on two processor cores, needs no download, and says where its report is.""",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        raise DiffpressError(f"{message} (see '{self.prog} --help')")


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser; parsed options hold the chosen function as `command`. Wrong usage raises `DiffpressError`."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--quiet", action="store_true", help="no progress and no summary, only errors")
    common.add_argument("--verbose", action="store_true", help="show what the libraries underneath say")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "parents": [common]}
    top = _Parser(
        prog="diffpress",
        description="Compress a diffusers pipeline, ship it as ONNX and TensorRT engines, and measure what was lost.",
        epilog="Start with: diffpress demo",
        **layout,
    )
    top.add_argument("--version", action="version", version=f"diffpress {__version__}")
    top.set_defaults(quiet=False, verbose=False, debug=False)
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    made = {}
    for name, (purpose, example) in TEACHING.items():
        description = f"{purpose[0].upper()}{purpose[1:]}."
        made[name] = subparsers.add_parser(
            name, help=purpose, description=description, epilog=f"example:\n{example}", **layout
        )
        made[name].set_defaults(command=commands[name])

    add = made["compress"].add_argument
    add("model", metavar="MODEL", help="a diffusers folder, a hub id, or 'shapes' (the embedded pipeline)")
    known = "fp32, int8, cache, cachequant, balanced, fast, max"
    add("--recipe", required=True, metavar="NAME_OR_FILE", help=f"{known} or a YAML file")
    add("--output", required=True, type=Path, metavar="BUNDLE", help="the folder to make; must not exist")
    add("--prompts", type=Path, metavar="FILE", help="prompts to calibrate with, one a line (default: built in)")
    add("--steps", type=_whole(1), metavar="N", help="steps of the model's own scheduler (default: the recipe's)")
    add("--seed", type=_whole(0), default=0, metavar="N", help="of the calibration images (default: 0)")
    add("--target", action="append", default=[], metavar="GPU", help="build engines for it, too; may be repeated")
    _add_gates(add, "images that gates are judged on (default: 200)")

    add = made["build"].add_argument
    add("bundle", metavar="BUNDLE", help=BUNDLE)
    add("--target", action="append", required=True, metavar="GPU", help="smXX, a name, or 'all'; may be repeated")
    add("--batch", type=_grown, default=(1,), metavar="N,N,...", help="images at once, growing (default: 1)")
    add("--resolution", type=_pixels, metavar="WxH", help="in pixels; graphs are made for one (default: that)")
    add("--memory", type=_positive, metavar="GB", help="of the GPU (default: of the smallest that was asked for)")

    add = made["run"].add_argument
    add("bundle", metavar="BUNDLE", help=f"{BUNDLE}, or a package of 'diffpress pack'")
    add("prompt", metavar="PROMPT", help="what the image shows")
    add("-o", "--output", required=True, type=Path, metavar="FILE", help="a .png file, replaced if it exists")
    add("--seed", type=_whole(0), default=0, metavar="N", help="of the starting noise (default: 0)")
    add("--negative-prompt", "--negative", metavar="TEXT", help="what the image should not show")
    add("--image", type=Path, metavar="FILE", help="begin with this picture, resized to the bundle's size")
    add("--strength", type=float, metavar="X", help="above 0 to 1: how much of it goes (default: 0.8, with a mask 1)")
    add("--mask", type=Path, metavar="FILE", help="draw only where this picture is white, the rest stays")
    add("--guidance-scale", type=float, metavar="X", help="1 or less: no guidance (default: the bundle's)")
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="default: engines for this GPU, then CUDA, then the processor",
    )
    add("--precision", choices=PRECISIONS, default="auto", help="of graphs; default: the backend's")
    add("--fallback", action="store_true", help="run graphs on ONNX Runtime where engines do not fit this machine")
    add("--threads", type=_whole(1), metavar="N", help="processor threads (default: the library's choice)")

    add = made["pack"].add_argument
    add("bundle", metavar="BUNDLE", help=BUNDLE)
    add("--target", action="append", required=True, metavar="smXX", help="a family of GPUs, or cpu; may be repeated")
    add("-o", "--output", required=True, type=Path, metavar="FILE", help="a .tar file to make; must not exist")
    add("--graphs", action="store_true", help="graphs as well as engines, for run --fallback")
    add("--image-to-image", action="store_true", help="the VAE's encoder as well")

    add = made["unpack"].add_argument
    add("package", type=Path, metavar="FILE", help="a file that 'diffpress pack' made")
    add("-o", "--output", type=Path, metavar="DIR", help="the folder to make (default: FILE without .tar)")

    add = made["bench"].add_argument
    add("bundle", metavar="BUNDLE", help=BUNDLE)
    add("--against", required=True, metavar="MODEL", help="the model it was made from")
    _add_gates(add, "for the quality figures (default: 200, or all of --prompts)", None)
    add("--prompts", type=Path, metavar="FILE", help="prompts to judge with, one a line (default: built in)")
    add("--clip-model", type=Path, metavar="DIR", help="a CLIP for the CLIP score (or DIFFPRESS_CLIP_MODEL)")
    add("--lpips-weights", type=Path, metavar="FILE", help="for LPIPS: AlexNet or VGG16 (or DIFFPRESS_LPIPS_WEIGHTS)")
    add("--inception", type=Path, metavar="FILE", help="for the Fréchet distance (or DIFFPRESS_INCEPTION)")
    add("--save-images", type=Path, metavar="DIR", help="keep all images and prompts here")
    add("--json", type=Path, metavar="FILE", help="write the figures here as well")

    add = made["compare"].add_argument
    add("runs", metavar="RUN", nargs="+", help="a bundle that was measured, or a report.json; two or more")
    add("--json", type=Path, metavar="FILE", help="write what is shown as data")
    add("--html", type=Path, metavar="FILE", help="write a page with a plot of quality against speed")

    add = made["search"].add_argument
    add("model", metavar="MODEL", help="a diffusers folder, a hub id, or 'shapes' (the embedded pipeline)")
    add("--space", required=True, metavar="FILE", help="a YAML file, or 'default'")
    budget = "'speedup >= 6', 'bytes <= 0.3x', 'attribute_accuracy >= -1pt', ...; may be repeated"
    add("--budget", type=_gate, action="append", required=True, metavar="LIMIT", help=budget)
    losses = "latent_error, latent_error_median, psnr_loss, ssim_loss, clip_loss, attribute_loss or frechet"
    add("--minimise", default="latent_error", metavar="LOSS", help=f"{losses} (default: %(default)s)")
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to make, or a search's to go on with")
    add("--trials", type=_whole(1), default=40, metavar="N", help="recipes to try (default: %(default)s)")
    add("--workers", type=_whole(1), metavar="N", help="trials at a time (default: one a core, 4 at most)")
    add("--ray", metavar="ADDRESS", help="run them on a Ray cluster: host:port, or auto for this machine's")
    prompts = "prompts of yours, one a line: a third calibrates, a third judges trials, a third the front"
    add("--prompts", type=Path, metavar="FILE", help=prompts)
    add("--images", type=_whole(2), default=16, metavar="N", help="to judge a trial on (default: %(default)s)")
    add("--seed", type=_whole(0), default=0, metavar="N", help="of calibration, images and suggestions (default: 0)")

    add = made["inspect"].add_argument
    add("bundle", metavar="BUNDLE", help=BUNDLE)
    add("--layers", action="store_true", help="the denoiser layer by layer: formats, bytes, what was measured")
    add("--json", action="store_true", help="the same as data")

    add = made["demo"].add_argument
    add("--output", type=Path, metavar="DIR", help="default: ./diffpress-demo, or the next number that is free")
    return top


def _add_gates(add: Callable[..., object], images: str, default: int | None = 200) -> None:
    """The options of what measures a bundle; `images` says what their number is for."""
    add("--images", type=_whole(1), default=default, metavar="N", help=images)
    add(
        "--gate",
        type=_gate,
        action="append",
        default=[],
        metavar="GATE",
        help="'speedup >= 3', 'clip >= -0.2%%', ...; may be repeated, and adds to the recipe's",
    )


def _gate(text: str) -> str:
    """An argument type: a gate, as it was written."""
    gates.parse(text)
    return text


def _grown(text: str) -> tuple[int, ...]:
    """An argument type: whole numbers with commas between, each larger than the one before."""
    try:
        values = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers such as 1,2,4") from None
    if values[0] < 1 or list(values) != sorted(set(values)):
        raise argparse.ArgumentTypeError(f"'{text}' must grow from 1 or more, as 1,2,4 does")
    return values


def _pixels(text: str) -> tuple[int, int]:
    """An argument type: "512x768", as (height, width) = (768, 512)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 512x512")
    return int(height), int(width)


def _positive(text: str) -> float:
    """An argument type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _whole(minimum: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return parse

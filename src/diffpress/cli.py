"""The command line: checks what can be checked before work starts, calls the parts, prints what they return.

Importing it costs nothing but the standard library: every command loads the parts it needs, and `run` none of torch.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpress import arguments, bundle, errors, gates

if TYPE_CHECKING:
    from diffpress.engines.memory import MemoryPlan
    from diffpress.engines.prepared import Prepared

# Whose absence is not a bug but an extra that was not installed: imported name -> extra.
EXTRAS = {
    **dict.fromkeys(("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers"), "compress"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "pydantic", "yaml"), "compress"),
    **dict.fromkeys(("onnxruntime", "openvino"), "cpu"),
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "modelopt": "modelopt",
    **dict.fromkeys(("torchmetrics", "torch_fidelity"), "metrics"),
    "optuna": "search",
    "ray": "ray",
}
# Libraries that talk while they work; what they say is for --verbose.
CHATTY = ("transformers", "diffusers", "huggingface_hub", "torch", "torch.onnx", "onnxscript", "onnx_ir", "accelerate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for what the user can mend, 3 for a failed gate, 1 for our bugs."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options = arguments.parser(COMMANDS).parse_args(words)
        with _heeded(), _settled(options):
            options.command(options)
            sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 every error ends here, as one line
        if "--debug" in words:
            traceback.print_exc()
        for link in _chain(error):
            traceback.clear_frames(link.__traceback__)  # progress bars end, and with them their line
        message, code = _explain(error)
        print(f"diffpress: error: {' '.join(message.split())}", file=sys.stderr)
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    """What to tell the user about an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted, nothing half-written was left", 2
    if _disk_full(error):
        return "the disk is full, nothing half-written was left: free some space and run the same command again", 2
    if isinstance(error, errors.DiffpressError):
        return str(error), error.exit_code
    name = str(getattr(error, "name", None)).partition(".")[0]
    if isinstance(error, ImportError) and name in EXTRAS:
        return f"'{name}' is not installed, which this command needs: pip install 'diffpress[{EXTRAS[name]}]'", 2
    if isinstance(error, MemoryError):
        return "the machine ran out of memory: close other programs or take a machine with more", 2
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}", 2
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text} (a bug in diffpress; --debug shows where)", 1


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and those that caused it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _disk_full(error: BaseException) -> bool:
    """Whether this error or one that caused it says so; safetensors and torch report it as text."""
    return any(
        getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(link)
        for link in _chain(error)
    )


@contextmanager
def _heeded() -> Iterator[None]:
    """Heed every Ctrl-C, also the one that arrives within a destructor or a callback of C, where Python drops it."""
    others, again = sys.unraisablehook, list[threading.Timer]()

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            others(dropped)
        else:  # a little later, or this function would be the next to drop it
            again.append(threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)))
            again[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others
        for timer in again:  # what C both drops and raises was heard: a second signal would meet Python as it exits
            timer.cancel()
            timer.join()


@contextmanager
def _settled(options: argparse.Namespace) -> Iterator[None]:
    """Silence the libraries' chatter, unless --verbose asked for it."""
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        yield
        return
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # read when they are imported
    if options.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in CHATTY:
        # Above ERROR: what they log as an error they also raise, and then it is our one line.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _hide_bars(options: argparse.Namespace) -> None:
    """Switch off the loading bars of diffusers and transformers, but not those of downloads."""
    if options.verbose:
        return
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import enable_progress_bars

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if not options.quiet:
        enable_progress_bars()


def _compress(options: argparse.Namespace) -> None:
    bundle.refuse_existing(options.output)
    _check_writable(options.output)
    if options.prompts:
        from diffpress.calibration import prompts

        prompts.read(options.prompts)
    if options.target:
        from diffpress.engines.preflight import check_targets

        check_targets(options.target)
    _check_gates(options)
    from diffpress import api

    _hide_bars(options)
    made = api.compress(
        options.model,
        options.recipe,
        options.output,
        prompts=options.prompts,
        steps=options.steps,
        seed=options.seed,
        targets=options.target,
        gates=options.gate,
        quiet=options.quiet,
    )
    from diffpress.calibration import processes

    if not processes.is_main():
        return
    if not options.quiet:
        _show_made(made, options.output, options.model)
    if not made.manifest["recipe"].get("gates"):
        return
    if processes.count() > 1:
        raise errors.DiffpressError(
            f"{options.output} is made, but not judged by its gates, which one process does: diffpress bench "
            f"{shlex.quote(str(options.output))} --against {shlex.quote(options.model)}"
        )
    _measure(options.output, options.model, options.images, options.quiet)


def _check_gates(options: argparse.Namespace) -> None:
    """Gates that nothing here can judge are refused before the work and not after it."""
    from diffpress.benchmarks import gates as judged
    from diffpress.calibration import model
    from diffpress.compress import recipe

    limits = [gates.parse(text) for text in (*recipe.load(options.recipe).gates, *options.gate)]
    judged.check_measurable(limits, model.is_shapes(options.model))


def _show_made(made: bundle.Bundle, output: Path, source: str) -> None:
    """What became of the passes, and the next commands."""
    from diffpress import inspection

    for line in (*inspection.pass_lines(made.manifest), *inspection.refused_lines(made.manifest)):
        print(line)
    place, model = shlex.quote(str(output)), shlex.quote(source)
    print(f"\n{made.path}: {inspection.size_line(made)}\nnext:")
    print(f'  diffpress run {place} "a prompt of yours" -o out.png')
    print(f"  diffpress bench {place} --against {model}")
    print(f"  diffpress inspect {place}", flush=True)


def _build(options: argparse.Namespace) -> None:
    opened = bundle.read(options.bundle)
    _warn_failed(opened)
    from diffpress.export import engines

    planned: list[str] = []

    def report(plan: MemoryPlan) -> None:
        planned.append(plan.target)
        if not options.quiet:
            print(plan.line(), flush=True)

    built = engines.build(
        opened,
        options.target,
        progress=not options.quiet,
        images=options.batch,
        resolution=options.resolution,
        memory_gb=options.memory,
        report=report,
    )
    for entry in built.manifest["engines"]:
        if entry["target"] in planned and not options.quiet:
            size = f"{entry['bytes'] / 1e6:.1f} MB"
            print(f"{built.path / entry['path']}  {entry['precision']}  {size}  {entry['seconds']:.1f} s")


def _run(options: argparse.Namespace) -> None:
    output: Path = options.output
    if output.suffix.lower() != ".png":
        raise errors.DiffpressError(f"{output} must end in .png: images are written as PNG")
    _check_file(output)
    for name in ("strength", "mask"):
        if options.image is None and getattr(options, name) is not None:
            raise errors.DiffpressError(f"--{name} is for drawing over a picture: name it with --image")
    from tqdm import tqdm

    from diffpress.runtime import package
    from diffpress.runtime.from_image import Source
    from diffpress.runtime.image import open_picture, save_png
    from diffpress.runtime.pipeline import Pipeline

    source = None
    if options.image is not None:
        mask = None if options.mask is None else open_picture(options.mask)
        source = Source(open_picture(options.image), options.strength, mask)
    opened = package.opened(options.bundle, options.backend, not options.quiet, options.fallback)
    _warn_failed(opened)
    pipeline = Pipeline.load(opened, options.backend, options.precision, options.threads, fallback=options.fallback)
    if pipeline.note:
        print(f"diffpress: warning: {pipeline.note}: {pipeline.backend} runs it instead", file=sys.stderr)
    steps = len(pipeline.sampling.timesteps) - (source.first(pipeline.sampling) if source else 0)
    if options.guidance_scale is not None and (caution := pipeline.caution(options.guidance_scale)):
        print(f"diffpress: warning: {caution}", file=sys.stderr)
    with tqdm(total=steps, desc="denoising", unit="step", disable=options.quiet) as bar:

        def tick(*_: object) -> None:
            bar.update()

        images = pipeline(
            [options.prompt],
            [options.seed],
            options.negative_prompt,
            options.guidance_scale,
            on_step=tick,
            source=source,
        )
    save_png(output, images.pixels[0])
    if images.problem:
        print(f"diffpress: warning: {images.problem}", file=sys.stderr)
    if not options.quiet:
        stages = ", ".join(f"{name} {value:.0f} ms" for name, value in images.stage_ms.items())
        print(f"{output}: {pipeline.backend} {pipeline.precision}, {stages}")


def _pack(options: argparse.Namespace) -> None:
    from diffpress.engines.targets import generation
    from diffpress.runtime import pack

    pack.check_output(options.output)
    _check_file(options.output)
    opened = bundle.read(options.bundle)
    _warn_failed(opened)
    targets = [name if name == pack.CPU else generation(name) for name in options.target]
    chosen = {"image_to_image": options.image_to_image, "graphs": options.graphs, "progress": not options.quiet}
    made = pack.pack(opened, targets, options.output, **chosen, prepare=_prepare)
    if not options.quiet:
        place = shlex.quote(str(made))
        print(f"{made}: {made.stat().st_size / 1e6:.1f} MB for {', '.join(targets)}\nnext, on the target:")
        print(f'  diffpress run {place} "a prompt of yours" -o out.png')


def _prepare(opened: bundle.Bundle) -> Prepared:
    errors.require("onnx_ir", "compress", "pack graphs that the target builds engines from")
    from diffpress.export import buildable

    return buildable.prepare(opened)


def _unpack(options: argparse.Namespace) -> None:
    from diffpress.runtime import package

    output = options.output or options.package.with_suffix("")
    _check_writable(output)
    made = package.unpack(options.package, output)
    if not options.quiet:
        print(f"{made.path}: for {', '.join(made.manifest['package']['targets'])}")


def _bench(options: argparse.Namespace) -> None:
    if options.json:
        _check_file(options.json)
    bundle.load(options.bundle)
    if options.save_images:
        _check_writable(options.save_images)
    from diffpress.benchmarks.networks import Networks

    _hide_bars(options)
    _measure(
        options.bundle,
        options.against,
        options.images,
        options.quiet,
        json_file=options.json,
        prompts_file=options.prompts,
        gates=options.gate,
        networks=Networks.load(options.clip_model, options.lpips_weights, options.inception),
        save_images=options.save_images,
    )


def _measure(place: str | Path, against: str, images: int | None, quiet: bool, **more: Any) -> None:
    """Bench a bundle and show what came out; raises `GateError` where a gate failed."""
    from diffpress.benchmarks import gates as judged
    from diffpress.benchmarks import verdict
    from diffpress.benchmarks.bench import bench
    from diffpress.calibration import processes

    report = bench(place, against=against, images=images, quiet=quiet, **more)
    if not processes.is_main():
        return
    if not quiet:
        found = verdict.verdict(report)
        print(found.headline, found.quality, found.rival_text, "", verdict.table(report), "", sep="\n")
        print(*verdict.notes(report), *judged.lines(report), "", sep="\n")
        print(f"report: {Path(place) / 'report' / 'report.html'}", flush=True)
    judged.check(report)


def _warn_failed(opened: bundle.Bundle) -> None:
    """One line where a bundle is marked as failed: it may be used, but nobody should do so unknowingly."""
    if failed := gates.failures(opened.manifest):
        print(f"diffpress: warning: {opened.path} failed its gates: {failed}", file=sys.stderr)


def _compare(options: argparse.Namespace) -> None:
    for file in (options.json, options.html):
        if file:
            _check_file(file)
    from diffpress.benchmarks import compare, compare_page

    found = compare.compare(options.runs)
    if options.json:
        options.json.write_text(compare.as_json(found), "utf-8")
    if options.html:
        options.html.write_text(compare_page.render(found), "utf-8")
    if not options.quiet:
        print(compare.as_text(found))


def _search(options: argparse.Namespace) -> None:
    _check_writable(options.output)
    errors.require("optuna", "search", "search for a recipe")
    from diffpress.benchmarks.search import report, run

    _hide_bars(options)
    budgets = tuple(dict.fromkeys(map(gates.parse, options.budget)))
    names = ("minimise", "trials", "workers", "ray", "prompts", "images", "seed")
    asked = run.Asked(budgets, **{name: getattr(options, name) for name in names})
    made, found = run.search(options.model, options.space, options.output, asked, options.quiet)
    if missed := found["bundle"]["missed"]:
        print(f"diffpress: warning: {made.path}, measured again, misses {missed}", file=sys.stderr)
    if not options.quiet:
        for line in report.lines(found):
            print(line)
        print(f"recipe: {options.output / run.RECIPE}\nbundle: {made.path}\nreport: {options.output / run.PAGE}")


def _inspect(options: argparse.Namespace) -> None:
    import json

    from diffpress import inspection

    seen = inspection.inspect(options.bundle)
    if options.layers:
        seen["layers"] = inspection.layer_rows(bundle.read(options.bundle))
    text = inspection.as_text(seen)
    if options.layers:
        text = "\n".join(inspection.layer_lines(seen["layers"]))
    print(json.dumps(seen, indent=1) if options.json else text)
    if found := seen["problems"]:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise errors.DiffpressError(
            f"bundle {options.bundle} is damaged: {found[0]}{more}; compress again or restore it"
        )


def _demo(options: argparse.Namespace) -> None:
    from diffpress.benchmarks.demo import demo

    _hide_bars(options)
    shown = demo(options.output or _unused(Path("diffpress-demo")), quiet=options.quiet)
    if not options.quiet:
        print(shown)


def _unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist, so that a demo can be repeated."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _check_writable(path: Path) -> None:
    """Raise when `path` could not be made: something on the way is a file, or must not be written to."""
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if not folder.is_dir():
        raise errors.DiffpressError(f"{path} cannot be made, {folder} is a file: choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise errors.DiffpressError(f"{path} cannot be made, {folder} is not writable: choose another place")


def _check_file(path: Path) -> None:
    """Raise when `path` could not be written as a file into a folder that exists."""
    if path.is_dir():
        raise errors.DiffpressError(f"{path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise errors.DiffpressError(f"there is no folder {path.parent} for {path.name}: make it first")
    _check_writable(path)


COMMANDS: dict[str, arguments.Command] = {
    "compress": _compress,
    "build": _build,
    "run": _run,
    "pack": _pack,
    "unpack": _unpack,
    "bench": _bench,
    "compare": _compare,
    "search": _search,
    "inspect": _inspect,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())

"""What a user can do wrong: one line that says what to do, exit code 2, nothing half-written, nothing lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress import api, bundle, cli
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant, MadeFor, Plan

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]
MADE = ["compress", "there", "--recipe", "int8", "--output", "b"]
SEARCH = ["search", "shapes", "--space", "default", "--budget", "speedup >= 6", "--output", "b"]


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder`, files with their digest."""
    paths = folder.rglob("*")
    return {str(path.relative_to(folder)): bundle.sha256(path) if path.is_file() else "" for path in paths}


def refused(capsys: Capture, *words: str | Path) -> str:
    """Run a command that must fail as every bad input does; returns the line."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    lines = re.sub(r"[^\n]*\r", "", err).splitlines()  # a bar draws over itself
    assert code == 2, err
    assert out == "" and len(lines) == 1 and lines[0].startswith("diffpress: error: "), err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["shrink"], "invalid choice: 'shrink'"),
        (["compress", "shapes", "--output", "b"], "required: --recipe (see 'diffpress compress --help')"),
        (["compress", "shapes", "--recipe", "int8"], "required: --output"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--steps", "0"], "--steps: 0 is less than 1"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--steps", "ten"], "'ten' is not a whole number"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--seed", "-1"], "--seed: -1 is less than 0"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--fast"], "unrecognized arguments: --fast"),
        (["compress", "shapes", "--recipe", "int8", "--output", "there"], "there exists already"),
        (["compress", "shapes", "--recipe", "int8", "--output", "there/file/b"], "there/file is a file"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--prompts", "none.txt"], "prompts file none.txt"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--prompts", "empty.txt"], "holds no prompts"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--prompts", "there"], "cannot be read"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--prompts", "binary.txt"], "cannot be read"),
        (["build", "b", "--target", "sm89"], "there is no bundle at b"),
        (["build", "there", "--target", "sm89"], "there is not a bundle"),
        (["build", "there"], "required: --target"),
        (["run", "b", "a circle", "-o", "x.png"], "there is no bundle at b"),
        (["run", "b", "a circle"], "required: -o/--output"),
        (["run", "b", "a circle", "-o", "x.jpg"], "x.jpg must end in .png"),
        (["run", "b", "a circle", "-o", "x"], "x must end in .png"),
        (["run", "b", "a circle", "-o", "nowhere/x.png"], "there is no folder nowhere"),
        (["run", "b", "a circle", "-o", "folder.png"], "folder.png is a folder"),
        (["run", "b", "a circle", "-o", "x.png", "--backend", "cuda"], "invalid choice: 'cuda'"),
        (["run", "b", "a circle", "-o", "x.png", "--threads", "0"], "--threads: 0 is less than 1"),
        (["run", "b", "a circle", "-o", "x.png", "--guidance-scale", "much"], "invalid float value: 'much'"),
        (["bench", "b"], "required: --against"),
        (["bench", "b", "--against", "shapes"], "there is no bundle at b"),
        (["bench", "b", "--against", "shapes", "--images", "0"], "--images: 0 is less than 1"),
        (["bench", "b", "--against", "shapes", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["bench", "b", "--against", "shapes", "--gate", "beauty > 1"], "nothing measures 'beauty'; metrics: speedup,"),
        (["compress", "shapes", "--recipe", "int8", "--output", "b", "--gate", "speedup 3"], "gate 'speedup 3' is not"),
        ([*MADE, "--gate", "clip >= 0%"], "'clip >= 0%' needs a network: set DIFFPRESS_CLIP_MODEL to a CLIP's folder"),
        ([*MADE, "--gate", "lpips <= 1"], "'lpips <= 1' needs a network: set DIFFPRESS_LPIPS_WEIGHTS"),
        ([*MADE, "--gate", "attribute_accuracy >= 0"], "only the captions of 'shapes'"),
        (["compress", "shapes", "--recipe", "bad.yaml", "--output", "b"], "gate 'clip >= high' is not understood"),
        (["compare"], "required: RUN"),
        (["compare", "there"], "two runs or more"),
        (["compare", "there", "b"], "there is not a bundle"),
        (["compare", "b", "c"], "b is neither a bundle nor a report"),
        (["compare", "b", "c", "--html", "nowhere/x.html"], "there is no folder nowhere"),
        (["compare", "b", "c", "--json", "folder.png"], "folder.png is a folder"),
        (["bench", "b", "--against", "shapes", "--save-images"], "expected one argument"),
        (["search", "shapes", "--space", "default", "--output", "b"], "required: --budget"),
        ([*SEARCH, "--budget", "speed >= 6"], "nothing measures 'speed'"),
        ([*SEARCH, "--budget", "cold_start_ms <= 6"], "a search does not measure cold_start_ms"),
        ([*SEARCH, "--minimise", "beauty"], "there is no loss 'beauty', choose from: latent_error"),
        ([*SEARCH, "--trials", "0"], "--trials: 0 is less than 1"),
        ([*SEARCH, "--images", "1"], "--images: 1 is less than 2"),
        ([*SEARCH, "--prompts", "empty.txt"], "holds no prompts"),
        ([*SEARCH, "--space", "none.yaml"], "there is no space 'none.yaml'"),
        ([*SEARCH, "--space", "empty.txt"], "must be a mapping with 'passes'"),
        ([*SEARCH, "--output", "there"], "there exists already and holds no search"),
        ([*SEARCH, "--output", "there/file/b"], "there/file is a file"),
        (["search", "./none", *SEARCH[2:]], "there is no model at ./none"),
        (["search", "there", *SEARCH[2:]], "there is not a diffusers pipeline"),
        (["search", "there", *SEARCH[2:], "--minimise", "frechet"], "needs judges that only 'shapes' comes with"),
        (["inspect", "b"], "there is no bundle at b"),
        (["inspect", "there"], "it has no diffpress.json"),
    ],
)
def test_what_is_wrong_is_seen_before_work_starts(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "bad.yaml").write_text("gates: [clip >= high]\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    before = tree(tmp_path)
    assert message in refused(capsys, *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "empty.txt"], "prompts file empty.txt holds no prompts"),
        (["--prompts", "two.txt", "--images", "5"], "two.txt holds 2 prompts, 5 images are asked for"),
        (["--clip-model", "nowhere"], "--clip-model: there is no folder nowhere"),
        (["--clip-model", "there"], "there is no CLIP that transformers saved"),
        (["--lpips-weights", "nowhere.pth"], "--lpips-weights: there is no file nowhere.pth"),
        (["--lpips-weights", "two.txt"], "two.txt cannot be read as weights"),
        (["--inception", "two.txt"], "two.txt is no network of features"),
        (["--save-images", "there"], "--save-images there exists and is not an empty folder"),
    ],
)
def test_what_a_bench_cannot_judge_with_is_seen_before_it_begins(
    words: list[str],
    message: str,
    handmade: Bundle,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    from diffpress.calibration.model import digest

    bundle.update(handmade, model={"source": "tiny", "digest": digest(str(tiny_pipeline))})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "two.txt").write_text("a dog\na cat\n")
    before = tree(tmp_path)
    assert message in refused(capsys, "bench", handmade.path, "--against", tiny_pipeline, *words)
    assert tree(tmp_path) == before


def test_an_unknown_target_is_refused_before_work_starts(tmp_path: Path, handmade: Bundle, capsys: Capture) -> None:
    pytest.importorskip("tensorrt_rtx")
    words = ("compress", "shapes", "--recipe", "int8", "--output", tmp_path / "b", "--target", "sm99")
    assert "sm75, sm80, sm86, sm89, sm120" in refused(capsys, *words)
    assert "sm75, sm80, sm86, sm89, sm120" in refused(capsys, "build", handmade.path, "--target", "sm99")
    assert list(tmp_path.iterdir()) == [handmade.path]


@pytest.mark.parametrize(
    ("format", "target", "message"),
    [
        (
            "int4",
            "rtx-2080",
            "needs int4, which sm75 does not have: build for sm80 or newer, or compress with format int8",
        ),
        ("fp8", "a100", "needs fp8, which sm80 does not have: build for sm89 or newer, or compress with format int8"),
        ("int8", "jetson-orin", "pack BUNDLE --target sm87"),
    ],
)
def test_a_format_that_a_target_lacks_is_refused_before_calibration(
    format: str, target: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"passes:\n  - quantize: {{format: {format}}}\n")
    monkeypatch.setattr("diffpress.api.begin", lambda *_, **__: pytest.fail("work was started"))
    words = (
        "compress",
        "shapes",
        "--recipe",
        recipe,
        "--output",
        tmp_path / "b",
        "--target",
        "sm89",
        "--target",
        target,
    )
    assert message in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    ("passes", "prompts", "told"),
    [
        (["quantize", {"cache-budget": {"speedup": 2}}], 3, "cache-budget: {}: calibrate with 4 or more, not 3"),
        (["quantize", "cachequant"], 1, "cachequant: {}: calibrate with 2 or more, not 1"),
        (["quantize", {"cachequant": {"correct": False}}, "cache-correct"], 1, "cache-correct: {}: calibrate with 2"),
        (["quantize", "correct"], 1, "correct: {}: calibrate with 2 or more, not 1"),
    ],
)
def test_too_few_prompts_are_refused_before_any_pass_works(
    passes: list[Any],
    prompts: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_pipeline: Path,
    capsys: Capture,
) -> None:
    recipe, file = tmp_path / "mine.yaml", tmp_path / "prompts.txt"
    monkeypatch.setattr("diffpress.compress.run.run", lambda *_: pytest.fail("a pass was run"))
    words = ("compress", tiny_pipeline, "--recipe", recipe, "--steps", "4", "--output", tmp_path / "b")
    told = told.format("half of the prompts judge what the other half found")
    recipe.write_text(json.dumps({"passes": passes, "calibration": {"prompts": prompts}}))
    assert told in refused(capsys, *words)
    recipe.write_text(json.dumps({"passes": passes}))  # 16 at most, and the file has fewer
    file.write_text("a cat\n" * prompts)
    assert told in refused(capsys, *words, "--prompts", file)
    assert sorted(tmp_path.iterdir()) == [recipe, file]


def test_a_format_that_a_pass_chose_is_refused_before_the_export(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pipeline: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("passes:\n  - quantize: {format: int8}\n")

    def choose(passes: object, work: Any) -> list[object]:
        work.quantization["conv"] = LayerQuant(np.ones((2, 1), np.float32), None, "int4", None)
        return []

    monkeypatch.setattr("diffpress.compress.run.run", choose)
    monkeypatch.setattr("diffpress.export.ship.ship", lambda *_, **__: pytest.fail("it was exported"))
    with pytest.raises(DiffpressError, match="what recipe mine chose needs int4, which sm75 does not have"):
        api.compress(str(tiny_pipeline), str(recipe), tmp_path / "b", steps=2, targets=["sm75"], quiet=True)
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "{}", "a circle", "-o", "out.png"),
        ("bench", "{}", "--against", "shapes"),
        ("build", "{}", "--target", "sm89"),
    ],
)
def test_a_changed_byte_is_found(
    words: tuple[str, ...], handmade: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    if words[0] == "build":
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(handmade.path.parent)
    file = handmade.file("unet/model.onnx_data")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = tree(handmade.path.parent)
    line = refused(capsys, *(word.format(handmade.path) for word in words))
    assert "unet/model.onnx_data has changed" in line and "restore" in line
    assert tree(handmade.path.parent) == before


@pytest.mark.parametrize(
    ("hidden", "words", "extra"),
    [
        (["torch"], ["compress", "shapes", "--recipe", "int8", "--output", "b"], "diffpress[compress]"),
        (["diffusers"], ["compress", "shapes", "--recipe", "int8", "--output", "b"], "diffpress[compress]"),
        (["yaml"], ["compress", "shapes", "--recipe", "int8", "--output", "b"], "diffpress[compress]"),
        (["onnx_ir"], ["build", "{}", "--target", "sm89"], "diffpress[compress]"),
        (["tensorrt_rtx", "tensorrt"], ["build", "{}", "--target", "sm89"], "diffpress[tensorrt-rtx]"),
        (["onnxruntime", "openvino"], ["run", "{}", "a circle", "-o", "x.png"], "diffpress[cpu]"),
        (["openvino"], ["run", "{}", "a circle", "-o", "x.png", "--backend", "openvino"], "diffpress[cpu]"),
        (["onnxruntime"], ["run", "{}", "a circle", "-o", "x.png", "--backend", "onnxruntime"], "diffpress[cpu]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    hidden: list[str], words: list[str], extra: str, handmade: Bundle
) -> None:
    script = (
        "import sys, importlib.machinery\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {hidden}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from diffpress.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    before = tree(handmade.path.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, *(word.format(handmade.path) for word in words)],
        capture_output=True,
        text=True,
        cwd=handmade.path.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("diffpress: error: ") and done.stderr.count("\n") == 1
    assert f"pip install '{extra}'" in done.stderr
    assert tree(handmade.path.parent) == before


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("turbo", "there is no recipe 'turbo': name a preset (balanced, cache, cachequant, fast, fp32, int8, max)"),
        ("nowhere.yaml", "there is no recipe"),
        ("passes: [{cache: {intervall: 3}}]", "unknown key 'intervall'"),
        ("passes: [{cache: {interval: 1}}]", "'interval'"),
        ("passes: [{cache: {interval: often}}]", "'interval'"),
        ("passes: [squeeze]", "there is no pass 'squeeze', choose from: schedule, guidance, prune-structured"),
        ("passes: [{quantize: {format: int3}}]", "'format'"),
        ("passes: [{schedule: {sigmas: [1, 2]}}]", "sigmas rises from 1 to 2"),
        ("passes: [cache, schedule]", "'schedule' has to be the first pass"),
        ("passes: [{quantize: {}, cache: {}}]", "each pass is one 'name: fields' entry"),
        ("passes: [3]", "passes"),
        ("passes: [[cache]]", "passes"),
        ("pases: []", "unknown key 'pases'"),
        ("steps: 0", "'steps'"),
        ("guidance_scale: strong", "'guidance_scale'"),
        ("calibration: {prompts: 0}", "prompts"),
        ("passes: [", "is not readable YAML"),
        ("- cache", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_wrong_recipe_names_the_key(recipe: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe)
    named = recipe in ("turbo", "nowhere.yaml")
    words = ("compress", "shapes", "--recipe", recipe if named else file, "--output", tmp_path / "b")
    assert message in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == [file]


def edit_index(folder: Path, **changes: Any) -> None:
    """Change the pipeline's model_index.json."""
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))


def cut(file: Path) -> None:
    """Keep the first half, as a download does that broke off."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no model at"),
        (lambda m: (m / "model_index.json").unlink(), "has no model_index.json"),
        (lambda m: (m / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda m: (m / "model_index.json").write_text("[]"), "model_index.json cannot be read"),
        (lambda m: edit_index(m, _class_name="FluxPipeline"), "FluxPipeline is not supported yet"),
        (
            lambda m: edit_index(m, _class_name="StableDiffusion3Pipeline"),
            "StableDiffusion3Pipeline is not supported",
        ),
        (lambda m: shutil.rmtree(m / "unet"), "could not be loaded"),
        (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),  # transformers makes an empty one up
        (lambda m: (m / "tokenizer/tokenizer.json").unlink(), "tokenizer"),
        (lambda m: (m / "tokenizer/tokenizer_config.json").unlink(), "tokenizer"),
        (lambda m: (m / "unet/diffusion_pytorch_model.safetensors").unlink(), "could not be loaded"),
        (lambda m: cut(m / "unet/diffusion_pytorch_model.safetensors"), "could not be loaded"),
        (lambda m: cut(m / "text_encoder/model.safetensors"), "could not be loaded"),
        (lambda m: (m / "unet/config.json").write_text("{"), "could not be loaded"),
    ],
)
def test_a_missing_or_broken_model_is_named(
    damage: Callable[[Path], Any], message: str, tiny_pipeline: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    damage(model)
    before = tree(tmp_path)
    line = refused(capsys, "compress", model, "--recipe", "cache", "--output", tmp_path / "b")
    assert message in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("model", ["/nowhere/sd15", "./sd15", "sd15", "a/b/c"])
def test_a_model_that_is_not_there_is_not_asked_of_the_hub(model: str, tmp_path: Path, capsys: Capture) -> None:
    line = refused(capsys, "compress", model, "--recipe", "cache", "--output", tmp_path / "b")
    assert f"there is no model at {model}" in line


def test_a_plan_of_elsewhere_is_refused(tiny_pipeline: Path, handmade: Bundle, tmp_path: Path, capsys: Capture) -> None:
    recipe, output = tmp_path / "mine.yaml", tmp_path / "b"

    def told(entry: str) -> str:
        recipe.write_text(f"passes:\n  - planned: {entry}\n")
        line = refused(capsys, "compress", tiny_pipeline, "--recipe", recipe, "--steps", "4", "--output", output)
        assert not output.exists()
        return line.removeprefix("diffpress: error: ")

    assert told(f"{{bundle: {tmp_path / 'none'}}}").endswith(f"there is no bundle and no plan at {tmp_path / 'none'}")
    assert "does not say what it was made for: compress it again" in told(f"{{bundle: {handmade.path}}}")
    plan = Plan.load(handmade.file("plan"))
    replace(plan, made_for=MadeFor("0" * 64, plan.sampling)).save(handmade.file("plan"))
    line = told(f"{{bundle: {handmade.path}}}")
    assert line.startswith(
        f"pass 'planned': planned: the plan of {handmade.path} was made for model 000000000000, here "
    )
    assert line.endswith("; for steps 6, here it is 4; for guidance_scale 3, here it is 7.5")
    assert "the program has 2 steps, the schedule 4 calls" in told("{program: [full, up_0]}")
    assert "step 0 reads feature 'up_0' before any step wrote it" in told("{program: [up_0, full, full, full]}")
    assert "step 3: this denoiser has no feature 'up_10'" in told("{program: [full, full, full, up_10]}")


STOPS = [
    (KeyboardInterrupt(), "interrupted, nothing half-written was left"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
]


@pytest.mark.parametrize(("error", "message"), STOPS)
@pytest.mark.parametrize(
    "place",
    [
        "diffpress.compress.cache.deepcache.CachePass.apply",
        "diffpress.export.graphs.to_onnx",
        "diffpress.bundle.update",
    ],
)
def test_a_compression_that_stops_halfway_leaves_nothing(
    place: str,
    error: BaseException,
    message: str,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        (partial,) = tmp_path.iterdir()  # the bundle so far
        (partial / "unet").mkdir(exist_ok=True)
        (partial / "unet/model.onnx_data").write_bytes(b"half")
        raise error

    if place == "diffpress.bundle.update":  # the last write of all
        place = "diffpress.bundle.write_manifest"
        monkeypatch.setattr("diffpress.export.ship.ship", lambda *_, **__: {})
    monkeypatch.setattr(place, stop)
    before = tree(tiny_pipeline)
    words = ("compress", tiny_pipeline, "--recipe", "cache", "--steps", "4", "--output", tmp_path / "b")
    assert message in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []
    assert tree(tiny_pipeline) == before


@pytest.fixture
def heeding() -> Iterator[None]:
    """SIGINT as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_ctrl_c_within_a_destructor_is_heeded(heeding: None) -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), cli._heeded():
        Interrupted()
        time.sleep(20)
    assert sys.unraisablehook is before


def test_a_ctrl_c_that_is_dropped_and_raised_comes_once(heeding: None) -> None:
    dropped = SimpleNamespace(exc_type=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), cli._heeded():
        sys.unraisablehook(dropped)  # type: ignore[arg-type]
        raise KeyboardInterrupt
    time.sleep(0.3)  # where a second one would arrive


def test_ctrl_c_in_the_middle_of_a_real_run_leaves_nothing(tiny_pipeline: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffpress.cli", "compress", str(tiny_pipeline)]
    command += ["--recipe", "fp32", "--output", str(tmp_path / "b")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    # What a shell starts in the background ignores SIGINT, and so would all that it starts.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heeds)
    try:
        deadline = time.monotonic() + 120
        while not any(tmp_path.iterdir()):  # the partial bundle has appeared: export is under way
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        err = running.communicate(timeout=90)[1]
    finally:
        running.kill()
    assert running.returncode == 2, err
    assert err.splitlines()[-1] == "diffpress: error: interrupted, nothing half-written was left"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []

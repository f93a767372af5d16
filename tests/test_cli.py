import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from diffpress import __version__, api, arguments, bundle, cli
from diffpress.bundle import Bundle
from diffpress.errors import DiffpressError

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers")


def process(script: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python on `script` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def fails_with(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("name", [None, *arguments.TEACHING])
def test_help_teaches_by_an_example(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*([name] if name else []), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"diffpress {name} " in shown.partition("example:")[2] if name else "diffpress demo" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"diffpress {__version__}\n"


def test_every_command_has_its_function() -> None:
    assert cli.COMMANDS.keys() == arguments.TEACHING.keys()


def test_the_readme_line_of_compress_is_understood(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(api, "compress", lambda *args, **fields: seen.update(fields, args=args) or handmade)
    monkeypatch.setattr("diffpress.engines.preflight.check_targets", lambda targets: None)
    (tmp_path / "p.txt").write_text("a red circle\n")
    output, targets = tmp_path / "out", ["--target", "sm89", "--target", "sm120"]
    words = ["compress", "shapes", "--recipe", "balanced", "--output", str(output), "--quiet", *targets]
    assert cli.main([*words, "--steps", "5", "--seed", "3", "--prompts", str(tmp_path / "p.txt")]) == 0
    assert seen.pop("args") == ("shapes", "balanced", output)
    given = {"prompts": tmp_path / "p.txt", "steps": 5, "seed": 3, "targets": ["sm89", "sm120"]}
    assert seen == {**given, "gates": [], "quiet": True}


def test_compress_ends_with_a_line_per_pass_and_the_next_commands(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(api, "compress", lambda *_, **__: handmade)
    output = tmp_path / "my bundle"
    assert cli.main(["compress", "shapes", "--recipe", "balanced", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("quantize: 2 layers to int8 (1.2 s)")
    assert lines[1].endswith("cache: 4 of 6 steps reuse features (0.5 s)")
    assert "denoiser 11.0 kB, 28% of its FP32 size" in lines[3]
    assert any(f"diffpress run '{output}' " in line for line in lines)
    assert any(f"diffpress bench '{output}' --against shapes" in line for line in lines)


def test_run_draws_the_same_image_from_the_same_seed(
    handmade: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {}
    for name, seed, *more in (("a", 1), ("b", 1), ("c", 2), ("d", 1, "--guidance-scale", "1")):
        file = tmp_path / f"{name}.png"
        words = [
            "run",
            str(handmade.path),
            "a red circle",
            "-o",
            str(file),
            "--seed",
            str(seed),
            "--threads",
            "1",
            *more,
        ]
        assert cli.main(words) == 0
        assert str(file) in capsys.readouterr().out
        with Image.open(file) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
            pictures[name] = np.asarray(image)
    assert (pictures["a"] == pictures["b"]).all()
    assert (pictures["a"] != pictures["c"]).any() and (pictures["a"] != pictures["d"]).any()
    assert bundle.load(handmade.path).manifest == handmade.manifest


def test_run_needs_neither_torch_nor_diffusers_nor_transformers(handmade: Bundle, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))  # importing one of them raises ImportError now\n"
        "from diffpress.cli import main\n"
        "code = main(sys.argv[1:])\n"
        f"assert not any(sys.modules[name] for name in {HEAVY})\n"
        "sys.exit(code)\n"
    )
    done = process(script, "run", handmade.path, "a red circle", "-o", tmp_path / "out.png", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (32, 32)


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    libraries = (*HEAVY, "numpy", "onnx", "onnxruntime", "openvino", "tqdm", "yaml", "PIL")
    script = f"import sys, diffpress.cli; print(*[n for n in {libraries} if n in sys.modules])"
    assert process(script).stdout.split() == []


def test_build_lists_what_it_made(handmade: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert cli.main(["build", str(handmade.path), "--target", "sm89", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["build", str(handmade.path), "--target", "sm120"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("sm120" in line for line in lines) and "int8+fp32" in lines[1]
    assert re.fullmatch(r"sm120: weights .* \+ activations .* \+ features .* = .* of 7.20 GB, fits", lines[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "2,1"], "'2,1' must grow from 1 or more"),
        (["--batch", "1,two"], "'1,two' is not a list of whole numbers"),
        (["--batch", "0"], "must grow from 1"),
        (["--resolution", "512"], "'512' is not a size such as 512x512"),
        (["--resolution", "64x64"], "made for 32x32 pixels and no others"),
        (["--memory", "0"], "0 is not above 0"),
        (["--memory", "much"], "'much' is not a number"),
        (["--target", "jetson-orin"], "diffpress pack BUNDLE --target sm87"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    handmade: Bundle, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert cli.main(["build", str(handmade.path), "--target", "sm89", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not handmade.file("engines").exists()


@pytest.fixture
def benched(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands for `bench`: gives the committed demo's report, judged; collects how it was called."""
    from diffpress.benchmarks import gates

    calls: list[dict[str, Any]] = []

    def fake(place: Path, **fields: Any) -> dict[str, Any]:
        calls.append(fields)
        report = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
        return report | gates.judge(report, gates.gathered(bundle.read(place).manifest, fields.get("gates", ())))

    monkeypatch.setattr("diffpress.benchmarks.bench.bench", fake)
    return calls


def test_bench_exits_with_3_where_a_gate_fails(
    handmade: Bundle, benched: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(handmade.path), "--against", "shapes", "--images", "7", "--gate", "psnr >= 30"]
    assert cli.main(words) == 0
    assert "passed  psnr >= 30  measured 44." in capsys.readouterr().out
    assert benched[0]["images"] == 7 and benched[0]["gates"] == ["psnr >= 30"]
    words += ["--gate", "speedup >= 99.5", "--gate", "lpips <= 0.1"]
    assert cli.main(words) == 3
    out, err = capsys.readouterr()
    assert [line[:6] for line in out.splitlines() if ">=" in line or "<=" in line] == ["passed", "FAILED", "FAILED"]
    assert out.splitlines()[-1].startswith("report: ")
    assert re.fullmatch(
        r"diffpress: error: balanced failed 2 of 3 gates: speedup >= 99.5 \(measured 8\.\d+\); lpips <= 0.1 "
        r"\(not measured: no weights of LPIPS were there\); it is kept, and marked as failed\n",
        err,
    )
    assert cli.main([*words, "--quiet"]) == 3
    assert capsys.readouterr() == ("", err)


@pytest.mark.parametrize(("gate", "code"), [("speedup >= 5", 0), ("speedup >= 50", 3)])
def test_compress_judges_the_gates_of_the_recipe_and_its_own(
    gate: str,
    code: int,
    handmade: Bundle,
    benched: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text('{passes: [], gates: ["psnr >= 40"]}')

    def compress(*_: Any, gates: list[str], **__: Any) -> Bundle:
        recipe = {"name": "mine", "gates": ["psnr >= 40", *gates]}
        return bundle.update(handmade, recipe=recipe)

    monkeypatch.setattr(api, "compress", compress)
    monkeypatch.setattr(bundle, "refuse_existing", lambda path: None)
    words = ["compress", "shapes", "--recipe", str(mine), "--output", str(handmade.path), "--gate", gate]
    assert cli.main([*words, "--images", "9"]) == code
    out, err = capsys.readouterr()
    assert benched == [{"against": "shapes", "images": 9, "quiet": False}]
    assert out.index("diffpress run") < out.index("passed  psnr >= 40") and f"  {gate}" in out
    assert err == "" or "failed 1 of 2 gates: speedup >= 50 (measured 8." in err


def test_compress_without_gates_measures_nothing(
    handmade: Bundle, benched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(api, "compress", lambda *_, **__: handmade)
    assert cli.main(["compress", "shapes", "--recipe", "int8", "--output", str(tmp_path / "b"), "--quiet"]) == 0
    assert benched == []


def test_several_processes_do_not_pass_gates_unjudged(
    handmade: Bundle,
    benched: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    made = bundle.update(handmade, recipe={"name": "mine", "gates": ["psnr >= 40"]})
    monkeypatch.setattr(api, "compress", lambda *_, **__: made)
    monkeypatch.setattr("diffpress.calibration.processes.count", lambda: 2)
    assert cli.main(["compress", "shapes", "--recipe", "int8", "--output", str(tmp_path / "b"), "--quiet"]) == 2
    assert "not judged by its gates" in capsys.readouterr().err and benched == []


def test_a_bundle_that_failed_is_used_with_a_warning(
    handmade: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"gate": "speedup >= 3", "measured": 2.4, "limit": 3.0, "unit": "", "passed": False}
    bundle.update(handmade, gates=[entry], failed=True)
    told = "failed its gates: speedup >= 3 (measured 2.4)\n"
    drawing = ["a red circle", "-o", str(tmp_path / "x.png"), "--quiet"]
    commands = [
        ["run", str(handmade.path), *drawing],
        ["pack", str(handmade.path), "--target", "cpu", "-o", str(tmp_path / "box.tar"), "--quiet"],
        ["run", str(tmp_path / "box.tar"), *drawing],  # a package keeps the mark
    ]
    if importlib.util.find_spec("tensorrt_rtx"):
        commands.append(["build", str(handmade.path), "--target", "sm89", "--quiet"])
    for words in commands:
        assert cli.main(words) == 0
        err = capsys.readouterr().err
        assert err.startswith("diffpress: warning: ") and err.endswith(told) and err.count("\n") == 1, words
    bundle.update(bundle.read(handmade.path), failed=False)
    assert cli.main(commands[0]) == 0
    assert capsys.readouterr().err == ""


def test_compare_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = ROOT / "benchmarks/results/demo.json"
    report = json.loads(demo.read_text())
    (tmp_path / "b.json").write_text(json.dumps(report | {"bundle": "another"}))
    files = [str(demo), str(tmp_path / "b.json")]
    more = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert cli.main(["compare", *files, *more]) == 0
    assert "another" in capsys.readouterr().out
    assert [run["name"] for run in json.loads((tmp_path / "out.json").read_text())["runs"]] == ["balanced", "another"]
    assert "<svg" in (tmp_path / "out.html").read_text()
    assert cli.main(["compare", *files, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "b.json").write_text(json.dumps(report | {"prompts": report["prompts"] | {"count": 200}}))
    assert cli.main(["compare", *files]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "was judged on 200 images" in err and err.count("\n") == 1


def test_comparing_loads_no_torch(tmp_path: Path) -> None:
    demo = ROOT / "benchmarks/results/demo.json"
    shutil.copy(demo, tmp_path / "b.json")
    script = (
        "import sys\n"
        "from diffpress.cli import main\n"
        "code = main(sys.argv[1:])\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(code)\n"
    )
    done = process(script, "compare", demo, tmp_path / "b.json", "--quiet", "--html", tmp_path / "x.html")
    assert (done.returncode, done.stderr) == (0, "")


def test_inspect_shows_text_and_data(handmade: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(handmade.path)]) == 0
    assert "#--#--" in capsys.readouterr().out
    assert cli.main(["inspect", str(handmade.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspect_shows_a_damaged_bundle_and_fails(
    handmade: Bundle, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    handmade.file("unet/cached.onnx").unlink()
    handmade.file("unet/model.onnx").unlink()
    assert cli.main(["inspect", str(handmade.path), *flags]) == 2
    out, err = capsys.readouterr()
    assert "unet/model.onnx is missing" in out and "#--#--" in out
    assert err.startswith("diffpress: error: bundle") and "(and 1 more)" in err and err.count("\n") == 1


def test_a_closed_pipe_is_no_error(handmade: Bundle) -> None:
    script = (
        "import os, sys\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
        "from diffpress.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = process(script, "inspect", handmade.path)
    assert (done.returncode, done.stderr) == (0, "")


def wrapped(error: Exception) -> Exception:
    """`error` as a library reports it that caught it first."""
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("writing failed") from inner
    except RuntimeError as outer:
        return outer


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/model.onnx_data")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DiffpressError("two\nlines: mend it"), 2, "two lines: mend it"),
        (KeyboardInterrupt(), 2, "interrupted, nothing half-written was left"),
        (
            FULL_DISK,
            2,
            "the disk is full, nothing half-written was left: free some space and run the same command again",
        ),
        (wrapped(FULL_DISK), 2, "the disk is full"),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'diffpress[compress]'"),
        (ModuleNotFoundError("no", name="onnx_ir.passes"), 2, "'onnx_ir' is not installed"),
        (ModuleNotFoundError("no", name="openvino"), 2, "pip install 'diffpress[cpu]'"),
        (MemoryError(), 2, "ran out of memory"),
        (ModuleNotFoundError("No module named 'diffpress.x'", name="diffpress.x"), 1, "a bug in diffpress"),
        (ZeroDivisionError("division by zero\nmore"), 1, "ZeroDivisionError: division by zero (a bug in diffpress"),
        (AssertionError(), 1, "AssertionError: no message (a bug in diffpress; --debug shows where)"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_every_error_is_one_line(
    error: BaseException,
    code: int,
    message: str,
    debug: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "inspect", fails_with(error))
    assert cli.main(["inspect", "x", *(["--debug"] if debug else [])]) == code
    out, err = capsys.readouterr()
    *traceback, last = err.splitlines()
    assert out == "" and last.startswith("diffpress: error: ") and message in last
    assert bool(traceback) == debug
    if debug:
        assert traceback[0].startswith("Traceback") or "direct cause" in err


def test_an_error_under_a_progress_bar_stands_on_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inner() -> None:
        for _ in tqdm(range(3), desc="working", leave=False):
            raise ValueError

    def work(_: Any) -> None:
        try:
            inner()
        except ValueError as error:
            raise DiffpressError("mend it") from error

    monkeypatch.setitem(cli.COMMANDS, "inspect", work)
    assert cli.main(["inspect", "x"]) == 2
    bar, _, line = capsys.readouterr().err.rpartition("\r")
    assert "working" in bar and line == "diffpress: error: mend it\n"


def test_third_parties_are_silent_unless_verbose() -> None:
    script = (
        "import logging, sys, warnings\n"
        "from diffpress import cli\n"
        "def chat(options):\n"
        "    warnings.warn('deprecated')\n"
        "    logging.getLogger('transformers').warning('no torchvision')\n"
        "    logging.getLogger('torch.onnx').warning('no operator')\n"
        "cli.COMMANDS['inspect'] = chat\n"
        "sys.exit(cli.main(['inspect', *sys.argv[1:]]))"
    )
    assert process(script, "x").stderr == ""
    loud = process(script, "x", "--verbose").stderr
    assert "deprecated" in loud and "no torchvision" in loud and "no operator" in loud

import errno
import json
import os
import re
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


def test_the_readme_line_of_compress_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(api, "compress", lambda *args, **fields: seen.update(fields, args=args))
    monkeypatch.setattr("diffpress.engines.preflight.check_targets", lambda targets: None)
    (tmp_path / "p.txt").write_text("a red circle\n")
    output, targets = tmp_path / "out", ["--target", "sm89", "--target", "sm120"]
    words = ["compress", "shapes", "--recipe", "balanced", "--output", str(output), "--quiet", *targets]
    assert cli.main([*words, "--steps", "5", "--seed", "3", "--prompts", str(tmp_path / "p.txt")]) == 0
    assert seen.pop("args") == ("shapes", "balanced", output)
    targets = ["sm89", "sm120"]
    assert seen == {"prompts": tmp_path / "p.txt", "steps": 5, "seed": 3, "targets": targets, "quiet": True}


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

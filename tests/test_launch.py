"""Two processes of `accelerate launch` compress together: what they share, and the bundle that comes of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpress import api, bundle, cli, inspection
from diffpress.compress import recipe as recipes
from diffpress.compress.run import run
from diffpress.compress.work import Work
from diffpress.plan import Plan

RECIPE = """
calibration: {prompts: 3, steps: 2}
passes:
- mixed-precision:
    candidates: [int8, int4]
    budget: {latent: 0.02}
    calls: 2
    prompts: 1
    min_parameters: 9216
    override: {"*.conv_shortcut": float, "*.ff.net.2": int8}
"""

SCRIPT = """
import json, sys
from pathlib import Path
from diffpress import api
from diffpress.calibration import processes

model, recipe, output = sys.argv[1:]
done = []

def progress(quiet):
    def show(items, text):
        items = list(items)
        done.append([text, len(items)])
        return items
    return show

api._progress = progress
made = api.compress(model, recipe, output, steps=4)
note = {"done": done, "files": len(made.manifest["files"])}
index = 0 if processes.is_main() else 1
Path(output).with_name(f"process-{index}.json").write_text(json.dumps(note))
"""


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what two processes leave: their bundle, their cache `two`, and a note by each."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "mixed.yaml").write_text(RECIPE)
    (folder / "script.py").write_text(SCRIPT)
    environment = os.environ | {"DIFFPRESS_CACHE": str(folder / "two"), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    # The launcher that GPUs get: `--cpu` starts a single process where there is no MPI.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    arguments = [folder / "script.py", tiny_pipeline, folder / "mixed.yaml", folder / "bundle"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def alone(folder: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """The same in this process, with the cache `one`."""
    monkeypatch.setenv("DIFFPRESS_CACHE", str(folder / "one"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the order of the launched processes
    chosen = recipes.load(str(folder / "mixed.yaml"))
    work = api.begin(str(tiny_pipeline), chosen, steps=4, quiet=True)
    run(chosen.built(), work)
    yield work
    torch.set_num_threads(threads)


def test_two_processes_end_with_what_one_makes(folder: Path, alone: Work) -> None:
    made = bundle.load(folder / "bundle")
    formats = {name: layer.name for name, layer in Plan.load(made.file("plan")).quantization.items()}
    assert formats == {name: layer.name for name, layer in alone.quantization.items()}
    assert set(formats.values()) == {"int8", "int4 weights"}
    shipped = {row["layer"]: row for row in inspection.layer_rows(made)}
    for row in alone.tables["sensitivity"]:
        assert {key: shipped[row["layer"]][key] for key in ("error", "candidates", "why")}.items() <= row.items()
    recorded = [path.relative_to(folder / "one") for path in (folder / "one" / "calibration").rglob("*.safetensors")]
    assert len(recorded) == 3
    for path in recorded:
        ours, theirs = load_file(folder / "one" / path), load_file(folder / "two" / path)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_each_did_its_part_and_the_first_wrote_the_bundle(folder: Path) -> None:
    notes = [json.loads((folder / f"process-{index}.json").read_text()) for index in range(2)]
    made = bundle.load(folder / "bundle")
    assert [note["files"] for note in notes] == [len(made.manifest["files"])] * 2
    first, second = (dict(note["done"]) for note in notes)
    assert (first["recording"], second["recording"]) == (2, 1)
    measured = sum(len(row["candidates"] or ()) for row in inspection.layer_rows(made))
    assert (first["measuring sensitivity"], second["measuring sensitivity"]) == ((measured + 1) // 2, measured // 2)
    assert "measuring latent" in first and "measuring latent" not in second
    assert "exporting the denoiser" in first and "exporting the denoiser" not in second
    assert not list((folder / "two" / "unfinished").iterdir())


def test_inspect_prints_what_was_measured_of_every_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder / "bundle"), "--layers"]) == 0
    text = capsys.readouterr().out
    rows = {row["layer"]: row for row in inspection.layer_rows(bundle.read(folder / "bundle"))}
    header = next(line.split() for line in text.splitlines() if line.startswith("layer "))
    assert header[-3:] == ["error", "why", "candidates"]  # without a target, no column of latencies
    lines = {line.split()[0]: line for line in text.splitlines() if line.split() and line.split()[0] in rows}
    assert set(lines) == set(rows)
    for name, line in lines.items():
        row = rows[name]
        assert row["why"] in line if row["format"] == "float32" else not row["why"], name
        for option in row["candidates"] or ():
            assert f"{option['name']} {option['error']:.4g}" in line
    assert "override" in lines["up_blocks.0.resnets.0.conv_shortcut"]
    assert "budget" in {row["why"] for row in rows.values()}
    assert all(row["format"] == "int8" for name, row in rows.items() if name.endswith("ff.net.2"))

"""Two processes of `accelerate launch` judge a bundle together: the first measures, both draw, one writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffpress import api, bundle
from diffpress.calibration import processes

IMAGES = 24  # a batch and a half

SCRIPT = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from diffpress.benchmarks import ceilings, drawing, roofline, throughput, timing
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, REFERENCE
from diffpress.benchmarks.bench import bench
from diffpress.calibration import processes

made, model, plain, images = sys.argv[1:]
drawn, timed = [], []

store, measure = drawing.candidates.store, timing.measure

def stored(file, images):
    drawn.append([file.parent.name.rpartition("-")[0], file.name[:6]])
    store(file, images)

def measured(*arguments):
    timed.append(True)
    return measure(*arguments)

drawing.candidates.store, timing.measure = stored, measured
# What takes long and is alike however many draw.
started = {key: dict.fromkeys((REFERENCE, EXPORT, COMPRESSED), 1.0) for key in ("peak_rss_bytes", "cold_start_ms")}
timing._starts, roofline.measure, throughput.BATCHES = lambda *_: started, lambda *_: {}, (1,)
ceilings.all_cores = nullcontext  # beside other tests, threads would wait for each other
report = bench(made, model, int(images), quiet=True, uncompressed=Path(plain))
index = 0 if processes.is_main() else 1
note = {"drawn": drawn, "timed": timed, "quality": report["quality"], "created": report["created"]}
Path(made).with_name(f"process-{index}.json").write_text(json.dumps(note))
"""


@pytest.fixture(scope="module")
def folder(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what two processes leave: a bundle with its report, their cache, and a note by each."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("judged")
    made = api.compress(str(least_pipeline), "fp32", folder / "bundle", steps=3, quiet=True)
    shutil.copytree(made.path, folder / "plain")
    (folder / "script.py").write_text(SCRIPT)
    environment = os.environ | {"DIFFPRESS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    arguments = [folder / "script.py", made.path, least_pipeline, folder / "plain", str(IMAGES)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


def notes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"process-{index}.json").read_text()) for index in range(2)]


def test_both_draw_and_no_image_twice(folder: Path) -> None:
    first, second = ([tuple(part) for part in note["drawn"]] for note in notes(folder))
    assert first and second and abs(len(first) - len(second)) <= 1
    assert len({*first, *second}) == len(first) + len(second)
    batches = {(name, start) for name in ("reference_eager", "compressed") for start in ("000000", "000016")}
    assert {*first, *second} >= batches | {("uncompressed_export", "000000")}
    assert not list((folder / "cache").rglob("*.npz"))


def test_the_first_measures_and_both_know_the_result(folder: Path) -> None:
    first, second = notes(folder)
    assert (first["timed"], second["timed"]) == ([True], [])
    assert (first["quality"], first["created"]) == (second["quality"], second["created"])
    report = json.loads((folder / "bundle" / "report" / "report.json").read_text())
    assert report["quality"] == first["quality"] and report["quality"]["images"] == IMAGES
    assert report["quality"]["psnr_db"] > 35 and report["faults"] == []
    assert bundle.problems(bundle.read(folder / "bundle")) == []


def test_alone_there_is_nobody_to_hear_from() -> None:
    value = {"a": 1}
    assert processes.from_main(value) is value


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"CUDA_VISIBLE_DEVICES": "1", "LOCAL_RANK": "0"}),
        (
            {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,7"},
            {"CUDA_VISIBLE_DEVICES": "7", "LOCAL_RANK": "0"},
        ),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "4,7"}, {}),  # accelerate says what is wrong
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}, {}),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {}),
        ({}, {}),
    ],
)
def test_a_launched_process_sees_its_own_gpu(environment: dict[str, str], expected: dict[str, str]) -> None:
    found = dict(environment)
    processes.take_own_gpu(found)
    assert found == environment | expected

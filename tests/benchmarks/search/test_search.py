"""Whole searches of the least pipeline: killed and resumed, on a Ray cluster, and with limits that cannot be kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffpress import bundle, cli
from diffpress.benchmarks.search import objective
from diffpress.compress import recipe as recipes

ROOT = Path(__file__).parents[3]
SPACE = """
steps: 6
calibration: {prompts: 2, steps: 2}
precision: [fp32]
first: [plain.yaml]
passes:
  - schedule: [null, {solver: [unipc, ddim], steps: {from: 2, to: 5}}]
  - cache: [null, {interval: [2, 3]}]
  - temporal-table: [null, {}]
"""


def command(place: Path, *more: str | Path) -> list[str]:
    space = place.parent / "space.yaml"
    return [
        "search", str(place.parent / "model"), "--space", str(space), "--budget", "speedup >= 0.01", "--images", "3",
        "--output", str(place), *map(str, more),
    ]  # fmt: skip


def begun(*words: str, **environment: str) -> subprocess.Popen[str]:
    known = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | environment
    line = [sys.executable, "-m", "diffpress", *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=known)


def records(place: Path) -> dict[str, Any]:
    return {file.stem: json.loads(file.read_text()) for file in (place / "trials").glob("*.json")}


def processes(place: Path) -> list[int]:
    """Workers of a search, by the folder that their task names or that they were started from."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            log = os.readlink(entry / "fd/2")
        except OSError:
            continue
        if "diffpress.benchmarks.search.worker" in words and log.startswith(str(place)):
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def killed(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A search that was killed after two trials, and went on: its folder, and what there was when it was killed."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "space.yaml").write_text(SPACE)
    (folder / "plain.yaml").write_text("{steps: 6, passes: []}")
    (folder / "model").symlink_to(least_pipeline)
    place = folder / "found"
    first = begun(*command(place, "--trials", "4", "--workers", "2"))
    deadline = time.monotonic() + 600
    while len(list((place / "trials").glob("*.json"))) < 2:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    gone = time.monotonic() + 30
    while left := processes(place):
        assert time.monotonic() < gone, f"workers {left} outlive their search"
        time.sleep(0.2)
    before = {file.name: file.read_bytes() for file in (place / "trials").glob("*.json")}
    exported = (place / "export/diffpress.json").stat().st_mtime_ns
    second = begun(*command(place, "--trials", "4", "--workers", "2"))
    out, err = second.communicate(timeout=900)
    assert second.returncode == 0, err
    yield {"place": place, "before": before, "exported": exported, "out": out, "err": err}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_search_that_was_killed_goes_on(killed: dict[str, Any]) -> None:
    place, before = killed["place"], killed["before"]
    assert 2 <= len(before) < 4 == len(records(place))
    assert all((place / "trials" / name).read_bytes() == content for name, content in before.items())
    assert (place / "export/diffpress.json").stat().st_mtime_ns == killed["exported"]
    assert all(record["state"] in ("measured", "hopeless") for record in records(place).values())


def test_it_ends_with_a_report_a_recipe_and_a_bundle(killed: dict[str, Any]) -> None:
    place = killed["place"]
    report = json.loads((place / "report.json").read_text())
    within = [entry for entry in report["finalists"] if entry["within"]]
    own = within[objective.least(within, objective.LOSSES["latent_error"]) or 0]
    assert own["key"] == report["chosen"]
    best = min(within, key=lambda entry: entry["loss"])
    assert own is best or own["quality"]["latent_rel_l2_median"] <= best["quality"]["latent_rel_l2_median"]
    assert len(report["trials"]) == 4 and "plain" in {entry["name"] for entry in report["trials"]}
    recipe = recipes.load(str(place / "recipe.yaml"))
    assert list(recipe.passes) == own["recipe"]["passes"] and recipe.steps == 6
    assert (place / "recipe.yaml").read_text().startswith(f"# {own['speedup']['vs_eager']:.2f}x, latent_error ")
    made = bundle.load(place / "bundle")
    assert [entry["name"] for entry in made.manifest["passes"]] == [name for name, _ in recipe.built()]
    assert made.manifest["default_backend"] == {"name": own["backend"], "precision": "fp32"}
    assert report["bundle"]["loss"] == pytest.approx(own["loss"], rel=1e-3, abs=1e-6)
    assert "No recipe" not in (place / "report.html").read_text()
    assert f"bundle: {place / 'bundle'}" in killed["out"] and "4 trials, " in killed["out"]
    kept = {path.name for path in (place / "graphs").iterdir() if path.is_dir()}
    assert len(kept) <= len(report["finalists"]) + 1


def test_the_same_command_has_nothing_left_to_do(killed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    place = killed["place"]
    times = {file: file.stat().st_mtime_ns for file in [*place.glob("trials/*"), place / "bundle/diffpress.json"]}
    assert cli.main([*command(place, "--trials", "4"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_limits_that_cannot_be_kept_name_the_nearest(
    killed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    place = killed["place"].with_name("copy")
    shutil.copytree(killed["place"], place)
    words = command(place, "--trials", "4", "--quiet", "--budget", "speedup >= 1000", "--budget", "psnr >= 1")
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no recipe of 4 trials keeps the limits; the nearest, " in line
    assert "misses speedup >= 1000 (reached " in line and "psnr" not in line
    assert f"the front is in {place / 'report.html'}" in line
    report = json.loads((place / "report.json").read_text())
    assert report["chosen"] is None and report["finalists"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--minimise", "psnr_loss"], "holds a search with another minimise"),
        (["--seed", "1"], "holds a search with another settings"),
        (["--images", "4"], "holds a search with another settings"),
    ],
)
def test_another_search_is_not_put_into_the_same_folder(
    more: list[str], message: str, killed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command(killed["place"], "--quiet"), *more]) == 2
    assert message in capsys.readouterr().err


def test_it_runs_on_a_ray_cluster(killed: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'diffpress[ray]'")
    from ray.cluster_utils import Cluster

    place = killed["place"].with_name("clustered")
    place.mkdir()
    for name in ("export", "reference-trials.npz", "base.json"):  # what a search makes before its trials
        source = killed["place"] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place / name)
    shutil.copy(killed["place"] / "search.json", place)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        words = command(place, "--trials", "3", "--workers", "2", "--ray", cluster.address)
        run = begun(*words, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
        out, err = run.communicate(timeout=900)
        assert run.returncode == 0, err
        missing = begun(*command(place, "--trials", "8", "--workers", "3", "--ray", cluster.address))
        assert "the Ray cluster has 2 processors: ask for --workers 2" in missing.communicate(timeout=120)[1]
    finally:
        cluster.shutdown()
    found = records(place)
    assert len(found) == 3 and {record["state"] for record in found.values()} <= {"measured", "hopeless"}
    assert (place / "bundle/diffpress.json").is_file() and "recipe: " in out
    assert yaml.safe_load((place / "recipe.yaml").read_text())["steps"] == 6
    assert not (place / "logs").exists()  # no process of this machine


def test_a_cluster_that_is_not_there_is_said(killed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'diffpress[ray]'")
    assert cli.main([*command(killed["place"], "--trials", "9", "--ray", "127.0.0.1:1"), "--quiet"]) == 2
    assert "no Ray cluster answers at '127.0.0.1:1': start one with 'ray start --head'" in capsys.readouterr().err

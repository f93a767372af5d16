"""Ours beside the peers: rows and their form, what a failure leaves, and what a second run does not repeat."""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks import candidates, peers, peers_bench, peers_rows
from diffpress.benchmarks.candidates import Drawn
from diffpress.benchmarks.gpu_launch import Failed
from diffpress.benchmarks.peers_bench import Bench
from diffpress.benchmarks.peers_link import Answers
from diffpress.benchmarks.peers_rows import CALL, CONVERGED, DDIM, DPM_12, OWN, REFERENCE, Contender, Model
from diffpress.benchmarks.prompts import Prompts
from diffpress.compress.recipe import presets
from diffpress.paths import whole

SHAPES = Model("shapes", "shapes", (4, 8, 8), (8, 6), 32, 2.0, {DDIM.name: DDIM, DPM_12.name: DPM_12})
CALLED = replace(peers_rows.shapes(), name=CALL, schedules={peers_rows.SHORT.name: peers_rows.SHORT})
THREE = {
    REFERENCE: Contender(REFERENCE, "torch"),
    "bad": Contender("bad", "torch"),
    "good": Contender("good", "torch", peer=False),
}
ISSUE = {
    "bits_w", "bits_a", "bytes", "params", "latent_rel_l2", "psnr_db", "ssim", "clip_score", "frechet",
    "attribute_accuracy", "speedup_vs_eager", "speedup_vs_uncompressed", "seconds", "deploys", "images_per_second",
    "peer", "schedule", "steps", "reason",
}  # fmt: skip
Fail = Callable[[str, str, str], str | None]  # (contender, what is asked, schedule) -> a reason


class Actor:
    """Answers as a worker would: what it draws is its name's, twice as fast as the reference; fails as it is told."""

    alive = True

    def __init__(self, contender: Contender, fail: Fail, asked: list[tuple[str, str]]) -> None:
        self.name, self.fail, self.asked = contender.name, fail, asked

    def ask(self, do: str, /, **message: Any) -> dict[str, Any]:
        self.asked.append((self.name, do))
        reason = self.fail(self.name, do, message["schedule"])
        if reason:
            raise Failed(reason)
        random = np.random.default_rng(zlib.crc32(self.name.encode()))
        if do == "draw":
            count = len(message["texts"])
            latents = np.ones((count, 4, 8, 8), np.float32) + 0.1 * random.normal(size=(count, 4, 8, 8))
            pixels = random.integers(0, 255, (count, 32, 32, 3)).astype(np.uint8)
            candidates.store(Path(message["file"]), Drawn(pixels, latents, np.empty((0, 0, 4, 8, 8))))
        elif do == "calls":
            scale = 1.0 if self.name == REFERENCE else 1.25
            with np.load(message["inputs"]) as arrays:
                outputs = scale * arrays["samples"][:, :1]
            whole(Path(message["file"]), lambda part: np.save(part, outputs))
        elif do == "time":
            return {"ms": 100.0 if self.name == REFERENCE else 50.0}
        return {"steps": 3, "timesteps": [901.0, 501.0, 101.0], "bits_w": 8, "bits_a": 8, "bytes": 10, "params": 40,
                "deploys": True, "seconds": 1.5, "backend": "a library"}  # fmt: skip

    def close(self) -> None:
        pass


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., tuple[Bench, list[tuple[str, str]]]]:
    """Makes a run with actors, and the list of what they are asked."""

    def make(fail: Fail = lambda *_: None, **changes: Any) -> tuple[Bench, list[tuple[str, str]]]:
        asked: list[tuple[str, str]] = []

        def start(contender: Contender, model: Model) -> Answers:
            reason = fail(contender.name, "start", "")
            if reason:
                raise Failed(reason)
            return Actor(contender, fail, asked)

        chosen = Prompts([f"prompt {index}" for index in range(5)], "made up")
        rounds = {"shapes": 3, CALL: 3}
        return replace(Bench(tmp_path, THREE, chosen, start, rounds), **changes), asked

    return make


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_bench, "SETTLE_S", 0)


# -- who is there ------------------------------------------------------------------------------------------------------


def test_contenders_are_the_reference_the_peers_and_every_preset() -> None:
    found = peers_rows.contenders()
    assert next(iter(found)) == REFERENCE and all(name == one.name for name, one in found.items())
    assert all(one.plain in found for one in found.values())
    assert {one.environment for one in found.values()} - {None} == set(peers_rows.ENVIRONMENTS)
    recipes = {one.options["recipe"] for one in found.values() if not one.peer}
    assert recipes == set(presets())
    quick = [one for one in found.values() if one.quick]
    assert {one.peer for one in quick} == {True, False} and found[REFERENCE] in quick and len(quick) < len(found) / 2
    for name in ("BF16", "channels-last", "torch.compile", "DeepCache", "ToMe", "optimum-onnx", "ONNX Runtime",
                 "OpenVINO BF16", "NNCF", "modelopt", "torchao", "pruna"):  # fmt: skip
        assert any(name in other for other in found), name


def test_a_recipe_with_a_schedule_of_its_own_has_no_other() -> None:
    found = peers_rows.contenders()
    assert found["diffpress fast"].schedules(SHAPES) == [OWN]
    assert found["diffpress int8"].schedules(SHAPES) == list(SHAPES.schedules) == found[REFERENCE].schedules(SHAPES)


def test_what_finetunes_is_not_called_at_a_large_models_size(bench: Any) -> None:
    found = peers_rows.contenders()
    assert [name for name, one in found.items() if one.not_called] == ["diffpress max"]
    own, asked = bench(contenders={REFERENCE: found[REFERENCE], "diffpress max": found["diffpress max"]})
    rows = peers.measured(own, CALLED)
    assert [row["reason"] for row in rows] == [None, peers_rows.TOO_LONG]
    assert "diffpress max" not in {name for name, _ in asked}
    own.draw(SHAPES, found["diffpress max"])
    assert ("diffpress max", "draw") in asked


def test_models_and_schedulers_are_read_from_the_folder() -> None:
    model = peers_rows.shapes()
    assert (model.latent, model.side, model.text[1]) == ((4, 16, 16), 64, 96)
    assert [schedule.steps for schedule in model.schedules.values()] == [50, 20, 12]
    made = [peers_rows.scheduler(model, schedule) for schedule in model.schedules.values()]
    assert [entry["class"] for entry in made] == ["DDIMScheduler", *["DPMSolverMultistepScheduler"] * 2]
    assert made[1]["config"]["use_karras_sigmas"] and made[1]["config"]["prediction_type"] == "v_prediction"
    (late, noisy), (early, clean) = peers_rows.signal_and_noise(model, [999, 0])
    assert max(late, clean) < 0.1 and min(noisy, early) > 0.9 and late**2 + noisy**2 == pytest.approx(1)


def test_a_task_survives_json(tmp_path: Path) -> None:
    contender = peers_rows.contenders()["DeepCache, interval 3"]
    made = peers.task(contender, peers_rows.shapes(), tmp_path, ["a red ball"])
    text = json.dumps(made.__dict__, default=str)
    assert type(made)(**json.loads(text)).options == {"deepcache": 3}
    assert set(made.schedules) == {*peers_rows.SCHEDULES, CONVERGED.name} and not made.single


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_form_of_the_other_tables(bench: Callable[..., Any]) -> None:
    made, _ = bench()
    rows = peers.measured(made, SHAPES)
    assert len(rows) == 6 and all(row.keys() >= ISSUE for row in rows)
    assert len({row["name"] for row in rows}) == 6 and all(row.keys() == rows[0].keys() for row in rows)
    first, good = rows[0], rows[-1]
    assert (first["schedule"], first["steps"], first["psnr_db"], first["latent_rel_l2"]) == ("DDIM", 3, None, 0)
    assert first["speedup_vs_eager"] == 1 and first["peer"] is True and first["reason"] is None
    assert good["speedup_vs_eager"] == pytest.approx(2) and good["speedup_vs_uncompressed"] == pytest.approx(2)
    assert good["images_per_second"] == pytest.approx(20) and good["peer"] is False and good["bits_w"] == 8
    assert 0 < good["latent_rel_l2"] < 1 and 0 < good["psnr_db"] < 20 and good["attribute_accuracy"] is None


def test_images_a_second_follow_the_ratios_where_the_machine_drifts(bench: Callable[..., Any]) -> None:
    made, _ = bench()
    peers.measured(made, SHAPES)
    file = made.file("times", SHAPES, "good", next(iter(SHAPES.schedules)))
    found = json.loads(file.read_text())
    slower = {name: [3 * ms for ms in found[name]] for name in ("own", "reference")}  # by a neighbour
    file.write_text(json.dumps(found | slower))
    rows = peers.measured(made, SHAPES)
    assert [row["images_per_second"] for row in rows] == pytest.approx([10 * row["speedup_vs_eager"] for row in rows])


def test_calls_are_compared_with_the_references_of_the_same_inputs(bench: Callable[..., Any]) -> None:
    made, _ = bench()
    rows = peers.measured(made, CALLED)
    assert [row["latent_rel_l2"] for row in rows] == pytest.approx([0, 0.25, 0.25])
    assert all(row["images_per_second"] is None and row["psnr_db"] is None for row in rows)
    assert rows[1]["speedup_vs_eager"] == pytest.approx(2) and rows[1]["p50_ms"] == 50
    with np.load(made.inputs(CALLED, [901.0, 501.0, 101.0])) as arrays:
        samples = arrays["samples"]
        assert samples.shape == (3, 2, *CALLED.latent) and (samples[:, 0] == samples[:, 1]).all()


@pytest.mark.parametrize("do", ["start", "follow", "draw"])
def test_a_peer_that_crashes_is_a_row_with_its_reason_and_the_rest_goes_on(bench: Callable[..., Any], do: str) -> None:
    made, _ = bench(lambda name, what, _: "it broke: no kernel" if name == "bad" and what == do else None)
    rows = peers.measured(made, SHAPES)
    broken, others = [row for row in rows if row["contender"] == "bad"], [r for r in rows if r["contender"] != "bad"]
    assert len(broken) == 2 and all(row["reason"] == "it broke: no kernel" for row in broken)
    assert all(row["speedup_vs_eager"] is None and row["latent_rel_l2"] is None for row in broken)
    assert all(row["reason"] is None and row["speedup_vs_eager"] for row in others)


def test_one_schedule_that_fails_leaves_the_others(bench: Callable[..., Any]) -> None:
    made, _ = bench(lambda name, what, schedule: "no" if (name, what, schedule) == ("bad", "draw", DDIM.name) else None)
    rows = {row["name"]: row for row in peers.measured(made, SHAPES)}
    assert rows[f"bad, {DDIM.name}"]["reason"] == "no" and rows[f"bad, {DDIM.name}"]["speedup_vs_eager"] is None
    assert rows[f"bad, {DPM_12.name}"]["reason"] is None and rows[f"bad, {DPM_12.name}"]["speedup_vs_eager"] == 2


def test_one_that_cannot_be_timed_keeps_its_quality(bench: Callable[..., Any]) -> None:
    made, _ = bench(lambda name, what, _: "killed" if name == "bad" and what == "time" else None)
    row = next(row for row in peers.measured(made, SHAPES) if row["contender"] == "bad")
    assert "killed" in row["reason"] and row["speedup_vs_eager"] is None and row["latent_rel_l2"] > 0


def test_without_its_uncompressed_export_a_row_lacks_that_ratio_alone(bench: Callable[..., Any]) -> None:
    made, _ = bench(contenders={REFERENCE: THREE[REFERENCE], "alone": Contender("alone", "torch", plain="not chosen")})
    rows = [row for row in peers.measured(made, SHAPES) if row["contender"] == "alone"]
    assert len(rows) == 2 and all(row["reason"] is None for row in rows)
    assert all(row["speedup_vs_uncompressed"] is None and row["speedup_vs_eager"] > 1 for row in rows)


def test_without_the_reference_every_row_says_why(bench: Callable[..., Any]) -> None:
    made, _ = bench(lambda name, *_: "no memory" if name == REFERENCE else None)
    rows = peers.measured(made, SHAPES)
    assert len(rows) == 6 and all("no memory" in row["reason"] for row in rows)


def test_what_is_kept_is_not_measured_again_and_a_failure_only_when_asked(bench: Callable[..., Any]) -> None:
    def fail(name: str, what: str, _: str) -> str | None:
        return "no" if name == "bad" and what == "draw" else None

    first, _ = bench(fail)
    rows = peers.measured(first, SHAPES)
    again, asked = bench()
    assert peers.measured(again, SHAPES) == rows and asked == []
    retried, asked = bench(retry=True)
    rows = peers.measured(retried, SHAPES)
    assert all(row["reason"] is None for row in rows)
    assert {name for name, do in asked if do == "draw"} == {"bad"}


def test_a_run_is_written_after_each_model(bench: Callable[..., Any], tmp_path: Path) -> None:
    made, _ = bench()
    file = tmp_path / "peers.json"

    def second() -> Model:
        assert len(json.loads(file.read_text("utf-8"))["rows"]) == 6
        return CALLED

    document = peers.run(made, [lambda: SHAPES, second], tmp_path, file, quick=True)
    assert json.loads(file.read_text("utf-8")) == json.loads(json.dumps(document)) and len(document["rows"]) == 9
    assert document["quick"] and document["images"] == 5 and {"machine", "versions", "environments"} <= document.keys()


def test_a_name_that_no_contender_has_is_one_line_and_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.main(["--json", str(tmp_path / "x.json"), "--work", str(tmp_path / "w"), "--only", "nothing like it"])
    assert ended.value.code == 2 and "no contender's name holds nothing like it" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_process_starts_with_all_threads_and_without_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def worker(command: list[str], log: Path, environ: Mapping[str, str], limit_s: float) -> Any:
        seen.update(command=command, environ=environ)

    monkeypatch.setattr(peers, "Worker", worker)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(peers.peers_venv, "python_of", lambda name, *_: Path(f"/{name}/python"))
    found = peers_rows.contenders()
    peers.starting(tmp_path, ["a text"])(found["optimum-onnx FP32"], peers_rows.shapes())
    assert seen["command"][:3] == ["/optimum-onnx/python", "-m", "diffpress.benchmarks.peers_worker"]
    assert seen["environ"]["PRUNA_METRICS_ENABLED"] == "false" and seen["environ"]["HF_HUB_OFFLINE"] == "1"
    assert "OMP_NUM_THREADS" not in seen["environ"]  # every library takes what it takes by itself
    path = Path(seen["environ"]["PYTHONPATH"].split(os.pathsep)[0])
    assert [entry.name for entry in path.iterdir()] == ["diffpress"]  # and not what is installed beside it

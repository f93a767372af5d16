"""The GPU benchmark up to the launch: rows and their reasons, state, what is told; measuring on the CPU as a device."""

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.benchmarks import candidates, gpu, gpu_bundles, gpu_launch, gpu_rows, gpu_worker
from diffpress.benchmarks.candidates import Drawn
from diffpress.benchmarks.gpu import Bench
from diffpress.benchmarks.gpu_device import Device, Peak
from diffpress.benchmarks.gpu_launch import Failed, Job, Launch
from diffpress.benchmarks.gpu_rows import BASELINE, MODELS, RECIPES, WHOLE, Model, Row
from diffpress.benchmarks.latency import alternate, wall_clock
from diffpress.compress.recipe import Recipe
from diffpress.errors import DiffpressError
from diffpress.runtime import cuda

CEILINGS = {"operations_per_s": {"fp32": 4e13, "fp16": 1e14, "int8": 2e14, "fp8": None}, "bytes_per_s": 1e12}
TINY = Model("shapes", 4, 2.0, 16, {"prompts": 2, "steps": 2}, 3)


class Cpu(Device):
    """The processor in a GPU's place."""

    torch = "cpu"

    def __init__(self) -> None: ...

    def time(self, call: Callable[[], object]) -> float:
        return wall_clock(call)

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        yield Peak(12345)

    def energy(self, call: Callable[[], object], seconds: float) -> dict[str, Any]:
        call()
        return {"energy_j": None, "power_w": None, "energy_reason": "a processor"}


def bench(folder: Path, launch: Launch, **changes: Any) -> Bench:
    made = Bench(folder, "sm89", "cuda", folder / "state", launch, only=("nothing",))
    return replace(made, **changes)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_every_recipe_on_every_library_and_the_references_first() -> None:
    rows = gpu_rows.rows()
    assert rows[:2] == [WHOLE, BASELINE] and len(set(rows)) == len(rows)
    for library in gpu_rows.LIBRARIES:
        assert [row.recipe for row in rows if row.runner == library] == list(RECIPES)
    assert {row.group for row in rows} == {"reference", "uncompressed", "pruned", "cached", "8-bit", "together"}
    quick = gpu_rows.rows(quick=True)
    assert quick[:2] == [WHOLE, BASELINE] and set(quick) < set(rows) and len(quick) == 8
    assert all(row.plain in rows for row in rows)


@pytest.mark.parametrize("model", MODELS.values(), ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_what_compress_reads(model: Model, recipe: str) -> None:
    read = Recipe.model_validate(gpu_rows.document(model, recipe))
    assert (read.steps, read.guidance_scale) == (model.steps, model.guidance)
    names = [name for name, _ in read.built()]
    assert ("cache" in names, "quantize" in names) == ("cached" in recipe, "8" in recipe)


def test_reasons_of_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda: None)

    def absent(name: str) -> Any:
        raise DiffpressError(f"'{name}' is not installed: pip install it")

    monkeypatch.setattr(gpu_rows.tensor_rt, "library", absent)
    reasons = {row: gpu_rows.obstacle(row, "sm86", None) for row in gpu_rows.rows()}
    assert all(reasons.values()) and not any("\n" in str(reason) for reason in reasons.values())
    assert "sm86 has no FP8 arithmetic" in str(reasons[Row("tensorrt", "fp8, cached")])
    assert "pip install" in str(reasons[BASELINE])
    assert "torch does not see this GPU" in str(gpu_rows.obstacle(BASELINE, "sm89", "cpu"))
    assert gpu_rows.obstacle(WHOLE, "sm89", "cpu") is None  # the reference can be drawn anywhere
    assert gpu_rows.obstacle(BASELINE, "sm89", "cuda") is None
    monkeypatch.setattr(gpu_rows.importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert "triton" in str(gpu_rows.obstacle(Row("diffusers compiled", "fp16"), "sm89", "cuda"))


def test_without_a_gpu_it_ends_with_one_line_and_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--json", str(tmp_path / "out.json"), "--work", str(tmp_path), "--quick"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and "no NVIDIA GPU found" in lines[0]
    assert not (tmp_path / "out.json").exists()


# -- state and what is told --------------------------------------------------------------------------------------------


class Script:
    """Does jobs as a list says: fails those whose rows hold a name, measures the rest at once."""

    def __init__(self, fail: Callable[[Job], str | None] = lambda job: None) -> None:
        self.fail, self.jobs = fail, list[Job]()

    def __call__(self, job: Job, log: Path) -> dict[str, Any]:
        self.jobs.append(job)
        reason = self.fail(job)
        if reason:
            raise Failed(reason)
        if job["do"] == "ceilings":
            return CEILINGS
        names = [Row(*pair).name for pair in job.get("rows", ())]
        if job["do"] == "probe":
            random = np.random.default_rng(zlib.crc32(names[0].encode()))
            latents = random.normal(size=(job["images"], 4, 4, 4)).astype(np.float32)
            pixels = random.integers(0, 255, (job["images"], 16, 16, 3), np.uint8)
            candidates.store(Path(job["drawn"]), Drawn(pixels, latents, latents[None]))
            work = {"operations": {"fp16": 4_000_000_000}, "weight_bytes": 10_000_000, "activation_bytes": 0}
            call = {"p50_ms": 0.1, "p90_ms": 0.2, "p99_ms": 0.3, "runs": 7, "work": work}
            return {"bits_w": 16, "calls": {"full": call}, "peak_device_bytes": 1}
        times = {"p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "runs": 3}
        return {name: {**times, "speedups": {other: 2.0 for other in names if other != name}} for name in names}


def test_a_row_that_fails_is_a_row_with_its_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = Row("diffusers", "fp16, cached")
    script = Script(
        lambda job: "it broke" if job["do"] == "probe" and job["rows"] == [["diffusers", bad.recipe]] else None
    )
    made = bench(tmp_path, script, only=("diffusers:",))
    rows = {row["name"]: row for row in made.measured(TINY, CEILINGS)}
    assert rows[bad.name]["reason"] == "it broke" and "latency_ms" not in rows[bad.name]
    assert rows[BASELINE.name]["reason"] is None and rows[BASELINE.name]["speedup_vs_eager"] == 1.0
    assert rows[WHOLE.name]["speedup_vs_eager"] == 2.0 and rows[WHOLE.name]["latent_rel_l2"] is None
    assert rows[BASELINE.name]["latent_rel_l2"] > 0 and rows[BASELINE.name]["psnr_db"] > 0
    # Another run measures nothing again, not even what failed, unless it is asked to.
    script.jobs.clear()
    assert {row["name"]: row for row in made.measured(TINY, CEILINGS)} == rows
    assert [job["do"] for job in script.jobs] == [
        "make"
    ] * 2  # bundles are looked for on disk, where a script makes none
    script.jobs.clear()
    script.fail = lambda job: None
    again = {row["name"]: row for row in replace(made, retry=True).measured(TINY, CEILINGS)}
    assert again[bad.name]["reason"] is None and again[bad.name]["speedup_vs_eager"] == 2.0
    assert [job["do"] for job in script.jobs if job["do"] != "make"] == ["probe", "times"]


def test_the_document_is_written_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"name": "Fake RTX 4090", "target": "sm89", "driver": "580.1"}
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("Fake RTX 4090", "sm89", 24 << 30, False))
    monkeypatch.setattr(gpu, "Device", lambda: SimpleNamespace(describe=lambda: described))
    monkeypatch.setattr(gpu_rows, "torch_place", lambda: "cuda")
    script, file = Script(), tmp_path / "out.json"
    arguments = ["--json", str(file), "--work", str(tmp_path), "--quick", "--only", "diffusers:"]
    gpu.main(arguments, script)
    document = json.loads(file.read_text())
    assert document["device"] == described and document["ceilings"] == CEILINGS and document["quick"]
    assert [row["name"] for row in document["rows"]] == [WHOLE.name, BASELINE.name]
    assert list(document["models"]) == ["shapes"] and document["versions"]["torch"]
    assert document["rows"][1]["calls"]["full"]["of_roofline"] == pytest.approx(0.4)
    script.jobs.clear()
    gpu.main(arguments, script)
    assert [job["do"] for job in script.jobs] == ["ceilings", "make"]
    assert json.loads(file.read_text())["rows"] == document["rows"]
    script.jobs.clear()
    described["driver"] = "590.1"
    gpu.main(arguments, script)
    assert [job["do"] for job in script.jobs] == ["ceilings", "make", "probe", "probe", "times"]
    script.fail = lambda job: "no torch" if job["do"] == "ceilings" else None
    gpu.main(arguments, script)
    document = json.loads(file.read_text())
    assert document["ceilings"]["reasons"] == {"all": "no torch"}
    assert document["rows"][1]["calls"]["full"]["of_roofline"] is None
    with pytest.raises(SystemExit):
        gpu.main(["--quick"], script)  # without a place for the result


def test_bundles_can_be_made_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    script = Script()
    gpu.main(["--prepare", "--work", str(tmp_path), "--model", "sd15"], script)
    assert [(job["model"], job["recipe"]) for job in script.jobs] == [("sd15", recipe) for recipe in RECIPES]
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--prepare", "--work", str(tmp_path)], Script(lambda job: "no space"))
    assert ended.value.code == 2


def test_a_bundle_that_cannot_be_made_is_the_reason_of_its_rows(tmp_path: Path) -> None:
    script = Script(lambda job: "no space" if job["do"] == "make" else None)
    rows = {row["name"]: row for row in bench(tmp_path, script, only=("diffusers:",)).measured(TINY, CEILINGS)}
    assert rows["diffusers: fp16, cached"]["reason"] == "its bundle could not be made: no space"
    assert rows[BASELINE.name]["reason"] is None  # it needs none


def test_rows_that_do_not_fit_together_are_timed_one_by_one(tmp_path: Path) -> None:
    def fail(job: Job) -> str | None:
        if job["do"] != "times" or len(job["rows"]) <= 2:
            return None
        return "out of memory"

    script = Script(fail)
    rows = {row["name"]: row for row in bench(tmp_path, script, only=("diffusers:",)).measured(TINY, CEILINGS)}
    timed = [job["rows"] for job in script.jobs if job["do"] == "times"]
    assert len(timed) == 4 and all(["diffusers", "fp16"] in some for some in timed)
    assert rows["diffusers: fp16, cached"]["latency_ms"]["p50_ms"] == 1.0
    assert rows["diffusers: fp16, cached"]["times_reason"] is None
    script.fail = lambda job: "out of memory" if job["do"] == "times" else None
    other = bench(tmp_path / "other", script, only=("diffusers:",)).measured(TINY, CEILINGS)
    assert {row["times_reason"] for row in other} == {"out of memory"}


def test_a_call_beside_the_ceilings() -> None:
    work = {"operations": {"fp16": 2e9, "int8": 4e9}, "weight_bytes": 8_000_000, "activation_bytes": 2_000_000}
    call = {"p50_ms": 0.1, "p90_ms": 0.2, "p99_ms": 0.3, "runs": 7, "work": work}
    found = gpu.judged(call, CEILINGS)
    assert found["operations_per_s"] == pytest.approx(6e13) and found["bytes_per_s"] == pytest.approx(1e11)
    assert found["roofline_ms"] == pytest.approx(0.04) and found["of_roofline"] == pytest.approx(0.4)
    assert found["of_bandwidth"] == pytest.approx(0.1)
    work["operations"]["fp8"] = 1.0  # no ceiling of it
    assert gpu.judged(call, CEILINGS)["of_roofline"] is None
    assert set(gpu.judged({**call, "work": None}, CEILINGS)) == {"p50_ms", "p90_ms", "p99_ms", "runs"}


@pytest.mark.parametrize(
    ("code", "log", "words"),
    [
        (1, "Traceback\n  File\ntorch.OutOfMemoryError: too much\n", "torch.OutOfMemoryError: too much"),
        (-11, "opening\rbar 3/4\r", "ended by SIGSEGV: bar 3/4"),
        (1, "\n", "it said nothing"),
        (1, "x" * 1000, "x" * gpu_launch.LONGEST),
    ],
)  # fmt: skip
def test_last_words_are_the_reason(code: int, log: str, words: str) -> None:
    assert gpu_launch.told(code, log) == words


def test_a_job_is_a_process_whose_error_comes_back(tmp_path: Path) -> None:
    if cuda.gpu() is not None:
        pytest.skip("there is a GPU here: the job would succeed")
    with pytest.raises(Failed, match="no NVIDIA GPU found"):
        gpu_launch.launched({"do": "ceilings", "memory_bytes": 1 << 30}, tmp_path / "logs" / "ceilings.log")
    with pytest.raises(Failed, match="KeyError"):
        gpu_launch.launched(
            {"do": "make", "work": str(tmp_path), "model": "none", "recipe": "fp16"}, tmp_path / "a.log"
        )


# -- measuring, the processor as the device ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(least_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Rows of the least pipeline in torch and ONNX Runtime on the processor, from the bundles on."""
    work = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_rows.MODELS, "shapes", TINY)
        patch.setattr(gpu_rows, "LIBRARIES", ("onnxruntime",))
        patch.setattr(gpu_bundles, "source", lambda model, folder: str(least_pipeline))
        made = bench(work, lambda job, log: gpu_worker.run(job, Cpu), only=("diffusers:", "time: int8, c"), quick=False)
        patch.setattr(Bench, "job", _smaller(Bench.job))
        rows = made.measured(TINY, CEILINGS)
    return work, {row["name"]: row for row in rows}


def _smaller(job: Callable[..., Job]) -> Callable[..., Job]:
    return lambda *given, **more: {**job(*given, **more), "images": 2, "rounds": 3, "call_rounds": 3}


def test_measured_rows_run(measured: tuple[Path, dict[str, Any]]) -> None:
    _, rows = measured
    assert list(rows) == [WHOLE.name, BASELINE.name, "diffusers: fp16, cached", "onnxruntime: int8, cached"]
    assert {name: row["reason"] for name, row in rows.items()} == dict.fromkeys(rows)
    for row in rows.values():
        assert row["latency_ms"]["runs"] == 3 and row["latency_ms"]["p50_ms"] > 0
        assert row["peak_device_bytes"] == 12345 and row["energy_reason"] == "a processor"
    json.dumps(rows)


def test_measured_rows_are_compared_with_the_same_noise(measured: tuple[Path, dict[str, Any]]) -> None:
    _, rows = measured
    assert rows[WHOLE.name]["latent_rel_l2"] is None
    assert 0 < rows[BASELINE.name]["latent_rel_l2"] < 0.02  # half precision, the same noise
    cached, together = rows["diffusers: fp16, cached"], rows["onnxruntime: int8, cached"]
    assert rows[BASELINE.name]["latent_rel_l2"] < cached["latent_rel_l2"]
    # The same step program in torch and in the bundle; INT8 comes on top.
    assert together["latent_rel_l2"] == pytest.approx(cached["latent_rel_l2"], rel=0.5)
    assert rows[BASELINE.name]["psnr_db"] > cached["psnr_db"] > 10


def test_measured_calls_know_their_work(measured: tuple[Path, dict[str, Any]]) -> None:
    _, rows = measured
    plain, together = rows[BASELINE.name]["calls"], rows["onnxruntime: int8, cached"]["calls"]
    assert set(plain) == {"full"} and len(together) == 2
    whole = sum(plain["full"]["operations"].values())
    assert set(plain["full"]["operations"]) == {"fp16"} and set(together["full"]["operations"]) == {"fp16", "int8"}
    assert sum(together["full"]["operations"].values()) == pytest.approx(whole, rel=1e-6)
    cached = next(call for name, call in together.items() if name != "full")
    assert sum(cached["operations"].values()) < 0.7 * whole
    assert together["full"]["weight_bytes"] < 0.75 * plain["full"]["weight_bytes"]
    assert rows["onnxruntime: int8, cached"]["bits_w"] == 8 and rows[BASELINE.name]["bits_w"] == 16
    assert rows["onnxruntime: int8, cached"]["bytes"] > 0 and rows[WHOLE.name]["bits_w"] == 32
    assert plain["full"]["of_roofline"] is not None and rows[WHOLE.name]["calls"]["full"].keys() >= {"p50_ms"}


def test_only_half_bundles_are_kept(measured: tuple[Path, dict[str, Any]]) -> None:
    work, _ = measured
    assert sorted(path.name for path in (work / "bundles/shapes").iterdir() if path.is_dir()) == [
        "fp16", "fp16-cached", "int8-cached",
    ]  # fmt: skip


def test_a_row_that_draws_nothing_of_use_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken:
        def __call__(self, *_: Any, **__: Any) -> Any:
            return type("Images", (), {"problem": "image 0: every pixel has the same colour"})

    monkeypatch.setattr(gpu_worker, "opened", lambda *_: Broken())
    settings = gpu_worker.Settings(tmp_path, 1, 1, 1, 0.0, "default")
    with pytest.raises(DiffpressError, match="nothing of use: image 0"):
        gpu_worker.probe(BASELINE, TINY, settings, Cpu(), tmp_path / "drawn.npz")


def test_the_compiled_row_compiles_what_it_says(monkeypatch: pytest.MonkeyPatch, least_pipeline: Path) -> None:
    import torch

    from diffpress.benchmarks.gpu_torch import Torch

    compiled: list[tuple[Any, str]] = []

    def compile_(part: Any, mode: str, fullgraph: bool) -> Any:
        compiled.append((part, mode))
        return part

    monkeypatch.setattr(torch, "compile", compile_)
    row = Row("diffusers compiled", "fp16")
    made = Torch.load(str(least_pipeline), TINY, row, "cpu", None, "max-autotune")
    assert [mode for _, mode in compiled] == ["max-autotune"] * 2 and made.pipeline.unet in [one for one, _ in compiled]
    assert made(["a red circle"], [1], keep_latents=True).problem is None


def test_another_clock_is_asked_for_every_call() -> None:
    asked: list[float] = []

    def clock(call: Callable[[], object]) -> float:
        call()
        asked.append(time.perf_counter())
        return 5.0

    assert alternate({"a": lambda _: None, "b": lambda _: None}, 3, 1, clock=clock) == {"a": [5.0] * 3, "b": [5.0] * 3}
    assert len(asked) == 8

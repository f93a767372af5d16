import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from diffpress import bundle
from diffpress.bundle import Bundle
from diffpress.compress.numerics.formats import get
from diffpress.compress.numerics.ranges import weight_scale
from diffpress.engines import builder, library, preflight, turing
from diffpress.engines.build import build as prepared_build
from diffpress.engines.memory import GB, USABLE, MemoryPlan
from diffpress.engines.prepared import Prepared
from diffpress.errors import DiffpressError
from diffpress.export import buildable, engines, graphs, qdq, store
from diffpress.export.deploy import deployable
from diffpress.plan import LayerQuant

try:
    import tensorrt_rtx
except ImportError:
    tensorrt_rtx = None

ALL = ["sm89", "sm75", "sm80", "sm86", "sm120", "sm121"]  # as "rtx-4090" and then "all" order them
COMPONENTS = {"full", "cached", "text_encoder", "vae_decoder"}
needs_library = pytest.mark.skipif(tensorrt_rtx is None, reason="tensorrt-rtx is not installed")


def state(folder: Path) -> dict[str, str]:
    """The digest of every file of a bundle, the manifest included."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): bundle.sha256(path) for path in files}


def rewrite(opened: Bundle, name: str, old: str, new: str) -> Bundle:
    """Rename an operator in a graph and list the file anew, as if the bundle had been made so."""
    model = onnx.load(opened.file(name), load_external_data=False)
    for node in model.graph.node:
        node.op_type = new if node.op_type == old else node.op_type
    opened.file(name).write_bytes(model.SerializeToString())
    return bundle.update(opened)


@pytest.fixture(scope="module")
def built(_handmade: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(_handmade, folder)
    return engines.build(bundle.load(folder), ["rtx-4090", "all", "sm89"], progress=False)


@needs_library
def test_engines_of_every_component_are_built_for_every_target(built: Bundle) -> None:
    bundle.load(built.path)
    listed = {(entry["target"], Path(entry["path"]).stem) for entry in built.manifest["engines"]}
    assert listed == {(target, name) for target in ALL for name in COMPONENTS}
    assert len(built.manifest["engines"]) == len(listed)
    for entry in built.manifest["engines"]:
        assert built.file(entry["path"]).stat().st_size == entry["bytes"] > 1000
        assert entry["path"] in built.manifest["files"]
        kinds = "int8+fp16+fp32" if entry["target"] == "sm75" else "int8+fp32"
        assert entry["precision"] == (kinds if entry["component"] == "unet" else kinds.removeprefix("int8+"))
    assert not [path for path in built.path.parent.iterdir() if path != built.path]


@needs_library
def test_a_balanced_pipeline_builds(tiny_balanced: Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_balanced.path, tmp_path / "bundle")
    made = engines.build(bundle.load(tmp_path / "bundle"), ["sm86"], progress=False)
    assert [entry["target"] for entry in made.manifest["engines"]] == ["sm86"] * 5
    assert {Path(entry["path"]).stem for entry in made.manifest["engines"]} == COMPONENTS | {"vae_encoder"}
    sidecar = json.loads(made.file("engines/sm86/full.json").read_text())
    assert sidecar["precision"] == "int8+fp32" and sidecar["shapes"]["sample"]["max"] == [2, 4, 8, 8]


@needs_library
def test_the_sidecar_says_what_the_engine_was_made_of(built: Bundle) -> None:
    sidecar = json.loads(built.file("engines/sm89/cached.json").read_text())
    assert (sidecar["target"], sidecar["component"], sidecar["variant"]) == ("sm89", "unet", "cached")
    assert sidecar["precision"] == "int8+fp32"
    assert sidecar["shapes"]["sample"] == {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [2, 4, 8, 8]}
    assert sidecar["shapes"]["timestep"] == {"min": [1], "opt": [1], "max": [1]}
    assert sidecar["shapes"]["feature_0"]["max"] == [2, 32, 8, 8]
    assert sidecar["sha256"] == {
        name: bundle.sha256(built.file(name)) for name in ("unet/cached.onnx", "unet/model.onnx_data")
    }
    assert set(sidecar["versions"]) == {"tensorrt-rtx", "diffpress", "onnx"}
    assert sidecar["library"] == {"name": "tensorrt-rtx", "version": tensorrt_rtx.__version__}
    assert sidecar["bytes"] > 0 and sidecar["seconds"] > 0
    assert (sidecar["format"], sidecar["compute_capability"], sidecar["gpus"]) == (1, "8.9", ["rtx-4090"])
    assert sidecar["architecture"] == "Ada Lovelace" and set(sidecar["types"]) == {"int8", "fp32"}
    assert sidecar["profiles"] == [sidecar["shapes"]] and sidecar["flags"] == [] and sidecar["warnings"] == []
    assert sidecar["sparse"] == {"layers": 0, "enabled": False, "kernels": None}
    assert sidecar["weight_streaming"] == {"enabled": False, "budget_bytes": None}
    planned = built.manifest["memory"]["sm89"]
    assert planned["engines"]["cached"]["weights"] == sidecar["memory"]["weights"] > 1000
    assert sidecar["memory"]["builder_weights"] > 1000 and sidecar["memory"]["builder_activations"] > 0
    assert planned["available"] == 0.9 * 8e9  # sm89 was asked for as well, and has smaller cards than rtx-4090
    assert planned["fits"] and planned["total"] > planned["weights"] + planned["features"] > 0
    assert "sm120" in json.loads(built.file("engines/sm120/cached.json").read_text())["target"]
    decoder = json.loads(built.file("engines/sm89/vae_decoder.json").read_text())
    assert (decoder["component"], decoder["variant"], decoder["precision"]) == ("vae_decoder", None, "fp32")
    assert decoder["shapes"]["latent_sample"]["max"] == [1, 4, 8, 8]


@needs_library
def test_what_no_gpu_can_tell_is_null_with_the_reason(built: Bundle) -> None:
    for target in set(ALL) - set(library.present()):
        sidecar = json.loads(built.file(f"engines/{target}/full.json").read_text())
        assert sidecar["layers"] is None and target in sidecar["layers_reason"] and "GPU" in sidecar["layers_reason"]


@needs_library
def test_a_profile_is_made_for_each_number_of_images(handmade: Bundle) -> None:
    plans: list[MemoryPlan] = []
    made = engines.build(handmade, ["sm89"], progress=False, images=(1, 2, 4), report=plans.append)
    sidecar = json.loads(made.file("engines/sm89/cached.json").read_text())
    rows = [[profile["feature_0"][kind][0] for kind in ("min", "opt", "max")] for profile in sidecar["profiles"]]
    assert rows == [[1, 2, 2], [3, 4, 4], [5, 8, 8]]  # one after the other, no batch in two of them
    assert sidecar["shapes"]["feature_0"] == {"min": [1, 32, 8, 8], "opt": [2, 32, 8, 8], "max": [8, 32, 8, 8]}
    assert [profile["timestep"]["max"] for profile in sidecar["profiles"]] == [[1]] * 3
    text = json.loads(made.file("engines/sm89/text_encoder.json").read_text())["profiles"]
    assert [profile["input_ids"]["max"][0] for profile in text] == [2, 3, 5]  # and the negative prompt
    assert len(json.loads(made.file("engines/sm89/vae_decoder.json").read_text())["profiles"]) == 1
    assert [plan.to_json() for plan in plans] == [made.manifest["memory"]["sm89"]]


@needs_library
def test_weights_are_streamed_where_the_card_is_too_small(handmade: Bundle) -> None:
    graphs = buildable.graphs(handmade)
    total = sum(graph.need.weights / 2 + graph.need.activations for graph in graphs)  # half the weights have room
    size = (total + buildable.feature_bytes(handmade, graphs)) / USABLE / GB
    made = engines.build(handmade, ["sm89"], progress=False, memory_gb=size)
    sidecars = [json.loads(file.read_text()) for file in made.path.glob("engines/sm89/*.json")]
    assert all(sidecar["flags"] == ["WEIGHT_STREAMING"] for sidecar in sidecars)
    for sidecar in sidecars:
        assert sidecar["weight_streaming"]["enabled"]
        budget = sidecar["weight_streaming"]["budget_bytes"]
        assert budget == pytest.approx(sidecar["memory"]["weights"] / 2, abs=2)
    assert made.manifest["memory"]["sm89"]["weight_streaming"]


@needs_library
def test_sparse_weights_are_told_to_targets_that_multiply_them_faster(handmade: Bundle) -> None:
    model = ir.load(handmade.file("unet/model.onnx"))
    weight = np.zeros((32, 32), np.int8)
    weight[::2] = 7  # [in, out]
    model.graph.initializers["to_q.weight"].const_value = ir.tensor(weight, name="to_q.weight")
    store.save({"model.onnx": model, "cached.onnx": ir.load(handmade.file("unet/cached.onnx"))}, handmade.file("new"))
    for file in handmade.file("new").iterdir():
        file.replace(handmade.file("unet") / file.name)
    handmade.file("new").rmdir()
    made = engines.build(bundle.update(handmade), ["sm75", "sm89"], progress=False)
    found = {
        (target, name): json.loads(made.file(f"engines/{target}/{name}.json").read_text())
        for target in ("sm75", "sm89")
        for name in ("full", "vae_decoder")
    }
    assert found["sm89", "full"]["sparse"] == {"layers": 1, "enabled": True, "kernels": None}
    assert found["sm89", "full"]["flags"] == ["SPARSE_WEIGHTS"] and found["sm75", "full"]["flags"] == []
    assert found["sm75", "full"]["sparse"] == {"layers": 1, "enabled": False, "kernels": None}
    assert found["sm89", "vae_decoder"]["sparse"] == {"layers": 0, "enabled": False, "kernels": None}


@pytest.mark.parametrize("images", [(), (0,), (2, 1), (1, 1), (-1, 2)])
def test_batches_that_make_no_sense_are_refused(handmade: Bundle, images: tuple[int, ...]) -> None:
    with pytest.raises(DiffpressError, match="batches must be whole numbers from 1 on that grow"):
        buildable.graphs(handmade, images)


@needs_library
def test_another_resolution_is_refused_before_any_work(handmade: Bundle) -> None:
    with pytest.raises(DiffpressError, match="made for 32x32 pixels and no others, 64x32 cannot be built"):
        engines.build(handmade, ["sm89"], progress=False, resolution=(32, 64))
    buildable.check_resolution(handmade, (32, 32))


@needs_library
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not a readable ONNX graph"),
        (lambda data: b"not a graph", "is not a readable ONNX graph"),
    ],
)
def test_a_graph_that_is_none_is_refused(handmade: Bundle, damage: Callable[[bytes], bytes], message: str) -> None:
    file = handmade.file("vae_decoder/model.onnx")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DiffpressError, match=message):
        engines.build(bundle.update(handmade), ["sm89"], progress=False)


@needs_library
def test_building_again_replaces_a_target_whole_and_keeps_the_others(handmade: Bundle) -> None:
    first = engines.build(handmade, ["sm86", "sm89"], progress=False)
    first.file("engines/sm89/stale.engine").write_bytes(b"from an earlier version")
    kept = bundle.sha256(first.file("engines/sm86/full.engine"))
    second = engines.build(bundle.update(first), ["sm89"], progress=False)
    assert not second.file("engines/sm89/stale.engine").exists()
    assert bundle.sha256(second.file("engines/sm86/full.engine")) == kept
    assert sorted(entry["target"] for entry in second.manifest["engines"]) == ["sm86"] * 4 + ["sm89"] * 4
    bundle.load(second.path)


@needs_library
@pytest.mark.parametrize("target", ["sm90", "sm87", "jetson-orin", "sm", "ada", "current", "none", ""])
def test_an_unknown_target_is_refused_before_any_work(
    handmade: Bundle, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "load", lambda path: pytest.fail("work was started"))
    with pytest.raises(DiffpressError, match=r"supported: sm75, sm80, sm86, sm89, sm120"):
        engines.build(handmade, ["sm89", target], progress=False)


SCHEDULE = (900.0, 600.0, 300.0, 1.0)


class Mixed(nn.Module):
    """A convolution, projections, an attention product and a layer of odd width, as a U-Net has them."""

    def __init__(self) -> None:
        super().__init__()
        self.time_proj = nn.Identity()
        self.conv, self.query, self.odd = nn.Conv2d(64, 128, 3, padding=1), nn.Linear(128, 128), nn.Linear(128, 40)
        self.out = nn.Linear(40, 64)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        time = self.time_proj(timestep)[:, None, None] * 0
        tokens = self.conv(sample).flatten(2).transpose(1, 2) + time
        weights = torch.softmax(self.query(tokens) @ tokens.transpose(1, 2), dim=-1)
        return (self.out(self.odd(weights @ tokens)).transpose(1, 2).unflatten(2, sample.shape[2:]).tanh(),)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = Mixed()

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return self.unet(sample, timestep)


@pytest.fixture(scope="module")
def quantized(_handmade: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str | None], Bundle]:
    """The bundle made by hand with a denoiser in these formats: 64 wide blocks of int4, otherwise scales by step and
    a multiplier.
    """

    def make(weights: str, inputs: str | None) -> Bundle:
        folder = tmp_path_factory.mktemp("quantized") / "bundle"
        shutil.copytree(_handmade, folder)
        module = Denoiser().eval().requires_grad_(False)
        plan = {}
        for name in ("conv", "query", "odd", "out"):
            weight = module.unet.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            block = 64 if weights == "int4" and weight.shape[1] % 64 == 0 else None
            scale = weight_scale(weight, get(weights), "max", block).numpy()
            multiplier = np.linspace(0.5, 2, weight.shape[1], dtype=np.float32) if name == "query" else None
            by_step = None if inputs is None else np.array([0.04, 0.03, 0.02, 0.01], np.float32)
            plan[name] = deployable(LayerQuant(scale, by_step, weights, inputs, multiplier))
        inputs_ = {"sample": torch.randn(2, 64, 8, 8), "timestep": torch.tensor([600.0])}
        graph = graphs.to_onnx(graphs.GraphSpec(module, inputs_, ("out_sample",)))
        assert qdq.insert(graph, plan, SCHEDULE) == set(plan)
        graphs.finish(graph)
        shutil.rmtree(folder / "unet")
        store.save({"model.onnx": graph}, folder / "unet")
        manifest = json.loads((folder / bundle.MANIFEST).read_text())
        manifest |= {"graphs": {"full": "unet/model.onnx"}}
        del manifest["files"]
        bundle.write_manifest(folder, manifest)
        return bundle.load(folder)

    return make


@needs_library
@pytest.mark.parametrize(
    ("formats", "targets", "precision"),
    [
        (("int8", "int8"), ["sm75"], "int8+fp32"),  # the others are built elsewhere here
        (("e4m3", "e4m3"), ["sm89", "sm121"], "fp8+fp32"),
        (("int4", None), ["sm80", "sm121"], "int4+fp32"),
        (("int8", None), ["sm80"], "int8+fp32"),
        (("e2m1", "e4m3"), ["sm120"], "fp8+fp32"),
        (("int4", "int8"), ["sm86"], "int8+fp32"),
    ],
)
def test_every_format_builds_for_targets_that_have_it(
    quantized: Callable[[str, str | None], Bundle],
    formats: tuple[str, str | None],
    targets: list[str],
    precision: str,
) -> None:
    made = engines.build(quantized(*formats), targets, progress=False)
    built = {entry["target"]: entry["precision"] for entry in made.manifest["engines"] if "full" in entry["path"]}
    assert built == {
        target: precision.replace("fp32", "fp16+fp32") if target == "sm75" else precision for target in targets
    }


@needs_library
@pytest.mark.parametrize(
    ("formats", "target", "message"),
    [
        (("e4m3", "e4m3"), "sm86", "needs fp8, which sm86 does not have: build for sm89 or newer"),
        (("int4", None), "sm75", "needs int4, which sm75 does not have: build for sm80 or newer"),
    ],
)
def test_a_type_that_a_target_lacks_is_refused_before_anything_is_built(
    quantized: Callable[[str, str | None], Bundle],
    formats: tuple[str, str | None],
    target: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = quantized(*formats)
    monkeypatch.setattr("diffpress.engines.build._build_graph", lambda *_: pytest.fail("work was started"))
    with pytest.raises(DiffpressError, match=message):
        engines.build(made, ["sm120", target], progress=False)
    assert not made.file("engines").exists()


@needs_library
def test_what_a_gpu_cannot_do_is_refused_by_the_name_of_the_node(
    handmade: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turing, "TARGETS", ())  # float products, which Turing has not
    before = state(handmade.path)
    with pytest.raises(DiffpressError, match=r"unet/model.onnx for sm75: .*'to_q_node'.*not supported$"):
        engines.build(handmade, ["sm89", "sm75"], progress=False)
    assert state(handmade.path) == before
    assert list(handmade.path.parent.iterdir()) == [handmade.path]


@needs_library
def test_an_operator_the_parser_does_not_know_is_named(handmade: Bundle) -> None:
    changed = rewrite(handmade, "vae_decoder/model.onnx", "Tanh", "Sparkle")
    before = state(changed.path)
    with pytest.raises(DiffpressError, match=r"vae_decoder/model.onnx: node 'sample_node' \(Sparkle\)"):
        engines.build(changed, ["sm89"], progress=False)
    assert state(changed.path) == before


@needs_library
def test_a_damaged_bundle_is_not_built(handmade: Bundle) -> None:
    handmade.file("unet/model.onnx_data").write_bytes(b"")
    with pytest.raises(DiffpressError, match="damaged"):
        engines.build(handmade, ["sm89"], progress=False)
    assert not handmade.file("engines").exists()


@needs_library
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_build_that_stops_halfway_leaves_the_bundle_as_it_was(
    handmade: Bundle, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = engines.build(handmade, ["sm89"], progress=False)
    before, real, calls = state(opened.path), builder.serialize, []

    def third(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*arguments)

    monkeypatch.setattr(builder, "serialize", third)
    with pytest.raises(type(error)):
        engines.build(opened, ["sm89", "sm120"], progress=False)
    assert state(opened.path) == before
    assert list(opened.path.parent.iterdir()) == [opened.path]


@needs_library
@pytest.mark.parametrize("earlier", [[], ["sm89"]])
def test_a_failure_at_the_very_end_puts_the_old_engines_back(
    handmade: Bundle, earlier: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = engines.build(handmade, earlier, progress=False) if earlier else handmade
    before = state(opened.path)

    def fail(*arguments: Any, **changes: Any) -> Bundle:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffpress.engines.build.update", fail)
    with pytest.raises(KeyboardInterrupt):
        engines.build(opened, ["sm89", "sm120"], progress=False)
    assert state(opened.path) == before
    assert opened.file("engines").exists() == bool(earlier)


@needs_library
def test_ctrl_c_stops_the_builder_at_its_next_step(request: pytest.FixtureRequest) -> None:
    class Slow:
        """A builder that never ends by itself."""

        asked = 0

        def build_serialized_network(self, network: Any, config: Any) -> None:
            config.progress_monitor.phase_start("root", None, 1)
            config.progress_monitor.phase_start("building", "root", 1000)
            while config.progress_monitor.step_complete("building", self.asked):
                self.asked += 1
                time.sleep(0.01)
            config.progress_monitor.phase_finish("building")

    main = threading.main_thread().ident
    assert main is not None
    # A shell starts background jobs with interrupts ignored, and tests inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    slow, config, ticks = Slow(), SimpleNamespace(), list[float]()
    with pytest.raises(KeyboardInterrupt):
        builder.serialize(tensorrt_rtx, slow, None, config, ticks.append)
    assert config.progress_monitor.stopped and 0 < slow.asked < 500
    assert ticks == sorted(ticks) and 0 < ticks[-1] < 1 and not config.progress_monitor.phases.keys() & {"building"}


@needs_library
def test_what_was_prepared_is_built_without_onnx_or_torch(handmade: Bundle, tmp_path: Path) -> None:
    (tmp_path / "prepared.json").write_text(json.dumps(buildable.prepare(handmade).to_json()))
    script = (
        "import json, sys\n"
        "sys.modules.update(dict.fromkeys(('onnx', 'onnx_ir', 'torch', 'onnxscript', 'diffusers')))\n"
        "from pathlib import Path\n"
        "from diffpress import bundle\n"
        "from diffpress.engines.build import build\n"
        "from diffpress.engines.prepared import Prepared\n"
        "prepared = Prepared.from_json(json.loads(Path(sys.argv[2]).read_text()))\n"
        "build(bundle.load(sys.argv[1]), prepared, ['sm89'], progress=False)\n"
    )
    words = [sys.executable, "-c", script, str(handmade.path), str(tmp_path / "prepared.json")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    alone = json.loads(handmade.file("engines/sm89/full.json").read_text())
    here = engines.build(bundle.load(handmade.path), ["sm89"], progress=False)
    both = [alone, json.loads(here.file("engines/sm89/full.json").read_text())]
    assert len({json.dumps({**sidecar, "seconds": 0}, sort_keys=True) for sidecar in both}) == 1


@needs_library
def test_prepared_graphs_are_those_of_their_bundle_alone(handmade: Bundle) -> None:
    prepared = buildable.prepare(handmade)
    assert Prepared.from_json(json.loads(json.dumps(prepared.to_json()))) == prepared
    document = prepared.to_json()
    document["graphs"][0]["digests"]["unet/model.onnx"] = "0" * 64
    with pytest.raises(DiffpressError, match=r"unet/model.onnx is another one than was packed"):
        prepared_build(handmade, Prepared.from_json(document), ["sm89"], progress=False)
    del document["graphs"][0]["batches"]
    for wrong in (document, {}, {"graphs": [[]], "features": 0}):
        with pytest.raises(DiffpressError, match="pack the bundle again"):
            Prepared.from_json(wrong)


def test_without_a_library_the_extra_is_named(handmade: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in library.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DiffpressError, match=r"pip install 'diffpress\[tensorrt-rtx\]'"):
        engines.build(handmade, ["sm89"])


def test_the_full_library_builds_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))  # it knows no other targets
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(library, "_by_driver", lambda: [])
    with pytest.raises(DiffpressError, match="tensorrt cannot build for target 'sm89'; supported: none"):
        preflight.check_targets(["sm89"])
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 8.9\necho 12.0\n")
    tool.chmod(0o755)
    assert preflight.supported_targets() == ["sm89", "sm120"]
    preflight.check_targets(["sm89"])

"""LoRAs of random numbers: fused they are what diffusers computes with adapters, and what does not fit is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from diffpress import api
from diffpress.calibration.lora import Lora, digest
from diffpress.calibration.model import load_pipeline
from diffpress.compress import recipe
from diffpress.compress.recipe import Recipe
from diffpress.errors import DiffpressError

RANK, ALPHA, SCALE = 4, 2.0, 0.7
UNET = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.1.attentions.0.proj_in",
    "up_blocks.1.resnets.0.conv1",
)
# With an out_proj, by which diffusers knows kohya's format; without one it drops what is left of attention.
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc1")
FORMATS = ("peft", "kohya", "before peft")


@pytest.fixture(scope="module")
def original(tiny_pipeline: Path) -> Any:
    return load_pipeline(str(tiny_pipeline))


def tensors(pipeline: Any, kind: str) -> dict[str, Any]:
    """A LoRA for the layers above, in one of the formats; those of kohya have an alpha."""
    import torch

    generator, found = torch.Generator().manual_seed(0), {}
    for part, paths in (("unet", UNET), ("text_encoder", TEXT)):
        for path in paths:
            weight = getattr(pipeline, part).get_submodule(path).weight
            down = 0.3 * torch.randn(RANK, *weight.shape[1:], generator=generator)
            up = 0.3 * torch.randn(len(weight), RANK, *[1] * (weight.ndim - 2), generator=generator)
            dotted = f"unet.{path}" if part == "unet" else f"text_encoder.text_model.{path}"
            ends = ("lora_A", "lora_B")
            if kind == "kohya":
                where = f"lora_unet_{path}" if part == "unet" else f"lora_te_text_model_{path}"
                dotted, ends = where.replace(".", "_"), ("lora_down", "lora_up")
                found[f"{dotted}.alpha"] = torch.tensor(ALPHA)
            elif kind == "before peft" and part == "text_encoder":
                ends = ("lora_linear_layer.down", "lora_linear_layer.up")
            elif kind == "before peft":
                ends = ("lora.down", "lora.up")
                for name in ("to_q", "to_out"):
                    end = {"to_q": ".to_q", "to_out": ".to_out.0"}[name]
                    if path.endswith(end):
                        dotted, ends = f"{dotted.removesuffix(end)}.processor.{name}_lora", ("down", "up")
            found |= {f"{dotted}.{ends[0]}.weight": down, f"{dotted}.{ends[1]}.weight": up}
    return found


def saved(folder: Path, content: Mapping[str, Any], name: str = "lora.safetensors") -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in content.items()}, folder / name)
    return folder / name


def latents(pipeline: Any) -> np.ndarray:
    import torch

    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    return pipeline("a red ring", generator=torch.Generator().manual_seed(1), **asked).images.numpy()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_fused_computes_what_adapters_do(original: Any, tiny_pipeline: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("peft", reason="diffusers' adapters, which this compares with, need peft")
    file = saved(tmp_path, tensors(original, kind))
    fused = load_pipeline(str(tiny_pipeline), [Lora(file, SCALE)])
    active = load_pipeline(str(tiny_pipeline))
    active.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="it")
    active.set_adapters("it", SCALE)
    wanted, got, before = latents(active), latents(fused), latents(original)
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert np.linalg.norm(got - before) > 1e-2 * np.linalg.norm(before)
    # The same modules as before, with nothing of an adapter left.
    for part in ("unet", "text_encoder"):
        ours, theirs = getattr(fused, part).state_dict(), getattr(original, part).state_dict()
        changed = {name.removesuffix(".weight") for name in ours if not ours[name].equal(theirs[name])}
        assert ours.keys() == theirs.keys()
        assert changed == set(UNET if part == "unet" else TEXT)
    assert not any(parameter.requires_grad for parameter in fused.unet.parameters())


def test_two_loras_add_up_and_their_files_tell_them_apart(original: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    first = saved(tmp_path / "a", tensors(original, "peft"))
    second = saved(tmp_path / "b", tensors(original, "kohya"))
    both = load_pipeline(str(tiny_pipeline), [Lora(first, 0.5), Lora(second.parent, -1.0)])
    layer = original.unet.get_submodule(UNET[0]).weight
    content = tensors(original, "peft")
    product = content[f"unet.{UNET[0]}.lora_B.weight"] @ content[f"unet.{UNET[0]}.lora_A.weight"]
    # The second has the same numbers at alpha / rank: 0.5 B A - ALPHA / RANK B A.
    wanted = layer + (0.5 - ALPHA / RANK) * product
    assert (both.unet.get_submodule(UNET[0]).weight - wanted).norm() <= 1e-5 * layer.norm()
    assert digest([Lora(first)]) == digest([Lora(saved(tmp_path / "c", content))]) != digest([Lora(first, 0.5)])
    assert digest([Lora(first)]) != digest([Lora(second)])
    assert digest([]) == ""


def test_a_lora_that_does_not_fit_is_refused_and_changes_nothing(original: Any, tmp_path: Path) -> None:
    import torch

    from diffpress.calibration.lora import fuse

    content = tensors(original, "peft")
    query = f"unet.{UNET[0]}.lora_A.weight"
    stranger = {
        f"unet.nowhere.{half}.weight": content[f"unet.{UNET[0]}.{half}.weight"] for half in ("lora_A", "lora_B")
    }
    norm = {f"unet.conv_norm_out.{half}.weight": torch.ones(1, 1) for half in ("lora_A", "lora_B")}
    cases = {
        "changes 'unet.nowhere.lora_A.weight', which this model lacks": content | stranger,
        r"\[4, 31\] for 'unet.down_blocks.* is for another model": content | {query: torch.ones(4, 31)},
        "one half of 'unet.down_blocks": {name: value for name, value in content.items() if name != query},
        "a GroupNorm, not a linear": content | norm,
        "not finite": content | {query: content[query] * float("nan")},
        "is a DoRA, not a LoRA": content | {f"unet.{UNET[0]}.dora_scale": torch.ones(1)},
        "is a LoHa, not a LoRA": {"lora_unet_x.hada_w1_a": torch.ones(1)},
        "no part of a LoRA": {"first_stage.weight": torch.ones(2, 2)},
        "lora_te2_x.lora_down.weight', which this model lacks": {"lora_te2_x.lora_down.weight": torch.ones(2, 2)},
        "is empty": {},
    }
    before = {name: value.clone() for name, value in original.unet.state_dict().items()}
    good = Lora(saved(tmp_path / "good", content))
    for index, (said, wrong) in enumerate(cases.items()):
        bad = Lora(saved(tmp_path / str(index), wrong))
        with pytest.raises(DiffpressError, match=said) as caught:
            fuse(original, [good, bad])
        assert str(caught.value).startswith("lora: ")
        assert "\n" not in str(caught.value)
    after = original.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())


def test_alphas_of_metadata_count(original: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from diffpress.calibration.lora_file import read

    said = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2, "^up_blocks.1.resnets.0.conv1": 1}}
    for rslora, rank in ((False, RANK), (True, RANK**0.5)):
        text = json.dumps({**said, "unet.use_rslora": rslora})
        save_file(tensors(original, "peft"), tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
        found = read(tmp_path / "x.safetensors", {"unet": original.unet, "text_encoder": original.text_encoder})
        scales = {f"{entry.part}.{entry.path}": entry.scale for entry in found}
        assert scales[f"unet.{UNET[0]}"] == 2 / rank
        assert scales[f"unet.{UNET[1]}"] == 8 / rank
        assert scales[f"unet.{UNET[4]}"] == 1 / rank
        assert scales[f"text_encoder.{TEXT[0]}"] == 1.0


def test_only_whole_safetensors_files_are_opened(original: Any, tmp_path: Path) -> None:
    from diffpress.calibration.lora import fuse

    content = tensors(original, "peft")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saved(tmp_path / "whole", content).read_bytes()[:-9])
    pickled = tmp_path / "pytorch_lora_weights.bin"
    pickled.write_bytes(b"\x80\x04")
    for name in ("one", "two"):
        saved(tmp_path / "several", content, f"{name}.safetensors")
    cases = {
        tmp_path / "absent.safetensors": "there is no file at",
        tmp_path / "absent": "no safetensors file",
        pickled: "pickles are never opened",
        cut: "cannot be read, it is damaged",
        tmp_path / "several": "it has: one.safetensors, two.safetensors",
        tmp_path: "should hold one safetensors file",
    }
    cut.rename(tmp_path / "cut.safetensors")
    saved(tmp_path, content, "other.safetensors")
    for path, said in cases.items():
        with pytest.raises(DiffpressError, match=said):
            fuse(original, [Lora(path)])


def test_a_bundle_ships_the_fused_weights_and_says_of_what(original: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    from diffpress.benchmarks.candidates import loras_of

    file = saved(tmp_path, tensors(original, "kohya"))
    text = f"steps: 2\nlora: {{path: {file}, scale: {SCALE}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    made = api.compress(str(tiny_pipeline), str(tmp_path / "recipe.yaml"), tmp_path / "bundle", quiet=True)
    fused = load_pipeline(str(tiny_pipeline), [Lora(file, SCALE)])
    for part, folder in ((fused.unet, "unet"), (fused.text_encoder, "text_encoder")):
        graph = onnx.load(made.path / folder / "model.onnx").graph
        stored = [numpy_helper.to_array(entry) for entry in graph.initializer]
        for path in UNET if folder == "unet" else TEXT:
            weight = part.get_submodule(path).weight.numpy()
            same = [value for value in stored if value.size == weight.size and value.ndim <= weight.ndim]
            assert any(np.array_equal(value, weight) or np.array_equal(value, weight.T) for value in same), path
    assert made.manifest["model"]["lora"] == [
        {"file": file.name, "scale": SCALE, "digest": digest([Lora(file, SCALE)])}
    ]
    assert made.manifest["recipe"]["lora"] == [{"path": str(file), "scale": SCALE, "lcm": None}]
    # Reports compare with the model and its LoRA, and with no other.
    assert loras_of(made.manifest) == (Lora(file, SCALE),)
    assert loras_of({"model": {}}) == ()
    saved(tmp_path, tensors(original, "peft"))
    with pytest.raises(DiffpressError, match="put it back"):
        loras_of(made.manifest)


def test_a_recipe_takes_one_lora_or_several() -> None:
    one = Recipe(name="x", lora={"path": "a.safetensors"})
    assert one.lora == (Lora(Path("a.safetensors")),)
    assert (one.steps, one.guidance_scale, one.lcm) == (50, None, False)
    several = Recipe(name="x", lora=[{"path": "a.safetensors", "scale": 0.5}, {"path": "b.safetensors"}])
    assert [entry.scale for entry in several.lora] == [0.5, 1.0]
    more = recipe.with_loras(one, [Lora(Path("c.safetensors"))])
    assert [entry.path.name for entry in more.lora] == ["c.safetensors", "a.safetensors"]


@pytest.mark.parametrize("fields", ["{path: a, scales: 1}", "{path: a, scale: .nan}", "{scale: 1}", "a"])
def test_a_wrong_line_is_refused_by_its_key(tmp_path: Path, fields: str) -> None:
    (tmp_path / "x.yaml").write_text(f"lora: {fields}\n")
    with pytest.raises(DiffpressError, match=r"x\.yaml: .*lora"):
        recipe.load(str(tmp_path / "x.yaml"))


def test_an_lcm_lora_sets_steps_and_guidance_and_refuses_others() -> None:
    lcm = {"path": "lcm-lora-sdv1-5/pytorch_lora_weights.safetensors"}
    plain = Recipe(name="x", lora=lcm)
    assert (plain.lcm, plain.steps, plain.guidance_scale) == (True, 4, 1.0)
    plain.built()
    assert not Recipe(name="x", lora={**lcm, "lcm": False}).lcm
    assert Recipe(name="x", lora={"path": "fast.safetensors", "lcm": True}, steps=8, guidance_scale=1.5).lcm
    for fields, said in (
        ({"steps": 50}, "draws in 4 to 8 steps, not in 50"),
        ({"guidance_scale": 7.5}, "guidance_scale of 1 to 2, not 7.5"),
        ({"passes": [{"schedule": {"solver": "dpm++"}}]}, "leave 'schedule' out"),
    ):
        with pytest.raises(DiffpressError, match=said):
            Recipe.model_validate({"name": "x", "lora": lcm, **fields}).built()
    with pytest.raises(DiffpressError, match="not in 20"):
        api.begin("shapes", plain, steps=20, quiet=True)


def test_an_lcm_lora_is_sampled_with_its_scheduler(original: Any, tiny_pipeline: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "lcm", tensors(original, "peft"))
    calm = Recipe(name="x", lora={"path": file, "scale": 0.1}, calibration={"prompts": 1, "steps": 2})
    try:
        work = api.begin(str(tiny_pipeline), calm, quiet=True)
    except DiffpressError as error:
        if "adds noise" in str(error):
            pytest.skip("no table of LCM's noise yet")
        raise
    assert (work.sampling.scheduler, work.sampling.steps, work.sampling.guidance_scale) == ("LCMScheduler", 4, 1.0)
    assert work.original is not None
    assert work.original().state_dict()[f"{UNET[0]}.weight"].equal(work.denoiser.state_dict()[f"{UNET[0]}.weight"])


def test_features_that_a_controlnet_would_change_are_not_kept() -> None:
    with pytest.raises(DiffpressError, match=r"'cache' keeps features, .* leave it or 'controlnet' out"):
        Recipe(name="x", controlnet=True, passes=("temporal-table", "cache")).built()
    Recipe(name="x", controlnet=True, passes=("temporal-table", {"guidance": {"every": 2}})).built()

"""A U-Net with parts cut out on its way to disk and back: the record, the folder, and what is wrong with either."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import diffpress
from diffpress.calibration.model import digest, load_pipeline
from diffpress.calibration.parts import keep, parts
from diffpress.calibration.structure import RECORD, WEIGHTS, rebuild, save, widths
from diffpress.errors import DiffpressError

RESNET = "down_blocks.0.resnets.0"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
KEPT = {RESNET: [0, 3, 4], f"{BLOCK}.attn1": [1], f"{BLOCK}.attn2": [0], f"{BLOCK}.ff": range(0, 128, 3)}
COUNTS = {RESNET: [3, 4], f"{BLOCK}.attn1": [1, 16], f"{BLOCK}.attn2": [1, 16], f"{BLOCK}.ff": [43, 1]}


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Path) -> Any:
    found = load_pipeline(str(tiny_pipeline))
    keep(found.unet, KEPT)
    return found


@pytest.fixture(scope="module")
def saved(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(pipeline, tmp_path_factory.mktemp("saved") / "narrow")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "narrow")
    return tmp_path / "narrow"


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return sample, torch.tensor([500.0]), torch.randn(2, 5, 32, generator=generator)


def latents(pipeline: Any) -> torch.Tensor:
    drawn: torch.Tensor = pipeline(
        "a red ring", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    return drawn


def test_a_record_makes_the_network_again(pipeline: Any) -> None:
    record = json.loads(json.dumps(widths(pipeline.unet)))
    assert record == COUNTS
    with torch.random.fork_rng():
        made = type(pipeline.unet).from_config(pipeline.unet.config).eval()
    assert widths(made) == {}
    rebuild(made, record)
    assert widths(made) == record and parts(made) == parts(pipeline.unet)
    made.load_state_dict(pipeline.unet.state_dict())
    with torch.no_grad():
        assert torch.equal(made(*inputs()).sample, pipeline.unet(*inputs()).sample)


def test_a_folder_opens_as_what_was_saved(pipeline: Any, saved: Path) -> None:
    assert json.loads((saved / "unet" / RECORD).read_text()) == {"format": 1, "parts": COUNTS}
    wanted = latents(pipeline)
    for opened in (load_pipeline(str(saved)), diffpress.load_pipeline(saved)):
        assert torch.equal(latents(opened), wanted)
        assert opened.unet.dtype == torch.float32 and not opened.unet.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in opened.unet.parameters())
    with pytest.raises(DiffpressError, match="runs in torch"):
        diffpress.load_pipeline(saved, "onnxruntime")


def test_what_is_saved_can_be_cut_and_saved_again(saved: Path, tmp_path: Path) -> None:
    opened = load_pipeline(str(saved))
    keep(opened.unet, {RESNET: [1, 2]})
    keep(opened.unet, {RESNET: [0, 2, 3, 4, 5, 7]}, "even")
    again = save(opened, tmp_path / "again")
    assert json.loads((again / "unet" / RECORD).read_text())["parts"] == {**COUNTS, RESNET: [2, 3]}
    assert torch.equal(latents(load_pipeline(str(again))), latents(opened))


def test_weights_in_several_files_and_in_half_precision_open(pipeline: Any, folder: Path) -> None:
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    half = copy.deepcopy(pipeline.unet).half()
    half.save_pretrained(folder / "unet", max_shard_size="500KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    opened = load_pipeline(str(folder)).unet
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, half.state_dict()[name].float()), name


def test_a_whole_pipeline_has_no_record(tiny_pipeline: Path, tmp_path: Path) -> None:
    opened = load_pipeline(str(tiny_pipeline))
    save(opened, tmp_path / "whole")
    assert not (tmp_path / "whole" / "unet" / RECORD).exists()
    assert torch.equal(latents(load_pipeline(str(tmp_path / "whole"))), latents(opened))


def test_sdxl_opens_as_it_was_saved(tiny_xl: Path, tmp_path: Path) -> None:
    opened = load_pipeline(str(tiny_xl))
    keep(opened.unet, {path: range(1, found.count) for path, found in parts(opened.unet).items() if found.count > 1})
    save(opened, tmp_path / "narrow")
    assert torch.equal(latents(diffpress.load_pipeline(tmp_path / "narrow")), latents(opened))


def test_a_reader_that_does_not_know_the_record_refuses_the_weights(saved: Path) -> None:
    from diffusers import StableDiffusionPipeline

    with pytest.raises(Exception, match=r"(?i)shape|size"):
        StableDiffusionPipeline.from_pretrained(str(saved), safety_checker=None)


def test_the_digest_depends_on_the_record(folder: Path) -> None:
    before, file = digest(str(folder)), folder / "unet" / RECORD
    file.write_text(document(**{RESNET: [2, 4]}))
    assert digest(str(folder)) != before


def test_nothing_is_written_over_nor_half(pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(DiffpressError, match="exists already"):
        save(pipeline, folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipeline), "save_pretrained", full)
    with pytest.raises(DiffpressError, match="nothing was left there: No space left"):
        save(pipeline, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow"]


def test_what_no_folder_can_hold_is_not_saved(tiny_pipeline: Path, tmp_path: Path) -> None:
    from diffpress.compress.temporal.table import install, tabulate

    opened = load_pipeline(str(tiny_pipeline))
    install(opened.unet, tabulate(opened.unet, (1.0, 2.0)))
    with pytest.raises(DiffpressError, match="save before temporal-table"):
        save(opened, tmp_path / "never")
    assert not list(tmp_path.iterdir())


def document(**changes: Any) -> str:
    return json.dumps({"format": 1, "parts": {**COUNTS, **changes}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 2, "parts": {}}', "format 2, this diffpress reads format 1"),
        ('{"format": 1, "parts": [3]}', "does not say how many"),
        (document(**{RESNET: 3}), "does not say how many"),
        (document(**{RESNET: [3]}), "does not say how many"),
        (document(**{RESNET: ["3", 4]}), "does not say how many"),
        (document(**{RESNET: [True, 4]}), "does not say how many"),
        (document(**{RESNET: [0, 4]}), f"leaves 0 parts of 4 to '{RESNET}', which has 8 of 4"),
        (document(**{RESNET: [9, 4]}), "leaves 9 parts of 4"),
        (document(**{RESNET: [3, 0]}), "leaves 3 parts of 0"),
        (document(**{RESNET: [3, 5]}), "leaves 3 parts of 5"),
        (document(**{f"{BLOCK}.attn1": [1, 8]}), "leaves 1 parts of 8"),
        (document(**{RESNET: [2, 4]}), f"does not fit the weights.*{RESNET}.*\\[12.*not \\[8"),
        (document(**{"mid_block.nowhere": [2, 4]}), "names 'mid_block.nowhere'"),
        ('{"format": 1, "parts": {}}', "does not fit the weights"),
    ],
)
def test_a_damaged_record_is_refused_in_a_line(folder: Path, text: str, message: str) -> None:
    (folder / "unet" / RECORD).write_text(text)
    with pytest.raises(DiffpressError, match=message) as caught:
        load_pipeline(str(folder))
    assert "\n" not in str(caught.value)


def test_damaged_weights_and_configurations_are_refused_in_a_line(folder: Path) -> None:
    file, config = folder / "unet" / WEIGHTS, folder / "unet" / "config.json"
    content, text = file.read_bytes(), config.read_text()

    def refused(match: str) -> None:
        with pytest.raises(DiffpressError, match=match) as caught:
            load_pipeline(str(folder))
        assert "\n" not in str(caught.value)

    file.write_bytes(content[:-100])
    refused("check that it is whole")
    file.unlink()
    refused("has no weights diffusion_pytorch_model.safetensors")
    torch.save({}, file.with_name("diffusion_pytorch_model.bin"))  # pickles are not looked at
    refused("has no weights diffusion_pytorch_model.safetensors")
    file.write_bytes(content)
    config.write_text(text.replace("UNet2DConditionModel", "UNet2DModel"))
    refused("is of UNet2DModel")
    config.write_text(text[:-30])
    refused("check that it is whole")

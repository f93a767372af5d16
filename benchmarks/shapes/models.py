"""The networks of `shapes`: stock diffusers and transformers classes, small, and a reader that checks pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffpress.benchmarks.shapes import scenes

TOKENS = 24  # the longest caption has 21 with its start and end marks
TEXT_WIDTH = 96
SCHEDULER = {
    # Stable Diffusion's own schedule; the prediction is v because a small network learns it in fewer iterations.
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write and load a CLIP tokenizer (byte-level BPE) in which every word of a caption is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(scenes.vocabulary(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    merges = [
        tuple(line.split(" "))
        for line in (folder / "merges.txt").read_text("utf-8").splitlines()
        if not line.startswith("#version")
    ]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for name in ("merges.txt", "vocab.json"):
        (folder / name).unlink()
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A two-tower CLIP for 64x64 pictures; its text tower becomes the pipeline's text encoder."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": TOKENS,
        "projection_dim": 96,
        **special,
    }
    vision = {
        "image_size": scenes.SIZE,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 96,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96, **special))


def make_vae() -> AutoencoderKL:
    """64x64x3 to latents of 16x16x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    """Stable Diffusion's topology with three levels; every width is a multiple of 16, as INT8 kernels want."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 2),  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """DDIM on Stable Diffusion's betas."""
    return DDIMScheduler(**SCHEDULER)


class Reader(nn.Module):
    """Names what a picture shows: the axis, and colour, shape and size of the first and second object.

    Input [N, 3, 64, 64] in -1..1. Output: logits by head; "second" heads mean nothing where the axis is single.
    """

    HEADS = {"axis": scenes.AXES} | {
        f"{slot}_{kind}": names
        for slot in ("first", "second")
        for kind, names in (("colour", tuple(scenes.COLOURS)), ("shape", scenes.SHAPES), ("size", tuple(scenes.SIZES)))
    }

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 24), (24, 48), (48, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(names)) for name, names in self.HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


def reader_labels(items: list[scenes.Scene]) -> dict[str, Tensor]:
    """Class indices by head, -100 (ignored by cross entropy) for the second object of a single one."""
    labels: dict[str, list[int]] = {name: [] for name in Reader.HEADS}
    for scene in items:
        labels["axis"].append(scenes.AXES.index(scene.axis))
        for slot, place in (("first", 0), ("second", 1)):
            for kind in ("colour", "shape", "size"):
                head = f"{slot}_{kind}"
                known = place < len(scene.things)
                labels[head].append(Reader.HEADS[head].index(getattr(scene.things[place], kind)) if known else -100)
    return {name: torch.tensor(values) for name, values in labels.items()}

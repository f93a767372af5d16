"""Trains `shapes` from a seed: `python -m diffpress.benchmarks.shapes.train --work runs/shapes`.

Stages, in order: clip, vae, unet, reader, assemble. Each keeps its state in the work folder (safetensors), so
the command may be stopped at any time and goes on where it was; `--stage` runs one alone. The pictures an iteration
sees depend on the seed and the iteration only. Hours on two CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from diffpress.benchmarks.shapes import CLIP, PIPELINE, READER, models, scenes

ITEMS, READER_ITEMS = 40_000, 30_000
ITERATIONS = {"clip": 1000, "vae": 5000, "unet": 13_500, "reader": 2400}
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1  # teaches the unconditional half of classifier-free guidance


def _state(model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a stage needs to go on, as flat tensors: `model.*`, `average.*`, `optimizer.<index>.*`."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _restore(file: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(file)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name, value in average.items():
        value.copy_(tensors[f"average.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    work: Path,
    iterations: int,
    rate: float,
    save_every: int = 250,
) -> None:
    """Minimise `loss_of(iteration, generator)` with AdamW and a cosine rate; leaves the EMA weights in `model`.

    Progress is on disk every `save_every` iterations as `work/<name>.state.safetensors` and `.json`.
    """
    state_file, progress_file = work / f"{name}.state.safetensors", work / f"{name}.json"
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average = {key: value.detach().clone() for key, value in model.state_dict().items() if value.is_floating_point()}
    start = 0
    if progress_file.exists():
        start = json.loads(progress_file.read_text())["iteration"]
        _restore(state_file, model, average, optimizer)
    live = [model.state_dict()[key] for key in average]  # shares memory with the parameters
    warm = max(1, min(200, iterations // 10))
    model.train()
    smooth = math.nan
    bar = tqdm(range(start, iterations), initial=start, total=iterations, desc=name, mininterval=5)
    for iteration in bar:
        # The end is scaled to where a longer run would be, so the rate never quite reaches zero.
        cosine = 0.5 * (1 + math.cos(math.pi * 0.98 * max(0, iteration - warm) / (iterations - warm)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (iteration + 1) / warm) * cosine
        loss = loss_of(iteration, torch.Generator().manual_seed(1_000_003 * (iteration + 1)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(EMA_DECAY, (iteration + 1) / (iteration + 10))
        torch._foreach_lerp_(list(average.values()), live, 1 - decay)
        value_now = loss.item()
        smooth = value_now if math.isnan(smooth) else 0.98 * smooth + 0.02 * value_now
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (iteration + 1) % save_every == 0 or iteration + 1 == iterations:
            temporary = state_file.with_suffix(".part")
            save_file(_state(model, average, optimizer), temporary)
            temporary.replace(state_file)
            progress_file.write_text(json.dumps({"iteration": iteration + 1, "loss": smooth}))
    model.load_state_dict(average, strict=False)
    model.eval()


class Data:
    """The training items, drawn once and kept in the work folder: uint8 images [N, 64, 64, 3], captions, labels [N]."""

    def __init__(self, work: Path, items: int, seed: int, held_out: bool | None = False) -> None:
        name = f"data-{items}-{seed}-{held_out}"
        file, words = work / f"{name}.npy", work / f"{name}.json"
        if not words.exists():
            images = np.lib.format.open_memmap(file, "w+", np.uint8, (items, scenes.SIZE, scenes.SIZE, 3))
            truths, captions = [], []
            for index, (scene, text, image) in enumerate(
                tqdm(scenes.dataset(items, seed, held_out), total=items, desc="drawing", mininterval=5)
            ):
                images[index] = image
                truths.append(scene)
                captions.append(text)
            images.flush()
            labels = {head: values.tolist() for head, values in models.reader_labels(truths).items()}
            words.write_text(json.dumps({"captions": captions, "labels": labels}))
        self.images: np.ndarray = np.load(file, mmap_mode="r")
        stored = json.loads(words.read_text())
        self.captions: list[str] = stored["captions"]
        self.labels = {head: torch.tensor(values) for head, values in stored["labels"].items()}

    def batch(self, rows: Tensor, device: torch.device) -> Tensor:
        """Images [N, 3, 64, 64] in -1..1."""
        pixels = torch.from_numpy(self.images[rows.numpy()]).to(device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded ids [N, TOKENS]."""
    encoded = tokenizer(captions, padding="max_length", max_length=models.TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def train_clip(work: Path, data: Data, tokenizer: CLIPTokenizer, device: torch.device) -> CLIPModel:
    """Contrastive training; every batch holds each scene beside its near miss, so order and binding must be read.

    The text tower is causal: the words of the first object cannot know the relation that follows them, and what stands
    where would stay deep inside the last state. Linear heads that name it, dropped afterwards, bring it to the surface.
    """
    torch.manual_seed(0)
    clip = models.make_clip(tokenizer)
    heads = nn.ModuleDict(
        {name: nn.Linear(models.TEXT_WIDTH, len(names)) for name, names in models.Reader.HEADS.items()}
    )
    model = nn.ModuleDict({"clip": clip, "heads": heads}).to(device)
    ids = token_ids(tokenizer, data.captions)

    def loss_of(_: int, generator: torch.Generator) -> Tensor:
        pairs = torch.randperm(len(data.captions) // 2, generator=generator)[:96]
        rows = torch.cat([2 * pairs, 2 * pairs + 1])
        output = clip(input_ids=ids[rows].to(device), pixel_values=data.batch(rows, device), return_loss=True)
        state = output.text_model_output.pooler_output  # transformers leaves it projected here: linear all the same
        named = [F.cross_entropy(head(state), data.labels[name][rows].to(device)) for name, head in heads.items()]
        return output.loss + torch.stack(named).sum()

    train("clip", model, loss_of, work, ITERATIONS["clip"], 1e-3)
    return clip


def _difference(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared error; differences of neighbours count like pixels, because edges are what makes a shape."""
    difference = decoded - images
    edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return difference.abs().mean() + 2 * difference.square().mean() + edges


def train_vae(work: Path, data: Data, device: torch.device) -> AutoencoderKL:
    """Reconstruction (`_difference`) with a light KL term; sets the latent scale afterwards."""
    torch.manual_seed(1)
    model = models.make_vae().to(device)

    def loss_of(_: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.captions), (16,), generator=generator)
        images = data.batch(rows, device)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        return _difference(decoded, images) + 1e-5 * posterior.kl().mean() / 1024

    train("vae", model, loss_of, work, ITERATIONS["vae"], 2e-3)
    with torch.no_grad():
        rows = torch.arange(min(512, len(data.captions)))
        latents = model.encode(data.batch(rows, device)).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return model


@torch.no_grad()
def _encoded(
    work: Path, data: Data, tokenizer: CLIPTokenizer, clip: CLIPModel, vae: AutoencoderKL, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents [N, 4, 16, 16], text states [N, TOKENS, width] in half precision, and the empty caption's."""
    file = work / "encoded.safetensors"
    if not file.exists():
        latents, states = [], []
        ids = token_ids(tokenizer, data.captions)
        for rows in tqdm(torch.arange(len(data.captions)).split(250), desc="encoding", mininterval=5):
            latent = vae.encode(data.batch(rows, device)).latent_dist.mean * vae.config.scaling_factor
            latents.append(latent.half().cpu())
            states.append(clip.text_model(ids[rows].to(device)).last_hidden_state.half().cpu())
        empty = clip.text_model(token_ids(tokenizer, [""]).to(device)).last_hidden_state.half().cpu()
        save_file({"latents": torch.cat(latents).contiguous(), "states": torch.cat(states), "empty": empty}, file)
    tensors = load_file(file)
    return tensors["latents"], tensors["states"], tensors["empty"]


def train_unet(
    work: Path, data: Data, tokenizer: CLIPTokenizer, clip: CLIPModel, vae: AutoencoderKL, device: torch.device
) -> nn.Module:
    """v-prediction on the frozen latents, captions dropped for guidance (Salimans and Ho 2022)."""
    torch.manual_seed(2)
    model = models.make_unet().to(device, memory_format=torch.channels_last)
    scheduler = models.make_scheduler()
    latents, states, empty = _encoded(work, data, tokenizer, clip, vae, device)

    def loss_of(_: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (32,), generator=generator)
        clean = latents[rows].float()
        text = states[rows].float()
        dropped = torch.rand(len(rows), generator=generator) < CAPTION_DROPOUT
        text[dropped] = empty.float()
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep from each of 32 strata (Kingma et al. 2021, appendix I.1), denser where the scene is decided
        # (density ~ sqrt(t)) than among the last traces of noise.
        uniform = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        steps = (1000 * uniform ** (2 / 3)).long().clamp(max=999)
        noisy = scheduler.add_noise(clean, noise, steps)
        target = scheduler.get_velocity(clean, noise, steps).to(device)
        return F.mse_loss(model(noisy.to(device), steps.to(device), text.to(device)).sample, target)

    train("unet", model, loss_of, work, ITERATIONS["unet"], 8e-4)
    return model.to(memory_format=torch.contiguous_format)


def train_reader(work: Path, device: torch.device) -> models.Reader:
    """The judge sees every combination, held out or not: it measures, it does not generate."""
    torch.manual_seed(3)
    data = Data(work, READER_ITEMS, seed=11, held_out=None)
    model = models.Reader().to(device)

    def loss_of(_: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.captions), (96,), generator=generator)
        images = data.batch(rows, device)
        # What a VAE and a sampler leave behind must not confuse it: slight blur and noise on half of the pictures.
        soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "reflect"), 3, 1)
        mix = torch.rand(len(rows), 1, 1, 1, generator=generator).to(device)
        images = torch.lerp(images, soft, mix * (mix < 0.5)) + 0.04 * torch.randn(images.shape, generator=generator).to(
            device
        )
        logits = model(images)
        return torch.stack([F.cross_entropy(logits[k], data.labels[k][rows].to(device)) for k in logits]).sum()

    train("reader", model, loss_of, work, ITERATIONS["reader"], 2e-3)
    return model


def assemble(tokenizer: CLIPTokenizer, clip: CLIPModel, vae: AutoencoderKL, unet: nn.Module, reader: nn.Module) -> None:
    """Write the committed folders: a stock pipeline, the CLIP (text tower and all), the reader.

    Rounded to half precision, so that the files are small enough for git; everything runs in float32. The text encoder
    alone stays as it is: transformers would load it in the precision of its file.
    """
    from transformers import CLIPTextModel

    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict(), strict=False)
    for network in (unet, vae, clip, reader):
        network.to("cpu").half()
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=models.make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for folder in (PIPELINE, CLIP):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(PIPELINE)
    clip.save_pretrained(CLIP)
    save_file(reader.state_dict(), READER)


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"), help="state and data live here")
    stages = ["clip", "vae", "unet", "reader", "assemble"]
    parser.add_argument("--stage", choices=stages, help="run this one alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    work, device = options.work, torch.device(options.device)
    work.mkdir(parents=True, exist_ok=True)
    stage = options.stage
    # Made once: its trainer breaks ties between pieces of words by chance. Whole words have the same ids every time.
    folder = work / "tokenizer"
    made = (folder / "tokenizer.json").exists()
    tokenizer = CLIPTokenizer.from_pretrained(folder) if made else models.make_tokenizer(folder)
    data = Data(work, ITEMS, seed=0)
    # A finished stage only restores its weights.
    if stage == "clip":
        train_clip(work, data, tokenizer, device)
    elif stage == "vae":
        train_vae(work, data, device)
    elif stage == "reader":
        train_reader(work, device)
    else:
        clip, vae = train_clip(work, data, tokenizer, device), train_vae(work, data, device)
        unet = train_unet(work, data, tokenizer, clip, vae, device)
        if stage != "unet":
            assemble(tokenizer, clip, vae, unet, train_reader(work, device))


if __name__ == "__main__":
    main()

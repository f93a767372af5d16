"""What stands in for the networks of a diffusers pipeline: modules without weights that run a bundle's graphs.

Arrays go to a session of the runtime and come back. Where a bundle is bound to its schedule, a clock says which step
of it a call is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.clock import Clock
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE
from diffpress.runtime import text as runtime
from diffpress.runtime.backends import Port, Session
from diffpress.runtime.program import HIDDEN, OUTPUT, SAMPLE, TIMESTEP, Denoiser

Told = dict[str, np.ndarray]  # the denoiser's conditions by input, [N, ...]
Run = Callable[[int, np.ndarray], np.ndarray]  # (step of the program, sample [M, C, h, w]) -> output [M, C, h, w]


class _StandIn(nn.Module):
    """What diffusers asks of any part of a pipeline."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Of what it takes and returns, whatever the backend computes in."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where its inputs are expected: a session takes them from memory, wherever it computes."""
        return torch.device("cpu")

    def load_lora_adapter(self, *_: Any, **__: Any) -> None:
        """Raises `DiffpressError`: the weights are in the graphs."""
        raise DiffpressError("a LoRA is fused before compression: name it in the recipe, lora: {path: FILE}")


class TextEncoder(_StandIn):
    """Stands in for `CLIPTextModel`: input_ids [N, T] to the last hidden state [N, T, D]."""

    def __init__(self, config: Any, encoder: runtime.TextEncoder) -> None:
        super().__init__(config)
        self._encoder, self._session = encoder, encoder.session

    def load_adapter(self, *_: Any, **__: Any) -> None:
        """As `load_lora_adapter`."""
        self.load_lora_adapter()

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        """Raises `DiffpressError` for a mask and for hidden states (clip_skip), which the graph does not have."""
        from transformers.modeling_outputs import BaseModelOutput

        if attention_mask is not None or output_hidden_states:
            self.refuse("attention mask" if attention_mask is not None else "clip_skip")
        return BaseModelOutput(last_hidden_state=self.encoded(input_ids)[0])

    def encoded(self, input_ids: Tensor) -> list[Tensor]:
        """The text [N, T, D], then the conditions [N, ...] beside it."""
        ids = _array(input_ids, self._session.inputs["input_ids"], "a tokenized prompt")
        found = self._session.run({"input_ids": ids})
        names = (self._encoder.hidden, *self._encoder.added)
        return [torch.from_numpy(found[name]).to(input_ids.device) for name in names]

    def refuse(self, what: str) -> None:
        """Raise `DiffpressError`."""
        raise DiffpressError(f"the text encoder of this bundle takes no {what}: it hands out one layer alone")


class PenultimateTextEncoder(TextEncoder):
    """Stands in for the encoders of SDXL, whose pipeline reads the last layer but one [N, T, D] and, from the encoder
    that has it, the pooled text [N, E] where other encoders return their last layer.
    """

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        """Raises `DiffpressError` for a mask and, when it is read, for another layer (clip_skip)."""
        from transformers.modeling_outputs import BaseModelOutput

        if attention_mask is not None:
            self.refuse("attention mask")
        hidden, *pooled = self.encoded(input_ids)
        return BaseModelOutput(
            last_hidden_state=pooled[0] if pooled else hidden,  # what comes first
            hidden_states=_Layers(hidden, self.refuse),
        )


class _Layers:
    """The hidden states of an encoder of which one is known."""

    def __init__(self, penultimate: Tensor, refuse: Callable[[str], None]) -> None:
        self._penultimate, self._refuse = penultimate, refuse

    def __getitem__(self, index: int) -> Tensor:
        if index != -2:
            self._refuse("clip_skip")
        return self._penultimate


class Vae(_StandIn):
    """Stands in for `AutoencoderKL`; images go through one by one, which costs nothing on a CPU and memory for one."""

    def __init__(self, config: Any, decoder: Session, open_encoder: Callable[[], Session]) -> None:
        super().__init__(config)
        self._decoder, self._open_encoder = decoder, open_encoder

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Latents [N, C, h, w], divided by the scaling factor, to images [N, 3, H, W] in -1..1."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        sample = _rows(self._decoder, "latent_sample", z, "sample", "a latent")
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images [N, 3, H, W] in -1..1 to the distribution of their latents."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        parameters = _rows(self._open_encoder(), "sample", x, "latent_parameters", "an image")
        distribution = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)


class Unet(_StandIn):
    """Stands in for `UNet2DConditionModel` and runs the bundle's step program, a call per step.

    Without a clock, which is where the program runs everything at every step, a call knows nothing of others: any
    schedule will do. `open_controlled` opens the graph that takes a ControlNet's residuals. `added` are the conditions
    that the graphs take beside the text.
    """

    def __init__(
        self,
        config: Any,
        denoiser: Denoiser,
        clock: Clock | None,
        open_controlled: Callable[[], Session] | None,
        added: Sequence[str] = (),
    ) -> None:
        super().__init__(config)
        self._denoiser, self._clock, self._open_controlled, self._added = denoiser, clock, open_controlled, added
        self._ports = {name: port for session in denoiser.sessions.values() for name, port in session.inputs.items()}
        if size := getattr(config, "projection_class_embeddings_input_dim", None):
            # Its pipeline compares this with the conditions that it makes.
            self.add_embedding = nn.Module()
            self.add_embedding.linear_1 = nn.Linear(size, 1, device="meta")
        self._image: _Images | None = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        **conditions: Any,
    ) -> Any:
        """`sample` [N, C, h, w] at one timestep and its text [N, T, D] to the output [N, C, h, w].

        Raises `DiffpressError` for conditions and sizes that the graphs do not take, and as the clock does.
        """
        added = added_cond_kwargs or {}
        given = [name for name, value in conditions.items() if value is not None and value != {}]
        given += [name for name in added if name not in self._added]
        if given:
            raise DiffpressError(f"the graphs of this bundle take no {', '.join(given)}")
        if missing := [name for name in self._added if name not in added]:
            raise DiffpressError(f"the graphs of this bundle need {', '.join(missing)} among added_cond_kwargs")
        moments = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if bool((moments != moments[0]).any()):
            raise DiffpressError("the graphs of this bundle take one timestep for the whole batch")
        at = float(moments[0])
        latents = _array(sample, self._ports[SAMPLE], "a latent")
        told = {HIDDEN: _array(encoder_hidden_states, self._ports[HIDDEN], "an encoded prompt")}
        told |= {name: _array(added[name], self._ports[name], f"'{name}'") for name in self._added}
        index = self._advance(at, latents, told)
        assert self._image is not None
        run: Run = functools.partial(_called, self._image.denoise, at)
        if down_block_additional_residuals is not None or mid_block_additional_residual is not None:
            residuals = [*(down_block_additional_residuals or ()), mid_block_additional_residual]
            run = self._controlled(residuals, at, told)
        output = torch.from_numpy(self._image(index, latents, told, run)).to(sample.device, sample.dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)

    def _advance(self, at: float, latents: np.ndarray, told: Told) -> int:
        """The step of the image's program that this call is."""
        if self._clock is None:
            self._image = _Images(self._denoiser, (at,), latents, told)
            return 0
        index, first = self._clock.tick(at)
        if first:
            self._begun = index
            timesteps = self._clock.sampling.timesteps[index:]
            self._image = _Images(self._denoiser.starting(index), timesteps, latents, told)
        return index - self._begun

    def _controlled(self, residuals: Sequence[Tensor | None], at: float, told: Told) -> Run:
        """Runs the graph that takes residuals, with these."""
        if self._open_controlled is None:
            raise DiffpressError(
                "the graphs of this bundle take no residuals of a ControlNet: compress with 'controlnet: true' in the "
                "recipe"
            )
        session = self._open_controlled()
        names = [name for name in session.inputs if name not in (SAMPLE, TIMESTEP, *told)]
        if len(names) != len(residuals) or any(residual is None for residual in residuals):
            count = sum(residual is not None for residual in residuals)
            raise DiffpressError(f"this denoiser takes {len(names)} residuals of a ControlNet, not {count}")
        pairs = zip(names, residuals, strict=True)
        arrays = {
            name: _array(tensor, session.inputs[name], "a residual") for name, tensor in pairs if tensor is not None
        }

        def run(_: int, sample: np.ndarray) -> np.ndarray:
            rows = len(sample)
            feeds = {SAMPLE: sample, **{name: value[-rows:] for name, value in (told | arrays).items()}}
            if TIMESTEP in session.inputs:  # a temporal table that knows one step looks at none
                port = session.inputs[TIMESTEP]
                feeds[TIMESTEP] = np.full([size or rows for size in port.shape], at, port.dtype)
            return session.run(feeds)[OUTPUT]

        return run


class _Images:
    """What lives as long as a batch of images: kept features, the text, the difference of both halves of guidance."""

    def __init__(self, denoiser: Denoiser, timesteps: Sequence[float], latents: np.ndarray, told: Told) -> None:
        self._program, self._told = denoiser.program, {name: value.copy() for name, value in told.items()}
        added = {name: value for name, value in self._told.items() if name != HIDDEN}
        self.denoise = denoiser.start(self._told[HIDDEN], timesteps, added)
        # A pipeline does not say whether it guides; it then repeats the latents, the unconditional half first.
        self._guided = bool(self._program.guidance) and _repeats(latents)
        self._difference = np.zeros(0, np.float32)

    def __call__(self, step: int, latents: np.ndarray, told: Told, run: Run) -> np.ndarray:
        """The output [N, C, h, w] of both halves of guidance, or of what there is.

        Where the program computes the conditional half c alone that is (c - d, c) with the last difference d, or
        (c, c), so that the pipeline's own u + scale (c - u) is right.
        """
        rows, begun = len(latents), len(self._told[HIDDEN])
        if rows > begun:
            raise DiffpressError(f"the batch grew from {begun} to {rows} while this bundle's plan was running")
        for name, value in told.items():
            self._told[name][-rows:] = value  # callbacks may change the text
        if not self._guided or rows < begun:
            return run(step, latents)
        if not _repeats(latents):
            raise DiffpressError(
                "this bundle's plan leaves halves of guidance out, and cannot tell an unguided batch from a guided one "
                "when its images begin with the same noise: give each its own seed"
            )
        half, how = rows // 2, self._program.guided(step)
        if how != FULL:
            conditional = run(step, latents[half:])
            return np.concatenate([conditional - self._difference if how == REUSE else conditional, conditional])
        output = run(step, latents)
        self._difference = output[half:] - output[:half]
        return output


def _called(denoise: Callable[[int, np.ndarray, float], np.ndarray], at: float, step: int, x: np.ndarray) -> np.ndarray:
    return denoise(step, x, at)


def _repeats(latents: np.ndarray) -> bool:
    half, odd = divmod(len(latents), 2)
    return not odd and bool((latents[:half] == latents[half:]).all())


def _array(tensor: Tensor, port: Port, what: str) -> np.ndarray:
    """A tensor as a graph takes it; raises `DiffpressError` for another size than the graph was exported for."""
    wanted = port.shape
    fits = tensor.ndim == len(wanted) and all(
        size in (None, given) for size, given in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        shape = ", ".join("batch" if size is None else str(size) for size in wanted)
        raise DiffpressError(
            f"{what} of {list(tensor.shape)} does not fit this bundle, whose graph takes [{shape}]: it is bound to the "
            "resolution that it was compressed for"
        )
    return np.ascontiguousarray(tensor.numpy(force=True), dtype=port.dtype)


def _rows(session: Session, source: str, batch: Tensor, output: str, what: str) -> Tensor:
    """Runs a graph row by row."""
    array = _array(batch, session.inputs[source], what)
    made = [session.run({source: array[index : index + 1]})[output] for index in range(len(array))]
    return torch.from_numpy(np.concatenate(made)).to(batch.device, batch.dtype)

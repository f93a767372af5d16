"""What stands in for the networks of a diffusers pipeline: modules without weights that run a bundle's graphs.

Arrays go to a session of the runtime and come back. Where a bundle is bound to its schedule, a clock says which step
of it a call is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpress.errors import DiffpressError
from diffpress.plan import FULL, REUSE, Sampling
from diffpress.runtime.backends import Port, Session
from diffpress.runtime.program import HIDDEN, OUTPUT, SAMPLE, TIMESTEP, Denoiser

NEAR = 1e-3  # by how much a timestep may differ from the plan's: schedulers round in single precision
Run = Callable[[int, np.ndarray], np.ndarray]  # (step of the program, sample [M, C, h, w]) -> output [M, C, h, w]


class Clock:
    """Where in its schedule the denoiser is called, which nobody but the pipeline's scheduler can know.

    Every diffusers pipeline calls `set_timesteps` for an image and `scale_model_input` before each call of the
    denoiser. A denoiser that is called without them is called under another scheduler.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._scheduler: Any = None  # that was told to begin an image
        self._last: int | None = None  # the call before in this image
        self._told = False  # of the next call

    def begin(self, scheduler: Any) -> None:
        """An image begins; raises `DiffpressError` unless its timesteps are those of the plan."""
        self._scheduler = None
        if not _near([float(timestep) for timestep in scheduler.timesteps], self.sampling.timesteps):
            raise DiffpressError(
                f"this bundle is planned for {self.sampling.scheduler} at {self.sampling.steps} steps: call it with "
                f"num_inference_steps={self.sampling.steps}, or compress for the steps that you want"
            )
        self._scheduler, self._last, self._told = scheduler, None, False

    def announce(self) -> None:
        """The denoiser is about to be called."""
        self._told = True

    def tick(self, timestep: float) -> tuple[int, bool]:
        """The index of the call at `timestep`, and whether it is the first of its image.

        An image may begin at a later call (image to image). Raises `DiffpressError` for what the plan does not know.
        """
        timesteps, planned = self.sampling.timesteps, f"{self.sampling.scheduler} at {self.sampling.steps} steps"
        if not self._told or self._scheduler is None:
            raise DiffpressError(
                f"this bundle is planned for {planned}: keep the pipeline's own scheduler, or compress for another one "
                "with a 'schedule' pass"
            )
        if self._last is not None:
            index = self._last + 1
        else:
            begin = getattr(self._scheduler, "begin_index", None)
            same = [index for index, entry in enumerate(timesteps) if _near([entry], [timestep])]
            index = begin if begin is not None else same[0] if same else len(timesteps)
        if index >= len(timesteps) or not _near([timesteps[index]], [timestep]):
            raise DiffpressError(
                f"the denoiser is called at timestep {timestep:g}, where the plan for {planned} does not stand: leave "
                "the timesteps to the scheduler"
            )
        first = self._last is None
        self._last, self._told = index, False
        return index, first


def watch(scheduler: Any, clock: Clock) -> None:
    """Make `scheduler` tell `clock` what it is asked, and be as it is in everything else."""
    kind = type(scheduler)

    @functools.wraps(kind.set_timesteps)  # pipelines look at the signature
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        clock.begin(self)

    @functools.wraps(kind.scale_model_input)
    def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.announce()
        return kind.scale_model_input(self, *args, **kwargs)

    methods = {"set_timesteps": set_timesteps, "scale_model_input": scale_model_input, "__module__": kind.__module__}
    scheduler.__class__ = type(kind.__name__, (kind,), methods)


def _near(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=0, abs_tol=NEAR) for a, b in pairs)


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

    def __init__(self, config: Any, session: Session) -> None:
        super().__init__(config)
        self._session = session

    def load_adapter(self, *_: Any, **__: Any) -> None:
        """As `load_lora_adapter`."""
        self.load_lora_adapter()

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        """Raises `DiffpressError` for a mask and for hidden states (clip_skip), which the graph does not have."""
        from transformers.modeling_outputs import BaseModelOutput

        if attention_mask is not None or output_hidden_states:
            what = "attention mask" if attention_mask is not None else "clip_skip"
            raise DiffpressError(f"the text encoder of this bundle takes no {what}: it hands out its last layer alone")
        ids = _array(input_ids, self._session.inputs["input_ids"], "a tokenized prompt")
        hidden = self._session.run({"input_ids": ids})["last_hidden_state"]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden).to(input_ids.device))


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
    schedule will do. `open_controlled` opens the graph that takes a ControlNet's residuals.
    """

    def __init__(
        self,
        config: Any,
        denoiser: Denoiser,
        clock: Clock | None,
        open_controlled: Callable[[], Session] | None,
    ) -> None:
        super().__init__(config)
        self._denoiser, self._clock, self._open_controlled = denoiser, clock, open_controlled
        self._ports = denoiser.sessions[denoiser.program.steps[0]].inputs
        self._image: _Images | None = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        **conditions: Any,
    ) -> Any:
        """`sample` [N, C, h, w] at one timestep and its text [N, T, D] to the output [N, C, h, w].

        Raises `DiffpressError` for conditions and sizes that the graphs do not take, and as the clock does.
        """
        given = [name for name, value in conditions.items() if value is not None and value != {}]
        if given:
            raise DiffpressError(f"the graphs of this bundle take no {', '.join(given)}")
        moments = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)
        if bool((moments != moments[0]).any()):
            raise DiffpressError("the graphs of this bundle take one timestep for the whole batch")
        at = float(moments[0])
        latents = _array(sample, self._ports[SAMPLE], "a latent")
        hidden = _array(encoder_hidden_states, self._ports[HIDDEN], "an encoded prompt")
        index = self._advance(at, latents, hidden)
        assert self._image is not None
        run: Run = functools.partial(_called, self._image.denoise, at)
        if down_block_additional_residuals is not None or mid_block_additional_residual is not None:
            residuals = [*(down_block_additional_residuals or ()), mid_block_additional_residual]
            run = self._controlled(residuals, at, hidden)
        output = torch.from_numpy(self._image(index, latents, hidden, run)).to(sample.device, sample.dtype)
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=output)

    def _advance(self, at: float, latents: np.ndarray, hidden: np.ndarray) -> int:
        """The step of the image's program that this call is."""
        if self._clock is None:
            self._image = _Images(self._denoiser, (at,), latents, hidden)
            return 0
        index, first = self._clock.tick(at)
        if first:
            self._begun = index
            timesteps = self._clock.sampling.timesteps[index:]
            self._image = _Images(self._denoiser.starting(index), timesteps, latents, hidden)
        return index - self._begun

    def _controlled(self, residuals: Sequence[Tensor | None], at: float, hidden: np.ndarray) -> Run:
        """Runs the graph that takes residuals, with these."""
        if self._open_controlled is None:
            raise DiffpressError(
                "the graphs of this bundle take no residuals of a ControlNet: compress with 'controlnet: true' in the "
                "recipe"
            )
        session = self._open_controlled()
        names = [name for name in session.inputs if name not in (SAMPLE, TIMESTEP, HIDDEN)]
        if len(names) != len(residuals) or any(residual is None for residual in residuals):
            count = sum(residual is not None for residual in residuals)
            raise DiffpressError(f"this denoiser takes {len(names)} residuals of a ControlNet, not {count}")
        pairs = zip(names, residuals, strict=True)
        arrays = {
            name: _array(tensor, session.inputs[name], "a residual") for name, tensor in pairs if tensor is not None
        }

        def run(_: int, sample: np.ndarray) -> np.ndarray:
            rows = len(sample)
            feeds = {SAMPLE: sample, HIDDEN: hidden[-rows:], **{name: value[-rows:] for name, value in arrays.items()}}
            if TIMESTEP in session.inputs:  # a temporal table that knows one step looks at none
                port = session.inputs[TIMESTEP]
                feeds[TIMESTEP] = np.full([size or rows for size in port.shape], at, port.dtype)
            return session.run(feeds)[OUTPUT]

        return run


class _Images:
    """What lives as long as a batch of images: kept features, the text, the difference of both halves of guidance."""

    def __init__(self, denoiser: Denoiser, timesteps: Sequence[float], latents: np.ndarray, hidden: np.ndarray) -> None:
        self._program, self._hidden = denoiser.program, hidden.copy()
        self.denoise = denoiser.start(self._hidden, timesteps)
        # A pipeline does not say whether it guides; it then repeats the latents, the unconditional half first.
        self._guided = bool(self._program.guidance) and _repeats(latents)
        self._difference = np.zeros(0, np.float32)

    def __call__(self, step: int, latents: np.ndarray, hidden: np.ndarray, run: Run) -> np.ndarray:
        """The output [N, C, h, w] of both halves of guidance, or of what there is.

        Where the program computes the conditional half c alone that is (c - d, c) with the last difference d, or
        (c, c), so that the pipeline's own u + scale (c - u) is right.
        """
        rows = len(latents)
        if rows > len(self._hidden):
            raise DiffpressError(
                f"the batch grew from {len(self._hidden)} to {rows} while this bundle's plan was running"
            )
        self._hidden[-rows:] = hidden  # callbacks may change the text
        if not self._guided or rows < len(self._hidden):
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

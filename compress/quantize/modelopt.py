"""`modelopt`: runs a configuration of nvidia-modelopt and reads its quantizers into the plan.

Its fake-quant is ours in other words. Integers: clip(round(x * (q / amax)), -q - 1, q) / (q / amax) with q = 127 or 7,
both ends of the grid in use unless `narrow_range` is set, which no configuration does; so scale = amax / q. E4M3: the
float8 cast of x * (448 / amax); so scale = amax / 448. It multiplies where we divide, so results differ by the last
bit, and a number that lies within that of the middle of two steps may go to the other one. An amax of 2^-24 or less
counts as none. `pre_quant_scale` multiplies a layer's input and is folded into its weight: it is our multiplier.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from fnmatch import fnmatch
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.compress.cache.execute import replay
from diffpress.compress.families import unet as family
from diffpress.compress.names import by_reason, require_matches
from diffpress.compress.numerics.formats import FORMATS, Format, get
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError, require
from diffpress.plan import LayerQuant

EPSILON = 2.0**-24  # an amax that counts as none, as in its tensor_quant
# It would pad each row of a kernel to a block, which takes hundreds of times the weight's memory and gives no format.
KERNELS = "blocks would lie along the width of kernels"
NVFP4 = ((2, 1), (4, 3))  # bits of its numbers and of the scales of their blocks


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModeloptPass:
    """A configuration of nvidia-modelopt by its name there, for the layers that `quantize` would take.

    First and last convolution and the time modules stay in float as in `quantize`; so does what `exclude` matches, and
    what the configuration itself leaves out ("proj_out" in most of them).
    """

    config: str = "INT8_DEFAULT_CFG"
    exclude: Annotated[tuple[str, ...], Field(description="shell patterns of layers that stay in float")] = ()

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` without the package, for a name it does not know, or where it needs a GPU."""
        settings = configuration(self.config)
        if needs_gpu(settings) and not torch.cuda.is_available():
            raise DiffpressError(
                f"modelopt: {self.config} runs in CUDA kernels alone and there is no GPU here; INT8_DEFAULT_CFG, "
                "INT8_SMOOTHQUANT_CFG, FP8_DEFAULT_CFG, INT4_AWQ_CFG and W4A8_AWQ_BETA_CFG run on a CPU"
            )
        if work.quantization:
            raise DiffpressError("modelopt starts from a float model: put it in the place of 'quantize', not after it")
        names = family.quantizable(work.denoiser)
        require_matches("modelopt: exclude", self.exclude, names)
        if not self.layers(work):
            raise DiffpressError("modelopt: the exclude patterns leave no layer to quantize")

    def layers(self, work: Work) -> dict[str, nn.Conv2d | nn.Linear]:
        """Those it may quantize; where weights are in blocks, no convolutions."""
        return {
            name: module
            for name, module in self._wanted(work).items()
            if isinstance(module, nn.Linear) or not in_blocks(configuration(self.config))
        }

    def _wanted(self, work: Work) -> dict[str, nn.Conv2d | nn.Linear]:
        return {
            name: module
            for name, module in family.quantizable(work.denoiser).items()
            if not any(fnmatch(name, pattern) for pattern in self.exclude)
        }

    def apply(self, work: Work) -> str:
        """Quantize a copy, read it, put it into the plan; says what could not be read. All of that is in
        `work.tables["modelopt"]`.
        """
        layers = self.layers(work)
        found = read(quantized_copy(work, self.config, layers), layers)
        found.left |= {name: KERNELS for name in self._wanted(work) if name not in layers}
        if not found.layers:
            raise DiffpressError(f"modelopt: a plan can hold nothing of {self.config}: {_told(found.left)}")
        for name, weight in found.weights.items():
            work.originals.setdefault(f"{name}.weight", layers[name].weight.data)
            layers[name].weight.data = weight
        work.quantization.update(found.layers)
        work.tables["modelopt"] = [{"quantizer": name, "why": why} for name, why in found.left.items()]
        names = {layer.name for layer in found.layers.values()}
        text = f"{len(found.layers)} layers as {self.config} has them ({', '.join(sorted(names))})"
        return text + (f"; left out: {_told(found.left)}" if found.left else "")


@plain_dataclass
class Reading:
    """What of a model that nvidia-modelopt quantized a plan can hold.

    `layers` by module path; `weights` of layers that it changed beyond scaling; `left` what is not held, and why, by
    the path of a quantizer or of a layer that it keeps in float.
    """

    layers: dict[str, LayerQuant] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class _Inexpressible(Exception):
    """A plan has no place for it; the message says why."""


def _library() -> Any:
    with warnings.catch_warnings():  # on import it warns of versions of libraries that play no part here
        warnings.simplefilter("ignore")
        return require("modelopt.torch.quantization", "modelopt", "run its configurations")


def configuration(name: str) -> dict[str, Any]:
    """A copy of one of its configurations; raises `DiffpressError` that lists them for a name there is not."""
    library = _library()
    known = sorted(library.config.choices)
    if name not in known:
        raise DiffpressError(f"modelopt: there is no configuration '{name}', choose from: {', '.join(known)}")
    return copy.deepcopy(getattr(library, name))


def needs_gpu(settings: Mapping[str, Any]) -> bool:
    """Whether a configuration has arithmetic that only its CUDA kernels do: blocks whose scales are rounded too."""
    return any("scale_bits" in sizes for sizes in _block_sizes(settings))


def in_blocks(settings: Mapping[str, Any]) -> bool:
    """Whether it gives blocks of a weight their own scales."""
    return any(_extents(sizes) for sizes in _block_sizes(settings))


def _block_sizes(settings: Mapping[str, Any]) -> Iterator[Mapping[Any, Any]]:
    for entry in settings["quant_cfg"]:
        cfg = entry.get("cfg") or []
        yield from (
            part["block_sizes"] for part in (cfg if isinstance(cfg, list) else [cfg]) if part.get("block_sizes")
        )


def _extents(sizes: Mapping[Any, Any] | None) -> dict[int, int]:
    """Axis to the width of blocks along it; a width of None there means the whole axis."""
    return {axis: size for axis, size in (sizes or {}).items() if isinstance(axis, int) and size}


def quantized_copy(work: Work, config: str, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the denoiser, calibrated by nvidia-modelopt on the recorded calls with only `layers` quantized."""
    settings = configuration(config)
    others = [
        name
        for name, module in work.denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in layers
    ]
    settings["quant_cfg"] += [{"quantizer_name": f"{name}.*", "enable": False} for name in others]
    model = copy.deepcopy(work.denoiser)
    if torch.cuda.is_available():
        model.to("cuda")

    def calibrate(model: Any) -> None:
        for call in work.progress(work.record(), f"calibrating {config}"):
            replay(model, work.program, work.corrections, call)

    try:
        # It prints, and warns of every layer that is not quantized or was not run: both are told by `read`.
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return _library().quantize(model, settings, calibrate)
    # What it raises for inputs that are not finite, and for shapes that a configuration does not fit.
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DiffpressError(f"modelopt: {config} failed on this denoiser: {reason}") from error


@torch.no_grad()
def read(model: nn.Module, layers: Mapping[str, nn.Conv2d | nn.Linear]) -> Reading:
    """What a plan can hold of `model`, a quantized copy of the network that has `layers` in float."""
    found, seen = Reading(), set()
    for name, original in layers.items():
        module: Any = model.get_submodule(name)
        if not hasattr(module, "weight_quantizer"):
            found.left[name] = "it does not know such layers"
            continue
        weights, inputs = f"{name}.weight_quantizer", f"{name}.input_quantizer"
        seen |= {weights, inputs}
        if not module.weight_quantizer.is_enabled:
            found.left[name] = "its configuration leaves their weights in float"
            continue
        try:
            multiplier = _multiplier(module)
            format, scale, weight = _weight(module, original.weight, multiplier)
        except _Inexpressible as reason:
            found.left[weights] = str(reason)
            if module.input_quantizer.is_enabled:
                found.left[inputs] = "the weights are left out"
            continue
        input_format, input_scale = None, None
        if module.input_quantizer.is_enabled:
            try:
                input_format, input_scale = _input(module.input_quantizer)
            except _Inexpressible as reason:
                found.left[inputs] = str(reason)
        found.layers[name] = LayerQuant(
            scale.cpu().numpy(), input_scale, format, input_format, None if multiplier is None else multiplier.numpy()
        )
        if weight is not None:
            found.weights[name] = weight
    for path in _enabled(model):
        if path not in seen and path.rpartition(".")[0] not in seen:  # parts of a sequence are numbered below it
            found.left[path] = "they round neither weights nor inputs of layers"
    return found


def _enabled(model: nn.Module) -> Iterator[str]:
    """Paths of all that rounds in a quantized model."""
    quantizer = _library().nn.TensorQuantizer
    return (path for path, part in model.named_modules() if isinstance(part, quantizer) and part.is_enabled)


def _multiplier(module: Any) -> Tensor | None:
    """[in], of a layer's input; it is applied where the input is not rounded, too."""
    scale = module.input_quantizer.pre_quant_scale
    if scale is None or bool((scale == 1).all()):
        return None
    return scale.detach().float().cpu().expand(module.weight.shape[1]).contiguous()


def _input(quantizer: Any) -> tuple[str, np.ndarray]:
    """Format and scale [1]."""
    format = _format(quantizer)
    if quantizer._dynamic or (quantizer.block_sizes or {}).get("type") == "dynamic":
        raise _Inexpressible("scales are found at run time")
    if quantizer.amax is None:
        raise _Inexpressible("no recorded call ran them")
    if quantizer.amax.numel() != 1:
        raise _Inexpressible("they have several scales")
    return format.name, _scale(quantizer.amax, format).reshape(1).cpu().numpy()


def _weight(module: Any, original: Tensor, multiplier: Tensor | None) -> tuple[str, Tensor, Tensor | None]:
    """Format, scale [out] or [out, blocks], and the weight if it is not just `original` over the multiplier."""
    factor = 1.0 if multiplier is None else multiplier.reshape(1, -1, *[1] * (original.ndim - 2)).to(original)
    folded = module.weight.detach()
    parts = list(module.weight_quantizer) if isinstance(module.weight_quantizer, nn.Sequential) else []
    for part in parts[:-1]:
        # W4A8 rounds twice, to blocks of int4 and then to one scale of E4M3. The first goes into the weight itself.
        folded = part(folded)
    quantizer = parts[-1] if parts else module.weight_quantizer
    if quantizer.pre_quant_scale is not None:
        raise _Inexpressible("they scale by themselves")
    if getattr(quantizer, "svdquant_lora_a", None) is not None:
        raise _Inexpressible("they add a low-rank branch")
    format = _format(quantizer)
    scale = _blocks(quantizer, folded, format)
    here = folded.to(original)
    changed = not torch.allclose(here, original / factor, rtol=1e-5, atol=1e-9)
    return format.name, scale, here * factor if changed else None


def _blocks(quantizer: Any, weight: Tensor, format: Format) -> Tensor:
    """The scale [out] or [out, blocks] of a weight [out, in, ...]."""
    outputs, inputs = weight.shape[:2]
    sizes = _extents(quantizer.block_sizes)
    if sizes and weight.ndim > 2:
        raise _Inexpressible(KERNELS)
    width = sizes.get(-1) or sizes.get(1) or inputs
    height = sizes.get(-2) or sizes.get(0) or 1
    if (quantizer.block_sizes or {}).get("scale_bits") is not None:
        if (quantizer.num_bits, quantizer.block_sizes["scale_bits"]) != NVFP4 or inputs % width:
            raise _Inexpressible("scales are found at run time")
        kind = require("modelopt.torch.quantization.qtensor", "modelopt", "read NVFP4").NVFP4QTensor
        scales, overall = kind.get_weights_scaling_factor_from_quantizer(quantizer, weight)
        return (scales.float() * overall).reshape(outputs, -1)
    if quantizer.amax is None:
        raise _Inexpressible("they were not calibrated")
    scale = _scale(quantizer.amax, format)
    if not sizes:
        if scale.numel() not in (1, outputs) or (scale.numel() > 1 and scale.shape[0] != outputs):
            raise _Inexpressible("scales are not those of output channels")
        return scale.flatten().expand(outputs).contiguous()
    rows = scale.reshape(math.ceil(outputs / height), math.ceil(inputs / width)).repeat_interleave(height, 0)[:outputs]
    if rows.shape[1] == 1:
        return rows[:, 0].contiguous()
    # Its last block may be cut short, ours are equal: as wide as divides both, neighbours with the same scale.
    common = math.gcd(width, inputs)
    return rows.repeat_interleave(width // common, 1)[:, : inputs // common].contiguous()


def _scale(amax: Tensor, format: Format) -> Tensor:
    if not bool(amax.isfinite().all()):
        raise _Inexpressible("ranges are not finite")
    return torch.where(amax > EPSILON, amax.float(), 1.0) / format.largest


def _format(quantizer: Any) -> Format:
    bits = quantizer.num_bits
    name = f"int{bits}" if isinstance(bits, int) else "e{}m{}".format(*bits) if isinstance(bits, tuple) else str(bits)
    unusual = {
        "unsigned": quantizer.unsigned,
        "narrow": quantizer.narrow_range,
        "shifted": quantizer.bias is not None,
        "rotated": quantizer.rotate_is_enabled,
        "packed": not quantizer.fake_quant,
        "of another backend": quantizer.backend is not None,
        "unknown": name not in FORMATS,
    }
    said = [word for word, present in unusual.items() if present]
    if said:
        raise _Inexpressible(f"numbers ({name}) are {', '.join(said)}")
    return get(name)


def _told(left: Mapping[str, str]) -> str:
    """What was left out, by reason."""
    return "; ".join(f"{count} because {why} ({names})" for why, count, names in by_reason(left))

"""`quantize`: post-training INT8, W8A8, symmetric; weights per output channel, layer inputs per tensor.

Ranges come from the L2.4 search over recorded calls (shared primitives of PTQ4DM and Q-Diffusion). Attention products,
softmax and normalisation stay in float: no target gains from them (TensorRT fuses attention whole).
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration.statistics import observe_inputs
from diffpress.compress.families import unet as family
from diffpress.compress.numerics.integer import scale_of, search_input_scale, search_weight_scale
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import LayerQuant


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantizePass:
    """INT8 weights and layer inputs. `exclude` keeps layers in float, by shell patterns over their module paths."""

    format: Literal["int8"] = "int8"
    range: Literal["l2.4", "max"] = "l2.4"
    exclude: Annotated[tuple[str, ...], Field(description="shell patterns of layers that stay in float")] = ()

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` when a pattern matches nothing or nothing is left to quantize."""
        names = family.quantizable(work.denoiser)
        for pattern in self.exclude:
            if not any(fnmatch(name, pattern) for name in names):
                raise DiffpressError(
                    f"quantize: exclude pattern '{pattern}' matches no layer, such as '{next(iter(names))}'"
                )
        if all(any(fnmatch(name, pattern) for pattern in self.exclude) for name in names):
            raise DiffpressError("quantize: the exclude patterns leave no layer to quantize")

    def apply(self, work: Work) -> str:
        """Find scales from recorded calls and put them into the plan; says how many layers."""
        layers = {
            name: module
            for name, module in family.quantizable(work.denoiser).items()
            if not any(fnmatch(name, pattern) for pattern in self.exclude)
        }
        histograms = observe_inputs(work.denoiser, layers, work.record(), work.progress)
        for name, module in work.progress(layers.items(), "searching ranges"):
            seen = histograms[name]
            weight: Tensor = module.weight
            if self.range == "max":
                weight_scale = scale_of(weight.detach().reshape(weight.shape[0], -1).abs().amax(dim=1).clamp_min(1e-12))
                input_scale = float(scale_of(seen.amax or 127.0))
            else:
                weight_scale = search_weight_scale(weight)
                input_scale = search_input_scale(seen.counts, seen.centres(), seen.amax)
            assert isinstance(weight_scale, Tensor)
            work.quantization[name] = LayerQuant(weight_scale.numpy().astype("float32"), input_scale, self.format)
        total = sum(parameter.numel() for parameter in work.denoiser.parameters())
        covered = sum(module.weight.numel() for module in layers.values())
        return f"{len(layers)} layers to INT8 with {covered / total:.0%} of the parameters, ranges by {self.range}"

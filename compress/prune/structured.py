"""`prune-structured`: heads, feed-forward neurons and ResBlock channels leave, and what stays makes up for them.

OBS-Diff (Zhu et al. 2025) on U-Nets: the reader of a structure (`to_out`, the second feed-forward layer, the second
convolution) loses groups of its input columns by the Optimal Brain Surgeon with a timestep-aware Hessian, and what made
these inputs is cut with them. Module packages bound the memory: the Hessians of one package at a time are collected, on
the network as it is cut so far. How much of each structure goes follows from what that does to the denoiser's output.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from diffpress.calibration.capture import Call
from diffpress.calibration.hessian import Hessian, Weighting
from diffpress.calibration.processes import on_fastest_device
from diffpress.compress.families import texts
from diffpress.compress.families import unet as family
from diffpress.compress.names import phrases, require_matches
from diffpress.compress.prune import packages, speed, structure
from diffpress.compress.prune.allocate import Choice, TooMuch, allocate, uniform
from diffpress.compress.prune.methods import Method, collected, prune_structure
from diffpress.compress.prune.norms import cut_evenly
from diffpress.compress.prune.outputs import Outputs
from diffpress.compress.prune.structure import CHANNELS, NormGroups, Structure
from diffpress.compress.quantize.samples import chosen_calls
from diffpress.compress.quantize.sensitivity import Numbers
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError

NAME = "prune-structured"
LEVELS = (0.25, 0.5)  # of a structure's parts: where its effect on the output is measured
JUDGED = 16  # recorded calls that the output's error is measured on


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruneStructuredPass:
    """Remove the share `ratio` of the denoiser's parameters, operations, both (balanced) or measured latency.

    `allocation` says how the share is spread: by what removing parts does to the output, or alike everywhere. `exclude`
    spares structures by shell patterns over their paths, those of the first and last block if it is absent. `method`
    obs compensates; the others are what it is compared with. Widths stay multiples of `multiple` where they can.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    budget: Literal["parameters", "flops", "balanced", "latency"] = "parameters"
    method: Method = "obs"
    allocation: Literal["sensitivity", "uniform"] = "sensitivity"
    kinds: Annotated[tuple[Literal["heads", "neurons", "channels"], ...], Field(min_length=1)] = (
        "heads",
        "neurons",
        "channels",
    )
    exclude: tuple[str, ...] | None = None
    weighting: Weighting = "log-decrease"
    packages: Annotated[int, Field(ge=1, description="module packages, each with a run over the recorded calls")] = 4
    memory_gb: Annotated[float, Field(gt=0, description="of Hessians at a time; more packages where it is less")] = 4.0
    multiple: Annotated[int, Field(ge=1)] = structure.MULTIPLE
    norm_groups: Annotated[
        NormGroups, Field(description="channels leave ResBlocks by whole norm groups, or evenly out of all")
    ] = "whole"
    damping: Annotated[float, Field(gt=0)] = 0.01

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` behind passes that know the widths, and where nothing can be cut."""
        structure.check_order(work, NAME)
        if self.budget == "latency" and work.latency is None:
            raise DiffpressError(f"{NAME}: budget: latency is measured, and no inference library is installed here")
        self.chosen(work)

    def chosen(self, work: Work) -> dict[str, Structure]:
        """The structures that may be cut; raises `DiffpressError` where patterns match or leave nothing."""
        known = structure.structures(work.denoiser, self.multiple, self.norm_groups)
        require_matches(f"{NAME}: exclude", self.exclude or (), known, "structure")
        spared = self.exclude if self.exclude is not None else packages.ends(work.denoiser, known)
        found = {
            path: one
            for path, one in known.items()
            if one.kind in self.kinds and len(one.counts) > 1 and not any(fnmatch(path, pattern) for pattern in spared)
        }
        if not found:
            raise DiffpressError(f"{NAME}: nothing is left that could be cut: relax exclude, kinds or multiple")
        return found

    def apply(self, work: Work) -> str:
        """Cut the denoiser in place; says what left and what that did to the output."""
        unet, chosen, calls = work.denoiser, self.chosen(work), list(work.record())
        before = sum(parameter.numel() for parameter in unet.parameters())
        with on_fastest_device(unet):
            outputs = Outputs(work, chosen_calls(work.record(), JUDGED, work.seed))
            counts = self._counts(work, chosen, outputs, calls)
            state = packages.State(work, NAME, (self, sorted(counts.items())), calls)
            for index, group in enumerate(self._groups(work, chosen, counts, self.packages)):
                done = state.load(index)
                if done is None:
                    seen = self._seen(work, chosen, group, calls)
                    done = {}
                    for path in work.progress(group, f"pruning package {index + 1}"):
                        kept, weight = self._solved(work, chosen[path], seen, counts[path])
                        done |= {f"{path} kept": torch.tensor(kept), f"{path} weight": weight}
                    del seen
                    state.save(index, done)
                    packages.forget(work)
                for path in group:
                    reader = unet.get_submodule(chosen[path].reader)
                    reader.weight.data = done[f"{path} weight"].reshape(reader.weight.shape).to(reader.weight)
                stays = {path: done[f"{path} kept"].tolist() for path in group}
                if self.norm_groups == "even":
                    cut_evenly(unet, stays, lambda: [work.run(call) for call in outputs.calls])
                else:
                    structure.cut(unet, stays)
            error = outputs.error()
        work.originals.clear()  # they have the old widths; from here on this network is what others are compared with
        after = sum(parameter.numel() for parameter in unet.parameters())
        return (
            f"{1 - after / before:.1%} of the parameters removed: {self._told(chosen, counts)}; error of the output "
            f"on recorded calls {error:.2%}{self._skipped(unet)}"
        )

    def _skipped(self, unet: Any) -> str:
        """What could not be cut, in words."""
        return "".join(f"; left whole: {phrase}" for phrase in phrases(structure.unsupported(unet)))

    def _solved(
        self, work: Work, one: Structure, seen: Mapping[str, Hessian | None], count: int
    ) -> tuple[Sequence[int], Tensor]:
        """The parts of a structure that stay when `count` go, and its reader's weight [out, columns] then."""
        weight = work.denoiser.get_submodule(one.reader).weight.detach().flatten(1)
        try:
            gone = prune_structure(self.method, weight, seen[one.reader], one, count, self.damping)
        except DiffpressError as error:
            raise DiffpressError(f"{one.path} cannot be cut: {error}") from error
        return gone.kept.tolist(), gone.weight

    def _once(self, work: Work, chosen: Mapping[str, Structure]) -> bool:
        """Whether what was seen for the sensitivities serves to solve, too: one package, nothing cut before it."""
        alone = self.packages == 1 and self.allocation == "sensitivity"
        return alone and len(self._groups(work, chosen, chosen, 1)) == 1

    def _seen(
        self, work: Work, chosen: Mapping[str, Structure], group: Sequence[str], calls: Sequence[Call]
    ) -> Mapping[str, Hessian | None]:
        """The Hessians of a group's readers; of all at once where a second call for others then finds them kept."""
        paths = chosen if self._once(work, chosen) else group
        return collected(self.method, work, [chosen[path].reader for path in paths], calls, self.weighting)

    def _groups(self, work: Work, chosen: Mapping[str, Structure], paths: Iterable[str], count: int) -> list[list[str]]:
        readers = {path: work.denoiser.get_submodule(chosen[path].reader) for path in chosen if path in set(paths)}
        return packages.split(readers, count, self.memory_gb)

    def _counts(
        self, work: Work, chosen: Mapping[str, Structure], outputs: Outputs, calls: Sequence[Call]
    ) -> dict[str, int]:
        """How many parts leave each structure, of those that lose some."""
        budget = "parameters" if self.budget == "latency" else self.budget
        each, total = _costs(work, chosen, budget, self.norm_groups)
        errors = self._errors(work, chosen, outputs, calls) if self.allocation == "sensitivity" else None
        choices = {}
        for path, one in chosen.items():
            removed = [one.count - left for left in reversed(one.counts)]
            grown = packages.growth(errors[path]) if errors else (lambda count: 0.0)
            choices[path] = [Choice(count, each[path] * count, grown(count)) for count in removed]

        def spread(share: float) -> dict[str, int]:
            """The same for a share of the denoiser's parameters or operations."""
            try:
                picked = (allocate if errors else uniform)(choices, share * total)
            except TooMuch as error:
                most = sum(options[-1].saved for options in choices.values()) / total
                raise TooMuch(
                    f"{NAME}: ratio {share:g} of the denoiser's {budget} is more than the {most:.2f} that all it may "
                    "cut have: lower it, or relax exclude, kinds or multiple"
                ) from error
            return {path: choice.removed for path, choice in picked.items()}

        latency = self.budget == "latency"
        found = speed.counts(work, self.ratio, spread, self.norm_groups) if latency else spread(self.ratio)
        return {path: count for path, count in found.items() if count}

    def _errors(
        self, work: Work, chosen: Mapping[str, Structure], outputs: Outputs, calls: Sequence[Call]
    ) -> dict[str, dict[int, float]]:
        """The output's relative error when a structure alone loses so many parts, measured at `LEVELS` of them."""
        known = Numbers(work.scratch / f"{NAME}-sensitivity")
        context = json.dumps(
            [self.method, self.weighting, self.damping, self.norm_groups, packages.digest(work, calls)]
        )

        def key(path: str, count: int) -> str:
            return packages.short(f"{context} {path} {count}")

        wanted = {
            path: sorted({max(1, round(level * one.count / one.blocks)) * one.blocks for level in LEVELS})
            for path, one in chosen.items()
        }
        wanted = {path: [count for count in counts if count < chosen[path].count] for path, counts in wanted.items()}
        missing = [path for path, counts in wanted.items() if any(key(path, count) not in known for count in counts)]
        for group in self._groups(work, chosen, missing, 1):
            seen = self._seen(work, chosen, group, calls)
            for path in work.progress(group, "measuring what parts are worth"):
                reader = work.denoiser.get_submodule(chosen[path].reader)
                whole = reader.weight.data
                for count in wanted[path]:
                    _, weight = self._solved(work, chosen[path], seen, count)
                    reader.weight.data = weight.reshape(whole.shape).to(whole)
                    known[key(path, count)] = outputs.error()
                    reader.weight.data = whole
            del seen
            if not self._once(work, chosen):
                packages.forget(work)
        return {path: {count: known[key(path, count)] for count in counts} for path, counts in wanted.items()}

    def _told(self, chosen: Mapping[str, Structure], counts: Mapping[str, int]) -> str:
        parts = []
        for kind in self.kinds:
            sizes = {path: one.size if kind == CHANNELS else 1 for path, one in chosen.items() if one.kind == kind}
            of = sum(chosen[path].count * size for path, size in sizes.items())
            gone = sum(counts.get(path, 0) * size for path, size in sizes.items())
            if gone:
                parts.append(f"{gone} of {of} {kind}")
        return ", ".join(parts) or "nothing"


def _costs(
    work: Work, chosen: Mapping[str, Structure], budget: str, norm_groups: NormGroups
) -> tuple[dict[str, float], float]:
    """What a part of each structure takes of the denoiser's parameters or operations, and what all of it takes.

    Balanced is the mean of both shares: bytes and time at once.
    """
    unet = work.denoiser
    if budget == "parameters":
        total = sum(parameter.numel() for parameter in unet.parameters())
        return {path: float(one.parameters) for path, one in chosen.items()}, float(total)
    if budget == "balanced":
        pairs = [_costs(work, chosen, one, norm_groups) for one in ("parameters", "flops")]
        return {path: sum(each[path] / total for each, total in pairs) / len(pairs) for path in chosen}, 1.0
    each, total = structure.flops(unet, *family.latent_size(unet), texts.tokens(work.pipeline), norm_groups)
    return {path: float(each[path]) for path in chosen}, float(total)

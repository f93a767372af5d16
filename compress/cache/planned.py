"""`planned`: a step program that is there already, of another bundle or written by hand, in place of planning one.

A plan is right for what it was made for: the model, the schedule, the guidance, and the network as the passes before
left it. That is checked, not assumed (InvarDiff's plans belong to model, scheduler, steps, resolution and guidance).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from diffpress.bundle import MANIFEST
from diffpress.compress.cache.program import program_of, require_no_cache
from diffpress.compress.families.unet import branches
from diffpress.compress.families.unet_graph import WHOLE, check_features, encoder, modules, up
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import FULL, MadeFor, Plan, StepProgram, listed

ENCODER = "encoder"  # in a program by hand: all of its features
# Passes that change what the network computes; others decide when it runs, or come after it.
_ROUNDING = ("quantize", "reconstruct", "temporal", "temporal-table", "finetune", "mixed-precision", "modelopt")
NETWORK = frozenset((*_ROUNDING, "prune-structured", "prune-nm", "prune-unstructured", "distill"))
CLOSE = 1e-3  # timesteps apart that are the same; coefficients of the solver, relatively
DIGITS = 12  # of a digest, for people


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PlannedPass:
    """Take the step program over from `bundle`, or as `program` says what each step takes from earlier ones.

    A step of `program` is "full" or [] for none, or the features: up_0, skip_0, whole, a module's path, a shell pattern
    of any of these, or "encoder" for all that stand for it.
    """

    bundle: Annotated[Path | None, Field(description="a bundle, or the folder of a plan")] = None
    program: Annotated[
        tuple[str | tuple[str, ...], ...] | None, Field(description="by step: full, or the features that it takes")
    ] = None
    together: Annotated[
        int, Field(ge=1, description="steps of `program` that may run as one batch where none looks at its sample")
    ] = 1

    def __post_init__(self) -> None:
        # What no model is needed for is refused where the recipe is read.
        if (self.bundle is None) == (self.program is None):
            raise DiffpressError("planned: give either a bundle or a program")
        if self.bundle is not None:
            if self.together > 1:
                raise DiffpressError("planned: together belongs to a program, a bundle's plan says it itself")
            if not (_plan_folder(self.bundle) / "plan.json").is_file():
                raise DiffpressError(f"planned: there is no bundle and no plan at {self.bundle}")

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` for a plan that is not one for `work`, naming what differs."""
        require_no_cache(work, "planned")
        try:
            self._taken(work)
        except DiffpressError as error:
            raise DiffpressError(f"planned: {error}") from error

    def apply(self, work: Work) -> str:
        """Put the step program, and its corrections, into the plan; says where it is from."""
        plan = self._taken(work)
        work.program, work.corrections = plan.program, plan.corrections
        program = plan.program
        source = "the recipe" if self.bundle is None else str(self.bundle)
        corrected = "" if plan.corrections is None else f", {len(plan.corrections.features)} features corrected"
        return (
            f"{program.steps.count(FULL)} of {len(program.steps)} steps run in full, "
            f"{len(program.variants)} graph variants, as {source} says{corrected}"
        )

    def _taken(self, work: Work) -> Plan:
        """The plan that is taken over; only its step program and corrections count."""
        if self.bundle is None:
            return Plan(work.sampling, self._by_hand(work))
        plan = Plan.load(_plan_folder(self.bundle))
        if plan.made_for is None:
            raise DiffpressError(f"the plan of {self.bundle} does not say what it was made for: compress it again")
        wrong = differences(plan.made_for, work.made_for())
        if work.program.guidance and work.program.guidance != plan.program.guidance:
            marks = (plan.program.guidance_marks(), work.program.guidance_marks())
            wrong.append(f"guidance by step {marks[0]}, here it is {marks[1]}")
        if wrong:
            raise DiffpressError(f"the plan of {self.bundle} was made for {'; for '.join(wrong)}")
        if all(not variant.reads for variant in plan.program.variants.values()) and not plan.program.guidance:
            raise DiffpressError(f"the plan of {self.bundle} runs every step in full: there is nothing to take over")
        return plan

    def _by_hand(self, work: Work) -> StepProgram:
        unet, steps = work.denoiser, self.program or ()
        calls = len(work.sampling.timesteps)
        if len(steps) != calls:
            raise DiffpressError(f"the program has {len(steps)} steps, the schedule {calls} calls")
        reads = [_features(unet, index, entry) for index, entry in enumerate(steps)]
        program = program_of(unet, reads, work.program.guidance, together=self.together)
        if self.together > 1 and all(variant.together == 1 for variant in program.variants.values()):
            raise DiffpressError("no steps can run together: all look at their samples (see 'encoder')")
        return program


def differences(made: MadeFor, here: MadeFor) -> list[str]:
    """What a plan was made for and meets otherwise here, both in words; empty where it is at home."""
    a, b = made.sampling, here.sampling
    pairs: list[tuple[str, Any, Any]] = [
        ("model", made.model[:DIGITS], here.model[:DIGITS]),
        ("scheduler", a.scheduler, b.scheduler),
        ("solver", a.solver, b.solver),
        ("steps", a.steps, b.steps),
        ("resolution", f"{a.width}x{a.height}", f"{b.width}x{b.height}"),
        ("guidance_scale", f"{a.guidance_scale:g}", f"{b.guidance_scale:g}"),
    ]
    found = [f"{name} {ours}, here it is {theirs}" for name, ours, theirs in pairs if ours != theirs]
    if a.steps == b.steps and not _close(a.timesteps, b.timesteps):
        found.append(f"timesteps {listed(a.timesteps)}, here they are {listed(b.timesteps)}")
    elif not found and not _close(_coefficients(made), _coefficients(here)):
        found.append(f"other coefficients of {a.scheduler}: its options differ here")
    ours, theirs = (_network(entry.passes) for entry in (made, here))
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        found.append(f"{_named(ours)} before it, here {_verb(theirs)} {_named(theirs)}")
    else:
        for (name, fields), (_, others) in zip(ours, theirs, strict=True):
            found += [
                f"{name} with {key} {fields.get(key)}, here it is {others.get(key)}"
                for key in dict.fromkeys((*fields, *others))
                if fields.get(key) != others.get(key)
            ]
    return found


def _network(passes: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [entry for entry in passes if entry[0] in NETWORK]


def _named(passes: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(name for name, _ in passes) or "no pass that changes the network"


def _verb(passes: Sequence[Any]) -> str:
    return "are" if len(passes) > 1 else "is"


def _coefficients(made: MadeFor) -> list[float]:
    return [coefficient for row in made.sampling.terms for _, _, coefficient in row]


def _close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(abs(a - b) <= CLOSE * max(1.0, abs(a)) for a, b in pairs)


def _plan_folder(path: Path) -> Path:
    path = path.expanduser()
    return path / "plan" if (path / MANIFEST).is_file() else path


def _features(unet: Any, index: int, entry: str | tuple[str, ...]) -> list[str]:
    """The features that a step of a program by hand names; raises `DiffpressError` naming the step."""
    written = [entry] if isinstance(entry, str) else list(entry)
    if written == [FULL]:
        return []
    known = (*(up(branch) for branch in range(branches(unet))), *encoder(unet)[:-1], WHOLE, *modules(unet))
    found: list[str] = []
    for name in written:
        matching = [feature for feature in known if fnmatch(feature, name)] if set(name) & set("*?[") else []
        if set(name) & set("*?[") and not matching:
            raise DiffpressError(f"step {index}: pattern '{name}' matches no feature")
        found += encoder(unet) if name == ENCODER else matching or [name]
    try:
        check_features(unet, found)
    except DiffpressError as error:
        raise DiffpressError(f"step {index}: {error}") from error
    return found

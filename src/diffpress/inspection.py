"""What `diffpress inspect` shows of a bundle: as data, and as text made from that data. Nothing is run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpress import bundle as bundles
from diffpress import gates
from diffpress.bundle import MANIFEST, Bundle
from diffpress.errors import DiffpressError
from diffpress.plan import Corrections, Plan, Sampling, StepProgram, listed
from diffpress.segments import CALLS_LEGEND, GUIDANCE_LEGEND, LEGEND, calls_row, described, segments

COPIED = ("diffpress", "created", "versions", "model", "recipe", "seed", "passes", "latent", "text", "features")
LATER = ("measured", "default_backend", "gates", "failed", "parity", "lint", "memory")
LAYERS = "layers.json"  # in the plan's folder
MARKS_A_LINE = 50
LABEL = 14  # columns


def inspect(path: str | Path) -> dict[str, Any]:
    """Everything about a bundle, ready for JSON. `problems` is empty when it is whole.

    A damaged bundle is read as far as it can be; `DiffpressError` is raised only where there is no manifest to read.
    """
    bundle = bundles.read(path)
    manifest, found = bundle.manifest, bundles.problems(bundle)
    states = {name: _state(name, found) for name in manifest["files"]}
    seen: dict[str, Any] = {"path": str(bundle.path), "format": manifest["format"]}
    seen |= {name: manifest.get(name) for name in COPIED}
    seen["sampling"] = _attempt(found, "the sampling schedule", lambda: _sampling(manifest))
    seen["program"] = _attempt(found, "the step program", lambda: _program(bundle))
    planless = "package" in manifest  # what a target runs is in its graphs; the plan stays behind
    seen["quantization"] = None if planless else _attempt(found, "the plan", lambda: _quantization(bundle))
    seen["sizes"] = {**manifest.get("sizes", {}), **_sizes(bundle)}
    seen |= {name: manifest.get(name) for name in LATER}
    seen["engines"] = manifest.get("engines", [])
    seen |= {"files": states, "unlisted": sorted(_present(bundle) - set(states)), "problems": found}
    return seen


def as_text(seen: Mapping[str, Any]) -> str:
    """The lines people read, from what `inspect` returned."""
    model, recipe = seen["model"] or {}, seen["recipe"] or {}
    lines = [f"{seen['path']}: made {seen['created']} by diffpress {seen['diffpress']} (format {seen['format']})", ""]
    parameters = f", {model['parameters'] / 1e6:.1f} M parameters" if model.get("parameters") else ""
    lines += [_row("model", f"{model.get('source')} ({model.get('class')}{parameters})")]
    lines += [_row("lora", f"{entry['file']} at {entry['scale']:g}, fused") for entry in model.get("lora", ())]
    lines += [_row("recipe", f"{recipe.get('name')}, seed {seen['seed']}")]
    lines += pass_lines(seen)
    if sampling := seen["sampling"]:
        guidance = f"guidance {sampling['guidance_scale']:g}, {sampling['width']}x{sampling['height']} pixels"
        lines += [_row("sampling", f"{sampling['scheduler']}, {sampling['steps']} steps, {guidance}")]
        where = f"{sampling['steps']} steps at {listed(sampling['timesteps'])}"
        lines += [_row("schedule", f"{_solver(sampling, recipe)}, {where}")]
        if own := sampling.get("reference"):
            lines += [_row("reference", f"the model's own {own['scheduler']}, {own['steps']} steps")]
    lines += _program_lines(seen["program"]) if seen["program"] else []
    if quantization := seen["quantization"]:
        formats = ", ".join(f"{count} {name}" for name, count in quantization["formats"].items())
        lines += [_row("quantized", f"{quantization['layers']} layers ({formats})" if formats else "nothing")]
        lines += [
            _row(
                "simulated",
                f"{entry['layers']} layers: no target computes {entry['format']}, ships as {entry['ships_as']}",
            )
            for entry in quantization.get("simulated", ())
        ]
    lines += ["", *_size_lines(seen["sizes"])]
    if seen["measured"]:
        lines += ["", *measured_lines(seen["measured"])]
    if default := seen["default_backend"]:
        lines += [_row("fastest", f"{default['name']} {default['precision']}")]
    lines += gate_lines(seen)
    lines += ["", *_engine_lines(seen["engines"]), *refused_lines(seen)]
    lines += memory_lines(seen)
    for graph, parity in (seen["parity"] or {}).items():
        lines += [_row("parity", f"{graph}: {parity['max_rel_l2']:.1e} from torch (at most {parity['tolerance']:.0e})")]
    lines += ["", *_row_per_file(seen)]
    return "\n".join(lines)


def pass_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A line per pass: its name, what it changed, how long it took."""
    rows = manifest.get("passes") or []
    return [_row("pass", f"{row['name']}: {row['summary']} ({row['seconds']:.1f} s)") for row in rows]


def refused_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A line per graph that TensorRT cannot take, which other backends may run all the same."""
    return [
        _row("no engine", f"{graph}: {next(row['text'] for row in rows if row['fatal'])}")
        for graph, rows in (manifest.get("lint") or {}).items()
        if any(row["fatal"] for row in rows)
    ]


def memory_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A line per target that engines were built for: what they need of its memory."""
    return [
        _row("memory", f"{target}: {_size(plan['total'])} of {_size(plan['available'])} planned")
        + (", weights streamed" if plan["weight_streaming"] else "")
        for target, plan in (manifest.get("memory") or {}).items()
    ]


def size_line(bundle: Bundle) -> str:
    """The bundle's size, and the denoiser's against its FP32 weights."""
    total, sizes = _size(sum(_sizes(bundle)["groups"].values())), bundle.manifest.get("sizes", {})
    before, after = sizes.get("denoiser_reference"), sizes.get("denoiser_compressed")
    return f"{total}, denoiser {_size(after)}, {after / before:.0%} of its FP32 size" if before and after else total


def measured_lines(measured: Mapping[str, Any]) -> list[str]:
    """Latency, speedup and quality of a bench report or of the part of it that the manifest keeps."""
    lines = []
    for name, row in (measured.get("latency") or {}).items():
        spread = " ".join(f"{key.removesuffix('_ms')} {row[key]:.1f}" for key in row if key.endswith("_ms"))
        lines.append(_row("latency", f"{name.replace('_', ' '):20} {spread} ms"))
    for group in ("speedup", "quality"):
        for name, value in (measured.get(group) or {}).items():
            if isinstance(value, Mapping):
                text = ", ".join(f"{key} {_number(entry)}" for key, entry in value.items() if entry is not None)
                text = text or "not measured"
            else:
                text = _number(value) + ("x" if group == "speedup" else "")
            lines.append(_row(group, f"{name.replace('_', ' '):20} {text}"))
    return lines


def gate_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A line per gate that the bundle was judged by, and what it is marked with where one failed."""
    lines = [
        _row("gate", f"{'passed' if entry['passed'] else 'FAILED'}  {gates.described(entry)}")
        for entry in manifest.get("gates") or ()
    ]
    return lines + ([_row("failed", "this bundle does not do what its gates ask")] if gates.failures(manifest) else [])


def _attempt(problems: list[str], what: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What `read` returns; None and one more problem when the file or the entry is not what it should be."""
    try:
        return read()
    except (DiffpressError, AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(f"{what} cannot be read: {' '.join(str(error).split())}")
        return None


def _state(name: str, problems: list[str]) -> str:
    return next((line.removeprefix(f"{name} ") for line in problems if line.startswith(f"{name} ")), "OK")


def _sampling(manifest: Mapping[str, Any]) -> dict[str, Any]:
    sampling = Sampling.from_json(manifest["sampling"])
    names = ("scheduler", "steps", "guidance_scale", "height", "width")
    found = {name: getattr(sampling, name) for name in names} | {"calls": len(sampling.timesteps)}
    found["timesteps"] = list(sampling.timesteps)
    # A bundle from before there was a choice has the schedule of its model.
    own = Sampling.from_json(manifest["reference"]["sampling"]) if "reference" in manifest else sampling
    return found | ({"reference": {"scheduler": own.scheduler, "steps": own.steps}} if own != sampling else {})


def _solver(sampling: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The solver under the name that a recipe gave it, and its spacing; else the scheduler's class."""
    passes = [entry["schedule"] for entry in recipe.get("passes", ()) if "schedule" in entry]
    named = [passes[0].get(key) for key in ("solver", "spacing")] if passes else []
    return " ".join(word for word in named if word) or str(sampling["scheduler"])


def _program(bundle: Bundle) -> dict[str, Any]:
    program, manifest = StepProgram.from_json(bundle.manifest["program"]), bundle.manifest
    steps, calls = Counter(program.steps), Counter(program.steps[first] for first, _ in program.runs())
    variants = {
        name: {"graph": manifest["graphs"][name], "steps": steps[name], "calls": calls[name]} | entry
        for name, entry in program.to_json()["variants"].items()
    }
    drawn = program_rows(program, corrections_of(bundle, len(program.steps)))
    return {"marks": program.marks(), **drawn, "variants": variants}


def program_rows(program: StepProgram, corrections: Corrections | None = None) -> dict[str, Any]:
    """The rows of a step program's picture: a name and a mark per step for each part of the denoiser that it treats
    apart, and, where it has them, marks of the steps that run together and of guidance.
    """
    rows: dict[str, Any] = {"segments": [segment.__dict__ for segment in segments(program, corrections)]}
    if calls := calls_row(program):
        rows["together"] = calls
    return rows | ({"guidance": program.guidance_marks()} if program.guidance else {})


def corrections_of(bundle: Bundle, steps: int) -> Corrections | None:
    """Those of a bundle's plan; None where it cannot be read, or belongs to another number of steps."""
    try:
        found = Plan.load(bundle.file("plan")).corrections
    except DiffpressError:
        return None
    return found if found is not None and len(found.timesteps) == steps else None


def _quantization(bundle: Bundle) -> dict[str, Any]:
    layers = Plan.load(bundle.file("plan")).quantization
    found: dict[str, Any] = {
        "layers": len(layers),
        "formats": dict(Counter(layer.name for layer in layers.values())),
    }
    # What no target computes with was simulated, and ships in the nearest format that one has.
    simulated = Counter((row["format"], row["ships_as"]) for row in layer_rows(bundle) if not row["exact"])
    if simulated:
        found["simulated"] = [
            {"format": format, "ships_as": ships_as, "layers": count} for (format, ships_as), count in simulated.items()
        ]
    return found


def layer_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """The table that export wrote: a row per layer of the denoiser; empty in a bundle that has none."""
    file = bundle.file("plan") / LAYERS
    return json.loads(file.read_text("utf-8")) if file.is_file() else []


def layer_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of layers as text, columns that every row lacks left out."""
    if not rows:
        return ["this bundle has no table of layers"]
    known = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in known if any(row.get(key) is not None for row in rows)]
    table = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, list):
        return _number(value)
    options = [f"{option['name']} {_number(option['error'])}" for option in value if isinstance(option, Mapping)]
    return ", ".join(options) or "x".join(map(str, value))


def _present(bundle: Bundle) -> set[str]:
    files = (path for path in bundle.path.rglob("*") if path.is_file())
    return {path.relative_to(bundle.path).as_posix() for path in files} - {MANIFEST}


def _sizes(bundle: Bundle) -> dict[str, Any]:
    """Bytes on disk by folder; files beside the manifest count as 'manifest'."""
    groups: Counter[str] = Counter({"manifest": bundle.file(MANIFEST).stat().st_size})
    for name in sorted(_present(bundle)):
        groups[name.split("/")[0] if "/" in name else "manifest"] += (bundle.path / name).stat().st_size
    return {"groups": dict(groups), "bundle": sum(groups.values())}


def _program_lines(program: Mapping[str, Any]) -> list[str]:
    """A block of rows for every 50 steps, what the marks mean, and a line per variant."""
    marks, parts = program["marks"], program["segments"]
    width = max((len(part["name"]) for part in parts), default=0) + 2
    rows = [("steps" if index == 0 else "", part["name"], part["marks"]) for index, part in enumerate(parts)]
    rows += [(name, "", program[name]) for name in ("together", "guidance") if name in program]
    lines = []
    for start in range(0, len(marks), MARKS_A_LINE):
        for label, name, line in rows:
            shown = line[start : start + MARKS_A_LINE]
            where = f"  {start + 1}-{start + len(shown)}" if label == "steps" else ""
            lines.append(_row(label, f"{name:{width}}{shown}{where}"))
    used = {mark for part in parts for mark in part["marks"]}
    if len(used) > 1:
        lines.append(_row("", "; ".join(f"{mark} {words}" for mark, words in LEGEND.items() if mark in used)))
    lines += [_row("", CALLS_LEGEND)] if "together" in program else []
    lines += [_row("", f"guidance: {GUIDANCE_LEGEND}")] if "guidance" in program else []
    for name, variant in program["variants"].items():
        flow = [f"{verb} {described(variant[verb])}" for verb in ("reads", "writes") if variant[verb]]
        count = f"{variant['calls']} calls"
        if variant["calls"] < variant["steps"]:
            count += f" for {variant['steps']} steps"
        lines.append(_row("variant", "; ".join([f"{name}: {variant['graph']}, {count}", *flow])))
    return lines


def _size_lines(sizes: Mapping[str, Any]) -> list[str]:
    lines = [_row("size", f"{_size(size):>10}  {name}") for name, size in sizes["groups"].items()]
    lines += [_row("", f"{_size(sizes['bundle']):>10}  in all")]
    before, after = sizes.get("denoiser_reference"), sizes.get("denoiser_compressed")
    if before and after:
        lines.append(_row("denoiser", f"{_size(before)} as FP32 weights, {_size(after)} here ({after / before:.0%})"))
    return lines


def _engine_lines(engines: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        _row("engine", f"{entry['path']}, {entry.get('precision')}, {_size(entry.get('bytes', 0))}")
        for entry in engines
    ]
    return rows or [_row("engines", "none; 'diffpress build' makes them")]


def _row_per_file(seen: Mapping[str, Any]) -> list[str]:
    width = max((len(state) for state in seen["files"].values()), default=0)
    lines = [_row("file", f"{state:{width}}  {name}") for name, state in seen["files"].items()]
    lines += [_row("file", f"{'not listed':{width}}  {name}") for name in seen["unlisted"]]
    problems = [_row("problem", line) for line in seen["problems"]]
    return [*lines, "", *(problems or [_row("integrity", f"all {len(seen['files'])} files are whole")])]


def _row(label: str, text: str) -> str:
    return f"{label:{LABEL}}{text}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(size: float) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"

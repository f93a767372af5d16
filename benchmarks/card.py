"""A model card for a hub, written from a report: what was done, what was gained and lost, the limits, how to run it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffpress import gates
from diffpress.benchmarks import verdict
from diffpress.benchmarks.candidates import COMPRESSED, EXPORT, PLAIN, REFERENCE, STRICT
from diffpress.benchmarks.details import APART, LPIPS
from diffpress.benchmarks.markup import DASH, TIMES, between, labels, number, share
from diffpress.benchmarks.verdict import milliseconds, size

_TAG = re.compile(r"[a-z0-9]+")


def card(report: Mapping[str, Any]) -> str:
    """Markdown with YAML before it, as hubs read it; every number is one of the report."""
    found = verdict.verdict(report)
    sampling, model = report["sampling"], str(report["model"].get("hub") or report["model"].get("source", "model"))
    about = (
        f"{_plain(model)}, compressed with diffpress by the recipe "
        f"`{report['recipe']}` and exported to ONNX. {found.quality}"
    )
    parts = [
        _front_matter(report, model),
        f"# {_plain(report['bundle'])}: {found.headline}",
        about,
        *_failures(report),
        "## How to run it",
        _run(report),
        "## What was done",
        _done(report),
        "## What was gained",
        _gains(report),
        "## What was lost",
        _losses(report),
        found.rival_text,
        "## Limits",
        _limits(report, sampling),
        "## Measured on",
        _measured(report),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(report: Mapping[str, Any], model: str) -> str:
    formats = {word for row in report.get("layers") or () for word in _TAG.findall(row["ships_as"])}
    kinds = sorted(word for word in formats if word.startswith(("int", "float8", "fp8", "float4", "fp4")))
    tags = ["diffpress", "onnx", "diffusion", "text-to-image", *kinds, report["backend"]["name"]]
    entries: dict[str, Any] = {"base_model": model}
    # A hub files models under what they were made from; weights in fewer bits are what it calls quantized.
    entries |= {"base_model_relation": "quantized"} if kinds else {}
    entries |= {"pipeline_tag": "text-to-image", "library_name": "diffpress", "tags": list(dict.fromkeys(tags))}
    # JSON is YAML, and quotes whatever a name may hold.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in entries.items()), "---"])


def _failures(report: Mapping[str, Any]) -> Iterable[str]:
    failed = [gate for gate in report.get("gates") or () if not gate["passed"]]
    if failed:
        told = "; ".join(f"`{gates.described(gate)}`" for gate in failed)
        yield f"> **This bundle failed {len(failed)} of its {len(report['gates'])} gates:** {told}."


def _run(report: Mapping[str, Any]) -> str:
    folder, prompt = re.sub(r"[^\w.-]", "-", str(report["bundle"])), str(report["pictures"][0]["prompt"])
    return f"""```sh
pip install "diffpress[cpu]"                     # numpy and an inference library, no torch
diffpress run {folder} {shlex.quote(prompt)} -o out.png
```

or, where torch and diffusers are installed, as a pipeline of diffusers:

```python
import diffpress

pipeline = diffpress.load_pipeline("{folder}")
pipeline({json.dumps(prompt)}).images[0].save("out.png")
```

`{folder}` is the folder of this repository. The graphs are plain ONNX. `diffpress build {folder} --target sm89` makes
TensorRT engines of them."""


def _done(report: Mapping[str, Any]) -> str:
    lines = [f"- `{entry['name']}`: {_plain(entry.get('summary', ''))}" for entry in report["passes"]]
    marks = report["program"]["marks"]
    if full := marks.count("#") % len(marks):
        lines.append(f"- {full} of {len(marks)} steps run the whole denoiser, the others take a part of an earlier one")
    again = "\n".join(report["reproduce"])
    return f"{chr(10).join(lines) or 'No pass changed the model.'}\n\nTo do it again:\n\n```sh\n{again}\n```"


def _gains(report: Mapping[str, Any]) -> str:
    named, latency, speedup = labels(report), report["latency"], report["speedup"]
    spread, memory, sizes = report.get("speedup_interval") or {}, report["peak_rss_bytes"], report["size_bytes"]
    rows = [
        [named[name], milliseconds(latency[name]["p50_ms"]), _faster(speedup[against], spread.get(against)), disk,
         size(memory[name])]
        for name, against, disk in (
            (REFERENCE, "vs_eager", size(sizes["denoiser_reference"])),
            (EXPORT, "vs_uncompressed_export", DASH),
        )
    ]  # fmt: skip
    if strict := report["same_precision"]:
        p50 = milliseconds(strict["latency"]["p50_ms"])
        rows.append([named[STRICT], p50, _faster(strict["speedup"], strict.get("speedup_interval")), DASH, DASH])
    p50 = milliseconds(latency[COMPRESSED]["p50_ms"])
    rows.append([f"**{named[COMPRESSED]}**", p50, DASH, size(sizes["denoiser_compressed"]), size(memory[COMPRESSED])])
    note = "Latency is the median of one image from prompt to pixels; speedups are medians of paired, alternating runs"
    note += ", in brackets their 95 % bootstrap intervals." if spread else "."
    head = ["", "latency", "compressed is faster", "denoiser", "peak memory"]
    return f"{_table(head, rows)}\n\n{note}"


def _faster(ratio: float, interval: Sequence[float] | None) -> str:
    return f"{ratio:.2f}{TIMES}" + _in_brackets(between(interval, 2))


def _losses(report: Mapping[str, Any]) -> str:
    own, row, spread = report["quality"], report[PLAIN], report.get("quality_interval") or {}
    measured = report.get("metrics") or {}
    rows = []
    for name, label, digits in APART:
        if own.get(name) is None and name == LPIPS:
            continue
        value = number(own[name], digits) + _in_brackets(between(spread.get(name), digits))
        rows.append([label, DASH, value, number(row.get(name), digits)])
    for name, label in (
        ("clip_score", "CLIP score"),
        ("attribute_accuracy", "attributes confirmed"),
        ("frechet", f"Fréchet distance to {measured.get('frechet', {}).get('to') or 'real pictures'}"),
    ):
        sides = [own[name]["reference"], own[name]["compressed"], row.get(name)]
        if any(value is not None for value in sides[:2]):
            rows.append([label, *(share(v) if name == "attribute_accuracy" else number(v, 3) for v in sides)])
    head = ["", "reference", "compressed", f"{row['steps']} plain steps"]
    if row["steps"] is None:
        head, rows = head[:3], [cells[:3] for cells in rows]
    note = f"{own['images']} images, the same prompts and seeds on every side ({_plain(report['prompts']['source'])})."
    return f"{_table(head, rows)}\n\n{note}"


def _limits(report: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    lines = [
        f"- Bound to its sampling schedule ({verdict.schedule(sampling)}) and to {sampling['width']}{TIMES}"
        f"{sampling['height']} pixels; measured at guidance {sampling['guidance_scale']:g}.",
        "- Quality is the distance to the base model's own images and inherits its limits, biases and licence.",
        f"- Speed is that of one machine and backend ({report['backend']['name']} {report['backend']['precision']}); "
        "measure it on yours with `diffpress bench`.",
    ]
    worst = report["quality"]["psnr_db_worst"]
    if worst is not None:
        lines.append(f"- Single images may differ more than the mean says: the worst one has {worst:.1f} dB.")
    lines += [f"- Broken image: {_plain(fault)}." for fault in report["faults"][:5]]
    return "\n".join(lines)


def _measured(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{_plain(machine['processor'])}, {machine['cores']} cores, {size(machine['memory_bytes'])}, "
        f"{_plain(machine['system'])}, Python {machine['python']}; {_plain(versions)}. {report['created'][:10]}. "
        "Everything that was measured stands in `report.json`, pictures in `report.html`, beside this file."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    lines = (" | ".join(row) for row in (head, rule, *rows))
    return "\n".join(f"| {line} |" for line in lines)


def _in_brackets(interval: str) -> str:
    return f" ({interval})" if interval else ""


def _plain(text: Any) -> str:
    """Words from outside, so that Markdown takes none of them for its own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))

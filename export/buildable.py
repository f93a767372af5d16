"""A bundle's graphs as engines are built from them: batches, types, digests, and what they need of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from diffpress.bundle import CONTROLNET, Bundle, text_encoders
from diffpress.engines import memory
from diffpress.engines.builder import Batch
from diffpress.engines.prepared import Graph, Prepared
from diffpress.errors import DiffpressError
from diffpress.export import lint, liveness
from diffpress.export.sparsity import sparse_layers
from diffpress.plan import EARLIER, FULL, StepProgram

DECODER, ENCODER = "vae_decoder", "vae_encoder"
NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
NAMES |= {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT4: "int4"}
NAMES |= {ir.DataType.FLOAT4E2M1: "fp4"}


def graphs(bundle: Bundle, images: Sequence[int] = (1,)) -> list[Graph]:
    """Everything a run needs, for the numbers of `images` at once. Raises `DiffpressError` for what cannot be built."""
    # The one for ControlNets runs under diffusers alone.
    files = [(name, str(file), True) for name, file in bundle.manifest["graphs"].items() if name != CONTROLNET]
    files += [(name, f"{name}/model.onnx", False) for name in (*text_encoders(bundle.manifest), DECODER)]
    if f"{ENCODER}/model.onnx" in bundle.manifest["files"]:  # which image-to-image needs
        files.append((ENCODER, f"{ENCODER}/model.onnx", False))
    program = program_of(bundle)
    found = []
    for name, file, denoiser in files:
        model = _load(bundle, file)
        values = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
        data = sorted({str(value.location) for value in values if isinstance(value, ir.ExternalTensor)})
        parts = [file, *(f"{Path(file).parent.as_posix()}/{location}" for location in data)]
        listed = bundle.manifest["files"]
        if missing := [part for part in parts if part not in listed]:
            raise DiffpressError(f"{bundle.path} does not list {missing[0]}, which {file} needs: compress again")
        warnings = tuple(str(finding) for finding in lint.check(model, file))
        rows = batches(batch(program, name), images) if denoiser else others(name, images)
        found.append(
            Graph(
                name,
                file,
                denoiser,
                rows,
                precision(model),
                types(model),
                {part: listed[part] for part in parts},
                liveness.need(model, rows[-1][2]),
                tuple(sparse_layers(model)),
                warnings,
            )
        )
    return found


def prepare(bundle: Bundle, images: Sequence[int] = (1,)) -> Prepared:
    """Everything that building engines has to know of the bundle's graphs; raises as `graphs` does."""
    found = graphs(bundle, images)
    return Prepared(tuple(found), feature_bytes(bundle, found))


def program_of(bundle: Bundle) -> StepProgram:
    """The bundle's step program."""
    try:
        return StepProgram.from_json(bundle.manifest["program"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DiffpressError(f"{bundle.path} holds no readable step program: compress again") from error


def feature_bytes(bundle: Bundle, found: Sequence[Graph]) -> int:
    """Of the buffers that keep the step program's features between calls."""
    program = program_of(bundle)
    doubled = [read.removesuffix(EARLIER) for variant in program.variants.values() for read in variant.reads
               if read.endswith(EARLIER)]  # fmt: skip
    rows = max((graph.batches[-1][2] for graph in found if graph.denoiser), default=0)
    return memory.features(bundle.manifest.get("features", {}), rows, doubled)


def batch(program: StepProgram, variant: str) -> Batch:
    """From one half of guidance to the largest batch of the variant's calls; fastest with the most frequent one.

    A call has both halves of guidance or one, of one step or of all that it runs together.
    """
    sizes = Counter(
        count * (2 if program.guided(first) == FULL else 1)
        for first, count in program.runs()
        if program.steps[first] == variant
    )
    most = [size for size, _ in sizes.most_common()] or [2]
    return 1, most[0], max(most)


def batches(one: Batch, images: Sequence[int]) -> tuple[Batch, ...]:
    """Ranges of rows for each number of images at once: they follow one another, so that one range has every batch.

    `one` is the range of a single image. Raises `DiffpressError` unless `images` are whole numbers that grow.
    """
    check_images(images)
    found: list[Batch] = []
    for count in images:
        least, most = (found[-1][2] + 1 if found else one[0]), one[2] * count
        found.append((least, min(max(least, one[1] * count), most), most))
    return tuple(found)


def others(name: str, images: Sequence[int]) -> tuple[Batch, ...]:
    """Rows of the components: a text for each image and the negative one; images are encoded and decoded one at a
    time, which costs no time and needs the memory of one.
    """
    check_images(images)
    if name in (DECODER, ENCODER):
        return ((1, 1, 1),)
    found: list[Batch] = []
    for count in images:
        found.append((found[-1][2] + 1 if found else 1, count + 1, count + 1))
    return tuple(found)


def check_images(images: Sequence[int]) -> None:
    """Raise `DiffpressError` unless these can be numbers of images at once."""
    if not images or any(count < 1 for count in images) or sorted(set(images)) != list(images):
        shown = ", ".join(map(str, images)) or "nothing"
        raise DiffpressError(f"batches must be whole numbers from 1 on that grow, such as 1,2,4, not {shown}")


def check_resolution(bundle: Bundle, resolution: tuple[int, int] | None) -> None:
    """Raise `DiffpressError` where `resolution` (height, width in pixels) is not the one the graphs were made for."""
    sampling = bundle.manifest["sampling"]
    made = (sampling["height"], sampling["width"])
    if resolution is not None and tuple(resolution) != made:
        raise DiffpressError(
            f"the bundle's graphs are made for {made[1]}x{made[0]} pixels and no others, {resolution[1]}x"
            f"{resolution[0]} cannot be built from them: compress the model at that size"
        )


def types(model: ir.Model) -> frozenset[str]:
    """What the graph computes with or stores."""
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    constants = [value for graph in model.graphs() for value in graph.initializers.values()]
    return frozenset(NAMES[value.dtype] for value in (*outputs, *constants) if value.dtype in NAMES)


def precision(model: ir.Model) -> str:
    """The arithmetic a graph asks for, "int8+fp32": the stored types of what it dequantizes, then of its outputs."""
    found = [value.dtype for value in model.graph.outputs]
    for node in model.graph.all_nodes():
        weight = node.inputs[0].const_value if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if weight is not None:
            found.insert(0, weight.dtype)
    return "+".join(dict.fromkeys(NAMES[dtype] for dtype in found if dtype in NAMES))


def _load(bundle: Bundle, file: str) -> ir.Model:
    try:
        return ir.load(bundle.file(file))  # external data stays on disk
    except Exception as error:  # protobuf, onnx-ir and the file system each raise their own kind
        reason = " ".join(str(error).split())
        raise DiffpressError(f"{bundle.file(file)} is not a readable ONNX graph: {reason}") from error

import pytest

from diffpress.engines import targets
from diffpress.engines.targets import GENERATIONS, GPUS, Target
from diffpress.errors import DiffpressError

RTX = ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]  # what TensorRT for RTX 1.7 builds for


def names(*asked: str, types: tuple[str, ...] = ()) -> list[str]:
    return [target.name for target in targets.select(asked, RTX, "tensorrt-rtx", types, "the recipe")]


def test_the_table_holds_what_is_known_of_each_generation() -> None:
    have = {kind: [name for name, entry in GENERATIONS.items() if kind in entry.types] for kind in ("int8", "bf16")}
    assert have["int8"] == list(GENERATIONS) and have["bf16"] == [name for name in GENERATIONS if name != "sm75"]
    assert [name for name, entry in GENERATIONS.items() if "fp8" not in entry.types] == ["sm75", "sm80", "sm86", "sm87"]
    assert next(name for name, entry in GENERATIONS.items() if "fp4" in entry.types) == "sm100"
    assert [name for name, entry in GENERATIONS.items() if not entry.sparse] == ["sm75"]
    assert {target for target, _ in GPUS.values()} == GENERATIONS.keys()
    numbers = [int(name[2:]) for name in GENERATIONS]
    assert numbers == sorted(numbers)  # "sm89 or newer" names the first that has a type


@pytest.mark.parametrize(
    ("word", "target"),
    [
        ("rtx-4090", "sm89"),
        ("NVIDIA GeForce RTX 4090", "sm89"),
        ("rtx_3060", "sm86"),
        ("RTX3060", "sm86"),
        ("dgx-spark", "sm121"),
        ("DGX Spark", "sm121"),
        ("SM120", "sm120"),
        ("a100", "sm80"),
        ("t4", "sm75"),
    ],
)
def test_gpus_go_by_name(word: str, target: str) -> None:
    assert names(word) == [target] and targets.generation(word) == target


def test_several_become_each_target_once_with_the_smallest_card_in_mind() -> None:
    chosen = targets.select(["rtx-4090", "sm120", "rtx-4070"], RTX, "tensorrt-rtx")
    assert chosen == [Target("sm89", ("rtx-4090", "rtx-4070"), 12), Target("sm120", (), 8)]
    assert targets.select(["rtx-4090"], RTX, "tensorrt-rtx")[0].memory_gb == 24
    assert targets.select(["rtx-4090", "sm89"], RTX, "tensorrt-rtx")[0].memory_gb == 8


def test_all_is_what_the_library_builds_for_and_has_the_types() -> None:
    assert names("all") == RTX
    assert names("all", types=("int4",)) == RTX[1:]
    assert names("all", types=("fp8", "int8")) == ["sm89", "sm120", "sm121"]
    assert names("sm120", "all", types=("fp8",)) == ["sm120", "sm89", "sm121"]
    with pytest.raises(DiffpressError, match=r"builds for no target that has fp4; supported: sm89$"):
        targets.select(["all"], ["sm89"], "tensorrt-rtx", ("fp4",))


@pytest.mark.parametrize("word", ["sm87", "jetson-orin", "sm90", "h100", "b200", "jetson-thor"])
def test_what_only_the_machine_itself_can_build_is_packed(word: str) -> None:
    target = targets.generation(word)
    with pytest.raises(DiffpressError, match="full TensorRT") as caught:
        names("sm89", word)
    message = str(caught.value)
    assert f"'{word}'; supported: sm75, sm80" in message and f"pack BUNDLE --target {target}" in message
    assert GENERATIONS[target].series in message and "\n" not in message


@pytest.mark.parametrize("asked", [["ada"], [""], ["sm"], ["sm89", "rtx"], []])
def test_unknown_targets_are_refused_with_the_choice(asked: list[str]) -> None:
    with pytest.raises(DiffpressError, match="supported: sm75, sm80, sm86, sm89, sm120, sm121"):
        names(*asked)


def test_a_target_that_is_unknown_everywhere() -> None:
    with pytest.raises(DiffpressError, match=r"there is no target 'sm70': give .*jetson-orin"):
        targets.generation("sm70")


@pytest.mark.parametrize(
    ("kind", "target", "least", "instead"),
    [
        ("fp8", "sm86", "sm89", "int8"),
        ("fp8", "jetson-orin", "sm89", "int8"),
        ("int4", "sm75", "sm80", "int8"),
        ("fp4", "sm89", "sm100", "fp8"),
        ("fp4", "sm86", "sm100", "int4"),
        ("fp4", "sm75", "sm100", "int8"),
        ("bf16", "sm75", "sm80", "fp16"),
    ],
)
def test_a_missing_type_is_refused_and_another_named(kind: str, target: str, least: str, instead: str) -> None:
    target = targets.generation(target)
    with pytest.raises(DiffpressError) as caught:
        targets.check_types({"fp32", "int8", kind}, ["sm121", target], "recipe mine")
    assert str(caught.value) == (
        f"recipe mine needs {kind}, which {target} does not have: build for {least} or newer, or compress with format "
        f"{instead}"
    )


def test_the_table_says_what_the_installed_library_builds_for() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from diffpress.engines import library

    assert library.capabilities(trt).keys() <= GENERATIONS.keys()

"""Work split between the processes of `accelerate launch`, which share a file system; alone, one process does it all.

What can be split is made of independent items that end as files (recorded prompts, measured layers): each process makes
its part and reads the others'. All other work runs in every process alike, so that each holds the same result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env, str_to_bool

Item = TypeVar("Item")
PATIENCE = timedelta(days=2)  # a process may wait for one that exports or builds for hours


def _state() -> PartialState:
    """Of this process; joins the others at the first asking."""
    # PartialState takes no notice of `--cpu` itself, and without a GPU it would leave every process on its own.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def is_main() -> bool:
    """Whether this process is the one that writes results and talks to people."""
    return bool(_state().is_main_process)


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def wait() -> None:
    """Until every process has come here."""
    _state().wait_for_everyone()


def from_main(value: Item | None) -> Item:
    """What the main process gives, in every process; the others' is not looked at."""
    _state()
    given: list[Any] = [value]
    return broadcast_object_list(given)[0]  # type: ignore[no-any-return]


def take_own_gpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Leave a launched process one GPU to see, its own, so that libraries other than torch do not all take the first.

    Nothing where GPUs are not asked for or torch has begun to use them.
    """
    count, own = int(environment.get("WORLD_SIZE", 1)), int(environment.get("LOCAL_RANK", 0))
    on_cpu = str_to_bool(environment.get("ACCELERATE_USE_CPU", "false"))
    if count == 1 or on_cpu or torch.cuda.is_initialized():
        return
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    known = seen.split(",") if seen else [str(index) for index in range(own + 1)]
    if own < len(known):
        # To accelerate each is then the first process of a machine of its own; their ranks stay what they are.
        environment |= {"CUDA_VISIBLE_DEVICES": known[own], "LOCAL_RANK": "0"}


def make_missing(
    items: Iterable[Item],
    lacking: Callable[[Item], bool],
    make: Callable[[Item], object],
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    text: str,
) -> None:
    """Call `make` for every item that is `lacking` on disk, each in one process; afterwards none is lacking.

    Every process must come here with the same items; `make` leaves whole files, whatever interrupts it.
    """
    missing: Sequence[Item] = [item for item in items if lacking(item)]
    wait()  # until all have looked: what is made from here on is missing for each of them
    with _state().split_between_processes(missing) as mine:
        for item in progress(mine, text) if mine else ():
            make(item)
    wait()
    # Processes whose weights differ in the last bits, after training on GPUs, share no files: each makes its own.
    for item in missing:
        if lacking(item):
            make(item)


@contextmanager
def on_fastest_device(network: Any) -> Iterator[None]:
    """Within the block `network`, a diffusers model or pipeline, is on this process's GPU where there is one."""
    device = _state().device
    if device.type != "cuda":
        yield
        return
    home = network.device
    network.to(device)
    try:
        yield
    finally:
        network.to(home)

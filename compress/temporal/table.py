"""`temporal-table`: time features as a table, their modules gone (Huang et al. 2024, TFMQ-DM; cache-based maintenance).

A U-Net's time features depend on the timestep alone, and a sampler visits finitely many. So every ResBlock's projected
feature is computed once per step of the schedule, and the time embedding and its projections leave the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.compress.families import unet as family
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import TemporalTable


class RowOf(nn.Module):
    """In place of the sinusoids: timesteps [N] to their rows [N] in the schedule.

    Whole numbers all the way: a backend that computes in BF16 would round row 257 to 256.
    """

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        super().__init__()
        self.timesteps: Tensor
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.float32))

    def forward(self, timesteps: Tensor) -> Tensor:
        # The nearest, not the equal row: a runtime may round a fractional timestep.
        return (timesteps.float()[:, None] - self.timesteps[None]).abs().argmin(dim=1)


class Passed(nn.Module):
    """In place of the time embedding: hands the rows on."""

    def forward(self, rows: Tensor, condition: Tensor | None = None) -> Tensor:
        return rows


class Table(nn.Module):
    """In place of a ResBlock's time projection: rows [N] to features [N, C]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", table)

    def forward(self, rows: Tensor) -> Tensor:
        return self.table.index_select(0, rows.long())


@torch.no_grad()
def tabulate(unet: Any, timesteps: tuple[float, ...]) -> TemporalTable:
    """Every ResBlock's projected time feature at every timestep: tables [steps, C] by module path."""
    embedded = family.time_embedding(unet, torch.tensor(timesteps, dtype=torch.float32))
    tables = {}
    for name, block in family.time_projections(unet).items():
        active = embedded if block.skip_time_act else block.nonlinearity(embedded)
        tables[name] = np.asarray(block.time_emb_proj(active), dtype=np.float32)
    return TemporalTable(timesteps, tables)


def install(unet: Any, temporal: TemporalTable) -> None:
    """Replace the time modules of `unet`, in place; it still runs as before on the timesteps of the table."""
    unet.time_proj = RowOf(temporal.timesteps)
    unet.time_embedding = Passed()
    unet.time_embed_act = None
    for name, table in temporal.tables.items():
        block = unet.get_submodule(name)
        block.time_emb_proj = Table(torch.from_numpy(table.copy()))
        block.skip_time_act = True


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TemporalTablePass:
    """Precompute the time features of the schedule. No options."""

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where a ResBlock uses time otherwise than by addition."""
        blocks = [module for module in work.denoiser.modules() if getattr(module, "time_emb_proj", None) is not None]
        if len(blocks) != len(family.time_projections(work.denoiser)):
            raise DiffpressError(
                "temporal-table supports ResBlocks that add their time feature; this U-Net scales by it"
            )

    def apply(self, work: Work) -> str:
        """Put the tables into the plan and the model; says what left."""
        before = sum(parameter.numel() for parameter in work.denoiser.parameters())
        work.temporal = tabulate(work.denoiser, work.sampling.timesteps)
        install(work.denoiser, work.temporal)
        removed = before - sum(parameter.numel() for parameter in work.denoiser.parameters())
        rows, blocks = len(work.temporal.timesteps), len(work.temporal.tables)
        return (
            f"{blocks} time projections became tables of {rows} rows; {removed / 1e6:.2f} M parameters left the graph"
        )

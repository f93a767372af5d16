"""`temporal-table`: time features as a table, their modules gone (Huang et al. 2024, TFMQ-DM; cache-based maintenance).

A U-Net's time features depend on the timestep alone, and a sampler visits finitely many. So every ResBlock's projected
feature is computed once per step of the schedule, and the time embedding and its projections leave the model. Tables
for some ResBlocks only leave the embedding to the others. Where a U-Net adds other conditions to the embedding, that
alone is a feature of time, and the one that has a table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from diffpress.compress.families import unet as family
from diffpress.compress.numerics.lookup import RowOf
from diffpress.compress.work import Work
from diffpress.errors import DiffpressError
from diffpress.plan import TemporalTable

EMBEDDING = "time_embedding"


class Passed(nn.Module):
    """In place of a module whose work is done elsewhere: hands its input on."""

    def forward(self, rows: Tensor, condition: Tensor | None = None) -> Tensor:
        return rows


class Table(nn.Module):
    """In place of a time feature's module: rows [N] to features [N, C]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", table)

    def forward(self, rows: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.table.index_select(0, rows.long())


class MarkedEmbedding(nn.Module):
    """In place of the time embedding where only some projections are tables: timesteps [N] to [N, D + steps].

    The embedding, and behind it a one in the place of the schedule's row. ResBlocks so get one tensor that can be
    recorded and batched as before, and the mark survives their activation and BF16, which a row's number would not.
    """

    def __init__(self, unet: Any, timesteps: tuple[float, ...]) -> None:
        super().__init__()
        embedding = unet.time_embedding
        # Under their own names: the plan knows layers by their paths.
        self.linear_1, self.act, self.linear_2 = embedding.linear_1, embedding.act, embedding.linear_2
        self.sinusoids, self.final_act = unet.time_proj, unet.time_embed_act
        self.row_of = RowOf(timesteps)
        self.marks = Table(torch.eye(len(timesteps)))

    def forward(self, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
        embedded = self.linear_2(self.act(self.linear_1(self.sinusoids(timesteps).to(self.linear_1.weight.dtype))))
        if self.final_act is not None:
            embedded = self.final_act(embedded)
        return torch.cat([embedded, self.marks(self.row_of(timesteps)).to(embedded.dtype)], dim=1)


class MarkedTable(Table):
    """A table beside projections that stay: embeddings with marks [N, D + steps] to features [N, C]."""

    def forward(self, marked: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(marked[:, -len(self.table) :].argmax(dim=1))


def features(unet: Any, timesteps: Tensor) -> dict[str, Tensor]:
    """Every ResBlock's projected time feature [N, C] at timesteps [N], by module path; gradients flow.

    The time embedding alone where conditions are added to it.
    """
    embedded = family.time_embedding(unet, timesteps)
    if family.mixes_conditions(unet):
        return {EMBEDDING: embedded}
    return {
        name: block.time_emb_proj(embedded if block.skip_time_act else block.nonlinearity(embedded))
        for name, block in family.time_projections(unet).items()
    }


@torch.no_grad()
def tabulate(unet: Any, timesteps: tuple[float, ...]) -> TemporalTable:
    """Every feature of time at every timestep: tables [steps, C] by module path."""
    found = features(unet, torch.tensor(timesteps, dtype=torch.float32, device=unet.device))
    return TemporalTable(timesteps, {name: np.asarray(table.cpu(), dtype=np.float32) for name, table in found.items()})


def install(unet: Any, temporal: TemporalTable) -> None:
    """Replace the time modules of `unet`, in place; it still runs as before on the timesteps of the table.

    The embedding and the projections that have no table stay, under their paths.
    """
    if family.mixes_conditions(unet):
        rows = torch.from_numpy(temporal.tables[EMBEDDING].copy())
        unet.time_proj, unet.time_embedding = RowOf(temporal.timesteps), Table(rows)
        unet.to(unet.device)
        return
    blocks = family.time_projections(unet)
    kept = [block for name, block in blocks.items() if name not in temporal.tables]
    if kept:
        embedding = MarkedEmbedding(unet, temporal.timesteps)
        width = embedding.linear_2.out_features
        for block in kept:
            block.time_emb_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :width],))
        unet.time_proj, unet.time_embedding = Passed(), embedding
    else:
        unet.time_proj, unet.time_embedding = RowOf(temporal.timesteps), Passed()
    unet.time_embed_act = None
    for name, table in temporal.tables.items():
        rows = torch.from_numpy(table.copy())
        blocks[name].time_emb_proj = MarkedTable(rows) if kept else Table(rows)
        blocks[name].skip_time_act = True
    unet.to(unet.device)  # what is new in it


def require_modules(work: Work, name: str) -> None:
    """Raises `DiffpressError` where pass `name` finds no time modules to replace, or a ResBlock that scales by time."""
    blocks = [module for module in work.denoiser.modules() if getattr(module, "time_emb_proj", None) is not None]
    if len(blocks) != len(family.time_projections(work.denoiser)):
        raise DiffpressError(f"{name} supports ResBlocks that add their time feature; this U-Net scales by it")
    if work.temporal is not None or work.quantization.keys() & family.time_layers(work.denoiser).keys():
        raise DiffpressError(f"{name}: an earlier pass took care of the time features; keep one of the two")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TemporalTablePass:
    """Precompute the time features of the schedule. No options."""

    def requires(self, work: Work) -> None:
        """Raises `DiffpressError` where a ResBlock uses time otherwise than by addition, or a pass came before."""
        require_modules(work, "temporal-table")

    def apply(self, work: Work) -> str:
        """Put the tables into the plan and the model; says what left."""
        before = sum(parameter.numel() for parameter in work.denoiser.parameters())
        work.temporal = tabulate(work.denoiser, work.sampling.timesteps)
        install(work.denoiser, work.temporal)
        removed = before - sum(parameter.numel() for parameter in work.denoiser.parameters())
        rows, blocks = len(work.temporal.timesteps), len(work.temporal.tables)
        return f"{blocks} time features became tables of {rows} rows; {removed / 1e6:.2f} M parameters left the graph"

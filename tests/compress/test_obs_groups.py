"""Whole columns and groups of them: removed, compensated, and compared with brute force."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from diffpress.compress.numerics import obs
from diffpress.compress.numerics.obs import reconstruction_error
from diffpress.compress.numerics.obs_groups import prune_columns, prune_groups
from diffpress.compress.numerics.saliency import plain_groups
from diffpress.errors import DiffpressError

OUT, IN = 10, 36


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = IN, tokens: int = 300, seed: int = 1) -> Tensor:
    causes = drawn(tokens, columns // 3, seed=seed) @ drawn(columns // 3, columns, seed=seed + 1)
    x = (causes + 0.5 * drawn(tokens, columns, seed=seed + 2)) * drawn(columns, seed=seed + 3).exp()
    hessian = 2 / tokens * x.t() @ x
    return (hessian + hessian.t()) / 2


def least_squares(weight: Tensor, hessian: Tensor, stays: Tensor, damping: float = 0.01) -> Tensor:
    """The best weights on the columns that stay, for the damped Hessian."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    best = torch.zeros(weight.shape, dtype=torch.float64)
    best[:, stays] = torch.linalg.solve(damped[stays][:, stays], damped[stays] @ weight.double().t()).t()
    return best


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("size", [1, 4])
def test_what_stays_is_the_least_squares_solution(size: int, batch: int) -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    given = hessian.clone()
    cut = prune_groups(weight, hessian, size, 5, batch=batch)
    assert torch.equal(hessian, given)
    assert len(cut.removed) == 5
    assert sorted([*cut.kept.tolist(), *cut.removed.tolist()]) == list(range(IN // size))
    assert cut.kept.tolist() == sorted(cut.kept.tolist())
    stays = torch.isin(torch.arange(IN) // size, cut.kept)
    assert (cut.weight[:, ~stays] == 0).all()
    assert torch.allclose(cut.weight.double(), least_squares(weight, hessian, stays), atol=1e-5)


def test_the_first_column_is_the_one_whose_removal_costs_least() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    for size in (1, 4):
        columns = torch.arange(IN).reshape(-1, size)
        costs = []
        for group in columns:
            stays = torch.ones(IN, dtype=torch.bool)
            stays[group] = False
            change = weight.double() - least_squares(weight, hessian, stays)
            damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(IN)
            costs.append(float((change @ damped * change).sum()))
        cut = prune_groups(weight, hessian, size, 1)
        assert int(cut.removed[0]) == min(range(len(costs)), key=costs.__getitem__)


def test_one_after_the_other_is_near_the_best_of_all_subsets() -> None:
    weight, hessian = drawn(OUT, 9), correlated(9)
    errors = {}
    for gone in combinations(range(9), 3):
        stays = torch.tensor([column not in gone for column in range(9)])
        errors[gone] = reconstruction_error(weight, least_squares(weight, hessian, stays), hessian)
    cut = prune_columns(weight, hessian, 3, batch=1)
    ours = errors[tuple(sorted(cut.removed.tolist()))]
    assert sum(error < ours for error in errors.values()) <= 2  # of 84


@pytest.mark.parametrize("score", ["exact", "diagonal"])
def test_with_the_identity_the_groups_of_least_energy_go(score) -> None:
    weight = drawn(OUT, IN)
    cut = prune_groups(weight, torch.eye(IN), 4, 5, score=score)
    energy = weight.square().sum(dim=0).reshape(-1, 4).sum(dim=1)
    assert cut.removed.tolist() == energy.argsort()[:5].tolist()
    assert torch.equal(cut.weight, weight.masked_fill(torch.isin(torch.arange(IN) // 4, cut.removed), 0))


def test_groups_that_are_zero_go_first_and_change_nothing() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    weight[:, 8:12] = weight[:, 20:24] = 0
    for batch in (1, 2):
        cut = prune_groups(weight, hessian, 4, 2, batch=batch)
        assert sorted(cut.removed.tolist()) == [2, 5]
        assert torch.equal(cut.weight, weight)
    for criterion in ("magnitude", "wanda"):
        plain = plain_groups(weight, hessian, 4, 2, criterion)
        assert sorted(plain.removed.tolist()) == [2, 5]
        assert torch.equal(plain.weight, weight)


def test_dead_inputs_go_first() -> None:
    weight, hessian = drawn(OUT, IN).requires_grad_(), correlated()
    hessian[7, :] = hessian[:, 7] = 0
    cut = prune_columns(weight, hessian, 1)
    assert not cut.weight.requires_grad
    assert cut.removed.tolist() == [7]
    assert torch.equal(cut.weight, weight.index_fill(1, torch.tensor([7]), 0))


@pytest.mark.parametrize("seed", range(4))
def test_compensated_cuts_lose_least(seed: int) -> None:
    weight, hessian = drawn(OUT, IN, seed=seed), correlated(seed=10 * seed)
    for size, count in ((1, 8), (1, 18), (4, 3)):
        cut = prune_groups(weight, hessian, size, count)
        error = reconstruction_error(weight, cut.weight, hessian)
        stays = torch.isin(torch.arange(IN) // size, cut.kept)
        assert error <= reconstruction_error(weight, weight.masked_fill(~stays, 0), hessian)
        rivals = [plain_groups(weight, hessian, size, count, criterion) for criterion in ("magnitude", "wanda")]
        assert error < 0.7 * min(reconstruction_error(weight, rival.weight, hessian) for rival in rivals)


def test_groups_may_lie_anywhere_and_leave_columns_out() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    shuffled = torch.randperm(IN, generator=torch.Generator().manual_seed(3))
    groups = shuffled[:32].reshape(8, 4)
    cut = prune_groups(weight, hessian, groups, 3)
    # The same with the columns in the groups' order; the four of no group at the end.
    ordered = prune_groups(weight[:, shuffled], hessian[shuffled][:, shuffled], torch.arange(32).reshape(8, 4), 3)
    assert cut.removed.tolist() == ordered.removed.tolist()
    assert torch.allclose(cut.weight[:, shuffled], ordered.weight, atol=1e-6)
    assert (cut.weight[:, shuffled[32:]] != 0).all()
    plain = plain_groups(weight, None, groups, 3, "magnitude")
    totals = weight.abs().sum(dim=0)[groups].sum(dim=1)
    assert plain.removed.tolist() == totals.argsort()[:3].tolist()


def test_strata_lose_equally_many() -> None:
    weight, hessian = drawn(OUT, IN) * torch.arange(1.0, IN + 1), correlated()
    strata = torch.arange(IN) // 9
    for cut in (
        prune_columns(weight, hessian, 8, batch=3, strata=strata),
        plain_groups(weight, hessian, 1, 8, "magnitude", strata),
    ):
        assert strata[cut.kept].bincount().tolist() == [7, 7, 7, 7]
        assert len(cut.removed.unique()) == 8
    free = plain_groups(weight, hessian, 1, 8, "magnitude")
    assert strata[free.kept].bincount().tolist() != [7, 7, 7, 7]


def test_the_channels_of_a_convolution_are_removed_whole() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 6, 3, padding=1).requires_grad_(False)
    image = drawn(2, 8, 7, 7) @ drawn(7, 7, seed=4)
    image[:, 5] = image[:, 2] + 0.01 * image[:, 5]  # nearly a copy: another channel can take it over
    windows = nn.functional.unfold(image, 3, padding=1).transpose(0, 1).flatten(1)
    hessian = windows @ windows.t()
    cut = prune_groups(conv.weight.flatten(1), hessian, 9, 1, damping=1e-6)
    assert int(cut.removed[0]) in (2, 5)
    before, weight = conv(image), conv.weight.flatten(1).clone()
    conv.weight.copy_(cut.weight.reshape(conv.weight.shape))
    error = (conv(image) - before).square().sum() / (before - conv.bias[:, None, None]).square().sum()
    assert error < 1e-3
    assert float(error) == pytest.approx(reconstruction_error(weight, cut.weight, hessian), rel=1e-2)


def test_large_layers_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = drawn(OUT, 96), correlated(96)
    exact = prune_groups(weight, hessian, 3, 16)
    monkeypatch.setattr(obs, "EXACT", 10)
    single = prune_groups(weight, hessian, 3, 16)
    assert single.removed.tolist() == exact.removed.tolist()
    assert torch.allclose(single.weight, exact.weight, atol=1e-3)


def test_what_cannot_be_is_refused() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    with pytest.raises(DiffpressError, match="36 of 36 groups cannot be removed"):
        prune_columns(weight, hessian, IN)
    with pytest.raises(DiffpressError, match="cut into groups of 5"):
        prune_groups(weight, hessian, 5, 1)
    with pytest.raises(DiffpressError, match="at most once"):
        prune_groups(weight, hessian, torch.tensor([[0, 1], [1, 2]]), 1)
    with pytest.raises(DiffpressError, match="equally from 4 strata"):
        prune_columns(weight, hessian, 6, strata=torch.arange(IN) // 9)
    with pytest.raises(DiffpressError, match="whole Hessian"):
        prune_columns(weight, hessian[:9, :9], 1)
    with pytest.raises(DiffpressError, match="not positive definite"):
        prune_columns(weight, -hessian, 1)

"""Optimal Brain Surgeon against magnitude pruning, least squares and its rivals."""

import math

import pytest
import torch
from torch import Tensor

from diffpress.compress.numerics import obs
from diffpress.compress.numerics.obs import (
    compensate,
    inverse_factor,
    prune_nm,
    prune_unstructured,
    reconstruction_error,
)
from diffpress.compress.numerics.saliency import plain_nm, plain_unstructured
from diffpress.errors import DiffpressError

OUT, IN = 24, 48


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = IN, tokens: int = 400, seed: int = 1) -> Tensor:
    """A Hessian of inputs that share few causes and differ in size, as activations do."""
    causes = drawn(tokens, columns // 4, seed=seed) @ drawn(columns // 4, columns, seed=seed + 1)
    x = (causes + 0.5 * drawn(tokens, columns, seed=seed + 2)) * drawn(columns, seed=seed + 3).exp()
    hessian = 2 / tokens * x.t() @ x
    return (hessian + hessian.t()) / 2


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def magnitude_mask(weight: Tensor, ratio: float) -> Tensor:
    ranked = weight.abs().flatten().argsort()
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[ranked[: math.floor(ratio * weight.numel() + 0.5)]] = True
    return mask.reshape(weight.shape)


def least_squares(weight: Tensor, hessian: Tensor, gone: Tensor, damping: float = 0.01) -> Tensor:
    """The best weights with these zeros for the damped Hessian, row by row from the normal equations."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(
        len(hessian), dtype=torch.float64
    )
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(len(weight)):
        stays = ~gone[row]
        target = damped[stays] @ weight[row].double()
        best[row, stays] = torch.linalg.solve(damped[stays][:, stays], target)
    return best


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = correlated()
    factor = inverse_factor(hessian, damping=0.02)
    mean = hessian.double().diagonal().mean()
    damped = hessian.double() + 0.02 * mean * torch.eye(IN, dtype=torch.float64)
    assert factor.damping == pytest.approx(0.02 * float(mean))
    assert torch.equal(factor.upper, factor.upper.triu())
    assert torch.allclose(factor.upper.t() @ factor.upper @ damped, torch.eye(IN, dtype=torch.float64), atol=1e-9)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(factor.upper, expected, rtol=1e-8, atol=1e-10)


def test_dead_inputs_are_removed_and_change_nothing_else() -> None:
    dead = [3, 17]
    alive = [column for column in range(IN) if column not in dead]
    weight, hessian = drawn(OUT, IN), correlated()
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    given = hessian.clone()
    factor = inverse_factor(hessian)
    assert factor.dead.nonzero().flatten().tolist() == dead
    assert torch.equal(hessian, given)  # the caller's own
    smaller = inverse_factor(hessian[alive][:, alive])
    assert torch.allclose(factor.upper[alive][:, alive], smaller.upper)
    pruned = compensate(weight, hessian, weight.abs() < 0.5)
    assert zeros(pruned[:, dead]) == OUT * 2
    expected = compensate(weight[:, alive], hessian[alive][:, alive], weight[:, alive].abs() < 0.5)
    assert torch.allclose(pruned[:, alive], expected, atol=1e-6)
    assert zeros(prune_unstructured(weight, torch.zeros(IN, IN), 0.5)) == weight.numel()  # nothing ever came in


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h - 2 * h.diagonal().mean() * torch.eye(IN), "not positive definite with a damping of 0.01"),
        (lambda h: h.index_fill(0, torch.tensor([4]), float("nan")), "not finite"),
        (lambda h: h * float("inf"), "not finite"),
        (lambda h: h[:, :-1], "square"),
    ],
)
def test_a_hessian_that_cannot_be_inverted_is_refused(change, message: str) -> None:
    with pytest.raises(DiffpressError, match=message):
        inverse_factor(change(correlated()))


def test_large_layers_are_solved_in_float32_and_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    exact = prune_nm(weight, hessian, 2, 4, refine=3)
    monkeypatch.setattr(obs, "EXACT", IN - 1)
    assert inverse_factor(hessian).upper.dtype == torch.float32
    assert torch.allclose(prune_nm(weight, hessian, 2, 4, refine=3), exact, atol=1e-4)
    steep = correlated() + 1e12 * torch.ones(IN, IN)  # indefinite in float32, whose products this is made of
    steep = steep.double() + 1e-3 * steep.mean() * torch.eye(IN)
    assert inverse_factor(steep, 1e-9).upper.isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.77])
def test_with_the_identity_it_is_magnitude_pruning(ratio: float) -> None:
    weight, hessian = drawn(OUT, IN), torch.eye(IN)
    expected = weight.masked_fill(magnitude_mask(weight, ratio), 0)
    assert torch.equal(prune_unstructured(weight, hessian, ratio, block=IN), expected)
    assert torch.equal(plain_unstructured(weight, None, ratio, "magnitude"), expected)
    blocks = [weight[:, start : start + 16] for start in (0, 16, 32)]
    if ratio * OUT * 16 % 1 == 0:
        each = torch.cat([block.masked_fill(magnitude_mask(block, ratio), 0) for block in blocks], dim=1)
        assert torch.equal(prune_unstructured(weight, hessian, ratio, block=16), each)


@pytest.mark.parametrize(("n_zero", "m", "kernel"), [(2, 4, 1), (1, 4, 1), (5, 8, 1), (2, 4, 3), (2, 4, 4)])
def test_n_of_every_m_channels_go(n_zero: int, m: int, kernel: int) -> None:
    weight = drawn(OUT, IN)
    identity = prune_nm(weight, torch.eye(IN), n_zero, m, kernel)
    assert torch.equal(identity, plain_nm(weight, None, n_zero, m, "magnitude", kernel))
    for pruned in (identity, prune_nm(weight, correlated(), n_zero, m, kernel, refine=2)):
        groups = pruned.reshape(OUT, IN // kernel // m, m, kernel)  # [out, group, channel, place]
        assert ((groups == 0).sum(dim=2) == n_zero).all()
    by_hand = weight.reshape(OUT, -1, m, kernel)
    threshold = by_hand.abs().sort(dim=2).values[:, :, n_zero - 1 : n_zero]
    assert torch.equal(identity.reshape(by_hand.shape), by_hand.masked_fill(by_hand.abs() <= threshold, 0))


@pytest.mark.parametrize("block", [8, 20, 48, 128])
def test_the_number_of_zeros_is_exact(block: int) -> None:
    weight, hessian = drawn(OUT, IN + 3), correlated(IN + 3)
    for ratio in (0.0, 0.1, 1 / 3, 0.5, 0.999):
        expected = math.floor(ratio * weight.numel() + 0.5)
        halves = [hessian[:25, :25], hessian[25:, 25:]]
        assert zeros(prune_unstructured(weight, hessian, ratio, block=block)) == expected
        assert zeros(prune_unstructured(weight, halves, ratio, block=block, refine=1)) == expected
        for criterion in ("magnitude", "wanda"):
            pruned = plain_unstructured(weight, hessian, ratio, criterion)
            assert zeros(pruned) == expected
    rows = (pruned == 0).sum(dim=1)  # Wanda's
    assert rows.max() - rows.min() <= 1


def test_the_block_does_not_matter_where_the_mask_does_not_depend_on_it() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    gone = weight.abs() < 0.6
    whole, patterned = compensate(weight, hessian, gone, block=IN), prune_nm(weight, hessian, 2, 4, block=IN)
    assert torch.equal(whole == 0, gone)
    for block in (1, 7, 16):
        assert torch.allclose(compensate(weight, hessian, gone, block=block), whole, atol=1e-6)
        assert torch.allclose(prune_nm(weight, hessian, 2, 4, block=block), patterned, atol=1e-6)
    # Unstructured, a block is also what weights compete within.
    assert not torch.equal(prune_unstructured(weight, hessian, 0.5, block=16) == 0, whole == 0)


@pytest.mark.parametrize("column", [0, 20, IN - 1])
def test_one_column_is_compensated_by_all_later_ones_as_least_squares_does(column: int) -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    gone = torch.zeros(OUT, IN, dtype=torch.bool)
    gone[:, column] = True
    pruned = compensate(weight, hessian, gone).double()
    assert torch.equal(pruned[:, :column].float(), weight[:, :column])
    # Least squares over the later columns, the earlier ones as they are.
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(IN)
    later = slice(column + 1, IN)
    change = torch.linalg.solve(damped[later, later], damped[later, column, None] * weight[:, column].double())
    assert torch.allclose(pruned[:, later], weight[:, later].double() + change.t(), atol=1e-6)
    if column == 0:
        assert torch.allclose(pruned, least_squares(weight, hessian, gone), atol=1e-6)


def test_refined_weights_are_the_best_for_their_mask() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    gone = weight.abs() < 0.7
    best = least_squares(weight, hessian, gone)
    refined = compensate(weight, hessian, gone, refine=60)
    assert torch.allclose(refined.double(), best, atol=1e-4)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(IN)  # what steps cannot raise
    steps = [compensate(weight, hessian, gone, refine=n) for n in (0, 1, 2, 4, 60)]
    errors = [reconstruction_error(weight, step, damped) for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(reconstruction_error(weight, best, damped), rel=1e-3)
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("seed", range(4))
def test_compensation_never_hurts(seed: int) -> None:
    weight, hessian = drawn(OUT, IN, seed=seed), correlated(seed=10 * seed)
    gone = drawn(OUT, IN, seed=seed + 50) < 0.3
    plain = weight.masked_fill(gone, 0)
    for refine in (0, 3):
        pruned = compensate(weight, hessian, gone, refine=refine)
        assert torch.equal(pruned == 0, gone)
        for row in range(OUT):
            error = reconstruction_error(weight[row : row + 1], pruned[row : row + 1], hessian)
            assert error <= reconstruction_error(weight[row : row + 1], plain[row : row + 1], hessian) * (1 + 1e-6)
    assert reconstruction_error(weight, pruned, hessian) < 0.6 * reconstruction_error(weight, plain, hessian)


def test_where_the_sweep_alone_would_hurt_it_is_taken_back() -> None:
    # Input 0 is the difference of 1 and 2 made large: 1 and 2 take over its weight, tenfold, and then 2 goes.
    x = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    inputs = torch.stack([x[0] - torch.tensor([0.0, 0.1]), torch.tensor([0.05, 1.0]), torch.tensor([-0.05, 1.0])])
    hessian = inputs @ inputs.t()
    weight, gone = torch.ones(1, 3), torch.tensor([[True, False, True]])
    factor = inverse_factor(hessian, 1e-4)
    swept, _, losses = obs._sweep(weight.t().double(), factor.upper, lambda s, c: gone.t()[c : c + len(s)], 128, 128)
    plain = torch.tensor([[0.0, 1.0, 0.0]])
    bad = reconstruction_error(weight, swept.t(), hessian)
    assert bad > 5 * reconstruction_error(weight, plain, hessian)
    energy = float(weight @ hessian @ weight.t())
    assert float(losses[0]) == pytest.approx(bad * energy, rel=0.05)  # what the sweep thinks it costs, damping apart
    assert torch.equal(compensate(weight, hessian, gone, damping=1e-4), plain)
    refined = compensate(weight, hessian, gone, damping=1e-4, refine=3)
    assert reconstruction_error(weight, refined, hessian) < reconstruction_error(weight, plain, hessian)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_obs_beats_wanda_and_wanda_beats_magnitude(ratio: float) -> None:
    weight, hessian = drawn(OUT, IN), correlated()

    def error(pruned: Tensor) -> float:
        return reconstruction_error(weight, pruned, hessian)

    ours = error(prune_unstructured(weight, hessian, ratio, block=16))
    wanda, magnitude = (error(plain_unstructured(weight, hessian, ratio, c)) for c in ("wanda", "magnitude"))
    assert ours < 0.7 * wanda < wanda < magnitude
    assert error(prune_unstructured(weight, hessian, ratio, block=16, refine=10)) < ours
    if ratio == 0.5:
        ours = error(prune_nm(weight, hessian, 2, 4))
        wanda, magnitude = (error(plain_nm(weight, hessian, 2, 4, c)) for c in ("wanda", "magnitude"))
        assert ours < 0.7 * wanda < wanda < magnitude


def test_what_was_zero_already_costs_nothing() -> None:
    weight = drawn(OUT, IN)
    weight[weight.abs() < 0.7] = 0
    ratio = min(float((weight[:, start : start + 16] == 0).float().mean()) for start in (0, 16, 32)) - 0.01
    assert torch.equal(prune_unstructured(weight, correlated(), ratio, block=16), weight)
    pattern = plain_nm(drawn(OUT, IN), None, 2, 4, "magnitude")
    assert torch.equal(prune_nm(pattern, correlated(), 2, 4), pattern)


def test_blocks_of_the_diagonal_are_solved_each_for_itself() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    parts = [hessian[:32, :32], hessian[32:, 32:]]
    whole = torch.block_diag(*parts)
    separate = prune_nm(weight, parts, 2, 4, kernel=2)
    expected = torch.cat([prune_nm(weight[:, :32], parts[0], 2, 4, 2), prune_nm(weight[:, 32:], parts[1], 2, 4, 2)], 1)
    assert torch.equal(separate, expected)
    error = reconstruction_error(weight, separate, whole)
    assert reconstruction_error(weight, separate, parts) == pytest.approx(error, rel=1e-6)
    for criterion in ("magnitude", "wanda"):
        from_parts = plain_unstructured(weight, parts, 0.4, criterion)
        assert torch.equal(from_parts, plain_unstructured(weight, whole, 0.4, criterion))
    with pytest.raises(DiffpressError, match="48 columns cannot go with a Hessian of 32 and 32"):
        prune_nm(weight, [parts[0], parts[0]], 2, 4)


def test_the_error_is_that_of_the_outputs() -> None:
    weight, pruned, x = drawn(OUT, IN), drawn(OUT, IN, seed=5), drawn(IN, 90, seed=6)
    expected = ((weight - pruned) @ x).square().sum() / (weight @ x).square().sum()
    assert reconstruction_error(weight, pruned, x @ x.t()) == pytest.approx(float(expected), rel=1e-5)
    assert reconstruction_error(weight, weight, x @ x.t()) == 0
    assert reconstruction_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0
    assert reconstruction_error(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3)) == math.inf


def test_half_precision_comes_back_as_it_came() -> None:
    weight = drawn(OUT, IN).half().requires_grad_()
    pruned = prune_nm(weight, correlated(), 2, 4)
    assert pruned.dtype == torch.float16
    assert not pruned.requires_grad
    assert zeros(pruned) == weight.numel() // 2


def test_what_cannot_be_is_refused() -> None:
    weight, hessian = drawn(OUT, IN), correlated()
    for ratio in (-0.1, 1.0, 1.5, math.nan):
        for prune in (prune_unstructured, lambda w, h, r: plain_unstructured(w, h, r, "wanda")):
            with pytest.raises(DiffpressError, match="cannot be removed"):
                prune(weight, hessian, ratio)
    for prune in (prune_nm, lambda w, h, n, m, k=1: plain_nm(w, h, n, m, "wanda", k)):
        with pytest.raises(DiffpressError, match="48 input channels cannot be cut into groups of 7"):
            prune(weight, hessian, 2, 7)
        with pytest.raises(DiffpressError, match="16 input channels cannot be cut into groups of 32"):
            prune(weight, hessian, 2, 32, 3)
        with pytest.raises(DiffpressError, match="4 zeros in every 4"):
            prune(weight, hessian, 4, 4)
    with pytest.raises(DiffpressError, match="wanda needs"):
        plain_unstructured(weight, None, 0.5, "wanda")


def test_a_factor_wider_than_its_blocks() -> None:
    hessian = correlated(600, tokens=700).double()
    upper = inverse_factor(hessian).upper
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(600)
    assert torch.allclose(upper.t() @ upper @ damped, torch.eye(600, dtype=torch.float64), atol=1e-8)

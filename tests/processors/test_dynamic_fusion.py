"""Dynamic logit fusion: the curve and its optimum, solvers against brute force, several experts, generation."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from hf_logits.processors.dynamic_fusion import (
    DynamicFusionLogitsProcessor,
    exact_weight,
    fusion_loss,
    fusion_shift,
    fusion_targets,
    grid_weight,
    grid_weights,
)
from oracles import (
    ATOL,
    FUSION_ALONE,
    FUSION_BASE,
    FUSION_BIG,
    FUSION_CURVE,
    FUSION_DIRECTION,
    FUSION_EXPERT,
    FUSION_GRID_BEST,
    FUSION_JOINT,
    FUSION_MOVED,
    FUSION_OPTIMUM,
    FUSION_ROOTS,
    FUSION_SECOND,
    FUSION_SMALL,
    FUSION_TARGETS,
    answer,
    normalised,
)


GRID = [i / 10 for i in range(21)]
ONE = normalised(FUSION_BIG, FUSION_SMALL, FUSION_EXPERT)
TARGETS = fusion_targets(ONE[1], ONE[2][None])


@pytest.fixture(scope="module")
def models():
    """A large base, a small base, and two experts."""
    return [tiny.llama(seed=seed) for seed in (1, 2, 3, 4)]


def fused(models, *experts, big=FUSION_BIG, small=FUSION_SMALL, **settings):
    """Probabilities and the trace after one call on the table's logits."""
    experts = experts or (FUSION_EXPERT,)
    processor = DynamicFusionLogitsProcessor(models[1], list(models[2 : 2 + len(experts)]), **settings)
    probs = answer(processor, big, *([small, *experts] if processor.engines else []))
    return probs, {name: values[:, 0] for name, values in processor.stats.trace.items()}


def kl(p, q):
    """KL of two rows of log-probabilities by a plain sum over the tokens that `p` has."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > -math.inf)


def slow_loss(big, direction, weight, targets):
    moved = (big + weight * direction).log_softmax(-1)
    return (kl(moved, big) - targets[0]) ** 2 + (kl(big, moved) - targets[1]) ** 2


def problems(count, words, spread, seed, experts=1):
    """Random log-probabilities of big, small and experts."""
    generator = torch.Generator().manual_seed(seed)
    big, small = (spread * torch.randn(count, words, generator=generator).double() for _ in range(2))
    moves = spread * torch.randn(experts, count, words, generator=generator).double()
    return [values.log_softmax(-1) for values in (big, small, small + moves)]


# --- the numbers -----------------------------------------------------------------------------------------------------------


def test_the_targets_are_the_two_distances_of_the_expert():
    found = torch.cat(TARGETS)
    torch.testing.assert_close(found, found.new_tensor(FUSION_TARGETS), atol=ATOL, rtol=0)


def test_the_direction():
    difference = ONE[2] - ONE[1]
    shift = (difference - FUSION_DIRECTION)[0, 0]  # log-probabilities differ from logits by a constant
    torch.testing.assert_close(difference, FUSION_DIRECTION + shift)


@pytest.mark.parametrize("weight", FUSION_CURVE)
def test_the_curve(weight):
    expected = torch.tensor(FUSION_CURVE[weight]).double()
    for big, direction in ((ONE[0], ONE[2] - ONE[1]), (FUSION_BIG, FUSION_DIRECTION)):
        found = torch.cat([*fusion_shift(big, direction, weight), fusion_loss(big, direction, weight, TARGETS)])
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_the_roots():
    for target, root, of in zip(TARGETS, FUSION_ROOTS, (0, 1), strict=True):
        for delta, side in ((-2 * ATOL, -1), (2 * ATOL, 1)):
            gap = fusion_shift(FUSION_BIG, FUSION_DIRECTION, root + delta)[of] - target
            assert gap.sign().item() == side


def test_the_grid(models):
    (weights,), loss = grid_weights(ONE[0], (ONE[2] - ONE[1])[None], TARGETS, grid=GRID)
    torch.testing.assert_close(weights, weights.new_tensor([FUSION_GRID_BEST]))
    torch.testing.assert_close(loss, loss.new_tensor([FUSION_CURVE[1.0][2]]), atol=ATOL, rtol=0)
    probs, trace = fused(models)
    torch.testing.assert_close(probs, FUSION_MOVED, atol=ATOL, rtol=0)
    torch.testing.assert_close(trace["weight"], trace["weight"].new_tensor([FUSION_GRID_BEST]))


def test_the_continuous_optimum(models):
    weight, loss = exact_weight(ONE[0], ONE[2] - ONE[1], TARGETS, max_weight=2.0)
    torch.testing.assert_close(weight, weight.new_tensor([FUSION_OPTIMUM[0]]), atol=ATOL, rtol=0)
    torch.testing.assert_close(loss, loss.new_tensor([FUSION_OPTIMUM[1]]), atol=1e-9, rtol=0)
    _, trace = fused(models, solver="exact")
    torch.testing.assert_close(trace["weight"], trace["weight"].new_tensor([FUSION_OPTIMUM[0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, FUSION_BASE), (1.0, FUSION_MOVED)])
def test_a_fixed_weight_is_proxy_tuning(weight, expected, models):
    probs, _ = fused(models, weight=weight)
    torch.testing.assert_close(probs, expected, atol=ATOL, rtol=0)


def test_a_weight_for_each_row(models):
    rows = [logits.expand(2, -1) for logits in (FUSION_EXPERT, FUSION_BIG, FUSION_SMALL)]
    probs, trace = fused(models, rows[0], big=rows[1], small=rows[2], weight=torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(probs, torch.cat([FUSION_BASE, FUSION_MOVED]), atol=ATOL, rtol=0)
    assert trace["weight"].tolist() == [0, 1]


# --- several experts ---------------------------------------------------------------------------------------------------------


def summed_loss(weights):
    """The loss of the paper: both gaps, summed over the targets of both experts."""
    big, small, *experts = normalised(FUSION_BIG, FUSION_SMALL, FUSION_EXPERT, FUSION_SECOND)
    direction = sum(w * (expert - small) for w, expert in zip(weights, experts, strict=True))
    return sum(slow_loss(big[0], direction[0], 1.0, (kl(x[0], small[0]), kl(small[0], x[0]))) for x in experts)


def test_each_expert_alone_is_searched_against_all_targets():
    big, small, *experts = normalised(FUSION_BIG, FUSION_SMALL, FUSION_EXPERT, FUSION_SECOND)
    targets = fusion_targets(small, torch.stack(experts))
    for i, (expert, (best, least)) in enumerate(zip(experts, FUSION_ALONE, strict=True)):
        (weights,), _ = grid_weights(big, (expert - small)[None], targets, grid=GRID)
        torch.testing.assert_close(weights, weights.new_tensor([best]))
        assert abs(summed_loss([best * (j == i) for j in (0, 1)]) - least) < ATOL


def test_the_loss_to_the_mean_target_ranks_like_the_sum_over_targets():
    big, small, *experts = normalised(FUSION_BIG, FUSION_SMALL, FUSION_EXPERT, FUSION_SECOND)
    targets = fusion_targets(small, torch.stack(experts))
    gaps = []
    for weights in itertools.product(GRID[::4], repeat=2):
        direction = sum(w * (x - small) for w, x in zip(weights, experts, strict=True))
        gaps.append(summed_loss(weights) - 2 * fusion_loss(big, direction, 1.0, targets).item())
    assert max(gaps) - min(gaps) < 1e-12


def test_of_two_experts_the_better_one_alone(models):
    probs, trace = fused(models, FUSION_EXPERT, FUSION_SECOND)
    assert [round(trace[name].item(), 6) for name in ("weight", "weight_0", "weight_1")] == [0.7, 0.7, 0.0]
    torch.testing.assert_close(probs, (FUSION_BIG + 0.7 * FUSION_DIRECTION).softmax(-1))
    # the order in which they are given does not matter
    turned, trace = fused(models, FUSION_SECOND, FUSION_EXPERT)
    assert [round(trace[name].item(), 6) for name in ("weight_0", "weight_1")] == [0.0, 0.7]
    torch.testing.assert_close(turned, probs)


def test_two_experts_together(models):
    best, least = FUSION_JOINT
    _, trace = fused(models, FUSION_EXPERT, FUSION_SECOND, combine="joint")
    assert (round(trace["weight_0"].item(), 6), round(trace["weight_1"].item(), 6)) == best
    assert abs(summed_loss(best) - least) < ATOL
    assert least < FUSION_ALONE[0][1]
    _, refined = fused(models, FUSION_EXPERT, FUSION_SECOND, combine="joint", solver="exact")
    assert summed_loss([refined["weight_0"].item(), refined["weight_1"].item()]) < least


def test_the_joint_grid_equals_a_loop():
    big, small, experts = problems(6, 5, 1.0, seed=0, experts=2)
    directions = experts - small
    targets = fusion_targets(small, experts)
    grid = [0.0, 0.5, 1.0, 1.5]
    weights, loss = grid_weights(big, directions, targets, grid=grid)
    for r in range(6):
        by_point = {}
        for point in itertools.product(grid, repeat=2):
            moved = point[0] * directions[0, r] + point[1] * directions[1, r]
            by_point[point] = float(slow_loss(big[r], moved, 1.0, [t[r] for t in targets]))
        best = min(by_point, key=by_point.__getitem__)
        assert tuple(weights[:, r].tolist()) == best
        assert abs(loss[r].item() - by_point[best]) < 1e-9


# --- the solvers against brute force -----------------------------------------------------------------------------------------


def test_shifts_and_targets_equal_direct_sums():
    big, small, experts = problems(20, 6, 1.5, seed=1, experts=2)
    direction = experts[0] - small
    for weight in (0.0, 0.3, 1.0, 2.0):
        forward, backward = fusion_shift(big, direction, weight)
        moved = (big + weight * direction).log_softmax(-1)
        torch.testing.assert_close(forward.tolist(), [kl(p, q) for p, q in zip(moved, big, strict=True)])
        torch.testing.assert_close(backward.tolist(), [kl(p, q) for p, q in zip(big, moved, strict=True)])
    to, back = fusion_targets(small, experts)
    for r in range(20):
        torch.testing.assert_close(to[r].item(), sum(kl(x, small[r]) for x in experts[:, r]) / 2)
        torch.testing.assert_close(back[r].item(), sum(kl(small[r], x) for x in experts[:, r]) / 2)


def test_both_distances_grow_with_the_weight():
    big, small, (expert,) = problems(50, 6, 1.5, seed=2)
    curves = [torch.stack(fusion_shift(big, expert - small, weight)) for weight in GRID]
    assert all((later > earlier).all() for earlier, later in zip(curves, curves[1:], strict=False))


def test_the_grid_equals_a_loop():
    big, small, experts = problems(30, 5, 1.5, seed=3)
    targets = fusion_targets(small, experts)
    (weights,), losses = grid_weights(big, experts - small, targets, grid=GRID)
    for r in range(30):
        by_weight = [slow_loss(big[r], (experts[0] - small)[r], w, [t[r] for t in targets]) for w in GRID]
        assert weights[r].item() == GRID[by_weight.index(min(by_weight))]
        torch.testing.assert_close(losses[r].item(), float(min(by_weight)))


@pytest.mark.parametrize("spread", [1.0, 2.0, 5.0])
def test_the_exact_solver_is_the_global_optimum(spread):
    big, small, experts = problems(200, 4, spread, seed=int(10 * spread))
    direction, targets = experts[0] - small, fusion_targets(small, experts)
    weights, losses = exact_weight(big, direction, targets, max_weight=2.0)
    torch.testing.assert_close(losses, fusion_loss(big, direction, weights, targets))
    assert ((weights >= 0) & (weights <= 2)).all()
    _, of_grid = grid_weights(big, direction[None], targets, grid=GRID)
    assert (losses <= of_grid + 1e-9).all()
    # 20001 points, a thousand at a time
    points = torch.linspace(0, 2, 20001).double()
    least = torch.full_like(losses, torch.inf)
    for part in points.split(1000):
        n, rows = len(part), len(losses)
        grids = [values.repeat_interleave(n, 0) for values in (big, direction, *targets)]
        scan = fusion_loss(grids[0], grids[1], part.repeat(rows), (grids[2], grids[3])).view(rows, n)
        least = torch.minimum(least, scan.amin(-1))
    assert (losses <= least + 1e-8 * (1 + least)).all()
    # finer than the scan where the valley is steep, and nowhere else better
    assert (losses >= least - 1e-3).all()


def direct_loss(big, direction, weight, targets):
    """The loss of a weight a row by its definition, token by token."""
    plain, moved = big.log_softmax(-1), (big + weight[:, None] * direction).log_softmax(-1)
    forward, backward = (moved.exp() * (moved - plain)).sum(-1), (plain.exp() * (plain - moved)).sum(-1)
    return (forward - targets[0]) ** 2 + (backward - targets[1]) ** 2


def direct_grid(big, direction, targets, grid):
    losses = torch.stack([direct_loss(big, direction, torch.full_like(big[:, 0], w), targets) for w in grid])
    return big.new_tensor(grid)[losses.argmin(0)], losses.amin(0)


def patient_loss(big, direction, targets, max_weight):
    """The least loss: between the weights at which either distance meets its target, by ever finer scans."""

    def distance(weight, i):
        return fusion_shift(big, direction, weight)[i]

    low = torch.zeros(2, len(big), dtype=big.dtype)
    high = torch.full_like(low, max_weight)
    for _ in range(30):
        middle = (low + high) / 2
        short = torch.stack([distance(middle[i], i) < targets[i] for i in (0, 1)])
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    low, high = low.amin(0), high.amax(0)
    best, least = low, direct_loss(big, direction, low, targets)
    for _ in range(8):
        for part in range(9):
            weight = low + part / 8 * (high - low)
            loss = direct_loss(big, direction, weight, targets)
            best, least = torch.where(loss < least, weight, best), torch.minimum(loss, least)
        width = (high - low) / 8
        low, high = torch.maximum(low, best - width), torch.minimum(high, best + width)
    return least


def hard(kind, rows=30):
    """Big model, direction and targets, in double precision, that are hard in some way."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale, words):
        return scale * torch.randn(rows, words, generator=generator).double()

    def even(scale, words):
        return scale * (2 * torch.rand(rows, words, generator=generator).double() - 1)

    def spiked(words):
        spike = torch.zeros(rows, words).double()
        return spike.scatter(
            -1, torch.arange(rows)[:, None] % words, 40 * torch.rand(rows, 1, generator=generator).double()
        )

    def outliers(words, bulk, far, rare):
        """Tokens that nobody says, but that the expert would move far."""
        odd = torch.arange(words) % 50 == 0
        big = noise(3.0, words) - rare * odd
        small = big + noise(1.0, words)
        return big, small, small + noise(bulk, words) + far * odd

    if kind == "peaked":
        big = noise(8.0, 1500)
        small = 0.7 * big + noise(4.0, 1500)
        values = big, small, small + noise(1.5, 1500)
    elif kind == "close":
        big = noise(4.0, 1500)
        small = big + noise(1.0, 1500)
        values = big, small, small + noise(0.05, 1500)
    elif kind == "same base":
        small = noise(3.0, 1500)
        values = small, small, small + noise(2.0, 1500)
    elif kind == "out of reach":
        values = noise(12.0, 300), (small := noise(0.2, 300)), small + noise(3.0, 300)
    elif kind == "one word":
        values = noise(2.0, 300), (small := noise(2.0, 300)), small + spiked(300)
    elif kind == "three levels":
        levels = 20 * torch.randint(-1, 2, (rows, 20), generator=generator).double()
        values = noise(5.0, 20), (small := noise(2.0, 20)), small + levels
    elif kind.startswith("range"):
        words, size = (8, float(kind[5:-1])) if kind.endswith("s") else (1500, float(kind[5:]))
        values = noise(3.0, words), (small := noise(3.0, words)), small + even(size, words)
    elif kind == "forbidden":
        values = outliers(1500, 0.3, -1e4, 60.0)
    elif kind == "far below":
        values = outliers(1500, 0.02, -60.0, 15.0)
    elif kind == "far above":
        values = outliers(1500, 0.3, 15.0, 40.0)
    else:
        size = float(kind)
        values = noise(size, 4), (small := noise(size, 4)), small + noise(size, 4)
    big, small, expert = (value.log_softmax(-1) for value in values)
    return big, expert - small, fusion_targets(small, expert[None])


HARD = [
    *("1", "3", "10", "peaked", "close", "same base", "out of reach", "one word", "three levels"),
    *("range5", "range50", "range50s", "range200", "range1000", "forbidden", "far below", "far above"),
]


@pytest.mark.parametrize("kind", HARD)
def test_the_exact_solver_is_never_worse_than_the_grid_or_than_patience(kind):
    big, direction, targets = hard(kind)
    weights, losses = exact_weight(big, direction, targets, max_weight=2.0)
    assert ((weights >= 0) & (weights <= 2)).all()
    torch.testing.assert_close(losses, direct_loss(big, direction, weights, targets))
    _, of_grid = direct_grid(big, direction, targets, GRID)
    assert (losses <= of_grid + 1e-9 * (1 + of_grid)).all()
    patient = patient_loss(big, direction, targets, 2.0)
    assert (losses <= patient + 1e-8 * (1 + patient)).all()


@pytest.mark.parametrize("kind", HARD)
def test_single_precision_is_no_worse_than_the_grid_either(kind):
    big, direction, targets = hard(kind)
    single = big.float(), direction.float(), tuple(target.float() for target in targets)
    weights, _ = exact_weight(*single, max_weight=2.0)
    assert weights.dtype == torch.float32
    on_grid, _ = direct_grid(*single, GRID)
    ours, other = (direct_loss(big, direction, found.double(), targets) for found in (weights, on_grid))
    assert (ours <= other + 3e-6 * (1 + other)).all()


@pytest.mark.parametrize("kind", HARD)
def test_the_grid_is_searched_as_if_point_by_point(kind):
    problem = hard(kind)
    for grid in (GRID, [0.0, 0.7, 1.4], [0.5]):
        weights, losses = grid_weight(*problem, grid=grid)
        right, least = direct_grid(*problem, grid)
        assert torch.equal(weights, right)
        torch.testing.assert_close(losses, least)


@pytest.mark.parametrize("kind", ["peaked", "range50", "one word"])
def test_a_very_fine_grid(kind):
    problem = hard(kind, rows=6)
    grid = [i / 1000 for i in range(2001)]
    weights, losses = grid_weight(*problem, grid=grid)
    _, least = direct_grid(*problem, grid)
    torch.testing.assert_close(losses, least)
    torch.testing.assert_close(losses, direct_loss(problem[0], problem[1], weights, problem[2]))


def test_several_directions_are_searched_each_by_itself():
    big, small, experts = problems(7, 300, 1.5, seed=4, experts=3)
    directions, targets = experts - small, fusion_targets(small, experts)
    for solve, settings in ((exact_weight, {"max_weight": 2.0}), (grid_weight, {"grid": GRID})):
        weights, losses = solve(big, directions, targets, **settings)
        assert weights.shape == losses.shape == (3, 7)
        for t in range(3):
            alone = solve(big, directions[t], targets, **settings)
            torch.testing.assert_close((weights[t], losses[t]), alone)


@pytest.mark.parametrize("solve", [exact_weight, grid_weight])
def test_no_reason_to_move_is_a_weight_of_zero(solve):
    settings = {"max_weight": 2.0} if solve is exact_weight else {"grid": GRID}
    big, direction, targets = hard("peaked")
    still, never = torch.zeros_like(direction), tuple(torch.zeros_like(target) for target in targets)
    for problem in ((big, still, targets), (big, still, never), (big, direction, never)):
        weights, _ = solve(*problem, **settings)
        assert weights.tolist() == [0] * len(big)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            self.size = max(self.size, value.numel() if isinstance(value, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("solve", [exact_weight, grid_weight])
def test_a_solver_waits_for_no_device_and_holds_no_grid_of_vocabularies(solve):
    """Tensors on `meta` have no values: whoever asks for one fails."""
    settings = {"max_weight": 2.0} if solve is exact_weight else {"grid": GRID}
    big, direction, target = (torch.empty(shape, device="meta") for shape in ((4, 128_000), (2, 4, 128_000), (4,)))
    with Largest() as largest:
        weights, losses = solve(big, direction, (target, target), **settings)
    assert weights.shape == losses.shape == (2, 4)
    assert largest.size == direction.numel()


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_the_limit_of_the_weight(limit, models):
    _, trace = fused(models, max_weight=limit)
    wanted = min(limit, FUSION_GRID_BEST)
    assert round(trace["weight"].item(), 6) == wanted
    _, trace = fused(models, max_weight=limit, solver="exact")
    assert abs(trace["weight"].item() - min(limit, FUSION_OPTIMUM[0])) < 1e-4


def test_a_coarser_grid(models):
    _, trace = fused(models, step=0.7)
    by_weight = {w: slow_loss(ONE[0][0], FUSION_DIRECTION[0], w, TARGETS) for w in (0.0, 0.7, 1.4)}
    assert abs(trace["weight"].item() - min(by_weight, key=by_weight.get)) < 1e-6


# --- identities and edges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["grid", "exact"])
def test_a_big_model_equal_to_the_small_one_becomes_the_expert(solver, models):
    probs, trace = fused(models, big=FUSION_SMALL, solver=solver)
    torch.testing.assert_close(probs, FUSION_EXPERT.softmax(-1), atol=1e-5, rtol=0)
    assert abs(trace["weight"].item() - 1) < 1e-5
    small, expert = ONE[1:]
    assert fusion_loss(small, expert - small, 1.0, TARGETS).item() < 1e-20


@pytest.mark.parametrize("solver", ["grid", "exact"])
def test_of_equal_experts_the_first_is_used(solver, models):
    _, trace = fused(models, FUSION_EXPERT, FUSION_EXPERT, solver=solver)
    _, alone = fused(models, FUSION_EXPERT, solver=solver)
    torch.testing.assert_close(trace["weight_0"], alone["weight"])
    assert trace["weight_1"].tolist() == [0]


@pytest.mark.parametrize("solver", ["grid", "exact"])
def test_together_one_expert_is_alone(solver, models):
    together, alone = (fused(models, solver=solver, combine=combine) for combine in ("joint", "single"))
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("solver", ["grid", "exact"])
def test_an_expert_equal_to_the_small_base_changes_nothing(solver, models):
    probs, trace = fused(models, FUSION_SMALL, solver=solver)
    torch.testing.assert_close(probs, FUSION_BASE, atol=ATOL, rtol=0)
    assert trace["weight"].tolist() == [0]
    probs, trace = fused(models, FUSION_SMALL, FUSION_SMALL, solver=solver, combine="joint")
    torch.testing.assert_close(probs, FUSION_BASE, atol=ATOL, rtol=0)
    assert trace["weight"].tolist() == [0]


def test_the_earliest_of_equal_weights_wins():
    flat = torch.zeros_like(FUSION_DIRECTION)  # every weight has the same loss
    (weights,), _ = grid_weights(ONE[0], flat[None], TARGETS, grid=[0.3, 0.1, 0.2])
    torch.testing.assert_close(weights, weights.new_tensor([0.3]))


@pytest.mark.parametrize("solver", ["grid", "exact"])
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_a_huge_direction_is_finite(solver, size, models):
    expert = FUSION_SMALL.clone()
    expert[:, 3] += size  # all but certain of one token
    probs, trace = fused(models, expert, solver=solver)
    assert probs.isfinite().all() and 0 <= trace["weight"].item() <= 2
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0).double())
    # in float32 as well
    single = [values.float() for values in (expert, FUSION_BIG, FUSION_SMALL)]
    probs, _ = fused(models, single[0], big=single[1], small=single[2], solver=solver)
    assert probs.isfinite().all()


@pytest.mark.parametrize("solver", ["grid", "exact"])
def test_a_banned_token_is_in_none_of_the_distributions(solver, models):
    kept = [0, 1, 3, 4]
    banned = FUSION_BIG.clone()
    banned[:, 2] = -torch.inf
    probs, trace = fused(models, big=banned, solver=solver)
    cut = [logits[:, kept] for logits in (FUSION_EXPERT, FUSION_BIG, FUSION_SMALL)]
    without, its_trace = fused(models, cut[0], big=cut[1], small=cut[2], solver=solver)
    assert probs[0, 2] == 0
    torch.testing.assert_close(probs[:, kept], without)
    torch.testing.assert_close(trace["weight"], its_trace["weight"])


def test_each_row_has_its_own_weight(models):
    experts = torch.cat([FUSION_EXPERT, FUSION_SMALL, FUSION_SECOND])
    rows = [values.expand(3, -1) for values in (FUSION_BIG, FUSION_SMALL)]
    probs, trace = fused(models, experts, big=rows[0], small=rows[1])
    for r in range(3):
        alone, its_trace = fused(models, experts[r : r + 1])
        torch.testing.assert_close(probs[r : r + 1], alone)
        torch.testing.assert_close(trace["weight"][r : r + 1], its_trace["weight"])
    assert len(set(trace["weight"].tolist())) == 3


# --- in a generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"solver": "exact"}, {"combine": "joint", "step": 0.5}], ids=str)
def test_generation_equals_recomputation(settings, models):
    big, small, *experts = models
    ids, mask = tiny.prompts()
    processor = DynamicFusionLogitsProcessor(small, experts, **settings)
    out = big.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    trace = processor.stats.trace
    assert trace["weight"].shape == (2, 4)
    torch.testing.assert_close(trace["weight"], trace["weight_0"] + trace["weight_1"])
    grid = [i * settings.get("step", 0.1) for i in range(round(2 / settings.get("step", 0.1)) + 1)]
    for step, scores in enumerate(out.scores):
        rows = [
            row[: ids.shape[1] + step][first:].tolist()
            for row, first in zip(out.sequences, (mask == 0).sum(-1), strict=True)
        ]
        main, base, *tuned = (tiny.recomputed(model, rows).double() for model in models)
        for r in range(2):
            directions = [x[r] - base[r] for x in tuned]
            targets = [
                sum(kl(x[r], base[r]) for x in tuned) / 2,
                sum(kl(base[r], x[r]) for x in tuned) / 2,
            ]
            weights = [trace[f"weight_{i}"][r, step].item() for i in (0, 1)]
            moved = sum(w * d for w, d in zip(weights, directions, strict=True))
            right = (main[r] + moved).log_softmax(-1).float()
            torch.testing.assert_close(scores[r], right, atol=5e-5, rtol=0)
            # no point of the search does better
            points = [(w, 0.0) for w in grid] + [(0.0, w) for w in grid]
            if settings.get("combine") == "joint":
                points = list(itertools.product(grid, repeat=2))
            reached = slow_loss(main[r], moved, 1.0, targets)
            for point in points:
                other = sum(w * d for w, d in zip(point, directions, strict=True))
                assert reached <= slow_loss(main[r], other, 1.0, targets) + 1e-4
            if settings != {"combine": "joint", "step": 0.5}:
                assert min(weights) == 0


def test_a_fixed_weight_of_zero_costs_nothing(models):
    ids, mask = tiny.prompts()
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    processor = DynamicFusionLogitsProcessor(models[1], models[2], weight=0.0)
    ours = models[0].generate(ids, logits_processor=[processor], **settings)
    assert torch.equal(ours, models[0].generate(ids, **settings))
    assert processor.stats.forwards == 0

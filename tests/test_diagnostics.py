"""The diagnostics on what users may hand over: odd shapes, scales and numbers, own layers, strategies with a state."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ff_research.data import Images
from ff_research.diagnostics import (
    dead_units,
    diagnose,
    diversity,
    effective_rank,
    mmd,
    overlap,
    pair_correlation,
    pair_error,
    participation_ratio,
    two_sample_error,
)
from ff_research.network import Network
from ff_research.strategies import STRATEGIES, make_strategy

QUIET = dict(precision="fp32", device="cpu")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (100, 1, 6, 6), generator=generator, dtype=torch.uint8), torch.arange(100) % 4
    return Images("noise", x[:40], y[:40], x[40:], y[40:], 4)


@pytest.fixture
def network():
    return Network([36, 20, 15], seed=3)


# The measures


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_overlap_is_its_definition(rounded):
    a, b = numbers(57), numbers(33, seed=1) + 0.3
    if rounded:
        a, b = a.round(), b.round()
    expected = ((b > a[:, None]).double() + (b == a[:, None]).double() / 2).mean().item()
    assert overlap(a, b) == pytest.approx(expected, abs=1e-12)
    assert overlap(b, a) == pytest.approx(1 - expected, abs=1e-12)
    assert overlap(a.double().exp(), b.double().exp()) == pytest.approx(expected, abs=1e-12)
    assert overlap(a.double().numpy(), b.double()) == pytest.approx(expected, abs=1e-12)


def test_overlap_of_one_and_of_bfloat16():
    assert overlap(torch.ones(1), torch.ones(1)) == 0.5 and overlap([2.0], [1.0]) == 0.0
    assert overlap(numbers(50).bfloat16(), numbers(50).bfloat16()) == 0.5


def test_pairs_are_counted_and_correlated_as_numpy_does():
    a, b = numbers(57).round(decimals=1), numbers(57, seed=1).round(decimals=1)
    for right, wrong in ((a, b), (b, a), (a, a - b), (a.bfloat16(), a.numpy() + 3)):
        x, y = (np.asarray(torch.as_tensor(t).double()) for t in (right, wrong))
        assert pair_error(right, wrong) == pytest.approx(((y > x) + (y == x) / 2).mean(), abs=1e-12)
        assert pair_correlation(right, wrong) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert pair_error(a, a) == 0.5 and pair_error([2.0], [1.0]) == 0
    assert pair_correlation(a, 3 * a - 1) == pytest.approx(1) and pair_correlation(a, -a) == pytest.approx(-1)
    assert pair_correlation(a, torch.ones(57)) == pair_correlation(torch.zeros(57), a) == 0
    for measure in (pair_error, pair_correlation):
        with pytest.raises(ValueError, match="57 and 56 samples"):
            measure(a, b[1:])
    with pytest.raises(ValueError, match="at least 2"):
        pair_correlation(a[:1], b[:1])


def test_pairs_stay_together():
    "Nearly equal pairs: a reader that had seen one half of each would be wrong far more often than by chance."
    x = numbers(300, 30)
    errors = [two_sample_error(x, x + 1e-4 * numbers(300, 30, seed=1), seed=s, units=200) for s in range(5)]
    assert 44 < np.mean(errors) < 56
    assert two_sample_error(x, x) == 50


def test_two_sample_error_sees_more_than_means():
    x = numbers(400, 4)
    related = x.clone()
    related[:, 1] = x[:, 0] * numbers(400, seed=1).sign()  # the same means and variances, and no correlation
    assert two_sample_error(x, related) < 42
    assert two_sample_error(x, numbers(400, 4, seed=2)) > 44
    assert two_sample_error(x, -x.abs()) < 10


def test_two_sample_error_is_pure():
    x, y, state = numbers(60, 3, 4), numbers(60, 3, 4, seed=1) + 0.2, torch.get_rng_state()
    assert two_sample_error(x, y, seed=1) == two_sample_error(x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert two_sample_error(torch.zeros(8, 5), torch.zeros(8, 5)) == 50  # nothing to see


def mmd_by_definition(x, y):
    both = torch.cat([x, y]).double()
    width = torch.nn.functional.pdist(both).median()
    k = torch.exp(-(torch.cdist(both, both) ** 2) / (2 * width**2))
    n, m = len(x), len(y)
    off = (~torch.eye(n, dtype=torch.bool)).double() if n == m else torch.ones(n, m)
    xx, yy, xy = k[:n, :n], k[n:, n:], k[:n, n:]
    return ((xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1)) - 2 * (xy * off).sum() / off.sum()).item()


@pytest.mark.parametrize("n, m", [(30, 30), (30, 20)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_mmd_is_its_definition_at_any_scale(n, m, scale):
    x, y = numbers(n, 5), numbers(m, 5, seed=1) + 1
    assert mmd(scale * x, scale * y) == pytest.approx(mmd_by_definition(x, y), abs=1e-5)


def test_mmd_without_distances():
    assert mmd(torch.ones(5, 2), torch.ones(5, 2)) == 0
    mostly = torch.zeros(20, 2)
    mostly[0] = 1
    assert -2 < mmd(mostly, torch.zeros(20, 2)) < 2
    assert mmd(torch.zeros(9, 2), torch.ones(9, 2)) == pytest.approx(2 - 2 * np.exp(-0.5), abs=0.3)


def test_diversity_by_definition():
    draws = numbers(3, 7, 2, 2)
    same, other = [], []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for i in range(7):
            for j in range(7):
                (same if i == j else other).append((draws[a, i] - draws[b, j]).norm().item())
    assert diversity(draws) == pytest.approx(np.mean(same) / np.mean(other), abs=1e-5)
    assert diversity(torch.ones(2, 4, 3)) == 0


def test_ranks_of_known_spectra():
    z = numbers(60, 8).double()
    q = torch.linalg.qr(z - z.mean(0))[0]  # orthonormal columns, each of mean 0
    s = torch.tensor([4.0, 2, 1, 1], dtype=torch.float64)
    h, p = q[:, :4] * s, s / s.sum()
    assert effective_rank(h) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), abs=1e-6)
    assert participation_ratio(h) == pytest.approx(22**2 / (256 + 16 + 1 + 1), abs=1e-6)
    for scale in (1e-30, 1e30):
        assert effective_rank((h * scale).float()) == pytest.approx(effective_rank(h), rel=1e-3)
    assert effective_rank(h + 100) == pytest.approx(effective_rank(h), rel=1e-6)
    wide = numbers(12, 300)
    assert participation_ratio(wide) <= effective_rank(wide) <= 11 + 1e-6


def test_what_does_not_vary_has_rank_nought():
    for h in (torch.zeros(5, 3), torch.full((5, 3), 0.1), torch.full((2, 1), 7.0)):
        assert effective_rank(h) == participation_ratio(h) == 0
    assert effective_rank(torch.tensor([[0.0, 1], [1, 0]])) == pytest.approx(1)


def test_dead_units():
    h = numbers(50, 8).relu()
    h[:, :3] = 0
    assert dead_units(h) == 3 / 8 and dead_units(h[:, 3:]) == 0 and dead_units(torch.zeros(4, 2)) == 1


TWO = {
    "overlap": overlap,
    "pair_error": pair_error,
    "pair_correlation": pair_correlation,
    "two_sample_error": two_sample_error,
    "mmd": mmd,
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize(
    "spoiled, message",
    [
        (lambda x: x[:0], "shape"),
        (lambda x: x.clone().fill_(float("nan")), "NaN"),
        (lambda x: x.clone().fill_(float("inf")), "infinite"),
        (lambda x: x[:, None].repeat(1, 3), "numbers"),
        (lambda x: torch.tensor(1.0), "shape"),
    ],
)
def test_two_sets_that_have_no_answer(name, spoiled, message):
    x = numbers(10)
    for pair in ((spoiled(x), x), (x, spoiled(x))):
        with pytest.raises(ValueError, match=message):
            TWO[name](*pair)


def test_too_few():
    x = numbers(10, 3)
    for action in (
        lambda: two_sample_error(x[:3], x[:3]),
        lambda: two_sample_error(x, x[:9]),
        lambda: mmd(x[:1], x),
        lambda: diversity(x),
        lambda: diversity(x[None]),
        lambda: diversity(torch.ones(2, 1, 3)),
        lambda: effective_rank(x[:1]),
        lambda: participation_ratio(x[:, :0]),
        lambda: dead_units(x[:0]),
    ):
        with pytest.raises(ValueError):
            action()
    for measure in (effective_rank, participation_ratio, dead_units, lambda h: diversity(torch.stack([h, h]))):
        with pytest.raises(ValueError, match="NaN"):
            measure(x.clone().fill_(float("nan")))


# diagnose


@pytest.mark.parametrize(
    "name", [name for name, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"]
)
def test_every_strategy(images, network, name):
    strategy = make_strategy(name, 4)
    strategy.begin(network, images.x_train[:2])
    weights, learned, state = (
        copy.deepcopy(network.state_dict()),
        copy.deepcopy(strategy.state_dict()),
        torch.get_rng_state(),
    )
    report = diagnose(network, images, strategy, seed=3, **QUIET)
    assert report == json.loads(json.dumps(report)) == diagnose(network, images, strategy, seed=3, **QUIET)
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert all(torch.equal(learned[key], value) for key, value in strategy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(report["layers"]) == {
        "overlap",
        "pair_error",
        "pair_correlation",
        "effective_rank",
        "participation_ratio",
        "dead_units",
    }
    assert all(len(values) == 2 for values in report["layers"].values() if values is not None)
    if not strategy.has_negatives:
        assert (
            report["negatives"]
            is report["layers"]["overlap"]
            is report["layers"]["pair_error"]
            is report["layers"]["pair_correlation"]
            is None
        )
        return
    negatives = report["negatives"]
    assert set(negatives) == {"two_sample_error", "mmd", "diversity", "hardness_untrained"}
    assert negatives["hardness_untrained"] == report["layers"]["overlap"]  # the network is untrained, and of this seed
    assert 0 <= negatives["two_sample_error"] <= 100 and all(
        0 <= v <= 1 for v in report["layers"]["overlap"] + report["layers"]["pair_error"]
    )
    assert all(-1 <= v <= 1 for v in report["layers"]["pair_correlation"])


def test_negatives_between_layers_are_drawn_there(images, network):
    "Layer 2 reads what `before` gives it, not what layer 1 makes of the negatives."

    class Same(STRATEGIES["layer_wise"]):
        name = "same"

        def before(self, s, height, top, generator):
            return s if height == 1 else replace(s, x=torch.cat([s.x[: len(s.y)]] * 2))

    assert diagnose(network, images, Same(4), **QUIET)["layers"]["overlap"][1] == 0.5


def test_seed_and_samples(images, network):
    strategy = make_strategy("image_mixing", 4)
    one, other = (diagnose(network, images, strategy, seed=s, **QUIET)["negatives"] for s in (0, 1))
    assert one["diversity"] != other["diversity"] and one["hardness_untrained"] != other["hardness_untrained"]
    few = diagnose(network, images, None, samples=10, **QUIET)["layers"]["effective_rank"]
    assert max(few) <= 9 + 1e-6


class Convolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3), nn.ReLU())


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(36))

    def forward(self, x):
        return (x.flatten(1) * self.weight).relu()


def test_layers_of_ones_own(images):
    a, b = Network([Convolution()]), Network([Convolution()])
    assert not torch.equal(a.layers[0][0].weight, b.layers[0][0].weight)
    state, strategy = torch.get_rng_state(), make_strategy("masking", 4)
    reports = [diagnose(n, images, strategy, **QUIET) for n in (a, b)]
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        reports[0]["negatives"]["hardness_untrained"] == reports[1]["negatives"]["hardness_untrained"]
    )  # whatever weights the network has
    assert reports[0]["layers"]["effective_rank"] != reports[1]["layers"]["effective_rank"]
    assert diagnose(Network([Stubborn()]), images, strategy, **QUIET)["negatives"]["hardness_untrained"] is None


def test_bfloat16(images, network):
    report = diagnose(network, images, make_strategy("self_contrastive", 4), precision="bf16", device="cpu")
    plain = diagnose(network, images, make_strategy("self_contrastive", 4), **QUIET)
    assert report["negatives"]["two_sample_error"] == plain["negatives"]["two_sample_error"]
    assert report["layers"]["effective_rank"] == pytest.approx(plain["layers"]["effective_rank"], rel=0.05)
    assert next(network.parameters()).dtype == torch.float32


def test_what_cannot_be_diagnosed(images, network):
    strategy = make_strategy("label_embedding", 4)
    for samples in (0, 3, -5):
        with pytest.raises(ValueError, match="at least 4"):
            diagnose(network, images, strategy, samples=samples, **QUIET)
    with pytest.raises(ValueError, match="pixels"):
        diagnose(Network([64, 20]), images, strategy, **QUIET)
    with torch.no_grad():
        network.layers[1].weight[0] = float("nan")
    with pytest.raises(ValueError, match="layer 2 holds NaN"):
        diagnose(network, images, strategy, **QUIET)


def test_a_silent_layer_is_no_error(images, network):
    with torch.no_grad():
        network.layers[0].weight.fill_(-1.0)
    report = diagnose(network, images, make_strategy("label_embedding", 4), **QUIET)["layers"]
    assert report["effective_rank"] == report["participation_ratio"] == [0, 0]
    assert (
        report["dead_units"] == [1, 1]
        and report["overlap"] == report["pair_error"] == [0.5, 0.5]
        and report["pair_correlation"] == [0, 0]
    )

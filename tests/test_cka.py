"""CKA on what users may hand over: other number formats, extreme scales, hardly any samples, large matrices."""

import time

import numpy as np
import pytest
import torch

from ff_research import cka
from ff_research.cka import cka_matrix, compare, linear_cka, minibatch_cka
from ff_research.data import load
from ff_research.network import Network
from ff_research.readout import features


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 30, generator=generator)
    return x, x[:, :10] + torch.randn(80, 10, generator=generator)


def by_definition(x, y):
    "HSIC_1 over all pairs of different samples, in float64."

    def square(m):
        m = m.double() - m.double().mean(0)
        k = m @ m.T
        return k - k.diag().diag()

    def hsic(K, L):
        n = len(K)
        return (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * K.sum(0) @ L.sum(0)

    K, L = square(x), square(y)
    return (hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()).item()


@pytest.mark.parametrize("limit", [0, 1e12], ids=["single", "double"])
@pytest.mark.parametrize("samples, units", [(400, 50), (40, 500)])
def test_both_forms_in_both_precisions(monkeypatch, limit, samples, units):
    monkeypatch.setattr(cka, "EXACT_UP_TO", limit)
    x = torch.rand(samples, units, generator=torch.Generator().manual_seed(1)) + 10
    y = x[:, :20] ** 2
    assert linear_cka(x, y) == pytest.approx(by_definition(x, y), abs=1e-5 if limit == 0 else 1e-10)


def test_an_outlier_is_worth_double_precision(monkeypatch, pair):
    "Nearly everything of its square is diagonal, which single precision could not take away."
    monkeypatch.setattr(cka, "EXACT_UP_TO", 0)
    x, y = pair
    x[0] *= 300
    assert linear_cka(x, y) == pytest.approx(by_definition(x, y), abs=1e-9)


def test_dead_units_and_gradients_have_no_part(pair):
    x, y = pair
    more = torch.cat([x, torch.full((80, 5), 3.3)], dim=1).requires_grad_()
    assert linear_cka(more, y) == pytest.approx(linear_cka(x, y), abs=1e-9)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_number_formats(pair, kind):
    x, y = pair
    assert linear_cka(x.to(kind), y) == pytest.approx(linear_cka(x, y), abs=5e-3)


def test_arrays_and_integers(pair):
    x, y = pair
    assert linear_cka(x.numpy(), y.numpy().astype(np.float64)) == pytest.approx(linear_cka(x, y), abs=1e-6)
    whole = (20 * x).round()
    assert linear_cka(whole.long(), y) == linear_cka(whole, y)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e37])
def test_extreme_scales(pair, scale):
    x, y = pair
    assert linear_cka(x * scale, y) == pytest.approx(linear_cka(x, y), abs=1e-3)
    assert linear_cka(x.double() * scale**5 if scale > 1 else x.double() * scale, y) == pytest.approx(
        linear_cka(x, y), abs=1e-6
    )


def test_inputs_are_left_alone(pair):
    x, y = (m.double() for m in pair)
    before = x.clone(), y.clone()
    linear_cka(x, y), cka_matrix([x, y]), minibatch_cka([(x, y)])
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_four_samples_are_enough(pair):
    x, y = (m[:4] for m in pair)
    assert -1 <= linear_cka(x, y) <= 1
    assert linear_cka(x, x) == pytest.approx(1)


@pytest.mark.parametrize(
    "spoiled, message",
    [
        (lambda x: x[:-1], "79"),
        (lambda x: x[:0], "shape"),
        (lambda x: x[:, :0], "shape"),
        (lambda x: x[:, 0], "shape"),
        (lambda x: torch.full_like(x, 0.1), "constant"),
        (lambda x: torch.zeros_like(x), "constant"),
        (lambda x: torch.eye(80), "equally alike"),
        (lambda x: x.clone().index_fill_(0, torch.tensor([3]), float("nan")), "NaN"),
        (lambda x: x.clone().index_fill_(1, torch.tensor([3]), float("inf")), "NaN or inf"),
    ],
)
def test_what_has_no_answer_is_refused_by_name(pair, spoiled, message):
    x, y = pair
    for arguments, name in (((spoiled(x), y), "x"), ((y, spoiled(x)), "y")):
        with pytest.raises(ValueError, match=message) as error:
            linear_cka(*arguments)
        assert name in str(error.value)


def test_too_few_samples(pair):
    x, y = (m[:3] for m in pair)
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(x, y)
    assert 0 <= linear_cka(x, y, unbiased=False) <= 1
    with pytest.raises(ValueError, match="at least 2"):
        linear_cka(x[:1], y[:1], unbiased=False)


def test_batches_that_do_not_work(pair):
    x, y = pair
    with pytest.raises(ValueError, match="batch 1 has 2 samples"):
        minibatch_cka(zip(x.split(78), y.split(78)))
    for nothing in ([], [(torch.ones(5, 2), y[:5])]):
        with pytest.raises(ValueError, match="0/0"):
            minibatch_cka(nothing)
    half = [(x, y), (torch.ones(5, 3), y[:5])]  # a batch in which one side is silent counts as a zero
    assert -1 < minibatch_cka(half) < 1
    with pytest.raises(ValueError, match="no layers"):
        cka_matrix([])


@pytest.mark.slow
def test_a_whole_test_set_takes_seconds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 2000, generator=generator)
    y = x + torch.randn(10_000, 2000, generator=generator)
    start = time.process_time()
    value = linear_cka(x, y)
    assert time.process_time() - start < 10  # of two cores' time together
    assert value == pytest.approx(linear_cka(x.double(), y.double()), abs=1e-7)


def test_networks_are_compared_on_the_same_images_in_the_same_convention():
    images, where = load("digits"), dict(precision="fp32", device="cpu")
    a, b = Network([64, 20, 15], seed=1), Network([64, 30, 10, 12], seed=2)
    for classes in (None, 10):
        found = compare(a, {"itself": None, "other": b}, images.x_test, classes, **where)
        xs, ys = (features(network, images.x_test, classes, **where) for network in (a, b))
        assert (
            torch.equal(found["itself"], cka_matrix(xs))
            and torch.equal(found["other"], cka_matrix(xs, ys))
            and found["other"].shape == (2, 3)
        )
    biased = compare(a, {"other": b}, images.x_test[:20], unbiased=False, **where)["other"]
    assert (biased > compare(a, {"other": b}, images.x_test[:20], **where)["other"]).all()
    with pytest.raises(ValueError, match="samples"):
        compare(a, {"other": b}, images.x_test[:3], **where)
    with torch.no_grad():
        b.layers[1].weight.zero_()
    with pytest.raises(ValueError, match="constant"):
        compare(a, {"other": b}, images.x_test, **where)

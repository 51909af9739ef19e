"""Distance-Forward-style: oracles, centroids of classes that come late or never, what learns, what stays put, files."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import ff_research as ff
from ff_research.convolution import conv
from ff_research.distance import DistanceObjective, DistanceStrategy, margin_loss, moved
from ff_research.layers import FFConv
from ff_research.network import Network
from ff_research.readout import linear_probe, scores_errors
from ff_research.recipes import RECIPES
from ff_research.runs import run
from ff_research.streams import Streams
from ff_research.training import train

WHERE = dict(device="cpu", precision="fp32")
QUIET = dict(progress=False, **WHERE)


def drawn(count):
    return torch.Generator().manual_seed(count)


@pytest.fixture(scope="module")
def few(digits):
    return replace(digits, x_train=digits.x_train[:200], y_train=digits.y_train[:200])


def streams(h, y):
    return Streams(h, y, (len(h),))


# Oracles


def test_the_loss_is_a_hinge_over_the_other_known_classes():
    d = 2 * torch.rand(40, 6, generator=drawn(1))
    y = torch.randint(0, 6, (40,), generator=drawn(2))
    y[::7] = -100
    known = torch.tensor([True, True, False, True, True, True])
    total = 0.0
    for row, k in zip(d.tolist(), y.tolist()):
        if k >= 0 and known[k]:
            total += sum(max(0.0, row[k] - row[j] + 0.3) for j in range(6) if j != k and known[j])
    torch.testing.assert_close(margin_loss(d, y, known, 0.3).item(), total / int((y >= 0).sum()), rtol=1e-5, atol=1e-5)
    assert margin_loss(d, torch.full((40,), -100), known, 0.3) == 0
    assert margin_loss(d, y, torch.zeros(6, dtype=torch.bool), 0.3) == 0


def test_centroids_are_moving_averages_of_the_classes_in_a_batch():
    centroids, known = torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)
    expected, seen = torch.zeros(4, 3), set()
    for step in range(6):
        f = torch.randn(5, 3, generator=drawn(step))
        y = torch.randint(-1, 3, (5,), generator=drawn(step + 50))
        y = torch.where(y < 0, -100, y)
        centroids, known = moved(centroids, known, f, y, 0.8)
        for k in range(4):
            if (y == k).any():
                mean = f[y == k].mean(0)
                expected[k] = mean if k not in seen else 0.8 * expected[k] + 0.2 * mean
                seen.add(k)
    torch.testing.assert_close(centroids, expected)
    assert known.tolist() == [k in seen for k in range(4)] and not known[3]


@pytest.mark.parametrize("projection", [0, 7])
@pytest.mark.parametrize("shape", [(12,), (12, 4, 3)])
def test_scores_are_minus_the_distances_of_unit_features(shape, projection):
    objective = DistanceObjective(12, 5, projection=projection)
    h = torch.rand(20, *shape, generator=drawn(3))
    y = torch.arange(20) % 4  # class 4 is never seen
    objective.penalty(h, streams(h, y))
    f = h.flatten(2).mean(2) if len(shape) > 1 else h
    f = F.normalize(f if not projection else f @ objective.matrix.T, dim=1)
    means = torch.stack([f[y == k].mean(0) for k in range(4)])
    expected = torch.linalg.vector_norm(f[:, None] - means, dim=2)
    scores = objective.scores(h)
    torch.testing.assert_close(scores[:, :4], -expected, rtol=1e-4, atol=1e-5)
    assert (scores[:, 4] < scores[:, :4].amin(1)).all() and torch.isfinite(scores).all()


def test_the_gradient_is_autograds_of_the_plain_form_and_centroids_get_none():
    objective = DistanceObjective(6, 3, margin=0.5)
    first, second = torch.rand(2, 9, 6, generator=drawn(4)).unbind()
    y = torch.arange(9) % 3
    objective.penalty(first, streams(first, y))
    before = objective.centroids.clone()
    h = second.clone().requires_grad_()
    loss, g = objective(h, streams(h, y))
    loss.backward()
    other = second.clone().requires_grad_()
    d = torch.cdist(F.normalize(other, dim=1)[None], before[None])[0]
    plain = sum((d[i, y[i]] - d[i, j] + 0.5).clamp(min=0) for i in range(9) for j in range(3) if j != y[i]) / 9
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(h.grad, other.grad, rtol=1e-3, atol=1e-5)
    assert not objective.centroids.requires_grad and not torch.equal(before, objective.centroids)
    assert torch.equal(objective.goodness(second), objective.goodness(second)), "pure"


def test_a_silent_image_gives_no_nan():
    objective = DistanceObjective(4, 3)
    h = torch.zeros(6, 4, requires_grad=True)
    for _ in range(2):
        loss, _ = objective(h, streams(h, torch.arange(6) % 3))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all() and torch.isfinite(objective.centroids).all()


def test_the_centroids_move_once_an_update(few):
    network = Network([64, 20])
    objective = DistanceObjective(20, 10, momentum=0.0)
    calls, penalty = [], DistanceObjective.penalty

    class Counted(DistanceObjective):
        def penalty(self, h, s):
            calls.append(len(h))
            return penalty(self, h, s)

    objective.__class__ = Counted
    train(network, few, DistanceStrategy(10), objective=objective, epochs=2, batch_size=50, lr=1e-3, **QUIET)
    assert calls == [50] * 8


# What learns


@pytest.mark.parametrize("projection", [0, 32])
def test_fully_connected_layers_learn(projection, digits):
    errors = []
    for seed in range(2):
        network = Network([64, 100, 100], seed=seed)
        strategy = DistanceStrategy(10, projection=projection)
        train(network, digits, strategy, epochs=8, lr=3e-3, optimizer="adamw", seed=seed, **QUIET)
        errors.append(scores_errors(network, digits, **WHERE))
    assert all(one["sum"] < 9 and one["layer_2"] < 9 for one in errors), errors


def test_convolutions_learn_and_gain_over_their_random_start(digits):
    network = conv(digits.shape, (8, 16))
    read = lambda: linear_probe(network, digits, neutral_label=False, joined=1, **WHERE)["test"]["layer_2"]  # noqa: E731
    before = read()
    train(network, digits, DistanceStrategy(10), epochs=6, lr=1e-2, optimizer="adamw", **QUIET)
    after, own = read(), scores_errors(network, digits, **WHERE)
    assert after < before - 1.5 and own["layer_2"] < 8, (before, after, own)


def test_a_class_without_images_and_images_without_a_label_do_no_harm(digits):
    keep = digits.y_train != 7
    images = replace(digits, x_train=digits.x_train[keep], y_train=digits.y_train[keep].clone())
    network = Network([64, 60])
    train(network, images, DistanceStrategy(10), epochs=5, lr=5e-3, optimizer="adamw", **QUIET)
    assert network.objectives[0].known.tolist() == [k != 7 for k in range(10)]
    assert (ff.predict(network, digits.x_test, **WHERE) != 7).all()
    known = digits.y_test != 7
    rest = replace(images, x_test=digits.x_test[known], y_test=digits.y_test[known])
    assert scores_errors(network, rest, **WHERE)["layer_1"] < 15


def test_overlapping_updates_train(few):
    network = Network([FFConv(1, 8), FFConv(8, 8)])
    train(network, few, DistanceStrategy(10), epochs=2, overlap=True, lr=0.01, **QUIET)
    assert all(torch.isfinite(p).all() for p in network.parameters()) and network.objectives[1].known.all()


# What stays put


def state(network, height):
    own = {**network.layers[height].state_dict()}
    if len(network.objectives):
        own |= {f"objective.{key}": value for key, value in network.objectives[height].state_dict().items()}
    return {key: value.clone() for key, value in own.items()}


@pytest.mark.parametrize("make", [lambda: Network([64, 20, 20]), lambda: conv((1, 8, 8), (6, 8))])
def test_other_layers_and_their_centroids_keep_every_bit_while_one_learns(make, few):
    network, seen = make(), []
    options = dict(schedule="greedy", lr=1e-2, optimizer="adamw", draw="batch")
    keep = lambda epoch, network: seen.append([state(network, i) for i in range(2)])  # noqa: E731
    train(network, few, DistanceStrategy(10, projection=6), epochs=2, after_epoch=keep, **options, **QUIET)
    for epoch, (a, b) in enumerate(zip(seen, seen[1:]), start=1):
        moved = [not all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)]
        assert moved == [epoch < 2, epoch >= 2]


def test_a_layer_learns_the_same_with_a_layer_above_it(few):
    found = []
    for widths in ([64, 20], [64, 20, 30]):
        network = Network(widths)
        train(network, few, DistanceStrategy(10), epochs=2, lr=3e-3, optimizer="adamw", **QUIET)
        found.append((network.layers[0].weight, network.objectives[0].centroids))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("make", [lambda: Network([64, 20, 20]), lambda: conv((1, 8, 8), (6, 8))])
def test_a_stopped_run_goes_on_bit_for_bit_with_its_centroids(make, few, tmp_path):
    class Stopped(Exception):
        pass

    def die(epoch, network):
        if epoch == 0:
            raise Stopped

    whole, first, second = make(), make(), make()
    options, path = dict(epochs=3, lr=3e-3, optimizer="adamw"), tmp_path / "run.safetensors"
    train(whole, few, DistanceStrategy(10, projection=5), **options, **QUIET)
    with pytest.raises(Stopped):
        train(first, few, DistanceStrategy(10, projection=5), checkpoint=path, after_epoch=die, **options, **QUIET)
    train(second, few, DistanceStrategy(10, projection=5), checkpoint=path, **options, **QUIET)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and any("centroids" in key for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)


# Files, sizes, recipes


@pytest.mark.parametrize("make", [lambda: Network([64, 20, 20]), lambda: conv((1, 8, 8), (6, 8))])
@pytest.mark.parametrize("projection", [0, 5])
def test_a_saved_network_predicts_the_same(make, projection, few, tmp_path):
    network = make()
    train(network, few, DistanceStrategy(10, projection=projection), epochs=2, lr=3e-3, optimizer="adamw", **QUIET)
    ff.save(network, tmp_path / "n.safetensors")
    again = ff.load_network(tmp_path / "n.safetensors")
    assert torch.equal(ff.predict(network, few.x_test, **WHERE), ff.predict(again, few.x_test, **WHERE))
    assert repr(again.strategy) == repr(network.strategy) and repr(again.objectives) == repr(network.objectives)
    assert torch.equal(again.objectives[0].centroids, network.objectives[0].centroids)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 9), (3, 32, 32)])
def test_images_of_any_size(shape):
    x = torch.rand(12, *shape, generator=drawn(5))
    images = ff.from_arrays("noise", x, torch.arange(12) % 3, x_test=x[:6], y_test=torch.arange(6) % 3)
    network = conv(shape, (4, 6))
    train(network, images, DistanceStrategy(3), epochs=2, lr=1e-3, **QUIET)
    assert ff.predict(network, x[:6], **WHERE).shape == (6,)


def test_wrong_input_is_refused_in_words(few):
    for call, words in [
        (lambda: DistanceObjective(4, 3, margin=0.0), "a margin above 0"),
        (lambda: DistanceObjective(4, 3, momentum=1.0), "momentum from 0 to below 1"),
        (lambda: DistanceObjective(4, 3, projection=-1), "projection=-1: expected a whole number"),
        (lambda: DistanceObjective(4, 3, projection=2.5), "projection=2.5"),
        (lambda: train(Network([64, 9]), few, DistanceStrategy(10), 1, micro_batch=4, **QUIET), "means over images"),
        (lambda: train(Network([64, 9]), few, DistanceStrategy(3), epochs=1, **QUIET), "label"),
        (lambda: train(Network([torch.nn.Linear(64, 5)]), few, DistanceStrategy(10), epochs=1, **QUIET), "`units`"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_the_recipe_for_digits_learns():
    row = run(RECIPES["distance-digits"], 0, progress=False, **WHERE)
    assert row["errors"]["test"]["scores"]["sum"] < 8 and row["errors"]["test"]["probe"]["layers_1_to_2"] < 6, row


def test_no_recipe_claims_the_papers_number():
    mine = [r for r in RECIPES.values() if r.strategy.name == "distance"]
    assert len(mine) >= 3 and not any(r.target for r in mine)

"""Training: every update against autograd and torch's optimisers, and what happens with unusual or unusable input."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ff_research.backprop import train_backprop
from ff_research.checkpoints import read_checkpoint
from ff_research.checks import PRECISIONS, best_device, best_precision
from ff_research.data import Images
from ff_research.goodness import mean_activity, symba_loss
from ff_research.labels import labelled, wrong_labels
from ff_research.layers import FFConv, FFLinear, normalise, prepare
from ff_research.learners import FusedLearner, Learner
from ff_research.network import Network, activities
from ff_research.objectives import Objective, PeerNormalisation, hinton, swish_symba, symba
from ff_research.optimisers import LR_SCHEDULES, OPTIMIZERS, cool_down
from ff_research.readout import features, label_goodness, linear_probe
from ff_research.schedules import SCHEDULES
from ff_research.strategies import STRATEGIES
from ff_research.streams import Streams
from ff_research.training import Diverged, train

QUIET = dict(precision="fp32", device="cpu", progress=False)
LABELS = STRATEGIES["label_embedding"]


def weights(network):
    return torch.cat([p.detach().flatten().float() for p in network.parameters()])


def small(**options):
    return Network([64, 30, 30], **options)


def pairs(x, y=None):
    "Rows of positives, then as many negatives."
    return Streams(x, y, (len(x) // 2,) * 2)


def with_peers(objective, peers):
    "A copy of an objective that has this peer normalisation, None for none."
    objective = copy.deepcopy(objective)
    objective.peers = peers
    return objective


@torch.no_grad()
def update(learner, s):
    "One update of a layer, as a step of training makes it: what is handed on, the loss and the goodness."
    learner.activity([s.x])
    loss, g = learner.learn(s)
    return learner.hand_on(), loss, g


# One update

OBJECTIVES = {
    "hinton": hinton(),
    "hinton, scaled": hinton(theta=20.0, scale=0.3),
    "symba": symba(),
    "swish_symba": swish_symba(),
    "mean_activity": hinton(theta=0.4, scale=5.0, goodness=mean_activity),
    "symba, mean_activity": symba(goodness=mean_activity),
}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("peer_weight", [0.0, 3.0])
@pytest.mark.parametrize("full_gradient", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_update_is_autograds(objective, full_gradient, peer_weight, dense):
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (33,), generator=draw)
    x = prepare(labelled(torch.rand(33, 1, 8, 8, generator=draw), torch.stack([y, wrong_labels(y, 10, draw)]), 10), 64)
    x = x.dense() if dense else x
    layer, peer = FFLinear(64, 21, full_gradient, draw), PeerNormalisation(21, peer_weight) if peer_weight else None
    layer.bias.data.normal_(generator=draw, std=0.1)

    theirs, mine, own_peer = copy.deepcopy(layer), copy.deepcopy(layer), copy.deepcopy(peer)
    h = theirs(x)
    loss, g = objective(h, pairs(x, y))
    total = loss if peer is None else loss + peer(h[:33].mean(0))
    total.backward()
    learner = FusedLearner(mine, with_peers(objective, own_peer), "sgd", 1.0, 0.0)
    handed_on, my_loss, my_g = update(learner, pairs(x, y))

    largest = theirs.weight.grad.abs().max().item()
    assert largest > 0
    for p, start, end in zip(theirs.parameters(), layer.parameters(), mine.parameters()):
        torch.testing.assert_close((start - end).detach(), p.grad, rtol=1e-5, atol=1e-5 * largest)
    torch.testing.assert_close(my_loss, loss.detach())
    torch.testing.assert_close(my_g, g.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(handed_on, normalise(h.detach()), rtol=1e-5, atol=1e-5)
    if peer is not None:
        torch.testing.assert_close(own_peer.mean, peer.mean)


def test_peer_gradient_is_masked_unless_full():
    "A unit that is silent for every image is moved by peer normalisation with the full gradient only."
    for full_gradient in (False, True):
        layer = FFLinear(8, 5, full_gradient, torch.Generator().manual_seed(0))
        layer.bias.data[2] = -100.0
        before = layer.weight[2].detach().clone()
        x = normalise(torch.rand(20, 8))
        update(FusedLearner(layer, with_peers(hinton(), PeerNormalisation(5, 3.0)), "sgd", 1.0, 0.0), pairs(x))
        assert torch.equal(before, layer.weight[2].detach()) != full_gradient


def test_bfloat16_update_is_near_the_float32_one():
    draw = torch.Generator().manual_seed(0)
    x, layer = normalise(torch.rand(200, 64, generator=draw)), FFLinear(64, 40, generator=draw)
    changes = []
    for precision, dtype in PRECISIONS.items():
        mine = copy.deepcopy(layer)
        update(FusedLearner(mine, symba(), "sgd", 1.0, 0.0, precision), pairs(x.to(dtype)))
        assert mine.weight.dtype == torch.float32
        changes.append((mine.weight - layer.weight).detach().flatten())
    assert torch.cosine_similarity(*changes, dim=0) > 0.995


@pytest.mark.parametrize("objective", [hinton(), symba()], ids=["hinton", "symba"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ten_steps_of_two_layers_are_those_of_torch(objective, optimizer):
    "The whole inner loop against plain autograd, detached between layers, and torch's optimisers (no weight decay)."
    draw = torch.Generator().manual_seed(1)
    mine = Network([20, 15, 12])
    theirs = copy.deepcopy(mine)
    make = (
        partial(torch.optim.SGD, momentum=0.9) if optimizer == "sgd" else partial(torch.optim.AdamW, weight_decay=0.0)
    )
    optimizers = [make(layer.parameters(), lr=0.01) for layer in theirs.layers]
    learners = [FusedLearner(layer, objective, optimizer, 0.01, 0.0) for layer in mine.layers]
    for _ in range(10):
        x = normalise(torch.rand(30, 20, generator=draw))
        a = b = x
        for learner, layer, step in zip(learners, theirs.layers, optimizers):
            a, _, _ = update(learner, pairs(a))
            h = layer(b)
            step.zero_grad()
            objective(h)[0].backward()
            step.step()
            b = normalise(h).detach()
    torch.testing.assert_close(weights(mine), weights(theirs), rtol=1e-4, atol=1e-5 if optimizer == "sgd" else 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_making_an_optimiser_changes_no_weight(name):
    start = torch.randn(4, 5)
    weight = start.clone()
    OPTIMIZERS[name]([weight], [weight], 0.5)
    assert torch.equal(weight, start)


def test_adamw_is_torchs():
    theirs = torch.randn(20, 30, generator=torch.Generator().manual_seed(2)).requires_grad_()
    mine = theirs.detach().clone()
    reference, own = (
        torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, fused=True),
        OPTIMIZERS["adamw"]([mine], [mine], 0.1),
    )
    for _ in range(20):
        theirs.grad = torch.randn(20, 30)
        own.accumulate(0, theirs.grad)
        reference.step()
        own.step(0.01)
    assert torch.equal(theirs, mine)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_follow_the_weights(name):
    weight = torch.randn(300, 1000)  # more than one block
    copy_ = weight.bfloat16()
    optimizer = OPTIMIZERS[name]([weight], [copy_], 0.01)
    for _ in range(3):
        optimizer.accumulate(0, torch.randn(300, 1000).bfloat16())
        optimizer.step(0.1)
    assert torch.equal(copy_, weight.bfloat16())


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 60, 61])
def test_cool_down_never_exceeds_the_rate(epochs):
    factors = [cool_down(epoch, epochs) for epoch in range(epochs)]
    assert (
        factors[0] == max(factors) == 1
        and factors[-1] == min(1, 2 / epochs)
        and factors == sorted(factors, reverse=True)
    )


# Layers learn alone


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_upper_layers_never_change_lower_ones(digits, schedule):
    "The first layer learns the same whether it has company or not."
    alone, below = Network([64, 30]), Network([64, 30, 30, 30])
    for network in (alone, below):
        train(network, digits, LABELS(10), epochs=2, schedule=schedule, **QUIET)
    if schedule == "together":
        assert torch.equal(alone.layers[0].weight, below.layers[0].weight)
    assert all(p.grad is None for p in below.parameters())


def test_greedy_trains_a_layer_on_the_frozen_ones_below(digits):
    network = Network([64, 30, 30])
    history = train(network, digits, LABELS(10), epochs=3, schedule="greedy", **QUIET)
    first = Network([64, 30])
    train(first, digits, LABELS(10), epochs=3, schedule="greedy", **QUIET)
    assert len(history) == 6 and torch.equal(first.layers[0].weight, network.layers[0].weight)


def test_greedy_layers_may_have_epochs_of_their_own(digits):
    network, equal = Network([64, 30, 30, 30]), Network([64, 30, 30, 30])
    assert len(train(network, digits, LABELS(10), epochs=[2, 0, 4], schedule="greedy", **QUIET)) == 6
    start = Network([64, 30, 30, 30])
    assert [torch.equal(a.weight, b.weight) for a, b in zip(network.layers, start.layers)] == [False, True, False]
    again = Network([64, 30, 30, 30])
    for n, epochs in ((equal, 2), (again, (2, 2, 2))):
        train(n, digits, LABELS(10), epochs=epochs, schedule="greedy", **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(equal.parameters(), again.parameters()))


class Convolution(nn.Module):
    def __init__(self, channels_in, channels):
        super().__init__()
        self.channels_in, self.units = channels_in, channels
        self.conv = nn.Conv2d(channels_in, channels, 7, padding=3)
        nn.init.normal_(self.conv.weight, std=0.2 / channels_in**0.5, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.conv(x.view(len(x), self.channels_in, 8, 8)).relu()


def test_any_modules_update_is_autograds():
    "Peer normalisation keeps one average a channel, over images and positions."
    draw = torch.Generator().manual_seed(0)
    theirs = Convolution(1, 6)
    mine, x = copy.deepcopy(theirs), torch.rand(40, 1, 8, 8, generator=draw)
    peer = PeerNormalisation(6, 3.0)
    own_peer = copy.deepcopy(peer)
    h = theirs(x)
    (hinton()(h.flatten(1))[0] + peer(h[:20].mean((0, 2, 3)))).backward()
    handed_on, _, _ = update(Learner(mine, with_peers(hinton(), own_peer), "sgd", 1.0, 0.0), pairs(x))
    for p, q in zip(theirs.parameters(), mine.parameters()):
        torch.testing.assert_close(p.detach() - p.grad, q.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_peer.mean, peer.mean)
    assert handed_on.shape == (40, 6, 8, 8)
    torch.testing.assert_close(handed_on.square().mean((1, 2, 3)), torch.ones(40), rtol=1e-3, atol=1e-3)


def test_convolutions_train_and_are_read(digits):
    network = Network([Convolution(1, 4), Convolution(4, 4)])
    history = train(network, digits, LABELS(10), epochs=3, optimizer="adamw", lr=3e-3, **QUIET)
    assert all(math.isfinite(v) for epoch in history.column("loss") for v in epoch)
    maps = activities(network, digits.x_test[:5])
    assert [tuple(h.shape) for h in maps] == [(5, 4, 8, 8)] * 2
    flat = features(network, digits.x_test[:5], precision="fp32", device="cpu")
    assert all(torch.equal(f, h.flatten(1)) for f, h in zip(flat, maps))
    assert label_goodness(network, digits.x_test[:5], 10, precision="fp32", device="cpu").shape == (5, 10)
    assert linear_probe(network, digits, precision="fp32", device="cpu")["test"].keys() == {"layer_1", "layer_2"}


class Linear(nn.Linear):
    flat = True  # fully connected, which the default objective asks for

    def forward(self, x):
        return super().forward(x.flatten(1)).relu()


def test_custom_linear_layer_learns_what_the_built_in_one_learns(digits):
    built_in, own = Network([64, 30]), Linear(64, 30)
    own.load_state_dict(built_in.layers[0].state_dict())
    own = Network([own])
    for network in (built_in, own):
        train(network, digits, LABELS(10), epochs=2, **QUIET)
    torch.testing.assert_close(weights(built_in), weights(own), rtol=1e-3, atol=1e-4)


# Runs


def test_same_seed_same_bits_and_other_seed_others(digits):
    runs = []
    for seed in (3, 3, 4):
        network = small()
        train(network, digits, LABELS(10), epochs=2, seed=seed, peer=0.03, **QUIET)
        runs.append(weights(network))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layer_learns(digits, schedule, precision):
    network = Network([64, 100, 100])
    history = train(
        network, digits, LABELS(10), epochs=12, schedule=schedule, device="cpu", precision=precision, progress=False
    )
    columns = history.column("separation")
    final = columns[-1] if schedule == "together" else [columns[11][0], columns[23][0]]
    assert min(final) > 0.75, final


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_backprop_fits_digits(digits, optimizer):
    network = Network([64, 100, 100])
    history = train_backprop(
        network,
        digits,
        epochs=10,
        optimizer=optimizer,
        lr={"sgd": 0.03, "plain_sgd": 0.3, "adamw": 3e-3}[optimizer],
        **QUIET,
    )
    assert history.column("separation")[-1][0] > 0.97 and network.head.weight.shape == (10, 100)


def test_backprop_after_forward_forward_with_a_learned_objective(digits):
    class Scaled(Objective):
        def __init__(self):
            super().__init__()
            self.inner, self.log_scale = symba(), nn.Parameter(torch.zeros(()))

        def goodness(self, h, s):
            return self.inner.goodness(h, s)

        def loss(self, g, s):
            return self.inner.loss(g, s) * self.log_scale.exp()

    network = small()
    train(network, digits, LABELS(10), epochs=1, objective=Scaled(), lr=0.1, **QUIET)
    scales = [objective.log_scale.item() for objective in network.objectives]
    assert all(scale < 0 for scale in scales) and len(set(scales)) == 2  # learned, each layer's own
    train(network, digits, LABELS(10), epochs=0, objective=Scaled(), **QUIET)
    assert [objective.log_scale.item() for objective in network.objectives] == scales  # kept by the next call
    train_backprop(network, digits, epochs=1, **QUIET)
    assert [objective.log_scale.item() for objective in network.objectives] == scales


@pytest.mark.parametrize(
    "name, objective", [("label_embedding", hinton(theta=40.0)), ("label_embedding", symba()), ("random_noise", None)]
)
@pytest.mark.parametrize("first", [1, 2])
def test_pairwise_backprop_is_autograds_gradient_of_one_loss(digits, name, objective, first):
    class Remembering(STRATEGIES[name]):
        def streams(self, *arguments):
            self.given = super().streams(*arguments)
            return self.given

    network, strategy = small(), Remembering(10)
    start = copy.deepcopy(network)
    history = train_backprop(
        network,
        digits,
        1,
        strategy=strategy,
        objective=objective,
        lr=0.5,
        weight_decay=0.0,
        batch_size=len(digits.y_train),
        first=first,
        **QUIET,
    )
    h, total = start.prepare(strategy.given.x), 0.0
    for depth, layer in enumerate(start.layers, start=1):
        activity = layer(h)
        h, total = normalise(activity), total + (activity.square().sum(1) if depth >= first else 0.0)
    g_pos, g_neg = total.chunk(2)
    units = activity.shape[1]
    if objective is not None and objective.of_goodness is symba_loss:
        loss = nn.functional.softplus(4 * (g_neg - g_pos) / units).mean()
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(
            torch.cat([g_pos, g_neg]) - (40.0 if objective else units),
            torch.cat([torch.ones_like(g_pos), torch.zeros_like(g_neg)]),
        )
    grads = torch.autograd.grad(loss, list(start.layers.parameters()))
    for before, grad, after in zip(start.layers.parameters(), grads, network.layers.parameters()):
        torch.testing.assert_close(before - 0.5 * grad, after, rtol=1e-3, atol=1e-5)
    assert history.epochs[0]["loss"][0] == pytest.approx(loss.item(), rel=1e-4) and not hasattr(network, "head")
    assert history.epochs[0]["separation"][0] == pytest.approx((g_pos > g_neg).float().mean().item(), abs=1e-6)


def test_pairwise_backprop_learns_and_resumes(digits, tmp_path):
    networks = [small() for _ in range(3)]
    options = dict(strategy=LABELS(10), lr=0.01, **QUIET)
    history = train_backprop(networks[0], digits, 6, **options)
    assert history.column("separation")[-1][0] > 0.85

    class Stop(Exception):
        pass

    def stop(epoch, network):
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        train_backprop(networks[1], digits, 6, checkpoint=tmp_path / "c", after_epoch=stop, **options)
    train_backprop(networks[1], digits, 6, checkpoint=tmp_path / "c", **options)
    assert torch.equal(weights(networks[0]), weights(networks[1]))
    for other in (
        dict(lr=0.01, **QUIET),
        options | dict(first=2),
    ):  # a checkpoint of the pairwise run is not one of the others
        with pytest.raises(ValueError, match="another run"):
            train_backprop(networks[2], digits, 6, checkpoint=tmp_path / "c", **other)


@pytest.mark.parametrize("strategy", [None, LABELS(10)], ids=["cross-entropy", "pairs"])
def test_backprop_refuses_a_network_whose_gradient_is_not_the_true_one(digits, strategy):
    network = Network([64, 10, 10], full_gradient=True)
    before = weights(network)
    with pytest.raises(ValueError, match="full_gradient"):
        train_backprop(network, digits, 1, strategy=strategy, **QUIET)
    assert not hasattr(network, "head") and torch.equal(before, weights(network))


@pytest.mark.parametrize("first, strategy", [(0, LABELS(10)), (3, LABELS(10)), (2, None)])
def test_goodness_from_no_layer(digits, first, strategy):
    network = small()
    before = weights(network)
    with pytest.raises(ValueError, match=f"first={first}: expected the number of a layer, 1…2"):
        train_backprop(network, digits, 1, strategy=strategy, first=first, **QUIET)
    assert torch.equal(before, weights(network)) and not hasattr(network, "head")


@pytest.mark.parametrize(
    "strategy, objective, message",
    [
        ("mono_forward", None, "gives no pairs"),
        ("layer_wise", None, "gives no pairs"),
        ("label_embedding", hinton(goodness=mean_activity), "sum of all layers' goodness"),
    ],
)
def test_pairs_that_backprop_cannot_use(digits, strategy, objective, message):
    network = small()
    before = weights(network)
    with pytest.raises(ValueError, match=message):
        train_backprop(network, digits, 1, strategy=STRATEGIES[strategy](10), objective=objective, **QUIET)
    assert torch.equal(weights(network), before)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_look_after_each_epoch_changes_nothing(digits, schedule, precision):
    seen, networks = [], [small(), small()]

    def look(epoch, network):
        seen.append((epoch, weights(network).clone()))
        torch.rand(3)

    for network, after_epoch in zip(networks, (None, look)):
        train(
            network,
            digits,
            LABELS(10),
            3,
            schedule=schedule,
            after_epoch=after_epoch,
            precision=precision,
            device="cpu",
            progress=False,
        )
    assert torch.equal(weights(networks[0]), weights(networks[1])) and torch.equal(seen[-1][1], weights(networks[1]))
    assert [epoch for epoch, _ in seen] == list(range(3 if schedule == "together" else 6))
    assert not torch.equal(seen[0][1], seen[1][1])


def test_training_goes_on(digits):
    network = small()
    first = train(network, digits, LABELS(10), epochs=5, **QUIET).column("separation")
    second = train(network, digits, LABELS(10), epochs=5, seed=1, **QUIET).column("separation")
    assert second[0][0] > first[0][0] + 0.1


def test_one_rate_for_each_layer(digits):
    network, start = small(), small()
    train(network, digits, LABELS(10), epochs=1, lr=[0.0, 1e-3], **QUIET)
    assert torch.equal(network.layers[0].weight, start.layers[0].weight)
    assert not torch.equal(network.layers[1].weight, start.layers[1].weight)


@pytest.mark.parametrize("method", ["ff", "greedy", "backprop"])
def test_the_callers_world_stays_as_it_was(digits, method):
    images = replace(digits, x_train=digits.x_train.float() / 255)
    before = images.x_train.clone(), images.y_train.clone()
    objective, state, threads, dtype = (
        symba(),
        torch.get_rng_state(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )
    if method == "backprop":
        train_backprop(small(), images, epochs=1, **QUIET)  # makes a head
    else:
        train(
            small(),
            images,
            LABELS(10),
            epochs=1,
            objective=objective,
            schedule="greedy" if method == "greedy" else "together",
            **QUIET,
        )
    assert torch.equal(before[0], images.x_train) and torch.equal(before[1], images.y_train)
    assert (
        torch.equal(state, torch.get_rng_state())
        and threads == torch.get_num_threads()
        and dtype == torch.get_default_dtype()
    )
    assert torch.is_grad_enabled()


def test_float_and_uint8_images_train_alike(digits):
    networks = small(), small()
    for network, images in zip(networks, (digits, replace(digits, x_train=digits.x_train.float() / 255))):
        train(network, images, LABELS(10), epochs=1, **QUIET)
    torch.testing.assert_close(weights(networks[0]), weights(networks[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 1437, 5000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_batch_size(digits, batch_size, schedule):
    few = replace(digits, x_train=digits.x_train[:15], y_train=digits.y_train[:15])
    options = dict(epochs=2, peer=0.03, batch_size=batch_size, schedule=schedule, **QUIET)
    history = train(small(), few, LABELS(10), **options)
    assert all(
        math.isfinite(v)
        for key in ("loss", "separation", "g_pos", "g_neg")
        for epoch in history.column(key)
        for v in epoch
    )


def test_no_epochs_change_nothing(digits):
    for optimizer in OPTIMIZERS:
        network, start = small(), weights(small())
        assert len(train(network, digits, LABELS(10), epochs=0, optimizer=optimizer, **QUIET)) == 0
        assert torch.equal(weights(network), start)


# Wrong input: one error that says what is wrong, and an untouched network

WRONG = [
    (dict(schedule="gready"), "unknown schedule 'gready'; did you mean 'greedy'?"),
    (dict(epochs=(1, 1)), "with schedule='greedy' one for each of the 2 layers"),
    (dict(epochs=(1, 1, 1), schedule="greedy"), "with schedule='greedy' one for each of the 2 layers"),
    (dict(epochs=(1, -1), schedule="greedy"), "expected epochs >= 0"),
    (dict(epochs=(4, 6), schedule="greedy", rounds=4), "a divisor of epochs=[4, 6]"),
    (dict(lr_schedule="cooldown"), "did you mean 'cool_down'?"),
    (dict(optimizer="adam"), "did you mean 'adamw'?"),
    (dict(precision="fp8"), "unknown precision 'fp8'"),
    (dict(device="abacus"), "device 'abacus' cannot be used here"),
    (dict(epochs=-1), "expected epochs >= 0"),
    (dict(batch_size=0), "batch_size >= 1"),
    (dict(lr=-1e-3), "expected one rate >= 0"),
    (dict(lr=[1e-3]), "one for each of the 2 layers"),
    (dict(strategy=LABELS(5)), "labels range from 0 to 9; expected 0…4"),
    (dict(strategy=LABELS(65)), "65 classes need as many pixels"),
]


@pytest.mark.parametrize(
    "options, message", WRONG, ids=[", ".join(map(str, options)) + f" {i}" for i, (options, _) in enumerate(WRONG)]
)
def test_unusable_settings(digits, options, message):
    network = small()
    with pytest.raises(ValueError) as error:
        train(network, digits, **{"strategy": LABELS(10), "epochs": 1, **QUIET, **options})
    assert message in str(error.value) and torch.equal(weights(network), weights(small()))
    if options.keys() <= {"lr_schedule", "optimizer", "precision", "device", "epochs", "batch_size"}:
        with pytest.raises(ValueError):
            train_backprop(network, digits, **{"epochs": 1, **QUIET, **options})
        assert torch.equal(weights(network), weights(small())) and not hasattr(network, "head")


def hand_built(digits, **changes):
    few = replace(digits, name="scans", x_train=digits.x_train[:20].float() / 255, y_train=digits.y_train[:20].clone())
    return replace(few, **changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_float_images_that_are_not_finite(digits, value):
    images = hand_built(digits)
    images.x_train[13, 0, 4, 4] = value
    for run in (
        lambda: train(small(), images, LABELS(10), epochs=1, **QUIET),
        lambda: train_backprop(small(), images, epochs=1, **QUIET),
    ):
        with pytest.raises(ValueError, match="'scans': training image 13 holds NaN or infinite pixels"):
            run()


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda d: dict(y_train=d.y_train[:19]), "20 training images and 19 labels"),
        (lambda d: dict(x_train=d.x_train[:0], y_train=d.y_train[:0]), "0 training images"),
        (lambda d: dict(y_train=d.y_train[:20] + 1), "labels range from"),
        (lambda d: dict(y_train=d.y_train[:20].float()), "expected integers"),
        (lambda d: dict(x_train=torch.rand(20, 1, 9, 9)), "81 pixels, but the network's first layer takes 64"),
    ],
)
def test_hand_built_images_that_do_not_fit(digits, changes, message):
    with pytest.raises(ValueError, match=message):
        train(small(), hand_built(digits, **changes(digits)), LABELS(10), epochs=1, **QUIET)


def test_weights_of_another_precision(digits):
    for network in (small().double(), small().bfloat16()):
        with pytest.raises(ValueError, match="float32"):
            train(network, digits, LABELS(10), epochs=1, **QUIET)


def test_all_black_images_are_no_reason_to_fail(digits):
    black = hand_built(digits, x_train=torch.zeros(20, 1, 8, 8))
    history = train(small(), black, LABELS(10), epochs=1, **QUIET)
    assert all(math.isfinite(v) for v in history.column("loss")[0])
    assert math.isfinite(train_backprop(small(), black, epochs=1, **QUIET).column("loss")[0][0])


def test_a_diverging_run_stops_and_says_where(digits, tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Diverged, match=r"diverged in epoch 1, layer 2: the mean loss is (nan|inf)"):
        train(small(), digits, LABELS(10), epochs=5, lr=[1e-3, 1e12], checkpoint=path, **QUIET)
    with pytest.raises(Diverged, match=r"diverged in epoch 3, layer 2"):  # the first of the second layer
        train(small(), digits, LABELS(10), epochs=2, lr=[1e-3, 1e12], schedule="greedy", **QUIET)
    with pytest.raises(Diverged, match=r"backpropagation diverged in epoch \d"):
        train_backprop(small(), digits, epochs=3, lr=1e30, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_choices_left_to_the_machine():
    assert best_device().type in ("cpu", "cuda", "mps") and best_device("cpu") == torch.device("cpu")
    assert (
        best_precision("auto", "meta") == "fp32"
        and best_precision("bf16", "cpu") == "bf16"
        and best_precision() in ("fp32", "bf16")
    )
    assert (
        set(LR_SCHEDULES) == {"cool_down", "constant", "exponential", "cosine"}
        and callable(read_checkpoint)
        and Images is not None
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["label_embedding", "hard_mining", "layer_wise", "mono_forward", "image_mixing"])
def test_steps_played_back_are_the_steps(name, digits, monkeypatch):
    def trained(recorded):
        network = small()
        with monkeypatch.context() as patched:
            if not recorded:
                patched.setattr("ff_research.training.Recorded.record", lambda self, given: None)
            train(
                network,
                digits,
                STRATEGIES[name](10),
                epochs=3,
                peer=0.03,
                batch_size=90,
                device="cuda",
                precision="bf16",
                progress=False,
            )
        return weights(network)

    assert torch.equal(trained(True), trained(False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_waits_for_the_device_is_not_played_back(digits):
    class Waits(Objective):
        seen = 0

        def goodness(self, h, s):
            return symba().goodness(h, s)

        def loss(self, g, s):
            self.seen += g.sum().item() > 0
            return symba().loss(g, s)

    network = small()
    history = train(
        network, digits, LABELS(10), epochs=2, objective=Waits(), batch_size=90, device="cuda", progress=False
    )
    assert math.isfinite(history.epochs[-1]["loss"][0]) and torch.rand(3, device="cuda").numel() == 3
    assert network.objectives[0].seen == 2 * -(-len(digits.y_train) // 90)


# Micro-batches


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("label_embedding", {}),
        ("class_confusion", dict(optimizer="adamw", lr=1e-4)),
        ("all_labels", {}),
        ("mono_forward", dict(schedule="greedy")),
        ("label_embedding", dict(collaboration="all")),
        ("label_embedding", dict(schedule="greedy", collaboration="previous")),
        ("masking", dict(objective=symba())),
    ],
)
def test_micro_batches_add_up_to_the_batch(strategy, options, digits):
    "In float64 terms they are the same sums; in float32 they differ by rounding, and a batch of one part does not."
    networks, options = [Network([64, 40, 30], seed=1) for _ in range(3)], dict(epochs=2, batch_size=120) | options
    options |= dict(progress=False, precision="fp32", device="cpu")
    start = copy.deepcopy(networks[0])
    for network, size in zip(networks, (None, 120, 50)):
        train(network, digits, STRATEGIES[strategy](10), micro_batch=size, **options)
    whole, one, parts = ([*network.layers.parameters()] for network in networks)
    for a, b, c, d in zip(whole, one, parts, start.layers.parameters()):
        moved = (a - d).abs().max()
        assert moved > 0 and (a - b).abs().max() < 1e-3 * moved and (a - c).abs().max() < 1e-3 * moved


def test_micro_batches_resume_to_the_same_bits(digits, tmp_path):
    options = dict(batch_size=120, micro_batch=50, lr_schedule="constant", progress=False, precision="fp32")
    one, two = Network([64, 40, 30]), Network([64, 40, 30])
    train(one, digits, STRATEGIES["label_embedding"](10), epochs=3, **options)
    for epochs in (1, 3):
        train(two, digits, STRATEGIES["label_embedding"](10), epochs, checkpoint=tmp_path / "c.safetensors", **options)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    with pytest.raises(ValueError, match="micro_batch is "):
        whole = dict(checkpoint=tmp_path / "c.safetensors") | options | dict(micro_batch=None)
        train(two, digits, STRATEGIES["label_embedding"](10), 3, **whole)


@pytest.mark.parametrize(
    "network, strategy, options, said",
    [
        (lambda: Network([64, 40]), "label_embedding", dict(micro_batch=0), "at least 1"),
        (lambda: Network([64, 40]), "label_embedding", dict(peer=0.1), "means over images"),
        (lambda: Network([64, 40]), "layer_wise", {}, "means over images"),
        (lambda: Network([FFConv(1, 4, norm="batch")]), "mono_forward", {}, "means over images"),
    ],
)
def test_micro_batches_that_would_not_add_up_are_refused(network, strategy, options, said, digits):
    with pytest.raises(ValueError, match=said):
        train(network(), digits, STRATEGIES[strategy](10), 1, **dict(micro_batch=10) | options)

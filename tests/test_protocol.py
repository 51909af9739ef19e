"""The protocol carries any layer: convolutions, skips, recurrence, graphs, positions; each learns, stays local and resumes bit for bit."""

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ff_research.backprop import train_backprop
from ff_research.data import data_root, from_arrays
from ff_research.labels import wrong_labels
from ff_research.layers import FFConv, FFLinear, Layer, Merge, prepare
from ff_research.learners import Learner
from ff_research.network import Network, activities, ready, walk
from ff_research.objectives import ChannelCompetition, ClassScores, Objective, hinton, symba
from ff_research.predictions import predict
from ff_research.readout import features, label_goodness, linear_probe, per_label_goodness, scores_errors
from ff_research.schedules import spans
from ff_research.strategies import STRATEGIES, PlainPositives, Strategy
from ff_research.streams import Shared, Streams
from ff_research.training import Step, as_read, train

QUIET = dict(progress=False, device="cpu", precision="fp32")
NAMES = [name for name, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"]


def drawn(count):
    return torch.Generator().manual_seed(count)


class Competing(PlainPositives):
    "Channel competition: no negatives, each layer's channels compete for the classes."

    name, has_negatives = "competing", False

    def objective(self, layer, depth):
        return ChannelCompetition(self.num_classes)


def residual():
    "Convolutions with batch normalisation, dropout and a skip."
    g = drawn(5)
    return Network(
        [
            FFConv(1, 20, norm="batch", generator=g),
            FFConv(20, 40, pool=2, norm="batch", groups=10, dropout=0.1, generator=g),
            FFConv(40, 40, norm="batch", generator=g),
            FFConv(80, 40, norm="batch", reads=(-1, -2), generator=g),
        ]
    )


WINDOWS = spans((0, 3), (0, 4), (1, 5), (1, 6))
ILT = dict(epochs=6, schedule=WINDOWS, optimizer="adamw", lr=3e-3)


class ImageLabels(Strategy):
    "The label as a plane wave over the whole image: a kernel can read it anywhere."

    name, contrasts_labels = "image_labels", True

    def create_positive(self, x, y):
        side = x.shape[-1]
        k = torch.arange(1, self.num_classes + 1, device=x.device).view(-1, 1, 1)
        across, down = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
        waves = torch.cos(2 * torch.pi * (k * across + (k * 3 % 7) * down) / side)
        image = x.float() / 255 if x.dtype == torch.uint8 else x
        return image + 0.5 * waves[y][:, None]

    def generate(self, x, y, network=None, generator=None):
        return self.create_positive(x, wrong_labels(y, self.num_classes, generator))

    def objective(self, layer, depth):
        return symba(8.0)


class Recurrent(Layer):
    "Reads the layer below, itself and the layer above, the latter two one iteration ago; damped."

    def __init__(self, below, units, above, reads=(-1, 0, 1)):
        super().__init__()
        self.units, self.reads = units, tuple(reads)
        self.up, self.down = nn.Linear(below, units), nn.Linear(above, units, bias=False)

    def forward(self, below, own, above):
        h = (self.up(below) + (0 if above is None else self.down(above))).relu()
        return h if own is None else 0.3 * own + 0.7 * h


class TopLabels(Strategy):
    "The label is an input by name, which clamps the top of a recurrent network."

    name, contrasts_labels = "top_labels", True

    def write(self, x, labels=None):
        classes = self.num_classes
        if labels is None:
            return Streams(x.float().flatten(1), None, (len(x),), {"label": torch.full((len(x), classes), 1 / classes)})
        rows = Shared(x.float().flatten(1), torch.arange(len(x)).repeat(len(labels))[:, None])
        return Streams(rows, None, (len(x),) * len(labels), {"label": F.one_hot(labels.flatten(), classes).float()})

    def streams(self, x, y, network=None, generator=None):
        return replace(self.write(x, torch.stack([y, wrong_labels(y, self.num_classes, generator)])), y=y)

    def objective(self, layer, depth):
        return hinton(1.0, 8.0, lambda h: h.square().mean(1))


def recurrent():
    torch.manual_seed(0)
    layers = [Recurrent(64, 100, 100), Recurrent(100, 100, 10, reads=(-1, 0, "label"))]
    return Network(layers, iterations=8, learn_at=range(3, 9), read_at=(3, 4, 5))


def resumes(make, strategy, images, stop, tmp_path, **options):
    "Whether a run that stops and goes on in fresh objects ends like an unbroken one, buffers included."
    options = QUIET | options

    class Stopped(Exception):
        pass

    def die(epoch, network):
        if epoch + 1 == stop:
            raise Stopped

    whole, first, second = make(), make(), make()
    train(whole, images, strategy(), **options)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stopped):
        train(first, images, strategy(), checkpoint=path, after_epoch=die, **options)
    torch.manual_seed(99)  # whatever happens in between
    train(second, images, strategy(), checkpoint=path, **options)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def few(digits):
    "A third of the digits: enough to compare weights."
    return replace(digits, x_train=digits.x_train[:400], y_train=digits.y_train[:400])


# Modules keep their promises


class Normed(nn.Module):
    "A layer of one's own: linear, batch normalisation, ReLU, dropout; knows nothing of this package."

    units = 40

    def __init__(self, inputs, dropout=0.0):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(inputs, 40), nn.BatchNorm1d(40), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x.flatten(1))).relu())


def own_layers(dropout=0.0):
    torch.manual_seed(3)
    return Network([Normed(64, dropout), Normed(40, dropout)])


def test_batch_normalisation_resumes_with_its_buffers(few, tmp_path):
    label = lambda: STRATEGIES["label_embedding"](10)  # noqa: E731
    assert resumes(own_layers, label, few, 2, tmp_path, epochs=4)


def test_batch_normalisation_keeps_statistics_in_bf16(few):
    network = own_layers()
    train(network, few, STRATEGIES["label_embedding"](10), epochs=2, **QUIET | dict(precision="bf16"))
    for layer in network.layers:
        assert layer.norm.running_mean.dtype == torch.float32 and layer.norm.running_mean.abs().max() > 0.01
        assert layer.norm.num_batches_tracked == 8
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_dropout_draws_the_same_for_the_same_seed_and_leaves_the_global_generator_alone(few, tmp_path):
    before, weights = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        network = own_layers(0.5)
        torch.rand(seed * 3 + 1)
        train(network, few, STRATEGIES["label_embedding"](10), epochs=1, seed=seed, **QUIET)
        weights.append(network.layers[1].linear.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.set_rng_state(before)
    state = torch.get_rng_state()
    train(network, few, STRATEGIES["label_embedding"](10), epochs=1, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert resumes(lambda: own_layers(0.5), lambda: STRATEGIES["label_embedding"](10), few, 1, tmp_path, epochs=3)


def test_readouts_leave_buffers_alone_and_do_not_depend_on_the_batch_size(few):
    network = own_layers(0.5)
    train(network, few, STRATEGIES["label_embedding"](10), epochs=1, **QUIET)
    for mode in (True, False):
        network.train(mode)
        state = {key: value.clone() for key, value in network.state_dict().items()}
        read = [features(network, few.x_test, 10, batch_size=size, device="cpu", precision="fp32") for size in (7, 500)]
        told = [label_goodness(network, few.x_test, 10, batch_size=n, device="cpu", precision="fp32") for n in (7, 500)]
        linear_probe(network, few, device="cpu", precision="fp32")
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
        for a, b in [*zip(*read), told]:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert all(module.training is mode for module in network.modules())


# What learns


def test_convolutions_with_a_skip_learn_interleaved_channel_competition(digits, tmp_path):
    network = residual()
    train(network, digits, Competing(10), **QUIET | ILT)
    errors = scores_errors(network, digits, device="cpu", precision="fp32")
    assert errors["sum"] <= 3 and errors["layer_4"] <= 3, errors
    batches = -(-len(digits.y_train) // 100)
    counts = [int(layer.batch_norm.num_batches_tracked) for layer in network.layers]
    assert counts == [n * batches for n in (3, 4, 4, 5)]  # once a batch while it learns, never while frozen
    with pytest.raises(ValueError, match="n/a"):
        per_label_goodness(network, digits, device="cpu")


def test_that_network_resumes_bit_for_bit_with_buffers_and_dropout(few, tmp_path):
    assert resumes(residual, lambda: Competing(10), few, 4, tmp_path, **ILT)


def test_goodness_of_each_position_learns_from_mixed_images_layer_after_layer(digits):
    "Narrow layers, so that a random network is no match: mean probe error of four networks and of their starts."

    class Mixing(STRATEGIES["image_mixing"]):
        def objective(self, layer, depth):
            return symba(1.0, reduction="positions")

    errors = {"trained": [], "random": []}
    for seed in (1, 3, 5, 7):
        made = [FFConv(1, 8, pool=2, generator=drawn(seed)), FFConv(8, 8, pool=2, generator=drawn(seed + 1))]
        network = Network(made)
        for name in ("random", "trained"):
            if name == "trained":
                train(network, digits, Mixing(10), epochs=10, schedule="greedy", lr=3e-3, optimizer="adamw", **QUIET)
            found = linear_probe(network, digits, neutral_label=False, device="cpu", precision="fp32")
            errors[name].append(found["test"]["layer_2"])
    assert sum(errors["trained"]) < sum(errors["random"]) - 8, errors
    h = activities(network, digits.x_test[:5], normalised=False)[1]
    assert network.objectives[1].goodness(h).shape == (5, 4)


def test_labels_spread_over_the_image_are_read_from_convolutions(digits):
    network = Network([FFConv(1, 24, generator=drawn(1)), FFConv(24, 32, pool=2, generator=drawn(2))])
    train(network, digits, ImageLabels(10), epochs=15, optimizer="adamw", lr=3e-3, **QUIET)
    error = per_label_goodness(network, digits, first=1, device="cpu", precision="fp32")
    assert error <= 12, error
    assert label_goodness(network, digits.x_test[:7], 10, device="cpu").shape == (7, 10)


def test_a_recurrent_network_learns_and_resumes(digits, few, tmp_path):
    network = recurrent()
    train(network, digits, TopLabels(10), epochs=8, optimizer="adamw", lr=3e-3, **QUIET)
    error = per_label_goodness(network, digits, first=1, device="cpu", precision="fp32")
    assert error <= 20, error
    assert resumes(recurrent, lambda: TopLabels(10), few, 1, tmp_path, epochs=2, optimizer="adamw", lr=3e-3)


class GraphMean(Layer):
    "Mean over neighbours and over class nodes, each with weights of its own."

    reads = (-1, "edges", "class_edges")

    def __init__(self, inputs, units):
        super().__init__()
        self.units = units
        self.own, self.near, self.classes = (nn.Linear(inputs, units, bias=bias) for bias in (True, False, False))

    def forward(self, x, edges, class_edges):
        def mean(e):
            total = torch.zeros_like(x).index_add_(0, e[1], x[e[0]])
            return total / torch.zeros(len(x)).index_add_(0, e[1], torch.ones(e.shape[1])).clamp(min=1)[:, None]

        return (self.own(x) + self.near(mean(edges)) + self.classes(mean(class_edges))).relu()

    def hand_on(self, h):
        return F.normalize(h, dim=1)


class ClassNodes(ClassScores):
    "The rows are nodes, then one virtual node for each class; a node's scores are its likeness to these."

    def scores(self, h, s=None):
        nodes, classes = s.split(F.normalize(h, dim=1))
        return 10 * nodes @ classes.T

    def goodness(self, h, s=None):
        return F.pad(self.scores(h, s), (0, 0, 0, s.sizes[1]))  # class nodes have no class of their own

    def loss(self, g, s):
        return F.cross_entropy(g[: s.sizes[0]], s.y)


@dataclass
class Graph:
    x: torch.Tensor
    y: torch.Tensor
    edges: torch.Tensor
    mask: torch.Tensor
    num_classes: int

    def batches(self, size, generator):
        yield self, self.y.masked_fill(~self.mask, -100), slice(None)

    def pieces(self):
        yield self, self.y

    def to(self, device):
        return self


class VirtualNodes(Strategy):
    name, has_negatives = "virtual_nodes", False

    def write(self, graph, labels=None):
        n = len(graph.x)
        marks = torch.randn(self.num_classes, graph.x.shape[1], generator=drawn(1)) / 40
        known = graph.mask.nonzero()[:, 0]
        side = {"edges": graph.edges, "class_edges": torch.stack([known, n + graph.y[known]])}
        return Streams(torch.cat([graph.x, marks]), None, (n, self.num_classes), side)

    def streams(self, x, y, network=None, generator=None):
        return replace(self.write(x), y=y)

    def objective(self, layer, depth):
        return ClassNodes()


def made_graph():
    "Six communities: neighbours are mostly of one's own, features say little by themselves."
    generator, nodes, classes = drawn(0), 600, 6
    y = torch.arange(nodes) % classes
    x = torch.randn(nodes, 50, generator=generator) + 0.6 * torch.randn(classes, 50, generator=generator)[y]
    same = torch.rand(nodes, nodes, generator=generator) < torch.where(y[:, None] == y, 0.05, 0.004)
    return Graph(x, y, same.nonzero().T, torch.arange(nodes) < 120, classes)


def graph_accuracy(graph, test, inputs):
    torch.manual_seed(0)
    network = Network([GraphMean(inputs, 64), GraphMean(64, 64)], inputs="plain")
    strategy = VirtualNodes(graph.num_classes)
    train(network, graph, strategy, epochs=40, schedule="greedy", draw="batch", optimizer="adamw", lr=1e-2, **QUIET)
    network.eval()
    s = ready(network, strategy.write(graph))
    h = walk(network, s)[2]
    return 100 * (ClassNodes().scores(h, s).argmax(1) == graph.y)[test].float().mean().item()


def test_a_graph_by_named_inputs_learns():
    graph = made_graph()
    accuracy = graph_accuracy(graph, ~graph.mask, 50)
    assert accuracy > 80, accuracy  # guessing gives 17


def test_a_citation_graph_learns():
    path = data_root() / "cora.npz"
    if not path.exists():
        pytest.skip(f"cora.npz is not in {path.parent}")
    d = np.load(path, allow_pickle=False)
    rows, columns = (int(n) for n in d["x_shape"])
    x = torch.zeros(rows, columns)
    x[np.repeat(np.arange(rows), np.diff(d["x_indptr"])), d["x_indices"].astype("int64")] = torch.tensor(d["x_data"])
    x = x / x.sum(1, keepdim=True).clamp(min=1)
    graph = Graph(x, torch.tensor(d["y"]), torch.tensor(d["edge_index"]), torch.tensor(d["train_mask"][0]), 7)
    accuracy = graph_accuracy(graph, torch.tensor(d["test_mask"][0]), columns)
    assert accuracy > 65, accuracy  # guessing the most frequent class gives 30


# Local means local


def reach(network, strategy, x, y, parity=None, collaboration=None):
    "One real step: {layer: the layers in whose weights its loss left a gradient}."
    found, overlap = {}, parity is not None

    class Watched(Learner):
        def learn(self, s, gamma=0.0, factor=1.0):
            for p in network.parameters():
                p.grad = None
            with torch.enable_grad():
                loss, g = self.objective(self.h.float(), s, gamma)
            loss.backward()
            mine = next(i for i, layer in enumerate(network.layers, 1) if layer is self.layer)
            found[mine] = {
                i
                for i, layer in enumerate(network.layers, 1)
                if any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
            }
            return loss.detach(), g.detach()

    network.train()
    objectives = [strategy.objective(layer, i) for i, layer in enumerate(network.layers, 1)]
    below = [None, *network.layers]
    learners = {
        i: Watched(layer, own, "sgd", 0.0, 0.0, "fp32", below=below[i - 1] if overlap else None)
        for i, (layer, own) in enumerate(zip(network.layers, objectives), 1)
    }
    asked = as_read(network, learners, "fp32")
    step = Step(asked, learners, collaboration, overlap)
    generator = drawn(0)
    before = (lambda s, height: strategy.before(s, height, 1, generator)) if strategy.redraws else None
    step.prepare(list(learners), dict.fromkeys(learners, 1.0), before, lambda *given: None)
    strategy.begin(asked, x[:2])
    step(ready(asked, strategy.streams(x, y, asked, generator)), parity=parity or 0)
    network.eval()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [None, "previous", "all"])
def test_no_loss_has_a_gradient_in_another_layer(name, mode, digits):
    strategy = STRATEGIES[name](10)
    if mode and (strategy.redraws or not strategy.has_negatives):
        pytest.skip("this strategy has no layer collaboration")
    network = Network([64, 30, 30, 30])
    found = reach(network, strategy, digits.x_train[:40], digits.y_train[:40], collaboration=mode)
    assert found == {1: {1}, 2: {2}, 3: {3}}


@pytest.mark.parametrize("make, strategy", [(residual, Competing), (recurrent, TopLabels)])
def test_nor_with_skips_or_iterations(make, strategy, digits):
    network = make()
    found = reach(network, strategy(10), digits.x_train[:40], digits.y_train[:40])
    assert found == {i: {i} for i in range(1, len(network.layers) + 1)}


def test_overlapping_updates_reach_one_layer_down_and_no_further(digits):
    network, strategy = Network([FFConv(1, 8), FFConv(8, 8), FFConv(8, 8), FFConv(8, 8)]), ImageLabels(10)
    x, y = digits.x_train[:20], digits.y_train[:20]
    assert reach(network, strategy, x, y, parity=0) == {1: {1}, 3: {2, 3}, 4: {4}}
    assert reach(network, strategy, x, y, parity=1) == {2: {1, 2}, 4: {3, 4}}


def test_overlap_trains_and_resumes(few, tmp_path):
    made = lambda: Network([FFConv(1, 8, generator=drawn(1)), FFConv(8, 8, generator=drawn(2))])  # noqa: E731
    network = made()
    train(network, few, ImageLabels(10), epochs=2, overlap=True, lr=0.01, **QUIET)
    assert not torch.equal(network.layers[0].conv.weight, made().layers[0].conv.weight)
    assert resumes(made, lambda: ImageLabels(10), few, 1, tmp_path, epochs=3, overlap=True, lr=0.01)


@pytest.mark.parametrize("schedule", ["together", "greedy", WINDOWS])
def test_weights_of_other_layers_do_not_move_while_a_layer_learns(schedule, few):
    "The layers that a schedule leaves idle keep every bit, statistics included."
    network, seen = residual(), []

    def keep(epoch, network):
        seen.append([{k: v.clone() for k, v in layer.state_dict().items()} for layer in network.layers])

    epochs = 6 if callable(schedule) else 1
    keep(-1, network)
    train(network, few, Competing(10), epochs=epochs, schedule=schedule, after_epoch=keep, lr=0.01, **QUIET)
    for epoch, (a, b) in enumerate(zip(seen, seen[1:])):
        moved = [not all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)]
        rows = {"together": [True] * 4, "greedy": [i == epoch for i in range(4)]}
        assert moved == (WINDOWS(4, 6)[epoch].tolist() if callable(schedule) else rows[schedule])


def test_collaboration_runs_each_layer_once(few):
    for mode in ("previous", "all"):
        network = Network([FFConv(1, 8, norm="batch"), FFConv(8, 8, norm="batch")])
        train(network, few, ImageLabels(10), epochs=2, collaboration=mode, lr=0.01, **QUIET)
        assert [int(layer.batch_norm.num_batches_tracked) for layer in network.layers] == [8, 8]


# What a checkpoint has to hold


@pytest.mark.parametrize(
    "kind",
    [
        "network.layers.0.batch_norm.running_mean",
        "network.objectives",
        "network.strategy",
        "learner",
        "generator",
        "torch",
    ],
)
def test_a_checkpoint_without_one_kind_of_state_does_not_resume(kind, few, tmp_path):
    "Each kind is overwritten by what it was at the start; the run must then end elsewhere, or the kind would be idle."

    class Hard(STRATEGIES["hard_mining"]):
        def objective(self, layer, depth):
            return symba(4.0)

    def made():
        g = drawn(1)
        return Network([FFConv(1, 8, norm="batch", dropout=0.2, generator=g), FFConv(8, 8, norm="batch", generator=g)])

    options = QUIET | dict(epochs=4, lr=0.05, peer=0.3)
    start, half, path = tmp_path / "start.safetensors", tmp_path / "half.safetensors", tmp_path / "run.safetensors"

    def keep(epoch, network):
        if epoch == 1:
            os.link(path, half)

    train(made(), few, Hard(10), checkpoint=start, **options | dict(epochs=0))
    whole = made()
    train(whole, few, Hard(10), checkpoint=path, after_epoch=keep, **options)
    first, kept = load_file(start), load_file(half)
    with safe_open(half, "pt") as f:
        header = f.metadata()
    names = [name for name in kept if name.startswith(kind)]
    assert names, kind
    for name in names:
        kept[name] = first[name]
    header.pop("crc")
    path.unlink()
    save_file(kept, path, header)
    again = made()
    train(again, few, Hard(10), checkpoint=path, **options)
    assert any(not torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


# A frozen prefix is computed once, if that changes nothing


@pytest.mark.parametrize(
    "strategy, draws", [(Competing, False), (STRATEGIES["mono_forward"], False), (ImageLabels, True)]
)
def test_frozen_outputs_are_kept_only_where_no_draw_takes_part(strategy, draws, few, monkeypatch):
    made = lambda: Network([FFConv(1, 10, generator=drawn(1)), FFConv(10, 10, generator=drawn(2))])  # noqa: E731
    calls, weights = [], []
    forward = FFConv.forward

    def counted(self, *xs):
        calls.append(self)
        return forward(self, *xs)

    monkeypatch.setattr(FFConv, "forward", counted)
    for x in (few.x_train, few.x_train.clone()):
        calls.clear()
        network = made()
        train(
            network, replace(few, x_train=x), strategy(10), epochs=3, schedule="greedy", draw="batch", lr=0.01, **QUIET
        )
        weights.append(network.layers[1].conv.weight)
        lower = sum(layer is network.layers[0] for layer in calls)
        assert lower == (
            12 + 12 + 1 if draws else 12 + 1
        )  # 3 epochs of 4 batches while it learns; then each batch, or once
    assert torch.equal(*weights)


def test_kept_outputs_give_the_same_weights_as_climbing_for_each_batch(few):
    class Declining(Competing):
        def streams(self, x, y, network=None, generator=None):
            torch.rand(1)  # a draw, though of nothing: the prefix may not be kept
            return super().streams(x, y, network, generator)

    weights = []
    for strategy in (Competing, Declining):
        network = Network([FFConv(1, 10, generator=drawn(1)), FFConv(10, 10, generator=drawn(2))])
        train(network, few, strategy(10), epochs=3, schedule="greedy", draw="batch", lr=0.01, **QUIET)
        weights.append(network.layers[1].conv.weight)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)  # kernels may differ with the number of images


# Wrong input


class Plain(Layer):
    "Turns rows of an image into one row, which mixes up the batch."

    units = 8

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x.flatten(0, 2)).relu()


def test_wrong_input_is_refused_in_words(digits):
    label = STRATEGIES["label_embedding"]
    few = replace(digits, x_train=digits.x_train[:40], y_train=digits.y_train[:40])

    def fit(network, strategy, **options):
        return train(network, few, strategy, epochs=1, **QUIET | options)

    conv = lambda: Network([FFConv(1, 8), FFConv(8, 8)])  # noqa: E731
    positions = symba(reduction="positions")
    tiny = replace(few, x_train=few.x_train[:, :, :2, :2], x_test=few.x_test[:, :, :2, :2])
    for call, words in [
        (lambda: fit(Network([Plain()]), label(10)), "rows of activity"),
        (lambda: fit(conv(), STRATEGIES["all_labels"](10), objective=hinton()), "two streams"),
        (lambda: fit(conv(), STRATEGIES["mono_forward"](10), objective=hinton()), "two streams"),
        (lambda: Network([FFConv(1, 8), FFConv(8, 8, reads=(-3,))]), "there is no layer -1"),
        (lambda: Network([FFConv(1, 8, reads=(-1, 1)), FFConv(8, 8)]), "needs iterations"),
        (lambda: fit(Network([FFConv(1, 8, reads=("sound",))]), label(10)), "reads the input 'sound'"),
        (
            lambda: fit(conv(), label(10), schedule=lambda layers, epochs: torch.ones(epochs, 3, dtype=torch.bool)),
            "a column for each",
        ),
        (
            lambda: fit(conv(), label(10), schedule=lambda layers, epochs: torch.zeros(epochs, 2, dtype=torch.bool)),
            "idle in epoch 1",
        ),
        (lambda: fit(conv(), label(10), schedule=spans((0, 1))), "1 pairs for 2 layers"),
        (
            lambda: fit(
                Network([FFConv(1, 8), FFConv(8, 8), Merge((-1, -2)), FFConv(8, 8)]), STRATEGIES["layer_wise"](10)
            ),
            "a skip cannot cross",
        ),
        (lambda: fit(conv(), ImageLabels(10), objective=positions, collaboration="all"), "one goodness a row"),
        (lambda: fit(conv(), ImageLabels(10), objective=positions, collaboration="previous"), "one goodness a row"),
        (lambda: train(conv(), tiny, label(10), epochs=1, **QUIET), "10 classes need as many pixels"),
        (lambda: fit(recurrent(), TopLabels(10), collaboration="all"), "iterations"),
        (lambda: fit(recurrent(), STRATEGIES["layer_wise"](10)), "iterations"),
        (lambda: fit(Network([FFConv(1, 12)]), Competing(10)), "12 channels cannot be shared out"),
        (lambda: fit(Network([FFConv(3, 12)]), label(10)), "first layer takes 3; build it"),
        (lambda: fit(Network([FFConv(1, 8, pool=9)]), label(10)), "too small for pool=9"),
        (lambda: FFConv(3, 10, groups=4), "groups=4 must divide"),
        (lambda: FFConv(3, 10, norm="layer"), "norm='layer'"),
        (lambda: fit(Network([nn.Linear(64, 5)]), STRATEGIES["mono_forward"](10)), "attribute `units`"),
        (lambda: fit(Network([Merge((-1,))]), label(10)), "no layer of the network has weights"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_trains_convolutions(name, few):
    network = Network([FFConv(1, 20, norm="batch"), FFConv(20, 20, pool=2), FFLinear(20 * 16, 30)])
    history = train(network, few, STRATEGIES[name](10), epochs=1, lr=1e-3, **QUIET)
    assert len(history.epochs[0]["loss"]) == 3
    assert all(torch.isfinite(p).all() for p in network.parameters())
    linear_probe(network, few, device="cpu", precision="fp32")


def test_a_network_of_modules_trains_by_backpropagation(digits):
    from ff_research.backprop import train_backprop
    from ff_research.readout import head_error

    network = Network(
        [FFConv(1, 16, norm="batch", generator=drawn(1)), FFConv(16, 32, pool=2, norm="batch", generator=drawn(2))]
    )
    for precision in ("fp32", "bf16"):
        train_backprop(network, digits, epochs=3, lr=0.03, **QUIET | dict(precision=precision))
    assert head_error(network, digits, device="cpu", precision="fp32") < 4
    assert network.layers[0].batch_norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("how", ["normalised", "standardised", "plain"])
@pytest.mark.parametrize("inputs", [None, 16])
@pytest.mark.parametrize("scaled", [False, True])
def test_shared_rows_are_prepared_as_if_they_were_written_out(how, inputs, scaled):
    g = drawn(0)
    scale = torch.rand(7, generator=g) if scaled else None
    rows = Shared(torch.rand(5, 1, 4, 4, generator=g), torch.randint(0, 5, (7, 2), generator=g), scale)
    ready_rows = prepare(rows, inputs, how=how)
    torch.testing.assert_close(ready_rows.dense(), prepare(rows.dense(), inputs, how=how), rtol=1e-5, atol=1e-6)
    assert len(ready_rows.base) == 5  # still shared


# Read-outs and messages


class Quiet(Objective):
    "A layer is quiet for positives: its goodness is minus the mean of squares."

    def goodness(self, h, s):
        return -h.flatten(1).square().mean(1, keepdim=True)

    def loss(self, g, s):
        right, wrong = s.split(g)
        return F.softplus(8 * (wrong - right)).mean()


def test_labels_are_read_by_the_goodness_that_was_trained(digits):
    network = Network([64, 60, 60])
    train(network, digits, STRATEGIES["label_embedding"](10), 12, lr=0.1, batch_size=50, objective=Quiet(), **QUIET)
    where = dict(device="cpu", precision="fp32")
    assert per_label_goodness(network, digits, **where) < 30
    assert per_label_goodness(network, digits, goodness=lambda h: h.square().sum(1), **where) > 70
    assert (predict(network, digits.x_test, **where) != digits.y_test).float().mean() < 0.3


def test_read_outs_that_mean_nothing_are_refused(digits):
    network = Network([64, 20, 20])
    train_backprop(network, digits, 1, **QUIET)
    for call, words in [
        (lambda: per_label_goodness(network, digits), "n/a: the network was trained by backpropagation"),
        (lambda: linear_probe(network, digits, joined=0), "joined=0"),
        (lambda: linear_probe(network, digits, neutral_label=0), "neutral_label=0: expected True, False or None"),
        (lambda: train_backprop(network, replace(digits, num_classes=12), 1, **QUIET), "del network.head"),
        (lambda: from_arrays(*(digits.x_train, digits.y_train) * 2), "begins with a name"),
        (lambda: fit_once(digits, objective=Quiet), r"call it, Quiet\(\)"),
        (lambda: fit_once(digits, lr=float("nan")), "lr=nan: expected one rate"),
        (lambda: fit_once(digits, lr="0.1"), "expected one rate"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    train(Network([64, 20, 20]), digits, STRATEGIES["label_embedding"](10), 1, lr=np.array([0.01, 0.01]), **QUIET)


def fit_once(images, **options):
    return train(Network([64, 20]), images, STRATEGIES["label_embedding"](10), 1, **options, **QUIET)

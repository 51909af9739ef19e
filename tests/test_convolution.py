"Labels that a kernel can read, layers without weight sharing: oracles, any images, learning, locality, files, recipes."

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ff_research.backprop import train_backprop
from ff_research.convolution import (
    MORPHOLOGIES,
    LabelConv,
    LocallyConnected,
    conv,
    dilated,
    eroded,
    locally_connected,
    morphological,
    moved,
    strips,
    wave_vectors,
    waves,
)
from ff_research.data import Images, as_float
from ff_research.layers import FFConv, channels_last_gradient
from ff_research.modelfiles import load_network, save
from ff_research.network import NETWORKS, Network, activities
from ff_research.objectives import ChannelCompetition, PeerNormalisation, hinton, symba
from ff_research.predictions import fit_readout, predict, scores
from ff_research.readout import label_goodness, linear_probe, per_label_goodness
from ff_research.recipes import RECIPES, Recipe
from ff_research.runs import run
from ff_research.strategies import STRATEGIES
from ff_research.training import train

WHERE = dict(device="cpu", precision="fp32")
QUIET = WHERE | dict(progress=False)
WAYS = {
    "strips": lambda n=10: STRATEGIES["spread_labels"](n, pattern="strips"),
    "waves": lambda n=10: STRATEGIES["spread_labels"](n),
    "morphological": lambda n=10: STRATEGIES["spread_labels"](n, pattern="morphological"),
    "channel": lambda n=10: STRATEGIES["label_channel"](n),
}
each_way = pytest.mark.parametrize("way", WAYS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network_for(way, shape=(1, 8, 8), widths=(12, 16), classes=10, **options):
    return conv(shape, widths, label_channel=classes if way == "channel" else 0, **options)


@pytest.mark.parametrize("strategy", ["image_mixing", "self_contrastive"])
def test_a_last_image_alone_stops_no_network(strategy):
    few = made((1, 4, 4), 2, count=25)
    network = conv(few.shape, (4, 4), pool=[2, 2])
    train(network, few, STRATEGIES[strategy](2), 1, batch_size=12, **QUIET)


@pytest.mark.parametrize("batch, told", [(24, "saw 3 batches.*73 % their start"), (1, None)])
@pytest.mark.parametrize("how", [train, train_backprop])
def test_running_statistics_of_a_few_batches_are_warned_of(how, batch, told):
    few, options = made((1, 6, 6), 2), dict(epochs=3, batch_size=batch, **QUIET)
    arguments = [few] if how is train_backprop else [few, STRATEGIES["mono_forward"](2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        how(conv(few.shape, (6,)), *arguments, **options)
        how(conv(few.shape, (6,), norm="row"), *arguments, **options)
    found = [str(w.message) for w in caught if "running statistics" in str(w.message)]
    assert len(found) == (told is not None) and all(re.search(told, text) for text in found)


def test_a_label_channel_takes_more_classes_than_an_image_has_pixels():
    few = made((1, 4, 4), 20, count=60)
    network = conv(few.shape, (6,), label_channel=20)
    train(network, few, STRATEGIES["label_channel"](20), 1, batch_size=20, **QUIET)
    assert label_goodness(network, few.x_test, 20, first=1, **WHERE).shape == (len(few.x_test), 20)
    with pytest.raises(ValueError, match="20 classes need as many pixels"):
        train(conv(few.shape, (6,)), few, STRATEGIES["label_embedding"](20), 1, **QUIET)


def made(shape, classes, count=24):
    "Random images of a shape."
    x = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=seeded())
    y = torch.arange(count) % classes
    return Images("made", x, y, x, y, classes)


@pytest.fixture(scope="module")
def few(digits):
    return replace(digits, x_train=digits.x_train[:300], y_train=digits.y_train[:300])


# Patterns


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 12)])
def test_waves_are_orthogonal_and_in_range(size):
    count = min(48, len(wave_vectors(1, *size)) and (size[0] - 1) * (size[1] - 1) // 2)
    found = waves(count, *size)
    assert found.shape == (count, 1, *size) and 0 <= found.min() and found.max() <= 1
    flat = (found - found.mean((2, 3), keepdim=True)).flatten(1)
    gram = F.normalize(flat) @ F.normalize(flat).T
    torch.testing.assert_close(gram, torch.eye(count), atol=1e-4, rtol=0)


def test_a_wave_is_what_its_entry_says():
    (across, down, phase), image = wave_vectors(30, 9, 16)[26], waves(30, 9, 16)[26, 0]
    assert phase == 0.25
    for row, column in ((0, 0), (3, 5), (8, 15)):
        angle = torch.tensor(2 * torch.pi * (across * column / 16 + down * row / 9 + phase))
        assert abs(image[row, column] - (1 + angle.cos()) / 2) < 1e-5


def test_lists_go_on_where_they_were():
    "More classes: the patterns of the first ones stay."
    assert wave_vectors(60, 28, 28)[:10] == wave_vectors(10, 28, 28) and len(set(wave_vectors(300, 28, 28))) == 300
    assert torch.equal(strips(20, 28, 28)[:10], strips(10, 28, 28))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (6, 11)])
def test_strips_are_distinct_and_balanced(size):
    found = strips(11, *size).flatten(1)
    assert len(found.unique(dim=0)) == 11 and set(found.flatten().tolist()) == {0.0, 1.0}
    assert not any(torch.equal(a, 1 - b) for a in found for b in found)


def test_morphology_against_loops():
    x = torch.rand(2, 3, 6, 7, generator=seeded())
    for row, column in ((0, 0), (2, 3), (5, 6)):
        window = x[:, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].flatten(2)
        assert torch.equal(dilated(x)[:, :, row, column], window.amax(2))
        assert torch.equal(eroded(x)[:, :, row, column], window.amin(2))
    assert (eroded(x) <= x).all() and (x <= dilated(x)).all()
    assert (eroded(dilated(x)) >= x).all()  # closing only adds
    assert torch.equal(moved(x, 1, 2)[:, :, 1:, 2:], x[:, :, :-1, :-2]) and moved(x, 1, 2)[:, :, 0].abs().max() == 0


@pytest.mark.parametrize("count", [2, 10, 12, 30])
def test_every_class_has_a_transform_of_its_own(count):
    x = torch.rand(3, 1, 12, 12, generator=seeded())
    labels = torch.arange(count)[:, None].expand(-1, 3)
    found = morphological(x, labels, count)
    assert found.shape == (count, 3, 1, 12, 12) and len(found.flatten(1).unique(dim=0)) == count
    for label in range(count):
        f, q = list(MORPHOLOGIES.values())[label % 12], label // 12
        assert torch.equal(found[label], moved(f(x), 3 * q, 3 * q))
    mixed = torch.tensor([[0, count - 1, 1]])
    assert torch.equal(morphological(x, mixed, count)[0], found[mixed[0], torch.arange(3)])


def test_the_mixture_is_the_papers(digits):
    x, y = digits.x_test[:6], digits.y_test[:6]
    strategy = STRATEGIES["spread_labels"](10, strength=0.3)
    expected = 0.7 * as_float(x) + 0.3 * waves(10, 8, 8)[y]
    torch.testing.assert_close(strategy.create_positive(x, y), expected)
    torch.testing.assert_close(strategy.write(x).x, 0.7 * as_float(x) + 0.3 * waves(10, 8, 8).mean(0))


# Any images, any labels

SHAPES = {"digits": ((1, 8, 8), 10), "colour, not square": ((3, 9, 7), 11), "two classes": ((2, 4, 4), 2)}


@each_way
@pytest.mark.parametrize("shape", SHAPES)
def test_any_images(way, shape):
    shape, classes = SHAPES[shape]
    images, strategy = made(shape, classes), WAYS[way](classes)
    before = images.x_train.clone()
    network = network_for(way, shape, (4, 6), classes)
    train(network, images, strategy, epochs=1, batch_size=12, lr=1e-3, **QUIET)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert label_goodness(network, images.x_test[:5], classes, device="cpu").shape == (5, classes)
    linear_probe(network, images, **WHERE)
    assert torch.equal(images.x_train, before)
    positive = strategy.create_positive(images.x_train, images.y_train)
    assert positive.shape == images.x_train.shape and positive.dtype == torch.float32
    assert strategy.generate(images.x_train, images.y_train).shape == positive.shape


@each_way
@pytest.mark.parametrize("hard", [False, True])
def test_negatives_have_wrong_labels_and_the_same_images(way, hard, digits):
    x, y = digits.x_train[:100], digits.y_train[:100]
    strategy = WAYS[way]()
    strategy.hard = hard
    network = network_for(way)
    s = strategy.streams(x, y, network, seeded(1))
    again = strategy.streams(x, y, network, seeded(1))
    assert s.sizes == (100, 100) and torch.equal(s.x, again.x) and torch.equal(s.y, y)
    every = strategy.write(x, torch.arange(10)[:, None].expand(-1, 100))
    rows, told = every.x.view(10, 100, -1), every.side.get("label")
    own = rows[y, torch.arange(100)]
    torch.testing.assert_close(s.x[:100].flatten(1), own)
    if told is None:
        same = (rows == s.x[100:].flatten(1)).all(2)  # which label the negative carries
        assert (same.sum(0) == 1).all() and not same[y, torch.arange(100)].any()
    else:
        wrong = s.side["label"][100:].argmax(1)
        assert (wrong != y).all() and torch.equal(s.side["label"][:100].argmax(1), y)


def test_hard_negatives_are_those_with_more_goodness(digits):
    x, y = digits.x_train[:200], digits.y_train[:200]
    network, plain, hard = network_for("waves"), WAYS["waves"](), WAYS["waves"]()
    train(network, digits, plain, epochs=1, lr=3e-3, optimizer="adamw", **QUIET)
    hard.hard = True
    g = label_goodness(network, x, 10, first=1, **WHERE)
    drawn = [g.gather(1, s.wrong(x, y, network, seeded(2))[:, None]).mean() for s in (plain, hard)]
    assert drawn[1] > drawn[0]


# What learns


@pytest.mark.parametrize(
    "name, limit",
    [
        ("digits-spread-labels", 25),
        ("digits-spread-labels-strips", 25),
        ("digits-spread-labels-morphological", 55),
        ("digits-label-channel", 30),
        ("digits-locally-connected", 25),
    ],
)
def test_recipes_on_digits_learn(name, limit):
    row = run(name, 0, progress=False, device="cpu", precision="fp32")
    errors = row["errors"]["test"]
    assert errors["per_label"] < limit and errors["probe"]["layer_1"] < 10, errors
    assert row["config"]["network"] == RECIPES[name].network.name


def bordered(images, border=3):
    "The images on a black ground, so that the ten label pixels of a corner lie apart from the digit."
    x_train, x_test = (F.pad(x, [border] * 4) for x in (images.x_train, images.x_test))
    return replace(images, x_train=x_train, x_test=x_test)


def parts(network, images):
    "How much the goodness under a label, less that under label 0, differs between images, beside its own size."
    g = label_goodness(network, images.x_test, 10, first=1, **WHERE)
    steps = g - g[:, :1]
    return ((steps - steps.mean(0)).abs().max() / g.abs().max()).item()


def test_one_layer_of_kernels_cannot_read_a_corner(few):
    "Its goodness is a part of the image plus a part of the label: the best labels are the same for all images."
    images = bordered(few)
    network = Network([FFConv(1, 8, norm="batch_first", pool=2, generator=seeded())], inputs="plain")
    train(network, images, STRATEGIES["label_embedding"](10), epochs=3, lr=0.02, optimizer="adamw", **QUIET)
    assert parts(network, images) < 1e-5
    near = bordered(few, 1)  # one pixel off, kernels see a label and a stroke at once
    train(network, near, STRATEGIES["label_embedding"](10), epochs=0, **QUIET)
    assert parts(network, near) > 1e-3


@each_way
def test_labels_all_over_the_image_meet_it_everywhere(way, few):
    images = bordered(few)
    network = network_for(way, images.shape, (8,), inputs="plain")
    train(network, images, WAYS[way](), epochs=1, lr=0.02, optimizer="adamw", **QUIET)
    assert parts(network, images) > 1e-3


# Layers without weight sharing


@pytest.mark.parametrize("kernel, stride, size", [(3, 1, (6, 5)), (5, 2, (7, 8)), (4, 1, (6, 6)), (11, 1, (6, 6))])
def test_locally_connected_against_a_loop(kernel, stride, size):
    layer = LocallyConnected((2, *size), 3, kernel, stride=stride, generator=seeded())
    torch.nn.init.normal_(layer.bias, generator=seeded(1))
    x = torch.randn(4, 2, *size, generator=seeded(2))
    h, border = layer(x), (kernel - 1) // 2
    padded = F.pad(x, [border] * 4)
    assert h.shape == (4, 3, *layer.side)
    for i in range(layer.side[0]):
        for j in range(layer.side[1]):
            field = padded[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel].flatten(1)
            expected = (field @ layer.weight[i, j].flatten(1).T + layer.bias[:, i, j]).relu()
            torch.testing.assert_close(h[:, :, i, j], expected)


def test_with_equal_weights_it_is_a_convolution():
    shared = FFConv(2, 5, 3, generator=seeded())
    layer = LocallyConnected((2, 6, 6), 5, 3)
    with torch.no_grad():
        layer.weight.copy_(shared.conv.weight)
    x = torch.randn(300, 2, 6, 6, generator=seeded(1))
    torch.testing.assert_close(layer(x), shared(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), shared(x))  # in parts


def test_its_peers_are_single_units(few):
    network = locally_connected((1, 8, 8), (2, 2), kernel=3)
    options = dict(epochs=1, lr=1e-3, peer=0.03)
    train(network, few, WAYS["waves"](), **QUIET | options)
    assert [len(own.peers.mean) for own in network.objectives] == [128, 128]
    h = network.layers[0](torch.rand(6, 1, 8, 8, generator=seeded()))
    objective = hinton(1.0)
    objective.peers = PeerNormalisation(128)
    expected = PeerNormalisation(128)(h[:3].flatten(1).mean(0))
    torch.testing.assert_close(objective(h)[0] - objective.local_loss(h)[0], expected)
    shared = conv((1, 8, 8), (4,), pool=0)
    train(shared, few, WAYS["waves"](), **QUIET | options)
    assert len(shared.objectives[0].peers.mean) == 4


@pytest.mark.parametrize("reduction", ["rows", "positions"])
def test_goodness_of_rows_or_positions(reduction, few):
    network = locally_connected((1, 8, 8), (4,), kernel=3)
    own = symba(8.0, reduction=reduction)
    options = QUIET | dict(epochs=5, lr=0.02, optimizer="adamw", batch_size=20)
    train(network, few, WAYS["waves"](), objective=own, **options)
    h = activities(network, few.x_test[:4], normalised=False)[0]
    assert network.objectives[0].goodness(h).shape == (4, 64 if reduction == "positions" else 1)
    assert per_label_goodness(network, few, first=1, **WHERE) < 70


# The label channel


def test_a_label_channel_is_a_further_channel():
    layer = LabelConv((2, 5, 6), 4, num_classes=3, generator=seeded())
    x, labels = torch.randn(3, 2, 5, 6, generator=seeded(1)), torch.tensor([2, 0, 1])
    joined = torch.cat([x, layer.embedding[labels].view(3, 1, 5, 6)], 1)
    torch.testing.assert_close(layer(x, F.one_hot(labels, 3).float()), layer.conv(joined).relu())
    middle = torch.cat([x, layer.embedding.mean(0).expand(3, -1).view(3, 1, 5, 6)], 1)
    torch.testing.assert_close(layer(x, torch.full((3, 3), 1 / 3)), layer.conv(middle).relu())


def test_the_channel_is_learned_with_the_first_layer_and_by_no_other(few):
    network = network_for("channel", widths=(6, 6, 6))
    seen = [network.layers[0].embedding.detach().clone()]

    def keep(epoch, network):
        seen.append(network.layers[0].embedding.detach().clone())

    train(network, few, WAYS["channel"](), epochs=2, schedule="greedy", after_epoch=keep, lr=0.01, **QUIET)
    moved = [not torch.equal(a, b) for a, b in zip(seen, seen[1:])]
    assert moved == [True, True, False, False, False, False]


# Local, resumed, kept


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_other_layers_keep_every_bit_while_one_learns(way, few):
    network, seen = network_for(way, pool=[2, 0, 0], widths=(6, 6, 6)), []
    if way == "local":
        network = locally_connected((1, 8, 8), (2, 2, 2), kernel=3)

    def keep(epoch, network):
        seen.append([{k: v.clone() for k, v in layer.state_dict().items()} for layer in network.layers])

    keep(-1, network)
    strategy = WAYS["waves" if way == "local" else way]()
    train(network, few, strategy, epochs=1, schedule="greedy", after_epoch=keep, lr=0.01, **QUIET)
    for epoch, (a, b) in enumerate(zip(seen, seen[1:])):
        moved = [not all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)]
        assert moved == [i == epoch for i in range(3)]
    if way != "local":
        assert [int(layer.batch_norm.num_batches_tracked) for layer in network.layers] == [3, 3, 3]


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_no_loss_has_a_gradient_in_another_layer(way, few):
    network = network_for(way, pool=0) if way != "local" else locally_connected((1, 8, 8), (2, 2), kernel=3)
    strategy = WAYS["waves" if way == "local" else way]()
    train(network, few, strategy, epochs=1, lr=(0.0, 0.01), weight_decay=0.0, **QUIET)
    start = network_for(way, pool=0) if way != "local" else locally_connected((1, 8, 8), (2, 2), kernel=3)
    pairs = [zip(a.parameters(), b.parameters()) for a, b in zip(network.layers, start.layers)]
    same = [all(torch.equal(*pair) for pair in layer) for layer in pairs]
    assert same == [True, False] and all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_a_stopped_run_resumes_bit_for_bit(way, few, tmp_path):
    class Stopped(Exception):
        pass

    def die(epoch, network):
        if epoch == 0:
            raise Stopped

    def fresh():
        return network_for(way) if way != "local" else locally_connected((1, 8, 8), (2, 2), kernel=3)

    kind = WAYS["waves" if way == "local" else way]
    options = QUIET | dict(epochs=2, lr=0.01, optimizer="adamw", peer=0.1)
    whole, first, second = fresh(), fresh(), fresh()
    train(whole, few, kind(), **options)
    with pytest.raises(Stopped):
        train(first, few, kind(), checkpoint=tmp_path / "run", after_epoch=die, **options)
    torch.manual_seed(99)
    train(second, few, kind(), checkpoint=tmp_path / "run", **options)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("way", [*WAYS, "local", "probe"])
def test_a_file_predicts_the_same(way, few, tmp_path):
    network = locally_connected((1, 8, 8), (2, 2), kernel=3) if way == "local" else network_for(way)
    strategy = WAYS[way if way in WAYS else "waves"]()
    train(network, few, strategy, epochs=1, lr=0.01, **QUIET)
    if way == "probe":
        fit_readout(network, few, **WHERE)
    save(network, tmp_path / "model.safetensors")
    again = load_network(tmp_path / "model.safetensors")
    assert torch.equal(scores(network, few.x_test, **WHERE), scores(again, few.x_test, **WHERE))
    assert repr(again) == repr(network) and repr(again.strategy) == repr(strategy)
    assert predict(again, few.x_test[0].numpy(), **WHERE).shape == (1,)


# Recipes


def test_networks_are_known_by_name():
    assert NETWORKS["conv"] is conv and NETWORKS["locally_connected"] is locally_connected
    a, b, c = (NETWORKS["locally_connected"]((1, 8, 8), (2, 3), seed=seed, kernel=3) for seed in (0, 0, 1))
    assert torch.equal(a.layers[1].weight, b.layers[1].weight) and not torch.equal(
        a.layers[1].weight, c.layers[1].weight
    )


def test_short_recipes_of_the_shared_network_are_alike():
    "Equal epochs and batches, one network, as many validation runs."
    names = [name for name in RECIPES if name.startswith("cifar10-conv-") and name.endswith("-short")]
    assert len(names) == 4
    for name in names:
        r, long = RECIPES[name], RECIPES[name.removesuffix("-short")]
        assert (r.schedule.epochs, r.optimizer.batch_size, r.network) == (3, 128, long.network)
        tried = 4 if r.method == "backprop" else 3  # its best rate of three lay at the edge
        assert r.network.widths == (64, 128, 256, 512) and len(long.search[0]) == tried
        assert r.vary(name=long.name, epochs=long.schedule.epochs, target=long.target, search=long.search) == long


# Wrong input


def test_wrong_input_is_refused_in_words(few):
    spread, channel = STRATEGIES["spread_labels"], STRATEGIES["label_channel"]

    def fit(network, strategy, images=few):
        return train(network, images, strategy, epochs=1, **QUIET)

    tiny = made((1, 3, 3), 9)
    many = made((1, 8, 8), 60, 120)
    for call, words in [
        (lambda: spread(10, pattern="wave"), "did you mean 'waves'"),
        (lambda: spread(10, strength=0), "strength=0: expected a share"),
        (lambda: spread(10, strength=1.5), "strength=1.5"),
        (lambda: fit(conv((1, 3, 3), (4,)), spread(9), tiny), "3 x 3 can hold 8 different waves"),
        (lambda: fit(conv((1, 3, 3), (4,)), spread(9, "strips"), tiny), "room for 3 patterns of strips"),
        (lambda: fit(conv((1, 8, 8), (4,)), spread(60), many), "can hold 48 different waves"),
        (lambda: fit(conv((1, 8, 8), (4,)), spread(60, "morphological"), many), "room for 24 morphological labels"),
        (lambda: spread(2).create_positive(torch.zeros(2, 9), torch.tensor([0, 1])), r"images \[2, 9\] have no rows"),
        (lambda: spread(2).create_positive(torch.zeros(2, 1, 4, 4), torch.tensor([0, 2])), "labels range from 0 to 2"),
        (lambda: fit(conv((1, 8, 8), (4,)), channel(10)), "which no layer of the network reads"),
        (lambda: fit(Network([64, 30]), channel(10)), "which no layer of the network reads"),
        (lambda: fit(conv((1, 8, 8), (4,), label_channel=7), channel(10)), r"labels of \[7\] classes"),
        (lambda: fit(conv((1, 8, 8), (4,), label_channel=10), spread(10)), "reads the input 'label'"),
        (lambda: fit(conv((1, 9, 9), (4,), label_channel=10), channel(10)), r"takes images \[1, 9, 9\]"),
        (lambda: fit(locally_connected((3, 8, 8), (4,)), spread(10)), r"takes \[3, 8, 8\]"),
        (lambda: LocallyConnected((1, 1, 1), 4, kernel=4), "too small for a kernel of 4 x 4"),
        (lambda: locally_connected((1, 8, 8), (4, 4), kernel=[3]), "kernel has 1 entries for 2 layers"),
        (lambda: conv((1, 8, 8), (4,) * 5), "layer 4 pools 2 x 2"),
        (
            lambda: Recipe(name="own", data="digits").vary(network="conv", network_options=(("kernal", 3),)),
            "has no option 'kernal'; did you mean 'kernel'",
        ),
        (
            lambda: train(network_for("channel"), few, channel(10), epochs=1, schedule="greedy", draw="epoch", **QUIET),
            "inputs by name",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("norm", [None, "batch_first", "batch"])
def test_pooling_before_relu_gives_the_bits_of_pooling_after_it(norm):
    "And no large map is copied on the way back: the gradient comes to the pooling with its channels last."
    layer = FFConv(3, 8, 3, pool=2, norm=norm, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(4, 8 * 6 * 6, generator=torch.Generator().manual_seed(2))

    def by_hand():
        z = layer.conv(x.contiguous(memory_format=torch.channels_last))
        h = F.max_pool2d((layer.batch_norm(z) if norm == "batch_first" else z).relu(), 2)
        return channels_last_gradient(layer.batch_norm(h)) if norm == "batch" else h

    found = []
    for h in (layer(x), by_hand()):
        grads = torch.autograd.grad((h.flatten(1) * weights).sum(), list(layer.parameters()))
        found.append([h.detach(), *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert (found[0][0] != 0).any() and all((grad != 0).any() for grad in found[0][1:2])


@pytest.mark.parametrize("norm", [None, "batch_first", "batch"])
@pytest.mark.parametrize("power", [1, 2])
def test_gradients_reach_normalisation_with_channels_last(norm, power):
    "In another order its backward pass takes some ten times as long; the order changes no more than rounding."
    layer = FFConv(3, 20, 3, norm=norm, generator=torch.Generator().manual_seed(0))
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y, objective = torch.arange(8), ChannelCompetition(10, power)
    h, orders = layer(x), []
    h.register_hook(lambda grad: orders.append(grad.is_contiguous(memory_format=torch.channels_last)))
    loss = F.cross_entropy(objective.scores(h), y) + h.flatten(1).square().mean()
    found = torch.autograd.grad(loss, [x, layer.conv.weight])
    z = layer.conv(x)
    z = layer.batch_norm(z).relu() if norm == "batch_first" else z.relu()
    z = layer.batch_norm(z) if norm == "batch" else z
    scores = torch.stack([group.pow(power).mean((1, 2, 3)) for group in z.chunk(10, 1)], 1)
    expected = torch.autograd.grad(F.cross_entropy(scores, y) + z.square().mean(), [x, layer.conv.weight])
    assert orders and all(orders)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

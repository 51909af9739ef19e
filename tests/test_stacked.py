"Networks side by side: each learns what `train` teaches it alone, at its own seed and rate; what cannot be stacked is refused."

import pytest
import torch

import ff_research as ff
from ff_research.checkpoints import Diverged
from ff_research.layers import FFConv, FFLinear
from ff_research.network import Network
from ff_research.objectives import hinton, swish_symba, symba
from ff_research.stacked import StackedLayer, train_stack
from ff_research.strategies import STRATEGIES
from ff_research.training import train

LABELS = STRATEGIES["label_embedding"](10)


@pytest.fixture(scope="module")
def few(digits):
    from dataclasses import replace

    return replace(digits, x_train=digits.x_train[:230], y_train=digits.y_train[:230])  # the last batch is smaller


def fresh(count=3, widths=(64, 30, 20), **options):
    return [Network(list(widths), seed=seed, **options) for seed in range(count)]


def close(one, other, atol=2e-5):
    pairs = list(zip(one.state_dict().values(), other.state_dict().values()))
    return len(pairs) > 3 and all(torch.allclose(a, b, atol=atol) for a, b in pairs)


@pytest.mark.parametrize(
    "strategy, options",
    [
        ("label_embedding", dict(peer=0.03)),
        ("label_embedding", dict(objective=swish_symba(), optimizer="adamw", weight_decay=0.01)),
        ("label_embedding", dict(objective=hinton(theta=5.0), lr_schedule="cosine", weight_decay=0.1)),
        ("image_mixing", dict(objective=symba(alpha=2.0))),
        ("hard_mining", dict(peer=0.03, optimizer="adamw")),
        ("masking", dict()),
    ],
)
def test_each_network_learns_what_it_would_alone(few, strategy, options):
    rates = [3e-3, 1e-3, 1e-2]
    stacked, alone = fresh(), fresh()
    given = STRATEGIES[strategy](10)
    histories = train_stack(stacked, few, given, 1, [5, 6, 5], lr=rates, batch_size=50, device="cpu", **options)
    for network, history, seed, rate in zip(stacked, histories, [5, 6, 5], rates):
        single = alone.pop(0)
        own = STRATEGIES[strategy](10)
        where = dict(batch_size=50, precision="fp32", device="cpu", progress=False)
        expected = train(single, few, own, 1, seed, lr=rate, **where, **options)
        assert close(network, single, 1e-3 if options.get("optimizer") == "adamw" else 1e-4)
        for key in ("loss", "separation", "g_pos", "g_neg"):
            torch.testing.assert_close(
                torch.tensor(history.column(key)), torch.tensor(expected.column(key)), rtol=1e-2, atol=5e-3
            )


def test_seeds_rates_and_full_gradients_matter_to_their_own_network_only(few):
    plain = dict(batch_size=50, device="cpu", peer=0.03)
    a, b = fresh(2, full_gradient=True), fresh(2, full_gradient=True)
    train_stack(a, few, LABELS, 1, [0, 1], lr=[1e-3, 1e-3], **plain)
    train_stack(b, few, LABELS, 1, [0, 7], lr=[1e-3, 1e-2], **plain)
    assert close(a[0], b[0], 1e-6) and not close(a[1], b[1], 1e-3)
    single = fresh(1, full_gradient=True)[0]
    train(single, few, LABELS, 1, 0, lr=1e-3, precision="fp32", progress=False, **plain)
    assert close(a[0], single, 1e-4)


def test_what_was_stacked_stands_alone_afterwards(few, tmp_path):
    networks = fresh(2)
    train_stack(networks, few, LABELS, 1, lr=3e-3, batch_size=50, device="cpu")
    before = networks[1].layers[0].weight.clone()
    networks[0].layers[0].weight.data.zero_()
    assert torch.equal(networks[1].layers[0].weight, before)
    ff.save(networks[1], tmp_path / "one.safetensors")
    again = ff.load_network(tmp_path / "one.safetensors")
    assert torch.equal(ff.predict(again, few.x_test), ff.predict(networks[1], few.x_test))
    assert not networks[0].training


def test_a_stack_learns(digits):
    networks = fresh(2, (64, 100, 100))
    train_stack(networks, digits, LABELS, 20, lr=3e-3, batch_size=50, device="cpu")
    errors = [ff.per_label_goodness(network, digits, first=1, precision="fp32", device="cpu") for network in networks]
    assert max(errors) < 15, errors


def test_the_gradient_of_a_layer_is_autograds():
    layers = [FFLinear(6, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    before = [layer.weight.detach().clone() for layer in layers]
    x = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(9))
    stack = StackedLayer(layers, [hinton(theta=2.0) for _ in layers], "sgd", torch.tensor([0.1, 0.2, 0.3]), 0.0)
    stack.learn(x, 0.5)
    stack.part()
    for k, weight in enumerate(before):
        leaf = weight.clone().requires_grad_()
        g = (x[k] @ leaf.T).relu().square().sum(1)
        loss = (torch.nn.functional.softplus(2 - g[:5]).mean() + torch.nn.functional.softplus(g[5:] - 2).mean()) / 2
        (grad,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(layers[k].weight.detach(), weight - 0.5 * (0.1, 0.2, 0.3)[k] * grad)


def test_what_cannot_be_stacked_is_refused_with_the_remedy(few):
    refused = [
        ([], {}, "no networks"),
        (fresh(2), dict(seeds=[0]), "2 networks, 1 seeds"),
        (fresh(2), dict(lr=[0.1]), "1 rates"),
        ([fresh(1)[0]] * 2, {}, "twice"),
        ([*fresh(1), *fresh(1, (64, 20, 20))], {}, "differ in shape; train them one by one"),
        ([Network([FFConv(1, 4), FFConv(4, 4)]) for _ in range(2)], {}, "only plain `FFLinear`"),
        (fresh(2, triangle=True), {}, "only plain `FFLinear`"),
        (fresh(2), dict(strategy=STRATEGIES["mono_forward"](10)), "no negatives"),
        (fresh(2), dict(strategy=STRATEGIES["layer_wise"](10)), "draws them anew"),
        (fresh(2), dict(strategy=STRATEGIES["all_labels"](10)), "GoodnessObjective"),
        (fresh(2), dict(optimizer="rprop"), "optimizer"),
    ]
    for networks, options, said in refused:
        options = dict(strategy=LABELS) | options
        with pytest.raises(ValueError, match=said):
            train_stack(networks, few, options.pop("strategy"), 1, device="cpu", **options)
        assert all(network.strategy is None for network in networks)  # refused before anything was changed


def test_a_network_that_diverges_is_named(few):
    with pytest.raises(Diverged, match=r"network 1 \(seed 4\)"):
        train_stack(fresh(2), few, LABELS, 3, [3, 4], lr=[1e-3, 1e30], device="cpu")

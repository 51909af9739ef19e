"""Counted work: grouped convolutions, any number of counted images, and methods that do not train."""

import pytest
import torch
from torch import nn

from ff_research.cost import counter, forward_flops, training_flops
from ff_research.data import load
from ff_research.network import NETWORKS
from ff_research.recipes import RECIPES


@pytest.mark.parametrize("kind, read", [(nn.Conv2d, 32), (nn.ConvTranspose2d, 64)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("wants", [True, False])
def test_gradients_cost_as_much_as_the_way_up(kind, read, groups, wants):
    layer = kind(8, 12, 3, padding=1, stride=2, groups=groups, bias=False)
    x = torch.rand(2, 8, 8, 8, requires_grad=wants)
    with counter() as count:
        y = layer(x)
    up = count.get_total_flops()
    places = y[0, 0].numel() if kind is nn.Conv2d else x[0, 0].numel()
    assert up == 2 * len(x) * places * 8 * 12 // groups * 9
    with counter() as count:
        layer(x).sum().backward()
    assert count.get_total_flops() == (3 if wants else 2) * up


def test_channel_competition_counts_its_groups():
    images = load("digits")
    network = NETWORKS["cfse"](images.shape, [20, 40], kernel=3)
    plain, grouped = 64 * 9 * 1 * 20, 64 * 9 * 20 * 40 // 10
    assert forward_flops(network, images.x_train[:5]) == 2 * (plain + grouped)


@pytest.mark.parametrize("name", ["mono-forward-digits", "cwcomp-digits", "distance-digits"])
def test_work_does_not_depend_on_how_many_images_are_counted(name):
    images = load("digits")
    few = training_flops(RECIPES[name], images, batch=20)
    assert training_flops(RECIPES[name], images, batch=40) == pytest.approx(few, rel=0.1) and few > 0
    x, y = images.x_train[:20], images.y_train[:20]
    assert training_flops(RECIPES[name], type(images)("twenty", x, y, x, y, 10), batch=40) == pytest.approx(few)


def test_what_does_not_train_costs_nothing():
    assert training_flops(RECIPES["random-digits"], load("digits")) == 0

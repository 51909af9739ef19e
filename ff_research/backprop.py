"""The same network trained by backpropagation, for comparison."""

import copy
import json
import math
import time

import torch
from torch import nn

from ff_research.checks import PRECISIONS, best_device, best_precision, one_of
from ff_research.goodness import mean_of_squares, sum_of_squares
from ff_research.layers import FFLinear, hand_on
from ff_research.network import activities, ready, run_layer, walk
from ff_research.objectives import GoodnessObjective
from ff_research.optimisers import LR_SCHEDULES, OPTIMIZERS
from ff_research.streams import Streams
from ff_research.training import Diverged, Recorded, check_images, forked, identity, run_epochs


class EndToEnd:
    "The network trained end to end: cross-entropy of a linear head on what the last layer hands on."

    headed = True

    def __init__(self, network, optimizer, lr, weight_decay, precision):
        self.network, self.lr = network, lr
        linear = all(isinstance(layer, FFLinear) for layer in network.layers)
        # modules of the user's own keep float32 weights and statistics, and run under autocast
        low = precision != "fp32"
        self.twin = copy.deepcopy(network).to(PRECISIONS[precision]) if low and linear else network
        self.precision, self.twin.precision = precision, precision
        self.master, self.copies = (
            [*n.layers.parameters(), *(n.head.parameters() if self.headed else ())] for n in (network, self.twin)
        )
        self.optimizer = OPTIMIZERS[optimizer](
            [p.detach() for p in self.master], [p.detach() for p in self.copies], weight_decay
        )

    def loss(self, s):
        "The loss of a batch, and the share of images that get their own label."
        top = walk(self.twin, ready(self.twin, s))[len(self.twin.layers)]
        logits = run_layer(self.twin.head, [top.flatten(1).to(self.twin.head.weight.dtype)]).float()
        return nn.functional.cross_entropy(logits, s.y), (logits.detach().argmax(1) == s.y).float().mean()

    @torch.enable_grad()
    def learn(self, s, factor):
        "One update; gives the loss, detached, and the share that was right."
        loss, right = self.loss(s)
        for i, grad in enumerate(torch.autograd.grad(loss, self.copies)):
            self.optimizer.accumulate(i, grad)
        self.optimizer.step(self.lr * factor)
        return loss.detach(), right

    def live(self):
        "Everything that an update changes, by name."
        optimizer = {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}
        return {f"network.{name}": t for name, t in self.network.state_dict().items()} | optimizer

    def refresh(self):
        "Bring the low-precision copies in line with the weights."
        for c, w in zip(self.copies, self.master):
            if c is not w:
                c.data.copy_(w.data)


class Pairwise(EndToEnd):
    "The network trained end to end by a local objective, on the goodness of all layers from `first` on together."

    headed = False

    def __init__(self, network, strategy, objective, first, generator, *options):
        super().__init__(network, *options)
        self.strategy, self.objective, self.first, self.generator = strategy, objective, first, generator

    def loss(self, s):
        "The objective of the summed goodness, and the share of pairs whose positive has more of it."
        total, activity = 0.0, None

        def visit(height, layer, xs, s, t):
            nonlocal total, activity
            h = run_layer(layer, xs, self.twin.precision)
            activity, out = h.flatten(1), hand_on(layer, h)
            total = total + (sum_of_squares(activity) if height >= self.first else 0.0)
            return h, out

        with torch.no_grad():
            streams = ready(self.twin, self.strategy.streams(s.x, s.y, self.twin, self.generator))
        walk(self.twin, streams, visit)
        activity = activity.view_as(activity)
        activity.squares = total
        loss, g = self.objective(activity, streams)
        g_pos, g_neg = g.detach().chunk(2)
        return loss, (g_pos > g_neg).float().mean()


def _pairwise_objective(network, strategy, objective):
    "The objective for the goodness of all layers together. Raises ValueError where there is none."
    objective = objective if objective is not None else strategy.objective(network.layers[-1], len(network.layers))
    if strategy.redraws or strategy.many_negatives or not strategy.has_negatives:
        raise ValueError(
            f"{strategy.name} gives no pairs of a positive and a negative that pass through all layers; "
            "take another strategy"
        )
    squares = isinstance(objective, GoodnessObjective) and objective.of_activity in (sum_of_squares, mean_of_squares)
    if not squares or objective.reduction != "rows" or list(objective.parameters()):
        raise ValueError(
            f"{objective} cannot be read off the sum of all layers' goodness; take one of the sum of squares, hinton() say"
        )
    return objective


def _new_head(network, images):
    "A linear head of zeros on the last layer's activity; draws no random numbers."
    inputs = activities(network, images.x_train[:1])[-1].numel()
    head = nn.utils.skip_init(nn.Linear, inputs, images.num_classes, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _check_backprop(network, images, epochs, batch_size, strategy, first):
    "Raise ValueError for settings that backpropagation cannot use."
    if not isinstance(epochs, int):
        raise ValueError(f"epochs={epochs!r}: expected one number, or with schedule='greedy' one for each layer")
    check_images(images, network, epochs, batch_size, strategy)
    if any(getattr(layer, "full_gradient", False) for layer in network.layers):
        raise ValueError(
            "the network has full_gradient=True, which is for one layer's own loss; backpropagation needs the gradient that "
            "there is: build it without"
        )
    if network.iterations:
        raise ValueError("backpropagation through the iterations of a recurrent network is not part of this package")
    if not 1 <= first <= (1 if strategy is None else len(network.layers)):
        raise ValueError(
            f"first={first}: expected the number of a layer, 1…{len(network.layers)}, and 1 without a strategy, where no "
            "goodness is in the loss"
        )


@torch.inference_mode(False)
def train_backprop(
    network,
    images,
    epochs=20,
    seed=0,
    *,
    lr=0.03,
    lr_schedule="cool_down",
    weight_decay=3e-4,
    optimizer="sgd",
    batch_size=100,
    precision="auto",
    device="auto",
    checkpoint=None,
    progress=True,
    after_epoch=None,
    strategy=None,
    objective=None,
    first=1,
):
    """Train the same `Network` by backpropagation: plain images in, a linear head (`network.head`) on the last layer.

    strategy: train on its positives and negatives instead, without a head, by the loss that `objective` (or the strategy's
    own) makes of the goodness of all layers together: what Forward-Forward would be if gradients passed between layers
    ("pairwise" backpropagation, Lorberbom et al. 2024). first: with a strategy, the first layer whose goodness is in that
    loss; as many as there are layers leaves the last one's alone, and only its gradient teaches those below.
    Other arguments as in `train`. Gives the `History`, whose one "layer" is the whole network and whose separation is the
    training accuracy, or that of the pairs. Raises ValueError as `train`, and for a network with `full_gradient`, a strategy
    that has no such pairs, an objective that reads more of the activity than its squares, or a `first` that is no layer.
    """
    for name, known, what in ((lr_schedule, LR_SCHEDULES, "lr_schedule"), (optimizer, OPTIMIZERS, "optimizer")):
        one_of(name, known, what)
    _check_backprop(network, images, epochs, batch_size, strategy, first)
    if strategy is not None:
        objective = _pairwise_objective(network, strategy, objective)
    device = best_device(device)
    precision = best_precision(precision, device)
    images, network = images.to(device), network.to(device)
    if strategy is None and not hasattr(network, "head"):
        network.head = _new_head(network, images).to(device)
    network.strategy, options = strategy, (optimizer, lr, weight_decay, precision)
    settings = dict(
        method="backprop" if strategy is None else "pairwise",
        network=repr(network),
        data=identity(images),
        epochs=epochs,
        seed=seed,
        lr=lr,
        lr_schedule=lr_schedule,
        weight_decay=weight_decay,
        optimizer=optimizer,
        batch_size=batch_size,
        precision=precision,
        device=device.type,
    )
    if strategy is not None:
        settings |= dict(strategy=repr(strategy), objective=repr(objective)) | ({"first": first} if first > 1 else {})
    with forked(seed, device) as generators:
        generators = {"generator": torch.Generator(device).manual_seed(seed)} | generators
        if strategy is None:
            learner = EndToEnd(network, *options)
        else:
            learner = Pairwise(network, strategy, objective, first, generators["generator"], *options)
            strategy.begin(learner.twin, images.x_train[:2])
        one_epoch = _epoch(learner, images, LR_SCHEDULES[lr_schedule], epochs, batch_size, generators["generator"])
        try:
            return run_epochs(
                epochs,
                one_epoch,
                learner.live(),
                learner.refresh,
                generators,
                json.loads(json.dumps(settings)),
                checkpoint,
                progress,
                after_epoch and (lambda epoch: after_epoch(epoch, network)),
            )
        finally:
            network.eval()
            network.precision = "fp32"


def _epoch(learner, images, factor, epochs, batch_size, generator):
    "A function of the number of an epoch, which runs it."
    step = Recorded(generator)

    def one_epoch(epoch):
        start, sums, steps = time.perf_counter(), torch.zeros(2, device=generator.device), 0
        learner.network.train()
        step.begin(lambda x, y: sums.add_(torch.stack(learner.learn(Streams(x, y, (len(y),)), factor(epoch, epochs)))))
        for x, y, _ in images.batches(batch_size, generator):
            step(x, y.long())
            steps += 1
        learner.network.eval()
        loss, accuracy = (sums / max(steps, 1)).tolist()
        if not (math.isfinite(loss) and all(torch.isfinite(w).all() for w in learner.master)):
            raise Diverged(
                f"backpropagation diverged in epoch {epoch + 1}: the mean loss is {loss}, or a weight is not finite; "
                "try a smaller lr"
            )
        return dict(loss=[loss], separation=[accuracy], g_pos=[], g_neg=[], seconds=time.perf_counter() - start)

    return one_epoch

"""The loop that makes every layer learn, keeps its memory flat in depth, and survives being killed."""

import contextlib
import copy
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ff_research.checkpoints import History, claimed, read_checkpoint, restore, save_checkpoint
from ff_research.checks import PRECISIONS, best_device, best_precision, one_of
from ff_research.goodness import sum_of_squares
from ff_research.labels import check_labels, check_room
from ff_research.layers import FFLinear, hand_on, units_of
from ff_research.learners import Workspace, learner_of
from ff_research.network import Network, deepest, ready, run_layer, walk
from ff_research.objectives import PeerNormalisation
from ff_research.optimisers import LR_SCHEDULES, OPTIMIZERS
from ff_research.schedules import epochs_of_each, table_of
from ff_research.strategies import negatives_of
from ff_research.streams import Rows, Streams, written_out


class Diverged(RuntimeError):
    "Training cannot go on: a loss or a weight that is not a number, or a layer that fell silent; says in which epoch and layer."


COLLABORATIONS = ("all", "previous")


def gammas(goodness, mode):
    """What each layer receives from the others: the sum of their goodness, `[layers, rows, …]` to the same, without a gradient.

    mode: "all" (of every other layer) or "previous" (of those below). Raises ValueError for another mode.
    Source: Lorberbom et al. (2024).
    """
    one_of(mode, COLLABORATIONS, "collaboration")
    goodness = goodness.detach()
    received = torch.zeros_like(goodness)
    received[1:] += goodness[:-1].cumsum(0)
    if mode == "all":
        received[:-1] += goodness[1:].flip(0).cumsum(0).flip(0)
    return received


class Meter:
    "Sums over the steps of an epoch, kept on the device: reading them earlier would make the processor wait."

    def __init__(self, layers, device):
        self.sums, self.steps = torch.zeros(len(layers), 4, device=device), 0
        self.layers = layers  # their numbers, from 1

    def add(self, i, loss, g, s):
        "One step of one layer: the loss and the goodness `[rows, …]`, positives first."
        nan = loss.new_full((), math.nan, dtype=torch.float32)
        if len(s.sizes) == 1 and g.shape[1] > 1 and s.y is not None:  # class scores
            known = s.y >= 0
            own = g.gather(1, s.y.clamp_min(0).long()[:, None])[:, 0]
            pairs, g_pos, g_neg = ((g.argmax(1) == s.y) & known).sum() / known.sum(), (own * known).sum() / known.sum(), nan
        else:
            g = g.mean(1) if g.shape[1] > 1 else g.squeeze(1)
            positive, negative = g[: s.sizes[0]], g[s.sizes[0] :]
            g_pos, both = positive.mean(), len(negative) and len(negative) % len(positive) == 0
            pairs = (positive > negative.view(-1, len(positive))).float().mean() if both else nan
            g_neg = negative.mean() if len(negative) else nan
        self.sums[i] += torch.stack([loss.float(), pairs.float(), g_pos.float(), g_neg.float()])

    def read(self, epoch, seconds):
        "The epoch's means; raises `Diverged` for a loss that is not finite."
        loss, separation, g_pos, g_neg = (self.sums / max(self.steps, 1)).T.tolist()
        for layer, value in zip(self.layers, loss):
            if not math.isfinite(value):
                raise Diverged(
                    f"training diverged in epoch {epoch + 1}, layer {layer}: the mean loss is {value}; try a smaller lr"
                )
        return dict(loss=loss, separation=separation, g_pos=g_pos, g_neg=g_neg, seconds=seconds)


def _examine(learners, epoch):
    "Raise `Diverged` for a layer whose weights or activity are not finite, or that was silent for the whole epoch."
    for layer, learner in learners.items():
        loudness, learner.loudness = learner.loudness.item(), torch.zeros_like(learner.loudness)
        if not (math.isfinite(loudness) and all(torch.isfinite(w).all() for w in learner.master)):
            raise Diverged(
                f"training diverged in epoch {epoch + 1}, layer {layer}: its weights or its activity are not finite; "
                "try a smaller lr"
            )
        if loudness == 0 and not learner.revivable:
            raise Diverged(
                f"layer {layer} is silent: its activity was 0 for every image of epoch {epoch + 1}, and so is its gradient; "
                "are the images blank, or is lr too large?"
            )


def _tensors(given):
    "The tensors in a step's arguments: in tuples, dictionaries, `Streams` and `Rows` as well."
    if isinstance(given, torch.Tensor):
        return [given]
    if isinstance(given, (Streams, Rows)):
        given = vars(given)
    parts = given.values() if isinstance(given, Mapping) else given if isinstance(given, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]


class Recorded:
    """A step that is recorded on CUDA at its second call, then played back on inputs of the same shapes: one launch, not hundreds.

    On other devices, and where the recording fails, because something in the step waits for the device, it is the plain step.
    """

    def __init__(self, generator, able=True):
        self.generator, self.graph, self.able = generator, None, able and generator.device.type == "cuda"

    def begin(self, step):
        "Take another step: a function of tensors, or objects that hold tensors, that works on the device alone."
        self.step, self.calls, self.held = step, 0, None

    def __call__(self, *given):
        self.calls += 1
        if self.calls == 2 and self.able:
            self.record(copy.deepcopy(given))
        if self.held is None or [t.shape for t in _tensors(given)] != [t.shape for t in self.held]:
            return self.step(*given)
        for held, new in zip(self.held, _tensors(given)):
            held.copy_(new)
        self.graph.replay()

    def record(self, given):
        "Record the step on these inputs, which are its own from now on; nothing is computed yet."
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.generator.device)
        draws = [(g, g.clone_state()) for g in (self.generator, torch.cuda.default_generators[here.device_index])]
        graph.register_generator_state(self.generator)
        aside = torch.cuda.Stream(here.device)
        aside.wait_stream(here)
        try:
            with torch.cuda.stream(aside):
                pool = () if self.graph is None else (self.graph.pool(),)  # the memory is that of the last recording
                graph.capture_begin(*pool, capture_error_mode="thread_local")
                try:
                    self.step(*given)
                finally:
                    graph.capture_end()
            self.graph, self.held = graph, _tensors(given)
        except RuntimeError:  # a recording that fails leaves the generators unable to draw
            self.able = False
            for g, state in draws:
                g.graphsafe_set_state(state)
        here.wait_stream(aside)


class Step:
    """One batch up the layers. learners: {height: learner} of the layers that have an objective; asked: the network as it is read.

    Called with streams, it gives nothing; `report(height, loss, g, s)` is told of each update. The one place that detaches.
    """

    def __init__(self, asked, learners, collaboration=None, overlap=False):
        self.asked, self.learners, self.collaboration, self.overlap = asked, learners, collaboration, overlap

    def prepare(self, learning, factors, before, report):
        "For an epoch: the heights that learn, the factors on their lr, and who redraws and who listens."
        self.learning, self.factors, self.before, self.report = set(learning), factors, before, report
        self.last = None if self.collaboration == "all" else max(learning)

    @torch.no_grad()
    def __call__(self, s, known=None, gamma=0.0, parity=0):
        """s: streams, prepared; known: {height: output} of frozen layers, to go on from; gamma: their summed goodness;
        parity: of the step, where updates overlap."""
        self.gamma, self.parity, self.waiting = gamma, parity, []
        walk(self.asked, s, self.visit, self.before, known, self.last)
        if self.waiting:  # every graph was kept: each layer learns now, receiving the goodness of all others
            received = gammas(torch.stack([g for *_, g in self.waiting]), "all")
            for (height, learner, streams, _), others in zip(self.waiting, received):
                if learner is not None:
                    self.learn(height, learner, streams, gamma + others)

    def visit(self, height, layer, xs, s, t):
        "Run a layer, let it learn if it is its turn, and hand on, cut off from the graph."
        if height not in self.learning or t not in self.asked.learn_at:
            return self.pass_through(height, layer, xs, s)
        learner = self.learners[height]
        h = learner.activity(xs)
        if self.overlap and (height + self.parity) % 2 == 0 and height < self.last:
            with torch.enable_grad():  # no loss of its own at this step: the next layer's loss teaches both
                return h, learner.hand_on()
        if self.collaboration == "all":
            self.waiting.append((height, learner, s, self.shareable(learner.goodness(s))))
        else:
            g = self.learn(height, learner, s, self.gamma)
            self.gamma = self.gamma + self.shareable(g) if self.collaboration else self.gamma
        return h.detach(), learner.hand_on().detach()

    def pass_through(self, height, layer, xs, s):
        "A layer that does not learn now, or never does: it is read as in evaluation."
        with torch.set_grad_enabled(self.overlap and height not in self.learners):
            h = run_layer(layer, xs, self.asked.precision)
            if self.collaboration and height in self.learners:
                g = self.shareable(self.learners[height].objective.goodness(with_squares(h), s))
                self.waiting.append((height, None, s, g)) if self.collaboration == "all" else None
                self.gamma = self.gamma + g if self.collaboration == "previous" else self.gamma
            return h, hand_on(layer, h)

    def learn(self, height, learner, s, gamma):
        loss, g = learner.learn(s, gamma, self.factors[height])
        self.report(height, loss, g, s)
        return g

    @staticmethod
    def shareable(g):
        "Goodness `[rows, 1]`. Raises ValueError for one of positions or classes, which layers of other sizes cannot add."
        if g.shape[1] != 1:
            raise ValueError(
                f"layer collaboration adds one goodness a row, but a layer's objective has {g.shape[1]} (positions or "
                "classes); take collaboration=None, or an objective with reduction='rows'"
            )
        return g


def with_squares(h):
    "The activity of a fully connected layer with its sums of squares beside it, so that they are formed once."
    if h.ndim == 2:
        h.squares = sum_of_squares(h)
    return h


@torch.no_grad()
def prefix(asked, make, images, top, objectives=None, before=None, generators=()):
    """What the frozen layers below `top` hand on for all training images, {height: `[streams, images, …]`}, and their summed goodness.

    make: from images and labels to `Streams`; objectives: {height: objective} of those whose goodness is wanted, else None.
    generators: where one of them was drawn from meanwhile, the result would not hold for another batch; then it is (None, None).
    """
    parts, sums, states = [], [], [g.get_state() for g in generators]
    for x, y in images.pieces():
        s, total = ready(asked, make(x, y)), [0.0]

        def visit(height, layer, xs, s, t, total=total):
            h = run_layer(layer, xs, asked.precision)
            if objectives is not None and height in objectives:
                total[0] = total[0] + Step.shareable(objectives[height].goodness(with_squares(h), s))
            return h, hand_on(layer, h)

        outs = walk(asked, s, visit, before, last=top - 1)
        count = len(s.sizes)
        parts.append({height: written_out(out).unflatten(0, (count, -1)) for height, out in outs.items()})
        zero = torch.zeros(sum(s.sizes), 1, device=y.device)
        sums.append((zero + total[0]).unflatten(0, (count, -1)))
    if any(not torch.equal(a, g.get_state()) for a, g in zip(states, generators)):
        for state, generator in zip(states, generators):
            generator.set_state(state)
        return None, None
    return {height: torch.cat([part[height] for part in parts], 1) for height in parts[0]}, torch.cat(sums, 1)


class Frozen:
    """What frozen layers hand on, computed once for as long as the same layers learn.

    draw="epoch": positives once for each visit to a layer, negatives drawn anew each epoch. Else the streams of all images, where
    making them draws no random number; otherwise every batch climbs for itself.
    """

    def __init__(self, asked, images, strategy, generators, objectives, draw):
        self.asked, self.images, self.strategy, self.generators = asked, images, strategy, generators
        self.objectives, self.draw, self.visit = objectives, draw, None

    def begin(self, row, top, before):
        "For an epoch: `outs` and `sums`, or None."
        fresh, self.visit = self.visit != row, row
        if self.draw == "epoch":
            self.begin_drawn(fresh, top)
        elif top == 1 or self.asked.iterations:
            self.outs = self.sums = None
        elif fresh:
            generators = list(self.generators.values())
            self.outs, self.sums = prefix(
                self.asked, self.streams, self.images, top, self.objectives, before, generators
            )

    def streams(self, x, y):
        return self.strategy.streams(x, y, self.asked, self.generators["generator"])

    def begin_drawn(self, fresh, top):
        def positive(x, y):
            return Streams(self.strategy.create_positive(x, y), y, (len(x),))

        def negative(x, y):
            made = negatives_of(self.strategy, x, y, self.asked, self.generators["generator"])
            return Streams(made, y, (len(x),))

        if fresh:
            self.positive = prefix(self.asked, positive, self.images, top, self.objectives)
        self.outs, self.sums = self.positive
        if self.strategy.has_negatives:
            outs, sums = prefix(self.asked, negative, self.images, top, self.objectives)
            self.outs = {height: torch.cat([out, outs[height]]) for height, out in self.outs.items()}
            self.sums = torch.cat([self.sums, sums])

    def batch(self, rows, y):
        "Streams, outputs and summed goodness of some images, as `Step` takes them."
        known = {height: out[:, rows].flatten(0, 1) for height, out in self.outs.items()}
        gamma = self.sums[:, rows].flatten(0, 1) if self.objectives is not None else 0.0
        return Streams(next(iter(known.values())), y, (len(y),) * len(self.sums)), known, gamma


@contextlib.contextmanager
def forked(seed, device):
    "Inside the block torch's global generators are seeded, so that layers that draw do so reproducibly; afterwards as before."
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield {"torch": torch.default_generator} | ({"cuda": torch.cuda.default_generators[cuda[0]]} if cuda else {})


def _apart(callback, network, generators):
    "A caller's function of epoch and network, whose draws leave those of the run alone."

    def told(epoch):
        states = {name: g.get_state() for name, g in generators.items()}
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        callback(epoch, network)
        for module, mode in modes:
            module.training = mode
        for name, g in generators.items():
            g.set_state(states[name])

    return callback and told


@torch.no_grad()
def run_epochs(epochs, one_epoch, live, refresh, generators, settings, checkpoint, progress, after=None):
    """Run the epochs that a checkpoint does not hold yet, and write it after each; gives the `History`.

    one_epoch: from the number of the epoch to its means; live: tensors that change, by name; refresh: called once these were
    loaded; generators: by name; settings: what two runs must share; after: called with the epoch after each.
    """
    history, start = History(), 0
    with claimed(checkpoint):
        if checkpoint is not None and Path(checkpoint).exists():
            start, stored, history = read_checkpoint(checkpoint, settings, epochs)
            restore(live, stored, generators, checkpoint)
            refresh()
        elif checkpoint is not None:
            save_checkpoint(checkpoint, live, 0, settings, history, generators)
        with tqdm(total=epochs, initial=start, unit="epoch", disable=not progress or "IN_TEST" in os.environ) as bar:
            for epoch in range(start, epochs):
                history.epochs.append(one_epoch(epoch))
                if checkpoint is not None:
                    save_checkpoint(checkpoint, live, epoch + 1, settings, history, generators)
                if after is not None:
                    after(epoch)
                bar.set_postfix_str("separation " + " ".join(f"{s:.2f}" for s in history.epochs[-1]["separation"]))
                bar.update()
    return history


def check_images(images, network, epochs, batch_size, strategy=None):
    "Raise ValueError for settings, images or labels that no run can use."
    if epochs < 0 or batch_size < 1:
        raise ValueError(f"epochs={epochs}, batch_size={batch_size}: expected epochs >= 0 and batch_size >= 1")
    if (dtype := next((p.dtype for p in network.layers.parameters()), torch.float32)) != torch.float32:
        raise ValueError(f"the network's weights are {dtype}; training keeps them in float32: call network.float() first")
    if not hasattr(images, "x_train"):  # a graph, say, which checks itself
        return
    x, y = images.x_train, images.y_train
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"{images.name!r} has {len(x)} training images and {len(y)} labels: expected as many labels as images, "
            "and at least one"
        )
    if x.is_floating_point() and not (finite := torch.isfinite(x.flatten(1)).all(1)).all():
        raise ValueError(f"{images.name!r}: training image {int(finite.int().argmin())} holds NaN or infinite pixels")
    classes = getattr(strategy, "num_classes", images.num_classes)
    check_labels(y, classes)
    if getattr(strategy, "contrasts_labels", False):
        check_room(x[:1], classes)
    inputs = network.layers[0].inputs if isinstance(network.layers[0], FFLinear) else None
    if inputs not in (None, images.num_pixels):
        raise ValueError(
            f"images {list(images.shape)} of {images.name!r} have {images.num_pixels} pixels, but the network's first layer "
            f"takes {inputs}"
        )


def identity(images):
    "What a checkpoint remembers of the data."
    if not hasattr(images, "x_train"):
        return repr(images)
    return f"{images.name}, {len(images.y_train)} training images {list(images.shape)}"


def _per_layer(lr, layers):
    "One learning rate for each layer."
    rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * layers
    if len(rates) != layers or any(rate < 0 for rate in rates):
        raise ValueError(f"lr={lr!r}: expected one rate >= 0, or one for each of the {layers} layers")
    return rates


def _objectives(network, strategy, objective, peer, device):
    """A local objective for each layer: copies of `objective`, or the strategy's own; None for a layer without weights.

    Learned parts of earlier training are kept where the objective is the same.
    """
    given = list(objective) if isinstance(objective, (list, tuple, nn.ModuleList)) else [objective] * len(network.layers)
    if len(given) != len(network.layers):
        raise ValueError(f"{len(given)} objectives: expected one, or one for each of the {len(network.layers)} layers")
    made = []
    for depth, (layer, own) in enumerate(zip(network.layers, given), start=1):
        if not any(True for _ in layer.parameters()):
            made.append(None)
            continue
        new = copy.deepcopy(own) if own is not None else strategy.objective(layer, depth)
        if new is not None and peer:
            new.peers = PeerNormalisation(units_of(layer), peer)
        made.append(new)
    new = nn.ModuleList(made).to(device)
    if repr(new) == repr(network.objectives):
        new.load_state_dict(network.objectives.state_dict())
    return new


def _check_collaboration(network, strategy, collaboration, overlap):
    "Raise ValueError for a collaboration that does not exist, or that network or strategy cannot have."
    if overlap and collaboration is not None:
        raise ValueError("overlap=True lets two layers share a loss, which leaves no goodness to add; take collaboration=None")
    if network.iterations and strategy.redraws:
        raise ValueError(f"{strategy.name} draws negatives between layers, which a network with iterations does not allow")
    if collaboration is None:
        return
    one_of(collaboration, COLLABORATIONS, "collaboration")
    if network.iterations:
        raise ValueError("a network with iterations reads its layers several times; take collaboration=None")
    if strategy.redraws:
        raise ValueError(
            f"{strategy.name} draws negatives between layers, so the layers' goodness belongs to different ones; "
            "take collaboration=None"
        )
    if not strategy.has_negatives:
        raise ValueError(
            f"{strategy.name} has no negatives and no goodness for layers to share; take collaboration=None"
        )


@torch.inference_mode(False)
@torch.no_grad()
def train(
    network,
    images,
    strategy,
    epochs=60,
    seed=0,
    *,
    objective=None,
    peer=0.0,
    schedule="together",
    collaboration=None,
    rounds=1,
    overlap=False,
    draw=None,
    lr=1e-3,
    lr_schedule="cool_down",
    weight_decay=3e-4,
    optimizer="sgd",
    batch_size=100,
    precision="auto",
    device="auto",
    checkpoint=None,
    progress=True,
    after_epoch=None,
):
    """Train every layer of `network` by its own local objective; the network is changed in place. Gives the `History`.

    images: `Images`, whose training part is used; strategy: makes positives and negatives; seed: of batches, negatives and
    whatever layers draw. objective: a local objective instead of the strategy's, or a list with one a layer; peer: weight of
    peer normalisation in each (0: none). schedule: "together" (each batch trains all layers), "greedy" (layer after layer,
    `epochs` each, or one number a layer, in `rounds` equal parts) or a function, see `schedules`. collaboration: whose
    goodness each layer adds to its own, None, "all" other layers' or the "previous" ones'. overlap: at every other step a
    layer is taught by the loss of the one above instead of its own (two layers share a gradient: no longer local).
    draw: when negatives are drawn, "batch" or "epoch" (frozen layers' outputs are then kept; the default of "greedy").
    lr: one rate, or one a layer. lr_schedule: a name of `LR_SCHEDULES`. optimizer: "sgd" (momentum 0.9) or "adamw".
    precision: of the matrix products, "auto", "fp32" or "bf16"; goodness is always float32. after_epoch: called with the
    epoch (from 0) and the network after each. checkpoint: a path; the run's state is kept there after each epoch, and a run
    that finds it goes on from there. On CUDA the step is recorded once an epoch and played back.
    Raises ValueError for unknown names, settings out of range or images that do not fit, `Diverged` where training cannot go on.
    """
    for name, known, what in ((lr_schedule, LR_SCHEDULES, "lr_schedule"), (optimizer, OPTIMIZERS, "optimizer")):
        one_of(name, known, what)
    _check_collaboration(network, strategy, collaboration, overlap)
    check_images(images, network, min(epochs) if isinstance(epochs, (list, tuple)) else epochs, batch_size, strategy)
    device = best_device(device)
    precision = best_precision(precision, device)
    rates = _per_layer(lr, len(network.layers))
    images, network, strategy = images.to(device), network.to(device), strategy.to(device)
    with forked(seed, device) as generators:
        generators = {"generator": torch.Generator(device).manual_seed(seed)} | generators
        network.objectives, network.strategy = _objectives(network, strategy, objective, peer, device), strategy
        table = table_of(schedule, [own is not None for own in network.objectives], epochs, rounds)
        if not network.objectives or not table.shape[1] or all(own is None for own in network.objectives):
            raise ValueError("no layer of the network has weights to learn")
        shares = not (network.iterations or deepest(network) > 1 or collaboration == "all")
        workspace, learners = Workspace(fresh=not shares), {}
        for height, (layer, own) in enumerate(zip(network.layers, network.objectives), start=1):
            if own is not None:
                settings = optimizer, rates[height - 1], weight_decay, precision
                below = network.layers[height - 2] if overlap and height > 1 else None
                learners[height] = learner_of(layer, own, *settings, workspace=workspace, below=below, overlap=overlap)
        asked = as_read(network, learners, precision)
        strategy.begin(asked, images.x_train[:2] if hasattr(images, "x_train") else images)
        step = Step(asked, learners, collaboration, overlap)
        draw = draw or ("epoch" if schedule == "greedy" and not (strategy.redraws or strategy.many_negatives) else "batch")
        one_of(draw, ("batch", "epoch"), "draw")
        heard = {height: learner.objective for height, learner in learners.items()} if collaboration else None
        frozen = Frozen(asked, images, strategy, generators, heard, draw)
        one_epoch = _epoch(network, images, strategy, step, frozen, table, LR_SCHEDULES[lr_schedule], batch_size, generators)
        settings = dict(
            method="ff",
            network=repr(network),
            data=identity(images),
            strategy=repr(strategy),
            epochs=epochs,
            seed=seed,
            schedule=schedule if isinstance(schedule, str) else ["".join("01"[int(v)] for v in row) for row in table],
            lr=lr,
            lr_schedule=lr_schedule,
            weight_decay=weight_decay,
            optimizer=optimizer,
            batch_size=batch_size,
            precision=precision,
            device=device.type,
        )
        plain = dict(collaboration=None, rounds=1, overlap=False, draw="batch")
        more = dict(collaboration=collaboration, rounds=rounds, overlap=overlap, draw=draw)
        settings |= {key: value for key, value in more.items() if value != plain[key]}
        live = {f"network.{name}": t for name, t in network.state_dict().items()}
        live |= {f"learner.{i}.{name}": t for i, learner in learners.items() for name, t in learner.state().items()}
        try:
            return run_epochs(
                len(table),
                one_epoch,
                live,
                lambda: [learner.refresh() for learner in learners.values()],
                generators,
                json.loads(json.dumps(settings)),
                checkpoint,
                progress,
                _apart(after_epoch, network, generators),
            )
        finally:
            network.eval()


def as_read(network, learners, precision):
    "The network as strategies and frozen layers read it: with the low-precision copies that the learners keep."
    layers = [learners[i].twin if i in learners else layer for i, layer in enumerate(network.layers, start=1)]
    kept = ("inputs", "iterations", "learn_at", "read_at")
    asked = Network(layers, **{key: getattr(network, key) for key in kept})
    asked.precision, asked.objectives = precision, network.objectives
    return asked


def _epoch(network, images, strategy, step, frozen, table, factor, batch_size, generators):
    "A function of the number of an epoch, which runs it."
    generator, recorded = generators["generator"], Recorded(generators["generator"], able=not step.overlap)
    learners, steps = step.learners, -(-len(images.y_train) // batch_size) if hasattr(images, "y_train") else 1

    def one_epoch(epoch):
        start, row = time.perf_counter(), table[epoch].tolist()
        learning = [height for height, learns in enumerate(row, start=1) if learns]
        gone, total = table[:epoch].sum(0).tolist(), table.sum(0).tolist()
        for height, layer in enumerate(network.layers, start=1):
            layer.train(row[height - 1])
            if height in learners:
                learners[height].objective.train(row[height - 1])
                learners[height].objective.progress = gone[height - 1] / max(total[height - 1], 1)
        factors = {height: factor(gone[height - 1], total[height - 1]) for height in learning}
        before = (lambda s, height: strategy.before(s, height, learning[0], generator)) if strategy.redraws else None
        meter, places = Meter(learning, generator.device), {height: i for i, height in enumerate(learning)}
        step.prepare(learning, factors, before, lambda height, *given: meter.add(places[height], *given))
        frozen.begin(row, learning[0], before)
        recorded.begin(step)
        for i, (x, y, rows) in enumerate(images.batches(batch_size, generator)):
            if frozen.outs is not None:
                recorded(*frozen.batch(rows, y))
            else:
                s = ready(step.asked, strategy.streams(x, y, step.asked, generator))
                recorded(s, None, 0.0, (epoch * steps + i) % 2)
            meter.steps += 1
        found = meter.read(epoch, time.perf_counter() - start)
        _examine({height: learners[height] for height in learning}, epoch)
        return found

    return one_epoch

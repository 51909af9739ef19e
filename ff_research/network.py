"""A network is a list of layers; one walk goes up it, for training, read-outs and measurements alike."""

import contextlib
import copy
from dataclasses import replace
from numbers import Integral

import torch
from torch import nn

from ff_research.checks import PRECISIONS, best_device, best_precision
from ff_research.layers import SCALINGS, FFLinear, hand_on, prepare, reads_of
from ff_research.streams import Streams


def _linear_layers(widths, seed, **options):
    "Fully connected layers with the given numbers of inputs and units, their weights drawn from a generator of their own."
    if len(widths) < 2 or not all(isinstance(w, Integral) and not isinstance(w, bool) and w > 0 for w in widths):
        raise ValueError(
            f"widths {widths!r}: expected the number of inputs, then of units of each layer, all positive integers; or a "
            "list of layers"
        )
    generator = torch.Generator().manual_seed(seed)
    return [FFLinear(int(a), int(b), generator=generator, **options) for a, b in zip(widths, widths[1:])]


def _check_layers(layers, iterations):
    "Raise ValueError for layers that read what is not there, or that do not fit together."
    for height, layer in enumerate(layers, start=1):
        for r in reads_of(layer):
            if isinstance(r, str):
                continue
            if r >= 0 and not iterations:
                raise ValueError(
                    f"layer {height} ({type(layer).__name__}) reads {r:+d}, itself or a layer above: that needs iterations, "
                    "as in Network(layers, iterations=8)"
                )
            if not 0 <= height + r <= len(layers):
                raise ValueError(f"layer {height} ({type(layer).__name__}) reads {r:+d}, but there is no layer {height + r}")
    for below, layer in zip(layers, layers[1:]):
        both = isinstance(layer, FFLinear) and isinstance(below, FFLinear) and layer.reads == (-1,)
        if both and layer.inputs != below.units:
            raise ValueError(f"{layer} takes {layer.inputs} inputs, but the layer below it has {below.units} units")


class Network(nn.Module):
    """Layers that each learn alone. `Network([784, 1000, 1000])` has two fully connected layers.

    widths: number of inputs, then of units of each layer; or a list of layers (`Layer`, or any modules from inputs to
    activity). seed: draws the weights of widths from a generator of its own and leaves torch's global one alone.
    full_gradient, triangle: of layers given by widths, see `FFLinear`. inputs: how the input is brought to scale,
    "normalised" (root mean square 1 in each row), "standardised" (its mean taken off first, the default with triangle) or
    "plain". iterations: for layers that read themselves or the layer above; the way up is followed by so many synchronous
    updates of all layers, of which those in `learn_at` (counted from 0, the way up) train and those in `read_at` are read.
    Raises ValueError where widths or layers do not fit together.
    """

    def __init__(
        self, widths, seed=0, *, full_gradient=False, triangle=False, inputs=None, iterations=0, learn_at=None, read_at=None
    ):
        super().__init__()
        own = len(widths) > 0 and all(isinstance(w, nn.Module) for w in widths)
        if own and (triangle or full_gradient):
            raise ValueError("triangle and full_gradient are for fully connected layers, given by their widths")
        options = dict(full_gradient=full_gradient, triangle=triangle)
        layers = list(widths) if own else _linear_layers(list(widths), seed, **options)
        _check_layers(layers, iterations)
        self.layers, self.objectives, self.precision = nn.ModuleList(layers), nn.ModuleList(), "fp32"
        self.strategy = None  # the one that trained it
        self.inputs = inputs or ("standardised" if getattr(layers[0], "triangle", False) else "normalised")
        if self.inputs not in SCALINGS:
            raise ValueError(f"inputs={inputs!r}: expected one of {', '.join(SCALINGS)}")
        self.iterations = iterations
        self.learn_at = tuple(range(iterations + 1)) if learn_at is None else tuple(learn_at)
        self.read_at = (iterations,) if read_at is None else tuple(read_at)

    def extra_repr(self):
        shown = {key: getattr(self, key) for key in ("inputs", "iterations", "learn_at", "read_at")}
        plain = dict(inputs="normalised", iterations=0, learn_at=(0,), read_at=(0,))
        return ", ".join(f"{key}={value!r}" for key, value in shown.items() if value != plain[key])

    @property
    def dtype(self):
        "What the first layer's input is kept in: the type of its weights."
        return next((p.dtype for p in self.layers[0].parameters()), torch.float32)

    @property
    def device(self):
        "Where the weights are."
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def prepare(self, x):
        "Inputs of the first layer from images `[rows, …]` or `Rows`; see `layers.prepare`."
        first = self.layers[0]
        return prepare(x, first.inputs if isinstance(first, FFLinear) else None, self.dtype, self.inputs)

    def forward(self, x):
        "What the last layer hands on, for images `[rows, …]`, `Rows` or `Streams`; gradients pass through all layers."
        outs = walk(self, ready(self, x))
        return outs[len(self.layers)]


def ready(network, x):
    "`Streams` whose rows are prepared for the first layer, from images, `Rows` or `Streams`."
    s = x if isinstance(x, Streams) else Streams(x, None, (len(x),))
    return replace(s, x=network.prepare(s.x))


def run_layer(layer, xs, precision="fp32"):
    "The activity of a layer; in low precision under autocast, unless it is an `FFLinear` whose weights are low themselves."
    if precision == "fp32" or isinstance(layer, FFLinear) and layer.weight.dtype == PRECISIONS[precision]:
        return layer(*xs)
    device = next((x.device for x in xs if x is not None), torch.device("cpu"))
    with torch.autocast(torch.device(device).type, PRECISIONS[precision]):
        return layer(*xs)


def look(network):
    "The plain visitor of `walk`: a layer's activity, and what it hands on."

    def visit(height, layer, xs, s, t):
        h = run_layer(layer, xs, network.precision)
        return h, hand_on(layer, h)

    return visit


def walk(network, s, visit=None, before=None, known=None, last=None):
    """The one way up a network; gives {height: what that layer hands on} of those that may still be read.

    The walk routes; the visitor computes, learns and detaches: `visit(height, layer, xs, s, t)` gives the layer's activity
    and what it hands on, heights count from 1, t is the iteration (0: the way up). Without a visitor it is plain evaluation,
    with gradients through all layers. s: `Streams` that are prepared (`ready`). before: `before(s, height)` gives the streams
    that a layer reads, for strategies that draw negatives anew between layers. known: {height: output} to go on from;
    last: the highest layer to visit. Memory stays flat in depth: outputs that no layer reads any more are let go.
    """
    visit = visit or look(network)
    outs, own = dict(known or {0: s.x}), {}
    first, reach = max(outs) + 1, deepest(network)
    for t in range(network.iterations + 1):
        seen = outs if t == 0 else dict(outs)  # later iterations read the one before, all layers at once
        for height, layer in enumerate(network.layers[first - 1 : last], first):
            if before is not None:
                new = before(replace(s, x=outs[height - 1]), height)
                if new.x is not outs[height - 1]:  # other rows from here on: what lies deeper fits no more
                    s, outs = new, {height - 1: new.x}
                    seen = outs
            xs = [_input(s, seen, own, height, r, layer) for r in reads_of(layer)]
            own[height], outs[height] = visit(height, layer, xs, s, t)
            if not network.iterations:
                own.clear()
                outs.pop(height - reach, None)
    return outs


def deepest(network):
    "How many layers down the longest read goes, at least 1."
    return -min([r for layer in network.layers for r in reads_of(layer) if not isinstance(r, str)] + [-1])


def _input(s, seen, own, height, r, layer):
    "One of the things that a layer reads. Raises ValueError for an input that is not there."
    if isinstance(r, str):
        if r not in s.side:
            known = ", ".join(map(repr, s.side)) or "none"
            raise ValueError(
                f"layer {height} ({type(layer).__name__}) reads the input {r!r}, which this strategy does not give; "
                f"inputs by name: {known}"
            )
        return s.side[r]
    if r == 0:
        return own.get(height)
    if r < 0 and height + r not in seen:
        raise ValueError(
            f"layer {height} ({type(layer).__name__}) reads {r:+d}, but the strategy draws new rows after that layer: a skip "
            "cannot cross streams that are drawn anew"
        )
    return seen.get(height + r)


@contextlib.contextmanager
def reading(network):
    "Evaluation mode and no gradient inside the block; then every module is as it was, also in the middle of training."
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def activities(network, x, normalised=True, power=1):
    """The activity of every layer `[rows, units, …]` for images `[rows, …]`, `Rows` or `Streams`, as a list; without gradient.

    normalised: as the next layer reads it, but raised to `power` (`hand_on`), which does not change what that layer reads;
    False: as it is. A network with iterations is read at those in `read_at`, averaged. The network is in evaluation mode
    meanwhile. Raises ValueError for a power without normalisation, which would be left out.
    """
    if power != 1 and not normalised:
        raise ValueError(f"power={power} is for activities that are brought to scale; take normalised=True")
    found = [[] for _ in network.layers]
    plain = look(network)

    def visit(height, layer, xs, s, t):
        h, out = plain(height, layer, xs, s, t)
        if t in network.read_at:
            found[height - 1].append(h if not normalised else out if power == 1 else hand_on(layer, h, power))
        return h, out

    with reading(network):
        walk(network, ready(network, x), visit)
    return [parts[0] if len(parts) == 1 else torch.stack(parts).mean(0) for parts in found]


def twin(network, precision="auto", device="auto"):
    """The network on a device and in a precision, for reading it: itself where it is so already, else a copy.

    Fully connected layers are copied in bf16; other modules keep float32 weights and statistics, and run under autocast.
    """
    device = best_device(device)
    precision = best_precision(precision, device)
    network = network.to(device)
    low = PRECISIONS[precision]
    linear = [layer for layer in network.layers if isinstance(layer, FFLinear)]
    if network.precision == precision and all(layer.weight.dtype == low for layer in linear):
        return network
    if precision == "fp32" and network.precision == "fp32" and all(p.dtype == low for p in network.parameters()):
        return network
    out = copy.deepcopy(network)
    out.precision = precision
    for module in [*(layer for layer in out.layers if isinstance(layer, FFLinear)), *([out.head] if hasattr(out, "head") else [])]:
        module.to(low)
    return out

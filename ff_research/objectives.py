"""What one layer minimises: a goodness of its activity, a loss of the goodness, and penalties on the activity."""

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from ff_research.goodness import (
    hinton_loss,
    mean_of_squares,
    sum_of_squares,
    swish_symba_loss,
    symba_loss,
)
from ff_research.streams import Streams


class PeerNormalisation(nn.Module):
    """A penalty that keeps any unit from being much more, or less, active on average than its peers.

    m <- momentum * m + (1 - momentum) * (mean activity over the positives); the penalty is
    `weight * mean_j (mean(m) - m_j)^2`. m starts at 0.5. Source: Hinton (2022), section 3.2; Loewe (2023), code.
    """

    def __init__(self, units, weight=0.03, momentum=0.9):
        super().__init__()
        self.weight, self.momentum = weight, momentum
        self.register_buffer("mean", torch.full((units,), 0.5))

    def extra_repr(self):
        return f"{len(self.mean)}, weight={self.weight}, momentum={self.momentum}"

    def forward(self, mean):
        "mean: activity of each unit averaged over the positives of a batch `[units]`, with gradient. Gives a scalar."
        m = self.momentum * self.mean + (1 - self.momentum) * mean
        self.mean.copy_(m.detach())
        return self.weight * (m.mean() - m).square().mean()


class Objective(nn.Module):
    """What one layer minimises. A subclass has `goodness` and `loss`; `penalty` and `scores` where it needs them.

    Heads, centroids and moving averages belong to the objective, as parameters and buffers: they are trained, saved and
    resumed with it. peers: a `PeerNormalisation` of the layer's units (channels), or None. progress: the share of the layer's
    own epochs that is over, 0 to 1, set by `train` before each epoch, for temperatures and warm-ups.
    """

    def __init__(self):
        super().__init__()
        self.progress, self.peers = 0.0, None

    def goodness(self, h, s):
        "From an activity `[rows, channels, …]` and its streams to `[rows, 1 | positions | classes]`; pure: moves no state."
        raise NotImplementedError(f"{type(self).__name__} has no goodness(h, s)")

    def loss(self, g, s):
        "From the goodness, to which that of other layers is added already, to a scalar."
        raise NotImplementedError(f"{type(self).__name__} has no loss(g, s)")

    def penalty(self, h, s):
        "A further term, read from the activity itself; moving averages move here or in `forward`, once an update."
        return 0.0

    def scores(self, h, s=None):
        "Class scores `[batch, classes]`, where the layer can be read out by itself; else None."
        return None

    def local_loss(self, h, s=None, gamma=0.0):
        """The loss without peer normalisation, and the goodness, of an activity; once an update.

        s: the `Streams`; None: positives, then as many negatives. gamma: other layers' goodness, detached, added to the
        layer's own before the loss.
        """
        s = two_streams(h) if s is None else s
        g = self.goodness(h, s)
        if len(g) != len(h) or g.ndim != 2:
            raise ValueError(
                f"{type(self).__name__}: the goodness of {len(h)} rows has the shape {list(g.shape)}; expected [rows, 1], "
                "[rows, positions] or [rows, classes]"
            )
        return self.loss(g + gamma, s) + self.penalty(h, s), g

    def forward(self, h, s=None, gamma=0.0):
        "The whole loss, a scalar, and the layer's own goodness; arguments as in `local_loss`."
        s = two_streams(h) if s is None else s
        loss, g = self.local_loss(h, s, gamma)
        return (loss if self.peers is None else loss + self.peers(mean_of_units(s.split(h)[0]))), g


def two_streams(h):
    "`Streams` of rows of which the first half are positives. Raises ValueError for an odd number."
    if len(h) % 2:
        raise ValueError(f"{len(h)} rows of activity: expected positives and as many negatives")
    return Streams(h, None, (len(h) // 2,) * 2)


def mean_of_units(h):
    "Mean activity of each unit (channel) over rows and positions, `[rows, units, …]` to `[units]`, in float32."
    return h.mean([i for i in range(h.ndim) if i != 1]).float()


def both_streams(g, s, what):
    "Goodness of positives and of negatives. Raises ValueError for another number of streams, or for unequal ones."
    if len(s.sizes) != 2 or s.sizes[0] != s.sizes[1]:
        raise ValueError(
            f"{what} compares positives with as many negatives: expected two streams of one size, got "
            f"{len(s.sizes)} of {' + '.join(map(str, s.sizes))} rows"
        )
    return s.split(g)


def _name(function):
    "A function's name for printing; of a `functools.partial` with what it fixes, so that it reads alike in every run."
    if isinstance(function, functools.partial):
        fixed = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{_name(function.func)}({', '.join(fixed)})"
    return getattr(function, "__name__", repr(function))


REDUCTIONS = ("rows", "positions")


class GoodnessObjective(Objective):
    """The goodness of each stream, then a loss of the two.

    goodness: from `[rows, units]` to `[rows]`; loss: from g_pos, g_neg `[batch, 1 | positions]` and options to a scalar.
    An option whose value is "units" stands for the number of activities that one goodness sums. reduction: "rows", all of a
    row's activity gives one goodness; "positions": the channels at each position of a feature map give one.
    """

    def __init__(self, goodness=sum_of_squares, loss=hinton_loss, reduction="rows", **options):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
        self.of_activity, self.of_goodness, self.reduction, self.options = goodness, loss, reduction, options
        self.units = None  # known once an activity was seen

    def extra_repr(self):
        names = [_name(self.of_activity), _name(self.of_goodness)] + [f"{k}={v}" for k, v in self.options.items()]
        return ", ".join(names + [f"reduction={self.reduction}"] * (self.reduction != "rows"))

    def goodness(self, h, s=None):
        if self.reduction == "positions":
            h = h.flatten(2).transpose(1, 2) if h.ndim > 2 else h.unsqueeze(1)
        elif h.ndim > 2:
            h = h.flatten(1)
        self.units = h.shape[-1]
        g = self.of_activity(h)
        return g if g.ndim == 2 else g.unsqueeze(1)

    def loss(self, g, s):
        options = {key: self.units if value == "units" else value for key, value in self.options.items()}
        return self.of_goodness(*both_streams(g, s, _name(self.of_goodness)), **options)


def hinton(theta="units", scale=1.0, goodness=sum_of_squares, reduction="rows"):
    """Hinton's objective: the sum of squares against theta, by default the number of units.

    That is the mean of squares against 1 with `scale` = units. Source: Hinton (2022), section 2.
    """
    return GoodnessObjective(goodness, hinton_loss, reduction, theta=theta, scale=scale)


def symba(alpha=4.0, goodness=mean_of_squares, reduction="rows"):
    "SymBa's objective on the mean of squares. Source: Lee and Song (2023)."
    return GoodnessObjective(goodness, symba_loss, reduction, alpha=alpha)


def swish_symba(alpha=4.0, goodness=mean_of_squares, reduction="rows"):
    "Swish-SymBa's objective on the mean of squares. Source: dah33 (2023)."
    return GoodnessObjective(goodness, swish_symba_loss, reduction, alpha=alpha)


def default_objective(layer):
    """Hinton's objective for a layer.

    Of a fully connected layer it is the sum of squares against the number of units. Feature maps have thousands of
    activities a row, whose sum would saturate the loss: there it is the mean of squares against 1, with `scale` 10.
    """
    return hinton() if getattr(layer, "flat", False) else hinton(1.0, 10.0, mean_of_squares)


class ClassScores(Objective):
    "Base of the objectives whose goodness is a score for each class, learned by cross-entropy; a subclass has `scores`."

    def goodness(self, h, s=None):
        return self.scores(h, s)

    def loss(self, g, s):
        return F.cross_entropy(g, s.y.long())


class ProjectionObjective(ClassScores):
    """Mono-Forward's objective: class scores `h @ M.T` from a learned projection M, and their cross-entropy with the labels.

    Feature maps are averaged over positions first. Source: Gong et al. (2025).
    """

    def __init__(self, units, num_classes, layer=1):
        super().__init__()
        generator = torch.Generator().manual_seed(layer)
        self.projection = nn.Parameter(torch.randn(num_classes, units, generator=generator) / math.sqrt(units))

    def extra_repr(self):
        return f"{self.projection.shape[1]}, {self.projection.shape[0]}"

    def scores(self, h, s=None):
        h = h.flatten(2).mean(2) if h.ndim > 2 else h
        return F.linear(h.to(self.projection.dtype), self.projection)


class ChannelCompetition(ClassScores):
    """Each class has a group of channels, whose mean activity (to a power) over all positions is its score.

    power: 2, mean of squares (CwComp, Papachristodoulou et al. 2024); 1, mean (DeeperForward, Sun et al. 2025). Groups are
    contiguous. Raises ValueError for channels that cannot be divided among the classes.
    """

    def __init__(self, num_classes, power=2):
        super().__init__()
        self.num_classes, self.power = num_classes, power

    def extra_repr(self):
        return f"{self.num_classes}, power={self.power}"

    def scores(self, h, s=None):
        if h.shape[1] % self.num_classes:
            raise ValueError(f"{h.shape[1]} channels cannot be shared out evenly among {self.num_classes} classes")
        return h.pow(self.power).unflatten(1, (self.num_classes, -1)).flatten(2).mean(2)


class LabelObjective(Objective):
    """Cross-entropy of the right label among all, with `alpha` times the mean-square goodness under each as its score.

    The streams are the images under all labels, the right one first, as `all_labels` makes them.
    """

    def __init__(self, alpha=32.0):
        super().__init__()
        self.alpha = alpha

    def extra_repr(self):
        return f"alpha={self.alpha}"

    def goodness(self, h, s=None):
        return mean_of_squares(h.flatten(1) if h.ndim > 2 else h).unsqueeze(1)

    def loss(self, g, s):
        if len(s.sizes) < 2 or len(set(s.sizes)) > 1:
            raise ValueError(f"expected a stream of one size for each label, got {len(s.sizes)} of {s.sizes} rows")
        return -(self.alpha * g).view(len(s.sizes), -1).log_softmax(0)[0].mean()

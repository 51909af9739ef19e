"""One update of one layer: from autograd for any module, and fused by hand for fully connected layers."""

import copy

import torch

from ff_research.checks import PRECISIONS
from ff_research.goodness import row_factor
from ff_research.layers import FFLinear, hand_on, normalise, product, standardise
from ff_research.network import run_layer
from ff_research.optimisers import BLOCK, OPTIMIZERS


class Workspace:
    """Buffers that all layers share: fresh memory costs more than the arithmetic on it, and it would grow with depth.

    fresh: give new memory at each request after all, where outputs are read later than by the next layer.
    """

    def __init__(self, fresh=False):
        self.buffers, self.fresh = {}, fresh

    def get(self, name, shape, dtype, device):
        "An uninitialised tensor, the same one for the same request."
        if self.fresh:
            return torch.empty(shape, dtype=dtype, device=device)
        key = name, tuple(shape), dtype
        if key not in self.buffers:
            self.buffers[key] = torch.empty(shape, dtype=dtype, device=device)
        return self.buffers[key]


class Learner:
    """One layer that learns alone, its objective and its optimiser.

    `activity` runs the layer, once an update; `learn` takes a step from that run; `hand_on` gives what other layers read.
    below: another layer that this one's loss trains too (overlapping updates).
    """

    revivable = False  # whether a gradient reaches units that are silent

    def __init__(self, layer, objective, optimizer, lr, weight_decay, precision="fp32", below=None):
        self.layer, self.objective, self.lr, self.precision, self.twin = layer, objective, lr, precision, layer
        self.parameters = [p for m in (layer, objective, below) if m is not None for p in m.parameters()]
        self.master = [p.detach() for p in self.parameters]
        self.optimizer = OPTIMIZERS[optimizer](self.master, self.master, weight_decay)
        self.loudness = torch.zeros((), device=self.master[0].device)  # of all activity in an epoch; 0: the layer is silent
        self.h = None

    def activity(self, xs):
        "The layer's activity, with its graph."
        with torch.enable_grad():
            self.h = run_layer(self.layer, xs, self.precision)
        return self.h

    def goodness(self, s):
        "Goodness of that run, for other layers to read."
        return self.objective.goodness(self.h.detach().float(), s)

    def learn(self, s, gamma=0.0, factor=1.0):
        "One update from that run; gives the loss and the layer's own goodness, detached."
        with torch.enable_grad():
            loss, g = self.objective(self.h.float(), s, gamma)
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for i, grad in enumerate(grads):
            self.optimizer.accumulate(i, torch.zeros_like(self.master[i]) if grad is None else grad)
        self.loudness += torch.linalg.vector_norm(self.h.detach().flatten(), ord=float("inf")).float()
        self.optimizer.step(self.lr * factor)
        return loss.detach(), g.detach()

    def hand_on(self):
        "What other layers read of that run; the run itself is let go by the next."
        return hand_on(self.layer, self.h)

    def state(self):
        "Tensors that an update changes besides weights and buffers, by name."
        return self.optimizer.state()

    def refresh(self):
        "Called after weights were loaded."


def _squares(h):
    "Sums of squares of the rows of `[batch, units]` in float32; low precision is widened some rows at a time, for the same reason."
    if h.dtype == torch.float32 or h.device.type != "cpu":
        return torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32).square_()
    out, step = torch.empty(len(h)), max(1, BLOCK // max(1, h.shape[1]))
    wide = torch.empty(min(step, len(h)), h.shape[1])
    for rows, part in zip(out.split(step), h.split(step)):
        torch.linalg.vector_norm(wide[: len(part)].copy_(part), dim=-1, out=rows)
    return out.square_()


class FusedLearner(Learner):
    """An `FFLinear` that learns by hand-written gradients: no graph passes through its product, and each buffer is shared.

    In bf16 the products read a low-precision copy of the weights, which the optimiser refreshes. Its oracle is `Learner`.
    """

    def __init__(self, layer, objective, optimizer, lr, weight_decay, precision="fp32", workspace=None):
        self.layer, self.objective, self.lr, self.precision = layer, objective, lr, precision
        self.workspace = Workspace() if workspace is None else workspace
        self.twin = layer if precision == "fp32" else copy.deepcopy(layer).to(PRECISIONS[precision])
        self.heads = list(objective.parameters())
        self.loudness = torch.zeros((), device=layer.weight.device)
        self.master = [p.detach() for p in (*layer.parameters(), *self.heads)]
        self.copies = [p.detach() for p in (*self.twin.parameters(), *self.heads)]
        self.optimizer = OPTIMIZERS[optimizer](self.master, self.copies, weight_decay)

    def activity(self, xs):
        weight, bias = self.copies[:2]
        self.x = self.twin.rows(*xs)
        self.h = h = self.workspace.get("h", (len(self.x), len(weight)), weight.dtype, weight.device)
        product(self.x, weight, bias, out=h)
        if self.layer.triangle:
            self.above = self.workspace.get("triangle", h.shape, h.dtype, h.device)
            torch.sub(h, h.mean(1, keepdim=True), out=self.above).relu_()
        h.relu_()
        self.squares = _squares(h)
        return h

    def hand_on(self):
        out = self.workspace.get("x", self.h.shape, self.h.dtype, self.h.device)
        return standardise(self.above, out) if self.layer.triangle else normalise(self.h, self.squares, out)

    def goodness(self, s):
        seen = self.h.detach()
        seen.squares = self.squares
        return self.objective.goodness(seen, s)

    def learn(self, s, gamma=0.0, factor=1.0):
        positives = s.sizes[0]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (self.h, self.squares)]
            leaves[0].squares = leaves[1]
            loss, g = self.objective.local_loss(leaves[0], s, gamma)
            total = loss
            if self.objective.peers is not None:
                leaves.append(self.h[:positives].mean(0).float().requires_grad_())
                total = loss + self.objective.peers(leaves[2])
        total.backward()
        self.loudness += self.squares.sum()
        self.revivable = self.layer.full_gradient and leaves[0].grad is not None
        self.descend(self.product_gradient(positives, *(leaf.grad for leaf in leaves)), factor)
        return loss.detach(), g.detach()

    def product_gradient(self, positives, d_h, d_squares, d_mean=None):
        "Gradient in the matrix product from those in the activity, its sums of squares and its mean over the positives."
        h = self.h
        dz = self.workspace.get("dz", h.shape, h.dtype, h.device)
        if d_squares is None:
            dz.zero_()
        else:
            torch.mul(h, row_factor(d_squares, h.dtype), out=dz)
        mask = 1 if self.layer.full_gradient or (d_h is None and d_mean is None) else h > 0
        if d_h is not None:
            dz += d_h * mask
        if d_mean is not None:
            dz[:positives] += (d_mean / positives).to(h.dtype) * (mask if isinstance(mask, int) else mask[:positives])
        return dz

    def descend(self, dz, factor):
        "One step of the optimiser, given the gradient in the matrix product."
        self.optimizer.accumulate_product(0, dz, self.x)
        self.optimizer.accumulate(1, dz.sum(0))
        for i, p in enumerate(self.heads, start=2):
            self.optimizer.accumulate(i, p.grad)
            p.grad = None
        self.optimizer.step(self.lr * factor)

    def refresh(self):
        "Bring the low-precision copies in line with the weights."
        for c, w in zip(self.copies, self.master):
            if c is not w:
                c.copy_(w)


def learner_of(layer, objective, *settings, workspace=None, below=None, overlap=False):
    """The learner of a layer: its own (`layer.learner`) where it has one, the fused one of an `FFLinear`, else autograd's.

    A subclass of `FFLinear` with another `forward` or `hand_on` learns by autograd: the fused form knows the original only.
    """
    if hasattr(layer, "learner"):
        return layer.learner(objective, *settings)
    plain = all(getattr(type(layer), name) is getattr(FFLinear, name) for name in ("forward", "hand_on", "rows")) if isinstance(layer, FFLinear) else False
    if plain and not overlap:
        return FusedLearner(layer, objective, *settings, workspace=workspace)
    return Learner(layer, objective, *settings, below=below)

"""Two optimisers that write each weight once a step, and how the learning rate falls."""

import torch

from ff_research.layers import add_product_gradient

def cool_down(epoch, epochs):
    "Factor on the learning rate: 1 in the first half of training, then straight down to 2/epochs in the last epoch (Loewe 2023)."
    return min(1.0, 2 * (epochs - epoch) / epochs)


def constant(epoch, epochs):
    "Factor on the learning rate: always 1."
    return 1.0


def exponential(epoch, epochs):
    "Factor on the learning rate: falls by the same factor each epoch, from 1 to 1/20 after the last. The form is that of Chen et al. (2025, code), the twentieth ours."
    return 0.05 ** (epoch / epochs)


LR_SCHEDULES = {"cool_down": cool_down, "constant": constant, "exponential": exponential}

BLOCK = 1 << 17  # weights at a time: float32 copies of so many stay in a core's own cache


def _descend(weight, momentum, copy_, lr, shrink):
    "weight <- shrink * weight - lr * momentum, and its copy of low precision; flat tensors, on the CPU block by block so that each is read from memory once."
    if weight.device.type != "cpu":
        copy_.copy_(weight.mul_(shrink).add_(momentum, alpha=-lr))
        return
    wide = torch.empty(min(BLOCK, len(weight)), dtype=weight.dtype)
    for w, m, c in zip(weight.split(BLOCK), momentum.split(BLOCK), copy_.split(BLOCK)):
        w.mul_(shrink).add_(wide[: len(w)].copy_(m), alpha=-lr)
        c.copy_(w)


def _forget(momenta, steps):
    "Count a step, and after every hundred set momentum below 1e-20 to zero: left to fade, it would end in numbers that processors multiply very slowly."
    steps += 1
    if momenta[0].device.type == "cpu" and steps.item() % 100 == 0:
        for m in momenta:
            torch.ops.aten.hardshrink.out(m, 1e-20, out=m)

class MomentumSGD:
    """Momentum 0.9 whose sum is formed by the weight gradient's matrix product itself, in the product's precision.

    Weight decay is pulled out of the momentum: it shrinks the weights by `lr * weight_decay / (1 - 0.9)` a step, to which
    the usual coupled form settles within ten steps or so.
    """

    KEEP = 0.9

    def __init__(self, master, copies, weight_decay):
        self.master, self.copies, self.weight_decay = master, copies, weight_decay
        self.momentum = [torch.zeros_like(p) for p in copies]
        # float32 products have no copies to refresh: plain descent along the momentum, fused into one pass over memory
        alone = [i for i, (w, c) in enumerate(zip(master, copies)) if c.data_ptr() == w.data_ptr()]
        self.copied = [i for i in range(len(master)) if i not in alone]
        self.fused = (
            torch.optim.SGD([master[i] for i in alone], lr=0.0, weight_decay=weight_decay / (1 - self.KEEP), fused=True)
            if alone
            else None
        )
        for i in alone:
            master[i].grad = self.momentum[i]
        self.steps = torch.zeros((), dtype=torch.int64)

    def accumulate(self, i, grad):
        "Add the gradient of parameter i to its momentum."
        self.momentum[i].mul_(self.KEEP).add_(grad)

    def accumulate_product(self, i, dz, x):
        "Add a weight's gradient, given as the two factors of the product, to its momentum."
        add_product_gradient(dz, x, self.momentum[i], self.KEEP)

    def step(self, lr):
        "weight <- shrink * weight - lr * momentum, and the copies."
        _forget(self.momentum, self.steps)
        if self.fused is not None:
            self.fused.param_groups[0]["lr"] = lr
            self.fused.step()
        shrink = 1 - lr * self.weight_decay / (1 - self.KEEP)
        for w, m, c in ((self.master[i], self.momentum[i], self.copies[i]) for i in self.copied):
            _descend(w.view(-1), m.view(-1), c.view(-1), lr, shrink)

    def state(self):
        return {f"momentum.{i}": m for i, m in enumerate(self.momentum)} | {"steps": self.steps}

class AdamW:
    "torch's fused AdamW on the float32 weights, behind the interface of `MomentumSGD`."

    def __init__(self, master, copies, weight_decay):
        self.master, self.copies = master, copies
        self.optimizer = torch.optim.AdamW(
            master, lr=0.0, weight_decay=weight_decay, fused=True, capturable=master[0].device.type == "cuda"
        )
        for p in master:
            p.grad = torch.zeros_like(p)  # a first step of length 0 makes the state that a checkpoint keeps
        self.optimizer.step()
        for s in self.optimizer.state.values():
            s["step"].zero_()
        self.steps = torch.zeros((), dtype=torch.int64)

    def accumulate(self, i, grad):
        self.master[i].grad.copy_(grad)

    def accumulate_product(self, i, dz, x):
        total = torch.zeros_like(self.copies[i])
        self.master[i].grad.copy_(add_product_gradient(dz, x, total))

    def step(self, lr):
        _forget([s["exp_avg"] for s in self.optimizer.state.values()], self.steps)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        for c, w in zip(self.copies, self.master):
            if c.data_ptr() != w.data_ptr():
                c.copy_(w)

    def state(self):
        return {
            f"adamw.{i}.{key}": value for i, s in enumerate(self.optimizer.state.values()) for key, value in s.items()
        } | {"steps": self.steps}


OPTIMIZERS = {"sgd": MomentumSGD, "adamw": AdamW}

"""What goes up a network in one step: rows of positives and negatives, kept small where they share images."""


from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ff_research.data import as_float


@dataclass
class Streams:
    """What goes up a network in one step.

    x: rows `[rows, …]`, a tensor or a `Shared`; y: labels `[batch]`, or None where no layer learns from them (-100: this row
    has none); sizes: the number of rows of each stream, positives first; side: further inputs, which layers read by name.
    """

    x: object
    y: torch.Tensor | None
    sizes: tuple
    side: dict = field(default_factory=dict)

    def split(self, h):
        "One part of `[rows, …]` for each stream. Raises ValueError where the rows are not those of the streams."
        if len(h) != sum(self.sizes):
            streams = " + ".join(map(str, self.sizes))
            raise ValueError(f"a layer gave {len(h)} rows of activity for {sum(self.sizes)} rows of input ({streams})")
        return h.split(self.sizes)


class Rows:
    """Base of the tensors-in-disguise that stand for `[rows, …]`, most of which they have in common.

    A subclass has `base` `[n, …]`, `spread` (what a linear map gives for the rows, from what it gives for `base`) and
    `prepare`; one without the first two says `linear = False`, and has `dense` and a product of its own.
    """

    linear = True

    def spread(self, z):
        "`[n, …]` to `[rows, …]`."
        raise NotImplementedError

    def dense(self):
        "The rows written out."
        return self.spread(self.base)

    def product(self, weight, bias, out=None):
        "`dense() @ weight.T + bias` of flattened rows, `[rows, units]`, written into `out` where that is given."
        z = self.spread(self.base.flatten(1) @ weight.t())
        return torch.add(z, bias, out=out)

    def add_product_gradient(self, dz, total, keep=0.0):
        "Replace `total` `[units, inputs]` by `keep * total + dz.T @ dense()`, in place; dz `[rows, units]`."
        return torch.addmm(total, dz.t(), self.dense().flatten(1), beta=keep, out=total)

    def __len__(self):
        return self.shape[0]

    @property
    def shape(self):
        "The shape that the rows have written out."
        return torch.Size([len(self), *self.base.shape[1:]])

    def __getattr__(self, name):
        if name.startswith("__") or name in ("base", "index", "scale"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        x, kwargs = args[0], kwargs or {}
        if isinstance(x, Rows) and x.linear and function in (F.linear, F.conv2d) and not kwargs:
            weight, bias, *more = (*args[1:], None)[: max(2, len(args) - 1)]
            z = x.spread(function(x.base, weight, None, *more))
            return z if bias is None else z + bias.to(z.dtype).view(-1, *[1] * (z.ndim - 2))
        return function(*map(written_out, args), **{key: written_out(value) for key, value in kwargs.items()})


def written_out(x):
    "The same without disguise: `Rows` as tensors, also inside lists and tuples; anything else as it is."
    if isinstance(x, Rows):
        return x.dense()
    return type(x)(map(written_out, x)) if isinstance(x, (list, tuple)) and type(x) in (list, tuple) else x


class Shared(Rows):
    "Rows that are `scale[r]` (default 1) times the sum of `base[index[r]]`: base `[n, …]`, index int64 `[rows, k]`, scale `[rows]`."

    def __init__(self, base, index, scale=None):
        self.base, self.index, self.scale = base, index, scale

    def __len__(self):
        return len(self.index)

    def spread(self, z):
        out = z[self.index[:, 0]]
        for column in self.index.T[1:]:
            out = out + z[column]
        return out if self.scale is None else out * self.scale.to(z.dtype).view(-1, *[1] * (z.ndim - 1))

    def prepare(self, how, scaling, dtype, flat):
        """The same rows as floats, brought to scale.

        how: the name of the scaling; scaling: from `[rows, numbers]` to as many; flat: give `[rows, numbers]`.
        """
        rows = scaling(as_float(self.dense(), dtype).flatten(1))
        return rows if flat else rows.view(self.shape)


class Paired(Rows):
    """Each image beside itself, then each beside its partner, read by one set of weights for both: `[2 x batch, …]`.

    images: `[batch, …]`; partner: int64 `[batch]`, a permutation; others: `[batch, …]`, what stands beside instead of the
    images themselves (other views of them, say), which costs a second product.
    """

    def __init__(self, images, partner, others=None):
        self.images, self.partner, self.others = images, partner, others

    def __len__(self):
        return 2 * len(self.images)

    @property
    def shape(self):
        return torch.Size([len(self), *self.images.shape[1:]])

    @property
    def base(self):
        "Everything that is multiplied: the images, and what stands beside them where that is something else."
        return self.images if self.others is None else torch.cat([self.images, self.others])

    def spread(self, z, out=None):
        beside = z
        if self.others is not None:
            z, beside = z.chunk(2)
        same = z if beside is z else torch.lerp(z, beside, 0.5)
        return torch.cat([same, torch.lerp(z, beside[self.partner], 0.5)], out=out)

    def prepare(self, how, scaling, dtype, flat):
        "The pairs of images, each of which is brought to scale by itself; see `Shared.prepare`."

        def ready(images):
            rows = scaling(as_float(images).flatten(1)).to(dtype)
            return rows if flat else rows.view(images.shape)

        return Paired(ready(self.images), self.partner, None if self.others is None else ready(self.others))

    def dense(self):
        beside = self.images if self.others is None else self.others
        return torch.cat([self.images + beside, self.images + beside[self.partner]]) / 2

    def product(self, weight, bias, out=None):
        z = torch.addmm(bias, self.images.flatten(1), weight.t())
        if self.others is not None:
            z = torch.cat([z, torch.addmm(bias, self.others.flatten(1), weight.t())])
        return self.spread(z, out)

    def add_product_gradient(self, dz, total, keep=0.0):
        positive, negative = (part / 2 for part in dz.chunk(2))
        d, beside = positive + negative, positive  # what reaches the images, and what stands beside them
        beside[self.partner] += negative
        images = self.images.flatten(1)
        if self.others is None:
            return torch.addmm(total, d.add_(beside).t(), images, beta=keep, out=total)
        torch.addmm(total, d.t(), images, beta=keep, out=total)
        return total.addmm_(beside.t(), self.others.flatten(1))

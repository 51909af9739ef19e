"""What a run is, in one file: written whole or not at all, refused where it belongs to another run."""

import contextlib
import glob
import json
import zlib
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from ff_research.checks import replacing, shown


@dataclass
class History:
    """What training saw: a dictionary for each epoch, with a list over the layers that learned in it under each of

    loss: mean local loss; separation: share of the batch's pairs whose positive has the higher goodness, 0.5 is chance (of an
    objective with class scores: share of images whose own class has the highest); g_pos, g_neg: mean goodness; and
    `seconds`, the epoch's own time.
    """

    epochs: list = field(default_factory=list)

    def __len__(self):
        return len(self.epochs)

    def column(self, key):
        "One quantity as `[epochs][layers]`."
        return [epoch[key] for epoch in self.epochs]


def _checksum(tensors):
    "CRC-32 of all numbers, in the order of their names."
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return str(crc)


def save_checkpoint(path, tensors, epoch, settings, history, generators):
    """Write a run's state as safetensors, whole or not at all.

    tensors: everything that an update changes, by name; generators: {name: `torch.Generator`}. Raises OSError, with the old
    checkpoint untouched, if it cannot.
    """
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    tensors |= {name: generator.get_state() for name, generator in generators.items()}
    header = dict(
        epoch=str(epoch), settings=json.dumps(settings), history=json.dumps(history.epochs), crc=_checksum(tensors)
    )
    try:
        with replacing(path) as f:
            f.write(serialize(tensors, header))
    except OSError as error:
        raise OSError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error


def _difference(key, there, here):
    "Two unlike settings in words; of long texts, a network's say, the first lines that differ."
    if isinstance(there, str) and isinstance(here, str):
        lines = zip_longest(there.splitlines(), here.splitlines())
        there, here = next((pair for pair in lines if pair[0] != pair[1]), (there, here))
    there, here = (repr(value.strip() if isinstance(value, str) else value) for value in (there, here))
    return f"{shown(key, 60)} is {there[:200]} there, {here[:200]} here"


def _is_history(epochs, count):
    "Whether this is what training writes after so many epochs: for each its seconds, and a list of floats over the layers under each key."

    def floats(v):
        return isinstance(v, list) and all(type(x) is float for x in v)

    return (
        isinstance(epochs, list)
        and len(epochs) == count
        and all(
            isinstance(epoch, dict)
            and type(epoch.get("seconds")) is float
            and all(floats(epoch.get(key)) for key in ("loss", "separation", "g_pos", "g_neg"))
            for epoch in epochs
        )
    )


def read_checkpoint(path, settings, most):
    """Epoch, tensors and history from a checkpoint of a run with the same settings and at most `most` epochs.

    Raises ValueError for a damaged file, or one that another run wrote (and says what differs).
    """
    where = shown(str(path))
    try:
        if not Path(path).is_file():
            raise ValueError("no regular file")
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        if "crc" in header and header["crc"] != _checksum(tensors):
            raise ValueError("its numbers are not those that were written")
        epoch, theirs, epochs = int(header["epoch"]), json.loads(header["settings"]), json.loads(header["history"])
        differing = [
            _difference(key, theirs.get(key), settings.get(key))
            for key in {**settings, **theirs}
            if theirs.get(key) != settings.get(key)
        ]
    except (
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # a damaged file trips all of them
        raise ValueError(
            f"{where}: damaged, or no checkpoint of ff_research ({shown(str(error), 200)}); move it away to start afresh"
        ) from error
    if differing:
        raise ValueError(
            f"{where} belongs to another run: {'; '.join(differing[:5])}{'; and more' if differing[5:] else ''}"
        )
    if not (0 <= epoch <= most and _is_history(epochs, epoch)):
        raise ValueError(
            f"{where}: damaged, its history is not that of the {shown(epoch, 60)} epochs it claims; move it away to start afresh"
        )
    return epoch, tensors, History(epochs)


def restore(live, stored, generators, path):
    """Copy stored tensors into the live ones of the same names, and set the generators, all of them or none.

    Raises ValueError where they do not fit.
    """
    where, wanted = shown(str(path)), live | {name: g.get_state() for name, g in generators.items()}
    wrong = sorted(wanted.keys() ^ stored.keys()) + [
        name
        for name in wanted.keys() & stored.keys()
        if (wanted[name].shape, wanted[name].dtype) != (stored[name].shape, stored[name].dtype)
    ]
    if wrong:
        raise ValueError(f"{where} belongs to another network: {shown(', '.join(wrong), 200)} do not match")
    if broken := [name for name in live if not torch.isfinite(stored[name]).all()]:
        raise ValueError(
            f"{where}: {broken[0]} holds NaN or infinite numbers: the run diverged, or the file is damaged; "
            "move it away to start afresh"
        )
    try:
        for name, generator in generators.items():
            torch.Generator(generator.device).set_state(stored[name])
    except RuntimeError as error:
        raise ValueError(
            f"{where}: damaged, the state of its random generator is none; move it away to start afresh"
        ) from error
    for name, generator in generators.items():
        generator.set_state(stored[name])
    for name, tensor in live.items():
        tensor.copy_(stored[name])


@contextlib.contextmanager
def claimed(path):
    "Hold the checkpoint of a run; what a killed one left half-written is cleared away. Raises ValueError if another run holds it, OSError if it cannot be written."
    if path is None:
        yield
        return
    path = Path(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{path} belongs to a run that is under way; wait for it, or give this one a checkpoint of its own"
        ) from None
    except OSError as error:
        raise OSError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
    try:
        for part in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            part.unlink(missing_ok=True)
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

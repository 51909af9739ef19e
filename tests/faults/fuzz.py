"""Hostile and broken files, made at random but repeatably: the library must say so in one line, or read them.

    python -m tests.faults.fuzz --cases 10000 --seed 0 --out fuzz.jsonl     every kind, from the project's root
    python -m tests.faults.fuzz --case npz/shapes/17 --seed 0               one case again

A case fails if the answer is no ValueError or OSError of one line that names the file; if it takes more than
`MEMORY_MB`, or `SECONDS`; if anything is unpickled, any program started, or any file written outside the case's own
folder; and if what was read after all is not sound.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as fixed_seed
from hypothesis import strategies as st

import ff_research
from ff_research import cli, jobs, loops, recipes, results, runs, searches, training
from ff_research.backprop import train_backprop
from ff_research.checkpoints import read_checkpoint as read_back
from ff_research.checks import keeping_memory
from ff_research.data import Images, from_arrays, from_dataset, load, load_npz, save_npz
from ff_research.files import read_arrays
from ff_research.layers import FFConv, FFLinear, Merge
from ff_research.modelfiles import digest, load_network, save
from ff_research.network import Network
from ff_research.predictions import fit_readout, predict, reading_of
from ff_research.strategies import STRATEGIES

MEMORY_MB, SECONDS = 200, 20
ATTACKS = {"npz": {}, "converter": {}, "checkpoint": {}, "model": {}, "rows": {}, "recipe": {}}


class Broken(AssertionError):
    "The library did what it must not do."


class Hang(BaseException):
    "The alarm rang."


def attack(kind):
    "Enter a function as a family of attacks; it makes one input from a source of random numbers."

    def enter(function):
        ATTACKS[kind][function.__name__] = function
        return function

    return enter


# Guards

_trespasses, _ground = None, ""  # what was done outside the folder `_ground`, while somebody watches
CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
ACTS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
    "ctypes.dlopen",
}


def _audit(event, arguments):
    """Python tells of what is opened, changed and started; hooks cannot be taken off again, so this one sleeps between
    cases.
    """
    if _trespasses is None:
        return
    paths = ()
    if (
        event == "open"
        and isinstance(arguments[0], (str, bytes))
        and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        paths = arguments[:1]
    elif event in CHANGES:
        paths = [path for path in arguments[:2] if isinstance(path, (str, bytes))]
    elif event in ACTS:
        _trespasses.append(f"{event} {arguments!r}"[:200])
    for path in map(os.fsdecode, paths):
        if not os.path.abspath(path).startswith(_ground) and "__pycache__" not in path and path != os.devnull:
            _trespasses.append(f"{event} {path!r}"[:200])


@cache
def _install():
    sys.addaudithook(_audit)


def _memory():
    """Resident memory in MB, its highest since the last call, and the address space; zeros where the system does not
    tell.
    """
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        Path("/proc/self/clear_refs").write_text("5")
        return [int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM", "VmSize")]
    except OSError:
        return [0, 0, 0]


def _ring(number, frame):
    raise Hang


@contextlib.contextmanager
def guarded(folder):
    """Whatever is done within may use little memory and time, touch only `folder`, start and unpickle nothing. Gives a
    dictionary that gets the memory.
    """
    global _trespasses, _ground
    _install()
    with keeping_memory():  # looks up the C library, once in a process
        pass
    told, unpickled = {}, []

    def refuse(*arguments, **options):
        unpickled.append(1)
        raise Broken("something was unpickled")

    refusing = type(
        "Unpickler", (), {"__init__": refuse}
    )  # a class, since modules that are imported meanwhile may derive from it

    _memory()
    before, soft, handler, here = (
        _memory(),
        resource.getrlimit(resource.RLIMIT_AS),
        signal.signal(signal.SIGALRM, _ring),
        os.getcwd(),
    )
    try:
        os.chdir(folder)
        with contextlib.ExitStack() as stack:
            for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
                stack.enter_context(mock.patch.object(pickle, name, refusing if name.endswith("er") else refuse))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            if before[2]:
                resource.setrlimit(resource.RLIMIT_AS, (int(before[2] + 1024) << 20, soft[1]))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            _trespasses, _ground = [], str(folder)
            try:
                yield told
            finally:
                done, _trespasses = _trespasses, None
    except Hang:
        raise Broken(f"no answer in {SECONDS} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(here)
        resource.setrlimit(resource.RLIMIT_AS, soft)
        told["mb"] = max(0, _memory()[1] - before[0])
    if unpickled:
        raise Broken("something was unpickled")
    if done:
        raise Broken(f"it reached out of its folder: {done[0]}")
    if told["mb"] > MEMORY_MB:
        raise Broken(f"it took {told['mb']:.0f} MB")


def _asked_for_too_much(error):
    """Whether an error goes back to memory that was not to be had. (Python's own parser says MemoryError to deep
    nesting, too.)
    """
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is None or not trace.tb_frame.f_code.co_filename.endswith("ast.py"):
                return True
        error = error.__cause__ or error.__context__
    return False


def judged(call, named="", kinds=(ValueError, OSError)):
    "What a call gives, None if it refused in the right way; any other way is `Broken`, or the error as it came."
    try:
        return call()
    except kinds as error:
        message = str(error)
        if _asked_for_too_much(error):
            raise Broken(f"it asked for too much memory: {message[:200]}") from error
        if not message.strip() or not message.isprintable() or len(message) > 15_000:
            raise Broken(f"not one clear line: {type(error).__name__} {message[:200]!r}") from error
        if named not in message:
            raise Broken(f"{named!r} is not named: {message[:200]}") from error
        return None


# Values


@cache
def examples(count=300):
    "JSON values of every shape, the same ones every time."
    leaf = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(10**18, 10**400)
        | st.floats()
        | st.text()
        | st.text(st.characters(categories=["Cs", "Cc", "Cf"]))
        | st.sampled_from(["NaN", "", "..", "../up", "/abs", "nul\0", "\ud800", "x" * 3000])
    )
    made = []

    @fixed_seed(0)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.recursive(
            leaf,
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
            max_leaves=10,
        )
    )
    def take(value):
        made.append(value)

    take()
    return made


def anything(rng):
    return rng.choice(examples())


def flipped(rng, data, low=0, high=None):
    "The same bytes with some bits flipped."
    data, high = bytearray(data), len(data) if high is None else high
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(data)


def spliced(rng, data):
    "The same bytes with a piece taken out, doubled, zeroed, or replaced by noise."
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b = min(b, a + 3000)
    piece = data[a:b]
    return data[:a] + rng.choice((b"", piece * 2, bytes(len(piece)), rng.randbytes(len(piece)), piece[::-1])) + data[b:]


def nested(depth, rng=None):
    "JSON text that goes deep."
    opening, closing = (rng or random).choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + "1" + closing * depth


class Payload:
    "Unpickled, it leaves a trace."

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def foreign(rng):
    "Files of other programs."
    torch.save({"a": torch.zeros(3)}, saved := io.BytesIO())
    return rng.choice(
        (
            b"",
            b"\n",
            b"PK",
            b"PK\5\6" + bytes(18),
            b"\x93NUMPY",
            b"x_train,y_train\n0,1\n",
            bytes(5000),
            b"\xff" * 5000,
            b"%PDF-1.7\n" + rng.randbytes(500),
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(500),
            gzip.compress(bytes(1000)),
            bz2.compress(bytes(10**6)),
            pickle.dumps(Payload("canary")),
            saved.getvalue(),
            b"#!/bin/sh\nmkdir canary\n",
            rng.randbytes(rng.randrange(3000)),
            struct.pack("<Q", 2**63) + bytes(50),
            b"import os\nos.mkdir('canary')\n",
        )
    )


def placed(rng, folder, good, name):
    "What is no regular file, or is one in a strange place; gives its path."
    path = folder / name
    stem, dot, end = name.partition(".")
    what = rng.choice(
        ("folder", "pipe", "zero", "full", "dangling", "loop", "link", "odd", "long", "nul", "unreadable", "home")
    )
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what in ("zero", "full"):
        path.symlink_to(f"/dev/{what}")
    elif what in ("dangling", "loop"):
        path.symlink_to("nowhere" if what == "dangling" else name)
    elif what == "link":
        (folder / "real").write_bytes(good)
        path.symlink_to(folder / "real")
    elif what == "odd":
        odd = rng.choice((" ", "\n", "\x1b[31m", "'", '"', "%s", "{0}", "\udcff", "ä", "\u202e", "\\", "*", "-"))
        path = folder / f"{odd}{stem}{dot}{end}"
        path.write_bytes(good if rng.random() < 0.5 else b"broken")
    elif what == "unreadable":
        path.write_bytes(good)
        path.chmod(0)
    else:
        return {
            "long": str(folder / ("x" * 10_000 + dot + end)),
            "nul": f"{folder}/\0{dot}{end}",
            "home": f"~nobody-of-this-name/{name}",
        }[what]
    return path


def naming(path):
    """What a message about a path has to hold: the end of it, the beginning of an endless one, nothing of one that
    cannot be.
    """
    text = repr(str(path))[1:-1]
    return "" if "\0" in str(path) else text[:20] if len(text) > 1000 else text[-10:]


# npz: `attack(rng, folder)` gives bytes, or a path

KEYS = ("x_train", "y_train", "x_test", "y_test")


def arrays():
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 256, (n, 1, 6, 5), dtype=np.uint8) for n in (12, 6)]
    return dict(x_train=x[0], y_train=np.arange(12) % 3, x_test=x[1], y_test=np.arange(6) % 3)


def npy(array, version=(1, 0)):
    "An array as numpy writes it."
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), version)
    return out.getvalue()


def headed(text, data=b"", version=(1, 0), length=None):
    "An array file with this header, whatever it says."
    text = text.encode("latin1", "replace") + b"\n"
    length = len(text) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes(version)
        + (struct.pack("<H", length % 65536) if version[0] == 1 else struct.pack("<I", length))
        + text
        + data
    )


def described(descr, shape, data=b"", fortran=False, **options):
    return headed(f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}", data, **options)


def packed(members, method=zipfile.ZIP_STORED, lie=None):
    "A zip archive; `lie` may change the entries before the directory is written."
    out = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
        if lie:
            lie(archive.filelist)
    return out.getvalue()


def with_member(rng, data, **options):
    "A good archive in which one array has another content."
    members = {f"{key}.npy": npy(value) for key, value in arrays().items()}
    members[f"{rng.choice(KEYS)}.npy"] = data
    return packed(members.items(), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), **options)


def whole_npz(rng):
    rng.choice((np.savez, np.savez_compressed))(out := io.BytesIO(), **arrays())
    return out.getvalue()


@attack("npz")
def truncated(rng, folder):
    data = whole_npz(rng)
    return data[: rng.randrange(len(data))]


@attack("npz")
def flips(rng, folder):
    return flipped(rng, whole_npz(rng))


@attack("npz")
def splices(rng, folder):
    return spliced(rng, whole_npz(rng))


@attack("npz")
def members(rng, folder):
    names = [f"{key}.npy" for key in KEYS]
    held = list(zip(names, map(npy, arrays().values())))
    odd = (
        "../x_train.npy",
        "/etc/x_train.npy",
        "..\\x_train.npy",
        "C:\\x_train.npy",
        "x_train",
        "X_TRAIN.npy",
        "x_train.npy/",
        "x_train.npy.npy",
        "",
        ".npy",
        "a\nb.npy",
        "\x1b[2J.npy",
        "\u202e.npy",
        "x" * 60_000 + ".npy",
        "x_train.npy ",
    )
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(held)) if held else 0
        what = rng.randrange(6) if held else 0
        if what == 0:
            held.append((rng.choice(odd), rng.choice((b"", b"text", npy(arrays()["x_train"])))))
        elif what == 1:
            held.pop(place)
        elif what == 2:
            held.append(held[place])
        elif what == 3:
            held[place] = rng.choice(odd), held[place][1]
        elif what == 4:
            held[place] = held[place][0], held[place - 1][1]
        else:
            held += [(f"more {i}", b"") for i in range(2000)]
    return packed(held, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


SHAPES = (
    "(-1, 1, 6, 5)",
    "(12, -1, -6, 5)",
    "(1000000, 1000000, 1000, 1)",
    "(2**62,)",
    "(4294967296, 4294967296)",
    "(9223372036854775807, 2, 1, 1)",
    "(18446744073709551617,)",
    "(0,)",
    "(0, 1, 6, 5)",
    "(12, 0, 9223372036854775807, 5)",
    "()",
    "(12,)",
    "(True, True, 6, 5)",
    "(1.5,)",
    "(12, 1, 6, None)",
    "('a',)",
    "12",
    "[12, 1, 6, 5]",
    "{}",
    "(" + "1, " * 60 + ")",
    "(" + "1, " * 3000 + ")",
    "(99999999999999999999999999999999999999,)",
    "(3000000000, 1, 1)",
    "(8000, 1, 1000, 1000)",
)


@attack("npz")
def shapes(rng, folder):
    data = rng.choice((b"", bytes(360), rng.randbytes(96), bytes(100_000)))
    return with_member(
        rng,
        described(
            rng.choice(("|u1", "<i8", "<f8")),
            rng.choice(SHAPES),
            data,
            rng.random() < 0.3,
            version=rng.choice(((1, 0), (2, 0), (3, 0))),
        ),
    )


@attack("npz")
def dtypes(rng, folder):
    value = arrays()[rng.choice(KEYS)]
    kinds = (
        object,
        complex,
        "S3",
        "U5",
        "M8[s]",
        "m8[ns]",
        bool,
        np.float16,
        ">f4",
        ">i8",
        np.longdouble,
        np.uint64,
        [("a", "u1"), ("b", "f8")],
        "V7",
        np.clongdouble,
    )
    texts = (
        "|V0",
        "|S0",
        "<U0",
        "|O",
        "O",
        "<f3",
        "|u9",
        "<U999999999",
        "|S2147483648",
        "?",
        "x",
        "",
        "|u1, |u1",
        "(2,3)f4",
        "<M8[1000000000Y]",
        "__import__('os').mkdir('canary')",
    )
    structs = (
        [("a", "|O")],
        [("a\n", "|u1")] * 2,
        [("x" * 5000, "<f8")],
        [],
        [("a", [("b", [("c", "|u1")])])],
        ("|u1", (3,)),
        {"names": ["a"], "formats": ["O"]},
    )
    if rng.random() < 0.4:
        return with_member(rng, npy(np.zeros(value.shape, rng.choice(kinds))))
    return with_member(
        rng,
        described(
            rng.choice((*texts, *structs)),
            rng.choice((value.shape, "(10**18,)", "(1000000000000, 1, 1)")),
            bytes(rng.choice((0, 12, 360))),
        ),
    )


@attack("npz")
def headers(rng, folder):
    deep = rng.choice((100, 199, 1000, 9000, 60_000))
    texts = (
        "",
        "{}",
        "None",
        "[]",
        "{'descr': '|u1'}",
        "{'descr': '|u1', 'fortran_order': 'yes', 'shape': (1,)}",
        "(" * deep,
        "[" * deep + "]" * deep,
        "-" * deep + "1",
        "~" * deep,
        "{'a':" * deep,
        " " * 65_000,
        "\0" * 50,
        "1" * 6000,
        "'" * 7,
        "{**{}}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (360,), 'more': 1}",
        "{'shape': (1,), 'shape': (2,), 'descr': '|u1', 'fortran_order': False}",
        "__import__('os').mkdir('canary')",
        "lambda: 1",
        "f'{1}'",
        "{1: 2, 'a': 3}",
        "1e999",
    )
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 7), (255, 255)))
    return with_member(
        rng, headed(rng.choice(texts), bytes(360), version, rng.choice((None, None, 0, 1, 60_000, 2**32 - 1, 2**31)))
    )


@attack("npz")
def pickles(rng, folder):
    payload = Payload(folder / "canary")
    objects = np.array([payload] * 12, dtype=object)
    return rng.choice(
        (
            lambda: with_member(rng, npy(objects)),
            lambda: with_member(rng, pickle.dumps(payload)),
            lambda: pickle.dumps(payload),
            lambda: npy(objects),
            lambda: with_member(rng, described("|O", (12,), pickle.dumps(objects))),
            lambda: with_member(rng, described([("a", "|O")], (1,), pickle.dumps(payload))),
            lambda: with_member(rng, described("|u1", (12,), pickle.dumps(payload))),
        )
    )()


@attack("npz")
def methods(rng, folder):
    method = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 1, 6, 9, 93, 98, 99, 65535))
    members = [(f"{key}.npy", npy(value)) for key, value in arrays().items()]
    if method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA) and rng.random() < 0.7:
        return packed(members, method)
    return packed(members, lie=lambda entries: setattr(rng.choice(entries), "compress_type", method))


@cache
def bomb(method, mb):
    "An archive whose first array is that many MB of zeros."
    shape = mb << 10, 1, 32, 32
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        with archive.open("x_train.npy", "w", force_zip64=True) as f:
            f.write(described("|u1", shape))
            for _ in range(mb):
                f.write(bytes(1 << 20))
        for key in KEYS[1:]:
            archive.writestr(f"{key}.npy", npy(arrays()[key]))
    return out.getvalue()


@attack("npz")
def bombs(rng, folder):
    blank = described("|u1", "(12, 1, 6, 5)" + " " * rng.choice((10**4, 10**6, 10**7)), version=(2, 0))
    return rng.choice(
        (
            lambda: bomb(zipfile.ZIP_DEFLATED, 20),
            lambda: bomb(zipfile.ZIP_BZIP2, 128),
            lambda: bomb(zipfile.ZIP_LZMA, 24),
            lambda: with_member(rng, blank),
            lambda: packed([(f"{key}.npy", bomb(zipfile.ZIP_BZIP2, 128)) for key in KEYS], zipfile.ZIP_DEFLATED),
        )
    )()


@attack("npz")
def directories(rng, folder):
    "A directory that does not tell the truth about what the archive holds."

    def lie(entries):
        entry = rng.choice(entries)
        for field in rng.sample(
            (
                "file_size",
                "compress_size",
                "CRC",
                "header_offset",
                "compress_type",
                "flag_bits",
                "create_version",
                "extract_version",
                "extra",
            ),
            rng.choice((1, 1, 2, 3)),
        ):
            huge = rng.choice((0, 1, 127, 487, 488, 489, 10**6, 2**31, 2**32 - 1, 2**32, 2**40, 2**62))
            setattr(
                entry,
                field,
                {
                    "CRC": huge % 2**32,
                    "compress_type": rng.choice((0, 8)),
                    "flag_bits": rng.choice((1, 8, 0x40, 0x800, 0x20, 0xFFFF)),
                    "create_version": rng.randrange(256),
                    "extract_version": rng.choice((0, 63, 64, 255)),
                    "extra": struct.pack("<HHQQ", 1, 16, huge, huge),
                }.get(field, huge),
            )

    honest = rng.random() < 0.3
    size = rng.choice((10**9, 8 * 10**9, 10**13))
    data = described("|u1", (size,), bytes(360)) if rng.random() < 0.5 else npy(arrays()["x_train"])
    if honest:  # directory and header agree on the same lie
        return with_member(
            rng,
            described("|u1", (size,), bytes(360)),
            lie=lambda entries: [
                (setattr(entry, "file_size", size + 128), setattr(entry, "compress_size", rng.choice((360, size))))
                for entry in entries
            ],
        )
    return with_member(rng, data, lie=lie)


@attack("npz")
def overlaps(rng, folder):
    "Several names for the same bytes."

    def lie(entries):
        one = rng.choice(entries)
        for entry in entries:
            if rng.random() < 0.7:
                entry.header_offset, entry.CRC, entry.file_size, entry.compress_size = (
                    one.header_offset,
                    one.CRC,
                    one.file_size,
                    one.compress_size,
                )

    data = packed([(f"{key}.npy", npy(value)) for key, value in arrays().items()], lie=lie)
    return data.replace(b"y_train", b"x_train") if rng.random() < 0.5 else data


@attack("npz")
def values(rng, folder):
    good = arrays()
    key = rng.choice(KEYS)
    value = good[key]
    odd = (10**9, -1, 2**63 - 1, np.nan, np.inf, -np.inf, 1e30, 256, 0.5, 2.0**-1074)
    change = rng.randrange(7)
    if change == 0:
        value = value.astype(rng.choice((np.float32, np.float64, np.int64)))
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            value.flat[rng.randrange(value.size)] = np.array(rng.choice(odd)).astype(value.dtype)
    elif change == 1:
        value = value[:0]
    elif change == 2:
        value = value[..., None] if rng.random() < 0.5 else value[0]
    elif change == 3:
        value = np.asfortranarray(value)
    elif change == 4:
        value = np.array([2**64 - 1, 2**63, 0, 1] * 3, dtype=np.uint64)[: len(value)]
    elif change == 5:
        value = value[: rng.randrange(len(value))]
    else:
        value = (value / 255).astype(rng.choice((np.float16, np.float32, np.longdouble)))
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(out := io.BytesIO(), **(good | {key: value}))
    return out.getvalue()


@attack("npz")
def others(rng, folder):
    return rng.choice(
        (
            lambda: foreign(rng),
            lambda: npy(arrays()["x_train"]),
            lambda: packed([("word/document.xml", b"<a/>")]),
            lambda: packed([]),
            lambda: whole_npz(rng) + rng.randbytes(300),
            lambda: rng.randbytes(300) + whole_npz(rng),
        )
    )()


@attack("npz")
def places(rng, folder):
    return placed(rng, folder, whole_npz(rng), "data.npz")


def read_npz(rng, folder, given):
    "Whether the data set could be read; `Broken` if it was, and is not sound."
    path = given
    if isinstance(given, bytes):
        path = folder / "data.npz"
        path.write_bytes(given)
    with guarded(folder) as told:
        images = judged(lambda: rng.choice((load_npz, load))(path), named=naming(path))
    if images is not None:
        sound(images)
    return images is not None, told


def sound(images, floats=False):
    "`Broken` for images that no training could use."
    for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        if (
            x.dtype != torch.uint8
            and not (floats and x.dtype == torch.float32 and x.isfinite().all())
            or x.ndim != 4
            or len(x) != len(y)
            or not 0 <= int(y.min()) <= int(y.max()) < images.num_classes
            or images.class_names is not None
            and len(images.class_names) != images.num_classes
        ):
            raise Broken(f"unsound data were read: {images!r}, labels {int(y.min())} to {int(y.max())}")
    if not str(images).isprintable():
        raise Broken(f"not one clear line: {images!r}")


# Converters: `attack(rng, folder)` gives a call and the text that its message has to hold

LENGTHS = (0, 1, 2, 3, 4, 5, 6, 12, 13)
ASKED = dict(
    pixel_range=(
        None,
        None,
        "as_is",
        (0, 255),
        (-1, 1),
        (1, 0),
        (0,),
        "text",
        (0, float("nan")),
        7,
        (None, 1),
        (0, 10**400),
    ),
    channels=(None, None, "first", "last", "middle", 3, ""),
    class_names=(None, None, "ab", [], ["a"], ["a", "a"], list("abc"), range(3), [0, "a"], [1.5, 2], 7, [None] * 3),
    split=(None, None, "last", "stratified", "random", 0),
)


def odd_pixels(rng, count, shape):
    "Numbers of any kind and range."
    noise = np.random.default_rng(rng.randrange(2**32)).random((count, *shape))
    low, high = rng.choice(
        ((0, 1), (0, 255), (0, 16), (-1, 1), (-3, 3), (0, 1.003), (0, 65535), (-1e30, 1e300), (0, 0), (5, 5))
    )
    x = low + noise * (high - low)
    if rng.random() < 0.1 and x.size:
        x.flat[rng.randrange(x.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e308))
    kinds = (
        np.float64,
        np.float32,
        np.float16,
        np.int64,
        np.uint8,
        np.int8,
        np.uint16,
        bool,
        complex,
        object,
        "U3",
        np.longdouble,
    )
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return x.astype(rng.choice(kinds))


def odd_labels(rng, count):
    "Labels of any kind."
    plain = np.arange(count) % rng.choice((1, 2, 3, max(count, 1)))
    return rng.choice(
        (
            lambda: plain,
            lambda: plain + rng.choice((1, -1, 10**15, -(10**15))),
            lambda: plain * 50,
            lambda: plain[:, None],
            lambda: plain[None],
            lambda: np.eye(3)[plain % 3],
            lambda: np.eye(3, dtype=bool)[plain % 3] | (rng.random() < 0.5),
            lambda: np.array(["a", "\x1b[2J", "\ud800", "x" * 5000, ""], dtype="U5000")[plain % 5],
            lambda: plain.astype("S3"),
            lambda: plain.astype(object),
            lambda: plain.astype(rng.choice((float, np.float16, np.uint64, np.uint8, "M8[s]", complex))),
            lambda: plain + rng.choice((0.5, np.nan, np.inf)),
            lambda: [anything(rng) for _ in range(count)],
            lambda: list(map(str, plain)),
            lambda: torch.from_numpy(plain),
            lambda: anything(rng),
        )
    )()


def odd_shape(rng):
    sides = (1, 2, 3, 4, 5, 8)
    return tuple(rng.choice(sides) for _ in range(rng.choice((0, 1, 2, 2, 3, 3, 3, 4))))


@attack("converter")
def odd_arrays(rng, folder):
    count, shape, held = rng.choice(LENGTHS), odd_shape(rng), {}
    for part in ("train", "test"):
        given = shape if rng.random() < 0.9 else odd_shape(rng)
        held[f"x_{part}"] = odd_pixels(rng, count, given)
        held[f"y_{part}"] = odd_labels(rng, count if rng.random() < 0.9 else rng.choice(LENGTHS))
    if rng.random() < 0.2:
        held |= dict(x_test=None, y_test=None)
    if rng.random() < 0.2:
        held["validation"] = rng.choice((None, 7, (), (held["x_train"], held["y_train"]), (None, None), "ab"))
    if rng.random() < 0.1:
        held[rng.choice(list(held))] = anything(rng)
    for key, choice in ASKED.items():
        if rng.random() < 0.3:
            held[key] = rng.choice(choice)
    return lambda: from_arrays("fuzz", **held), "" if any(isinstance(v, str) for v in held.values()) else "fuzz"


@attack("converter")
def good_arrays(rng, folder):
    "What ought to come through, told how: any range, order and labels."
    whole = arrays()
    low, high = rng.choice(((0, 1), (-1, 1), (0, 16), (0, 65535), (5, 7.5)))
    for key in ("x_train", "x_test"):
        whole[key] = low + whole[key] / 255 * (high - low)
        whole[key] = np.moveaxis(whole[key], 1, 3) if rng.random() < 0.5 else whole[key]
    names = rng.choice((list("abc"), [7, 9, 30], [False, True, 2]))
    for key in ("y_train", "y_test"):
        whole[key] = [names[k] for k in whole[key]]
    return lambda: from_arrays("fuzz", **whole, pixel_range=(low, high)), "fuzz"


class Strange:
    "A data set that lies."

    def __init__(self, count, items):
        self.count, self.items = count, items

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.items[i % len(self.items)]


@attack("converter")
def odd_datasets(rng, folder):
    from PIL import Image

    mode = rng.choice(("L", "RGB", "RGBA", "1", "P", "LA", "CMYK", "I", "F", "I;16"))
    images = (
        Image.new(mode, (4, 5)),
        Image.new("L", (4, 5), 200),
        np.full((4, 5), 200, np.uint8),
        torch.rand(1, 4, 5),
        torch.rand(1, 4, 5).to(torch.bfloat16),
        torch.zeros(3, 4, 5, requires_grad=True),
        None,
        "text",
        anything(rng),
        np.array({}),
        [[1, 2], [3]],
    )
    labels = (0, 1, 7, "cat", b"dog", None, 1.0, 1.5, torch.tensor(1), np.int64(2), [0, 1], {}, anything(rng), True)
    some, few = rng.choices(images, k=rng.choice((1, 1, 1, 2))), rng.choices(labels, k=rng.choice((1, 2, 3)))
    if rng.random() < 0.5:
        some, few = images[1:3], rng.choice((["cat", "dog"], [0, 1], [3, 4, 9]))
    pairs = [(rng.choice(some), few[i % len(few)]) for i in range(rng.choice((1, 3, 6)))]
    form = rng.choice(("pairs", "pairs", "columns", "odd columns", "alone", "text", "number"))
    items = {
        "columns": [dict(image=x, label=y) for x, y in pairs],
        "odd columns": [{"\x1b[2J": x, "y\n": y} for x, y in pairs],
        "alone": [x for x, _ in pairs],
        "text": "abc",
        "number": [7],
    }.get(form, pairs)
    train = rng.choice((items, Strange(rng.choice((0, 1, 12, 12, 10**4)), items), dict(train=items, test=items)))
    train = rng.choice(
        (train, train, train, iter(items), torch.utils.data.DataLoader(Strange(6, items)), anything(rng))
    )
    keep = folder / "kept.npz" if rng.random() < 0.3 else None
    return lambda: from_dataset(train, rng.choice((None, items)), name="fuzz", progress=False, keep=keep), ""


def idx(array, code=8):
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.tobytes()


def mat(compressed):
    from scipy.io import savemat

    savemat(out := io.BytesIO(), arrays() | {"note": "text"}, do_compression=compressed)
    return out.getvalue()


def as_file(rng, folder, name, data):
    (folder / name).write_bytes(data)
    path, y = folder / name, arrays()["y_train"]
    return lambda: from_arrays("fuzz", path, y, source=str(path), pixel_range=(0, 255)), name


@attack("converter")
def npy_files(rng, folder):
    good = npy(arrays()["x_train"])
    texts = ("|u1", "<i8", "|O", "<U1", "|V0"), SHAPES
    made = rng.choice(
        (flipped(rng, good), spliced(rng, good), good, described(*map(rng.choice, texts), bytes(360)), foreign(rng))
    )
    return as_file(rng, folder, "x.npy", made)


@attack("converter")
def idx_files(rng, folder):
    good = idx(arrays()["x_train"][:, 0])
    lies = (
        good[:4] + b"".join(struct.pack(">I", rng.choice((0, 1, 12, 2**31, 2**32 - 1))) for _ in range(3)) + good[16:]
    )
    deep = bytes([0, 0, 8, 255]) + struct.pack(">I", 2) * 255 + bytes(100)
    made = rng.choice(
        (good, good, flipped(rng, good), spliced(rng, good), lies, deep, good[: rng.randrange(len(good))])
    )
    if rng.random() < 0.5:
        packed_up = gzip.compress(rng.choice((made, made, good + bytes(10**7))))
        return as_file(rng, folder, "x-ubyte.gz", rng.choice((packed_up, packed_up, flipped(rng, packed_up))))
    return as_file(rng, folder, "x-ubyte", made)


@attack("converter")
def mat_files(rng, folder):
    good = mat(rng.random() < 0.5)
    made = rng.choice(
        (
            good,
            flipped(rng, good),
            flipped(rng, good, 128),
            spliced(rng, good),
            good[: rng.randrange(len(good))],
            foreign(rng),
        )
    )
    (folder / "x.mat").write_bytes(made)
    return lambda: load(folder / "x.mat"), "x.mat"


@attack("converter")
def odd_names(rng, folder):
    "Arrays under other names, and what a file may say of itself."
    words = dict(x_train="train_images", y_train="train_labels", x_test="test_images", y_test="test_labels")
    held = {rng.choice((key, key.upper(), words[key])): value for key, value in arrays().items()}
    said = dict(pixel_range=[0, 255], channels="first", class_names=list("abc"), split="last")
    for key in rng.sample(list(said), rng.choice((0, 1, 2))):
        odd = (said[key], said[key], rng.choice(ASKED[key]), "text", 7, np.nan, [], [[1]], "x" * 5000, [1e300, 2])
        with contextlib.suppress(ValueError):
            value = np.array(rng.choice(odd))
            held[key] = value if value.dtype.kind != "O" else value.astype(str)
    if rng.random() < 0.2:
        held |= dict(x_val=arrays()["x_test"], val_labels=odd_labels(rng, 6))
        held = {key: np.asarray(value) for key, value in held.items() if not isinstance(value, (dict, list))}
    held = {key: value for key, value in held.items() if getattr(value, "dtype", np.dtype("O")).kind != "O"}
    np.savez(folder / "named.npz", **held)
    return lambda: load(folder / "named.npz"), "named.npz"


def convert(rng, folder, given):
    "Whether images came out of it."
    call, said = given
    with guarded(folder) as told:
        made = judged(call, named=said)
        if isinstance(made, Images):
            judged(lambda: save_npz(made, folder / "again.npz"))
            again = judged(lambda: load(folder / "again.npz"))
            if again is None or not all(torch.equal(getattr(again, key), getattr(made, key)) for key in KEYS):
                raise Broken(f"written and read again, {made!r} is another")
        for path in list(folder.glob("x.*")):
            judged(lambda path=path: read_arrays(path), naming(path))
    if made is not None:
        sound(made, floats=True)
    return made is not None, told


# Checkpoints: `attack(rng, folder, whole)` gives bytes, or a path, from the bytes of a good one

QUIET = dict(epochs=2, lr=0.01, precision="fp32", device="cpu", progress=False, batch_size=6)
RUNS = {
    "together": {},
    "greedy": dict(schedule="greedy", optimizer="adamw"),
    "backprop": dict(method="backprop", optimizer="adamw"),
}
HISTORY = {"loss", "separation", "g_pos", "g_neg", "seconds"}


def trained(name, checkpoint):
    "One of the small runs: the network, and a function that trains it."
    options = dict(QUIET) | RUNS[name]
    network, images = Network([30, 4, 4]), from_arrays("tiny", **arrays())
    if options.pop("method", "ff") == "backprop":
        return network, lambda: train_backprop(network, images, checkpoint=checkpoint, **options)
    return network, lambda: training.train(
        network, images, STRATEGIES["label_embedding"](3), checkpoint=checkpoint, **options
    )


@cache
def checkpoints():
    "For each run what is in its checkpoint after the first epoch."
    held = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            path, seen = Path(folder) / f"{name}.safetensors", []

            def save(*arguments, seen=seen, write=loops.save_checkpoint):
                write(*arguments)
                seen.append(Path(arguments[0]).read_bytes())

            with mock.patch.object(loops, "save_checkpoint", save):
                trained(name, path)[1]()
            held[name] = seen[1]
    return held


def opened(whole):
    "Header and data of a safetensors file."
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def closed(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data


def retold(whole, **changes):
    "A checkpoint whose header says something else; None takes a key away."
    header, data = opened(whole)
    header["__metadata__"].update(changes)
    header["__metadata__"] = {key: value for key, value in header["__metadata__"].items() if value is not None}
    return closed(header, data)


def rewritten(whole, change):
    "A checkpoint whose tensors, {name: [dtype, shape, bytes]}, were changed."
    header, data = opened(whole)
    tensors = {
        name: [t["dtype"], t["shape"], data[slice(*t["data_offsets"])]]
        for name, t in header.items()
        if name != "__metadata__"
    }
    change(tensors)
    out, place = (
        {"__metadata__": {key: v for key, v in header["__metadata__"].items() if key != "crc"}},
        0,
    )  # or the checksum alone would refuse it
    for name, (dtype, shape, bits) in tensors.items():
        out[name] = dict(dtype=dtype, shape=shape, data_offsets=[place, place + len(bits)])
        place += len(bits)
    return closed(out, b"".join(t[2] for t in tensors.values()))


@attack("checkpoint")
def truncated_(rng, folder, whole):
    return whole[: rng.randrange(len(whole))]


@attack("checkpoint")
def header_flips(rng, folder, whole):
    return flipped(rng, whole, 0, 8 + int.from_bytes(whole[:8], "little"))


@attack("checkpoint")
def data_flips(rng, folder, whole):
    return flipped(rng, whole, 8 + int.from_bytes(whole[:8], "little"))


@attack("checkpoint")
def splices_(rng, folder, whole):
    return spliced(rng, whole)


@attack("checkpoint")
def lengths(rng, folder, whole):
    size = int.from_bytes(whole[:8], "little")
    return (
        struct.pack(
            "<Q",
            rng.choice((0, 1, 2, size - 1, size + 1, size // 2, len(whole), 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1)),
        )
        + whole[8:]
    )


@attack("checkpoint")
def header_texts(rng, folder, whole):
    header, data = opened(whole)
    text = json.dumps(header)
    return closed(
        rng.choice(
            (
                b"{}",
                b"[]",
                b"null",
                b"",
                b"{",
                nested(rng.choice((50, 127, 128, 1000, 100_000)), rng).encode(),
                text.encode()[:-1],
                text.replace('"F32"', '"F99"').encode(),
                text.encode("utf-16"),
                (text[:-1] + ', "generator": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}').encode(),
                text.replace("__metadata__", "__metadata__ ").encode(),
                (text[:-1] + ', "__metadata__": {}}').encode(),
                json.dumps(header | {"__metadata__": anything(rng)}).encode(),
                json.dumps(header | {"__metadata__": {"epoch": 1}}).encode(),
                text.replace('"shape": [', '"shape": [-1, ').encode(),
                text.replace("[0, ", "[18446744073709551616, ").encode(),
                (text + " " * 10**6).encode(),
                b"\xff" + text.encode(),
            )
        ),
        data,
    )


@attack("checkpoint")
def metadata(rng, folder, whole):
    key = rng.choice(("epoch", "settings", "history"))
    return retold(
        whole,
        **{
            key: rng.choice(
                (
                    None,
                    "",
                    "null",
                    "[]",
                    "{}",
                    "{",
                    "1",
                    '"text"',
                    "NaN",
                    "[[]]",
                    "true",
                    nested(rng.choice((50, 400, 600, 900, 100_000)), rng),
                    "9" * 5000,
                    json.dumps(anything(rng)),
                )
            )
        },
    )


@attack("checkpoint")
def epochs(rng, folder, whole):
    return retold(
        whole,
        epoch=rng.choice(
            (
                "-1",
                "0",
                "2",
                "3",
                "5",
                "99999999999999999999",
                "1.0",
                "1e3",
                "NaN",
                "one",
                "",
                "0x1",
                "1_0",
                "٣",
                " 1 ",
                "+1",
                "True",
                "None",
                "9" * 4000,
                "9" * 5000,
            )
        ),
    )


@attack("checkpoint")
def settings_(rng, folder, whole):
    told = json.loads(opened(whole)[0]["__metadata__"]["settings"])
    for _ in range(rng.choice((1, 1, 3))):
        what, key = rng.randrange(5), rng.choice(list(told) or ["lr"])
        if what == 0:
            told[key] = anything(rng)
        elif what == 1:
            told.pop(key, None)
        elif what == 2:
            told[json.dumps(anything(rng))[:2000]] = anything(rng)
        elif what == 3:
            told |= {f"key {i}": i for i in range(1000)}
        elif isinstance(told.get(key), str):
            told[key] = rng.choice(
                (
                    told[key] + "\n",
                    told[key].replace("\n", "\r\n"),
                    " " + told[key],
                    told[key] + "\x1b[31m",
                    told[key] * 100,
                )
            )
    return retold(whole, settings=json.dumps(told))


@attack("checkpoint")
def histories(rng, folder, whole):
    told = json.loads(opened(whole)[0]["__metadata__"]["history"])
    what, key = rng.randrange(9), rng.choice(sorted(HISTORY))
    if what == 0:
        told[0][key] = anything(rng)
    elif what == 1:
        del told[0][key]
    elif what == 2:
        told = told * rng.choice((0, 2, 3, 1000))
    elif what == 3:
        told = rng.choice(({}, {"0": told[0]}, told[0], [told], [None], [[]], ["loss"], None, "text", 1))
    elif what == 4:
        told[0][key] = [anything(rng)]
    elif what == 5:
        told[0][key] = [10**400, 1, True, None]
    elif what == 6:
        told[0] = list(told[0].items())
    elif what == 7:
        told[0][key] = rng.choice((1, True, "1.0", [1], [[0.5]], {"0": 0.5}, None, 10**400))
    else:
        told[0] |= {"more": anything(rng)}
    return retold(whole, history=json.dumps(told))


@attack("checkpoint")
def tensors(rng, folder, whole):
    def change(held):
        name, other = rng.choice(list(held)), rng.choice(list(held))
        what = rng.randrange(6)
        if what == 0:
            del held[name]
        elif what == 1:
            held[
                rng.choice(("more", "", "../up", "a\nb", "learner.9.momentum.0", "x" * 10**5, "generator ", "\u202e"))
            ] = list(held[name])
        elif what == 2:
            held[name], held[other] = held[other], held[name]
        elif what == 3:
            held |= {f"more {i}": ["F32", [1], bytes(4)] for i in range(500)}
        elif what == 4:
            held.clear()
        else:
            held[name + " "] = held.pop(name)

    return rewritten(whole, change)


@attack("checkpoint")
def kinds(rng, folder, whole):
    "Tensors of another dtype or shape, of the right number of bytes or not."

    def change(held):
        name = rng.choice(list(held))
        dtype, shape, bits = held[name]
        sizes = dict(
            F64=8,
            F32=4,
            F16=2,
            BF16=2,
            I64=8,
            I32=4,
            I16=2,
            I8=1,
            U8=1,
            U16=2,
            U32=4,
            U64=8,
            BOOL=1,
            C64=8,
            F8_E4M3=1,
            F8_E5M2=1,
            F8_E8M0=1,
            F4=1,
            F6_E2M3=1,
        )
        count, what = int(np.prod(shape)), rng.randrange(4)
        if what == 0:
            dtype = rng.choice(list(sizes))
            bits = bytes(count * sizes[dtype])
        elif what == 1:
            shape = rng.choice(([count], [1, *shape], [*shape, 1], shape[::-1], [0], [0, 2**62], [2**40, 0, 2**40], []))
            bits = bytes(len(bits) // max(count, 1) * int(np.prod(shape, dtype=object)))
        elif what == 2:
            shape = rng.choice(([2**63], [-1], [2**40, 2**40], [1.5], ["a"], None, [10**30]))
        else:
            dtype = rng.choice(("C64", "F64", "F16", "I32", "BOOL", "f32", "", "O", "Q9"))
        held[name] = [dtype, shape, bits]

    return rewritten(whole, change)


@attack("checkpoint")
def not_finite(rng, folder, whole):
    def change(held):
        name = rng.choice([name for name, t in held.items() if t[0] == "F32"])
        dtype, shape, bits = held[name]
        place = 4 * rng.randrange(len(bits) // 4)
        held[name] = [
            dtype,
            shape,
            bits[:place]
            + struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45)))
            + bits[place + 4 :],
        ]

    return rewritten(whole, change)


@attack("checkpoint")
def generators(rng, folder, whole):
    def change(held):
        name = rng.choice(("generator", "torch"))  # the run's own, and what its layers may draw from
        bits = held[name][2]
        held[name] = rng.choice(
            (
                ["U8", [len(bits) - 1], bits[:-1]],
                ["U8", [0], b""],
                ["U8", [len(bits)], bytes(len(bits))],
                ["U8", [len(bits)], b"\xff" * len(bits)],
                ["U8", [len(bits)], rng.randbytes(len(bits))],
                ["U8", [8, len(bits) // 8], bits],
                ["I8", [len(bits)], bits],
                ["F32", [len(bits) // 4], bits],
                ["U8", [16], bits[:16]],
                ["U8", [len(bits)], flipped(rng, bits)],
                ["BOOL", [len(bits)], bits],
            )
        )

    return rewritten(whole, change)


@attack("checkpoint")
def others_(rng, folder, whole):
    class Whole:  # a torch file of the same run, which would have to be unpickled
        def __reduce__(self):
            return os.mkdir, (str(folder / "canary"),)

    torch.save({"epoch": 1, "payload": Whole()}, saved := io.BytesIO())
    return rng.choice(
        (
            lambda: foreign(rng),
            saved.getvalue,
            lambda: closed({"weight": dict(dtype="F32", shape=[1], data_offsets=[0, 4])}, bytes(4)),
            lambda: whole + b"\0",
            lambda: closed({"__metadata__": {"format": "pt"}}),
            lambda: whole * 2,
            lambda: pickle.dumps(Payload(folder / "canary")),
        )
    )()


@attack("checkpoint")
def places_(rng, folder, whole):
    return placed(rng, folder, whole, "run.safetensors")


def read_checkpoint(rng, folder, given):
    """Whether a run went on from the checkpoint; `Broken` if a refusal changed network or file, or a run that went on
    is not whole.
    """
    name, given = given
    path = given
    if isinstance(given, bytes):
        path = folder / "run.safetensors"
        path.write_bytes(given)
    network, train = trained(name, path)
    turns = QUIET["epochs"] * (2 if name == "greedy" else 1)
    start = [p.detach().clone() for p in network.parameters()]
    told_there, refused, history = None, [], None
    with contextlib.suppress(Exception):
        told_there = json.loads(opened(checkpoints()[name])[0]["__metadata__"]["settings"])
    named = naming(path)
    with guarded(folder) as told:
        direct = judged(lambda: read_back(path, told_there, turns), named)
        try:
            history = judged(lambda: train() or refused.append(1), named)
        except training.Diverged as error:  # weights that were changed to huge ones
            if not str(error).isprintable():
                raise Broken(f"not one clear line: {error}") from error
            return False, told
    if history is None and not all(torch.equal(p, w) for p, w in zip(network.parameters(), start)):
        raise Broken("the checkpoint was refused, but the network is changed")
    if history is None and isinstance(given, bytes) and path.read_bytes() != given:
        raise Broken("the checkpoint was refused, but the file is changed")
    if direct is None and history is not None and isinstance(given, bytes):
        raise Broken("read_checkpoint refused it, but training went on from it")
    if history is not None:
        if len(history) != turns or not all(
            epoch.keys() >= HISTORY
            and all(isinstance(v, float) for v in (*epoch["loss"], *epoch["separation"], epoch["seconds"]))
            for epoch in history.epochs
        ):
            raise Broken(f"a history of {len(history)} epochs, {turns} expected, or not of the right form")
    return history is not None, told


# Models: `attack(rng, folder, whole)` gives bytes, or a path, from the bytes of a good one


@cache
def models():
    "What is in the files of small trained networks, by name."
    tiny, held = from_arrays("tiny", **arrays()), {}
    block = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(30, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU())
    torch.manual_seed(0)
    made = {
        "labels": (Network([30, 8, 8]), "hard_mining"),
        "scores": (Network([FFConv(1, 4, pool=2), Merge((-1,)), FFLinear(24, 6)]), "mono_forward"),
        "probe": (Network([block, FFLinear(6, 6)]), "image_mixing"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (network, strategy) in made.items():
            training.train(network, tiny, STRATEGIES[strategy](3), **QUIET)
            if name == "probe":
                fit_readout(network, tiny, precision="fp32", device="cpu")
            save(network, Path(folder) / name)
            held[name] = (Path(folder) / name).read_bytes()
    load_network_of(held["labels"])  # what torch imports late is loaded now
    return held


def load_network_of(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").write_bytes(data)
        return load_network(Path(folder) / "model")


def resealed(whole, change, tensors=lambda given: None):
    "A model whose header, and tensors, went through a change; with the digest that belongs to them."
    header, data = opened(whole)
    text = header["__metadata__"]["ff_research"]
    text = change(text)
    kept = {
        name: [t["dtype"], t["shape"], data[slice(*t["data_offsets"])]]
        for name, t in header.items()
        if name != "__metadata__"
    }
    tensors(kept)
    kinds = {"F32": np.float32, "I64": np.int64}
    with contextlib.suppress(Exception):
        read = {
            name: torch.from_numpy(np.frombuffer(bytearray(b), kinds[d]).reshape(s)) for name, (d, s, b) in kept.items()
        }
        seal = digest(text, read)
    out, place = {"__metadata__": {"ff_research": text, "digest": locals().get("seal", "")}}, 0
    for name, (dtype, shape, bits) in kept.items():
        out[name] = dict(dtype=dtype, shape=shape, data_offsets=[place, place + len(bits)])
        place += len(bits)
    return closed(out, b"".join(t[2] for t in kept.values()))


def places_of(value, path=()):
    "Every place in a JSON value, as the keys that lead there."
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_of(inner, (*path, key))


def altered(rng, whole, news, times=(1, 1, 1, 2, 4), fits=lambda value: True):
    "A model whose header has other values in some places; `news(rng, value)` gives one for the old one."

    def change(text):
        held = json.loads(text)
        for _ in range(rng.choice(times)):
            at = []
            for path in places_of(held):
                value = held
                for key in path:
                    value = value[key]
                if path and fits(value):
                    at.append((path, value))
            if not at:
                break
            (*path, last), value = rng.choice(at)
            inner = held
            for key in path:
                inner = inner[key]
            inner[last] = news(rng, value)
        return json.dumps(held)

    return resealed(whole, change)


@attack("model")
def model_cut(rng, folder, whole):
    return whole[: rng.randrange(len(whole))]


@attack("model")
def model_bits(rng, folder, whole):
    return flipped(rng, whole)


@attack("model")
def model_pieces(rng, folder, whole):
    return spliced(rng, whole)


@attack("model")
def model_text(rng, folder, whole):
    "A header that is no JSON, or no header."
    texts = (
        "",
        "null",
        "[]",
        "{}",
        "1",
        '"a"',
        "{",
        "NaN",
        "[" * 500,
        nested(100_000, rng),
        "9" * 5000,
        " " * 2 * 10**6,
    )
    return resealed(whole, lambda text: rng.choice((*texts, text[: rng.randrange(len(text))], text + "x", "\ud800x")))


@attack("model")
def model_values(rng, folder, whole):
    "Anything anywhere in the header."
    return altered(rng, whole, lambda rng, value: anything(rng))


@attack("model")
def model_sizes(rng, folder, whole):
    "Numbers that are too large, negative, or none."
    huge = (0, -1, 1, 2, 3, 7, 10**4, 10**6, 10**9, 2**31, 2**40, 2**63, 10**30, 1.5, -1e300, True, "64", None)
    return altered(
        rng,
        whole,
        lambda rng, value: rng.choice(huge),
        fits=lambda value: isinstance(value, (int, float)) and value != 0,
    )


@attack("model")
def model_classes(rng, folder, whole):
    "Other names of classes and functions, those of the package and of Python among them."
    names = (
        *"Popen system eval exec open Path Network FFLinear FFConv Merge Linear Upsample ZeroPad2d Conv2d Sequential".split(),
        *"GoodnessObjective LabelObjective HardMiningStrategy ReadOut PeerNormalisation Module os.system antigravity".split(),
        *"hinton_loss symba_loss sum_of_squares __import__ __class__ __init__ Lambda LSTM Embedding Strategy".split(),
    )
    given = altered(rng, whole, lambda rng, value: rng.choice(names), fits=lambda value: isinstance(value, str))
    kinds = ("function", "partial", "module", "tuple", "dict", "eval", "list")
    if rng.random() < 0.5:
        return given
    return resealed(
        given, lambda text: text.replace(f'"{rng.choice(kinds)}":', f'"{rng.choice(kinds)}":', rng.choice((1, 2, 100)))
    )


@attack("model")
def model_shells(rng, folder, whole):
    "Modules that would blow an image up, or go deep, around the first layer."
    module = lambda name, **given: {"module": {"class": name, "arguments": given}}  # noqa: E731
    big = rng.choice((2, 50, 10**4, 10**6, 10**9))
    around = rng.choice(
        (
            module("Upsample", scale_factor=big),
            module("ZeroPad2d", padding=big),
            module("AdaptiveAvgPool2d", output_size=big),
            module("Unflatten", dim=1, unflattened_size={"tuple": [big, -1]}),
            module("Merge", reads={"tuple": [-1] * rng.choice((1, 3, 10**4))}, how="cat"),
            module("MaxPool2d", kernel_size=big, padding=big // 2),
            module("Softmax", dim=big),
            {
                "module": {
                    "class": "Sequential",
                    "children": [[str(i), module("ReLU")] for i in range(rng.choice((1, 3000)))],
                }
            },
        )
    )
    for _ in range(rng.choice((0, 0, 3, 90))):
        around = {"module": {"class": "Sequential", "children": [["0", around]]}}

    def change(text):
        held = json.loads(text)
        layers = held["parts"]["layers"]["list"]
        if rng.random() < 0.5:
            layers[0] = {"module": {"class": "Sequential", "children": [["a", around], ["b", layers[0]]]}}
        else:
            layers.insert(0, around)
            held["parts"]["objectives"]["list"].insert(0, None)
        return json.dumps(held)

    return resealed(whole, change)


@attack("model")
def model_doubled(rng, folder, whole):
    "Keys that stand there twice, and some that do not belong there."

    def change(text):
        key = rng.choice(("parts", "options", "images", "class", "arguments", "units", "iterations", "more"))
        at = rng.choice([place for place, letter in enumerate(text) if letter == "{"])
        return f'{text[: at + 1]}"{key}": {rng.choice(("1", "null", "{}", "[]"))}, {text[at + 1 :]}'

    return resealed(whole, change)


@attack("model")
def model_tensors(rng, folder, whole):
    "Tensors that are missing, too many, of other shapes and kinds, or not finite."

    def change(kept):
        name = rng.choice(list(kept))
        dtype, shape, bits = kept[name]
        what = rng.randrange(6)
        if what == 0:
            kept.pop(name)
        elif what == 1:
            kept[f"layers.9.{rng.choice(('weight', 'x'))}"] = kept[name]
        elif what == 2:
            kept[name] = [dtype, shape[::-1], bits]
        elif what == 3:
            kept[name] = [dtype, [*shape, 1], bits]
        elif what == 4:
            kept[name] = [rng.choice(("I32", "F32", "U32")), shape, bits[: 4 * int(np.prod(shape))]]
        else:
            odd = struct.pack("<f", rng.choice((np.nan, np.inf, -np.inf, 1e38, 1e-45)))
            kept[name] = [dtype, shape, (odd + bits[4:]) if len(bits) >= 4 else bits]

    return resealed(whole, lambda text: text, change)


@attack("model")
def model_strangers(rng, folder, whole):
    return rng.choice((lambda: foreign(rng), lambda: rng.choice(list(checkpoints().values()))))()


@attack("model")
def model_corners(rng, folder, whole):
    return placed(rng, folder, whole, "model.safetensors")


def read_model(rng, folder, given):
    "Whether a model could be read; `Broken` if it was, and can neither predict nor say why."
    path = given
    if isinstance(given, bytes):
        path = folder / "model.safetensors"
        path.write_bytes(given)
    x = torch.from_numpy(arrays()["x_test"])
    with guarded(folder) as told:
        network = judged(lambda: load_network(path), naming(path))
        if network is not None:
            found = judged(lambda: [reading_of(network), predict(network, x, precision="fp32", device="cpu")])
            if found is not None and found[1].shape != (len(x),):
                raise Broken(f"{len(x)} images got {list(found[1].shape)} answers")
    return network is not None, told


# Rows: `attack(rng, folder)` gives {file name: bytes}, or makes the files itself


def row(recipe="loewe", seed=0, **changes):
    test = dict(per_label=1.5 + seed, probe=dict(layer_1=2.0, layers_2_to_3=1.0 + seed))
    return (
        dict(
            recipe=recipe,
            seed=seed,
            config=dict(lr=0.1, widths=[8, 8]),
            data=dict(name="mnist"),
            errors=dict(test=test),
            seconds=10.0,
            time="now",
        )
        | changes
    )


def lines(*rows):
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def good_rows():
    return lines(*(row(seed=seed) for seed in range(3)))


def among(rng, line):
    "This line somewhere among good ones."
    held = good_rows().splitlines(keepends=True)
    held.insert(rng.randrange(4), line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass"))
    return {"loewe.jsonl": b"\n".join(part.rstrip(b"\n") for part in held) + b"\n"}


@attack("rows")
def cut(rng, folder):
    data = good_rows()
    return {"loewe.jsonl": data[: rng.randrange(len(data))]}


@attack("rows")
def row_flips(rng, folder):
    return {"loewe.jsonl": flipped(rng, good_rows())}


@attack("rows")
def row_splices(rng, folder):
    return {"loewe.jsonl": spliced(rng, good_rows())}


@attack("rows")
def encodings(rng, folder):
    text = good_rows().decode()
    return {
        "loewe.jsonl": rng.choice(
            (
                text.encode("utf-16"),
                text.encode("utf-16-le"),
                text.encode("utf-32"),
                b"\xef\xbb\xbf" + text.encode(),
                text.replace("loewe", "löwe").encode("latin1"),
                text.replace("\n", "\r").encode(),
                text.replace("\n", "\r\n").encode(),
                text.replace("\n", "\x0b").encode(),
                text.replace("\n", "\u2028").encode(),
                text.encode() + b"\0" * rng.choice((1, 5000)),
                b"\0" + text.encode(),
                text.replace("mnist", "mn\0ist").encode(),
                text.encode("utf-7"),
                text.replace("mnist", "\xff").encode("latin1"),
                text.encode() + b"\x1a",
                text.replace("mnist", "\ud800").encode("utf-8", "surrogatepass"),
            )
        )
    }


@attack("rows")
def nesting(rng, folder):
    depth = rng.choice((10, 100, 300, 450, 600, 800, *range(880, 1000, 7), 2000, 100_000))
    deep = nested(depth, rng)
    key = rng.choice(("recipe", "seed", "config", "data", "errors", "seconds", "more"))
    line = json.dumps(row() | {key: "HERE"}).replace('"HERE"', deep)
    return (
        {"loewe.jsonl": (line + "\n").encode() * rng.choice((1, 2)) + lines(row(seed=1))}
        if rng.random() < 0.6
        else among(rng, deep)
    )


@attack("rows")
def numbers(rng, folder):
    number = rng.choice(
        (
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "-1e999",
            "1" * 400,
            "1" * 4300,
            "1" * 5000,
            "-" + "9" * 309,
            "1e-999",
            "0.1e1",
            "true",
            "1.0",
            "-0",
            "01",
            "1_0",
            "0x1",
            "1e308",
        )
    )
    place = rng.choice(('"seed": 1', '"per_label": 2.5', '"seconds": 10.0', '"layers_2_to_3": 2.0', '"lr": 0.1'))
    return {"loewe.jsonl": good_rows().decode().replace(place, place.split(":")[0] + ": " + number).encode()}


@attack("rows")
def types(rng, folder):
    "A row that has something else under one of its keys, at any depth."
    held = [row(seed=seed) for seed in range(3)]
    for _ in range(rng.choice((1, 1, 2))):
        place, path = (
            rng.choice(held),
            rng.choice(
                (
                    "recipe",
                    "seed",
                    "config",
                    "data",
                    "data.name",
                    "errors",
                    "errors.test",
                    "errors.test.per_label",
                    "errors.test.probe",
                    "errors.test.probe.layers_2_to_3",
                    "seconds",
                    "config.lr",
                    "time",
                )
            ),
        )
        *above, last = path.split(".")
        for key in above:
            place = place.get(key) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[last] = rng.choice(
                (anything(rng), None, [], {}, "text", [1, 2], {"a": 1}, True, 1, 1.5, [[1], [2, 3]], "1.5", "")
            )
    return {"loewe.jsonl": lines(*held)}


@attack("rows")
def missing(rng, folder):
    held = [row(seed=seed) for seed in range(2)]
    for key in rng.sample(list(held[0]), rng.choice((1, 1, 3, 7))):
        del held[0][key]
    return {"loewe.jsonl": lines(*held)}


@attack("rows")
def any_json(rng, folder):
    return {"loewe.jsonl": b"".join(json.dumps(anything(rng)).encode() + b"\n" for _ in range(rng.choice((1, 3))))}


@attack("rows")
def duplicates(rng, folder):
    key, value = rng.choice(("recipe", "seed", "errors", "data", "config")), json.dumps(anything(rng))
    return among(
        rng, json.dumps(row(seed=rng.choice((0, 7))))[:-1] + f', "{key}": {value}' * rng.choice((1, 2, 1000)) + "}"
    )


@attack("rows")
def texts(rng, folder):
    "Names that a terminal should not be sent as they are."
    odd = rng.choice(
        (
            "\ud800",
            "\udcff\ud800",
            "\x1b[2J",
            "a\nb",
            "a\rb",
            "a|b",
            "\0",
            "\u202e",
            "x" * 100_000,
            "",
            " ",
            "\u2028",
            "=cmd()",
            "<script>",
            "../../up",
            "/abs",
        )
    )
    change = rng.choice(
        (
            dict(recipe=odd),
            dict(data=dict(name=odd)),
            dict(errors=dict(test={"probe": {odd: 1.0}})),
            dict(errors={"test": {"per_label": odd}}),
            {odd: odd},
            dict(seconds=odd),
        )
    )
    return {"loewe.jsonl": lines(row(), row(seed=1, **change)) if rng.random() < 0.5 else lines(row(**change))}


@attack("rows")
def long(rng, folder):
    size = rng.choice((10**5, 10**6))
    return rng.choice(
        (
            lambda: among(rng, "x" * size),
            lambda: among(rng, '{"recipe": "' + "x" * size),
            lambda: among(rng, json.dumps(row(seed=5, more=list(range(size // 10))))),
            lambda: among(rng, json.dumps(row(seed=5, more="x" * size))),
            lambda: {"loewe.jsonl": b"\n" * size + good_rows()},
            lambda: {"loewe.jsonl": b"{}\n" * 1000},
            lambda: {"loewe.jsonl": b" " * size},
            lambda: {"loewe.jsonl": lines(*(row(seed=seed) for seed in range(100)))},
        )
    )()


@attack("rows")
def row_files(rng, folder):
    return {"loewe.jsonl": foreign(rng)}


@attack("rows")
def row_places(rng, folder):
    placed(rng, folder, good_rows() if rng.random() < 0.7 else b"broken", "loewe.jsonl")
    return {}


def shell(*arguments):
    """The command in this process, on a terminal that takes UTF-8 only; `Broken` unless it ends well, or with 2 and
    one line.
    """
    streams = [
        io.TextIOWrapper(io.BytesIO(), "utf-8"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace"),
    ]
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            cli.main(arguments)
            streams[0].flush()
        return True
    except SystemExit as end:
        streams[1].flush()
        said = streams[1].buffer.getvalue().decode()
        if (
            end.code != 2
            or not said.startswith("ff-research: ")
            or said.count("\n") != 1
            or not said.strip().isprintable()
        ):
            raise Broken(f"exit code {end.code}: {said[:300]!r}") from end
        return False


def read_rows(rng, folder, given):
    "Whether a table came out of the files."
    for name, data in given.items():
        (folder / name).write_bytes(data)
    (folder / "ff_research").mkdir()
    (folder / "ff_research" / "published").symlink_to(folder)
    paths = sorted(folder.glob("*.jsonl"))
    with (
        guarded(folder) as told,
        mock.patch.dict(os.environ, FF_RESEARCH_RESULTS=str(folder)),
        mock.patch.object(results, "files", lambda package: folder / package),
    ):
        for path in paths:
            held = judged(lambda: results.read_rows(path), repr(path.name)[1:-1])
            if held is not None and not all(isinstance(r, dict) for r in held):
                raise Broken("a row that is no dictionary")
            newest = judged(lambda: results.latest(held or []))
            judged(lambda: cli.summary_table(newest or []))
            for key in ("seconds", "errors.test.per_label"):
                judged(lambda: results.summary([r for r in newest or [] if r["recipe"] == "loewe"], key))
        judged(results.published)
        judged(lambda: results.published("loewe"))
        judged(lambda: results.publish("loewe", source=folder, target=folder / "shipped"))
        shell("table", rng.choice(("loewe", "mnist")), "--format", rng.choice(("md", "csv")))
        good = shell("table", rng.choice(("loewe", "mnist", "mnits")), "--own", "--format", rng.choice(("md", "csv")))
    return good, told


# Recipes: `attack(rng, folder)` gives what is to be called, and whether it has to be refused; None if it has to work

SOUND = dict(name="fuzz", data="digits", widths=(8,), epochs=1, batch_size=500)
SMALL = recipes.Recipe(name="fuzz", data="digits").vary(widths=(8,), epochs=1, batch_size=500)
BOOK = (Path(recipes.__file__).parent / "configs" / "papers.toml").read_text(encoding="utf-8")
ODD = (
    None,
    "",
    "text",
    -1,
    -0.5,
    10**12,
    10**400,
    -(10**400),
    float("nan"),
    float("inf"),
    True,
    b"bytes",
    [],
    {},
    (),
    [[]],
    {"a": 1},
    (None,),
    object(),
    "\0",
    "x" * 10_000,
    1j,
    {1},
    range(3),
    nested,
)
NAMES = (
    "..",
    ".",
    "",
    "../up",
    "a/b",
    "/abs",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x1b[31m",
    "x" * 10_000,
    "x" * 300,
    "~",
    "~/a",
    "*",
    "-",
    ".hidden",
    "a b",
    "ä",
    "\ud800",
    "\u202e",
    "CON:",
    "a\u2028b",
    None,
    7,
    ["loewe"],
    {"a": 1},
    b"loewe",
    ("loewe",),
    float("nan"),
    True,
)


def tower(depth):
    "A tuple that goes deep."
    out = ()
    for _ in range(depth):
        out = (out,)
    return out


def made(**changes):
    """A call that makes a recipe and runs it. Measuring, and telling of the machine, are left out; the network is
    small, or not made.
    """

    def call():
        settings = SOUND | changes
        chosen = recipes.Recipe(name=settings.pop("name"), data=settings.pop("data")).vary(**settings)
        if sum(chosen.network.widths) > 1000 or sum(np.atleast_1d(chosen.schedule.epochs)) > 2:
            return chosen  # sound, but more than a test should run
        with (
            mock.patch.object(runs, "errors_of", lambda *a, **k: {}),
            mock.patch.object(runs, "origin", lambda *a: {}),
        ):
            return runs.run(chosen, progress=False, device="cpu", precision="fp32")

    return call


def in_field(*names):
    "A family that puts nonsense into fields of one kind."

    def make(rng, folder):
        name = rng.choice(names)
        fits = {
            "name": {"text"},
            "target": {"", "text", "\0", "x" * 10_000},
            "data": set(),
            "objective": {None},
            "options": {()},
            "full_gradient": {True},
        }.get(name, set())
        odd = rng.choice([v for v in ODD if not any(type(v) is type(fit) and v == fit for fit in fits)])
        large = name in ("lr", "weight_decay", "peer") and odd == 10**12  # a number like any other
        return made(**{name: odd}), not large and (name != "target" or not isinstance(odd, str))

    return make


for family, names in dict(
    numbers_of_recipes=("lr", "weight_decay", "peer"),
    counts=("epochs", "batch_size"),
    words=("method", "strategy", "lr_schedule", "optimizer", "schedule", "objective"),
    data_of_recipes=("data",),
    others_of_recipes=("name", "target", "full_gradient", "options"),
).items():
    ATTACKS["recipe"][family] = in_field(*names)


@attack("recipe")
def widths(rng, folder):
    return made(
        widths=rng.choice(
            (
                (),
                (0,),
                (-1,),
                (10**12,),
                (8, -8),
                (8, 10**9),
                (1.5,),
                ("8",),
                (None,),
                (True,),
                (float("nan"),),
                ((8,),),
                "888",
                [8, 8],
                8,
                {8},
                (10**400,),
                tower(2000),
                (8,) * 10**5,
                (100_000,) * 1000,
                range(1, 3),
                (b"8",),
                None,
                {8: 8},
                (float("inf"),),
            )
        )
    ), True


@attack("recipe")
def options(rng, folder):
    objective = rng.choice(("hinton", "symba", "swish_symba", None))
    odd = rng.choice(
        (
            ("nonsense", 1),
            ("scale", "much"),
            ("scale", float("nan")),
            ("scale", None),
            ("", 1),
            ("__class__", 1),
            ("self", 1),
            ("scale", (1, 2)),
            ("scale", 10**400),
            ("scale", float("inf")),
            ("x" * 10_000, 1),
            ("\n", 1),
            (1, 1),
            "ab",
            None,
            ("scale",),
            tower(2000),
            ("scale", [1]),
            ("theta", "high"),
            ("theta", float("nan")),
            ("goodness", 1),
        )
    )
    return made(objective=objective, options=rng.choice(((odd,), (("scale", 1.0), odd)))), True


@attack("recipe")
def paths_as_data(rng, folder):
    return made(
        data=rng.choice(
            (
                "../up.npz",
                "/dev/zero",
                "/dev/zero.npz",
                "a\0.npz",
                "x" * 10_000 + ".npz",
                "~nobody-of-this-name/x.npz",
                "file:///etc/passwd",
                "http://localhost/x.npz",
                str(folder),
                f"{folder}/",
                str(folder / "absent.npz"),
                "\n.npz",
                "mnist/../digits",
                "digits ",
                "-",
                "*",
                ".npz",
            )
        )
    ), True


@attack("recipe")
def unknown_fields(rng, folder):
    return made(
        **{rng.choice(("depth", "Name", "__class__", "self ", "widths_", "seed", "x" * 1000)): rng.choice(ODD)}
    ), True


@attack("recipe")
def edges(rng, folder):
    "The ends of what is allowed: these have to work."
    return made(
        **rng.choice(
            (
                dict(lr=0),
                dict(lr=1),
                dict(lr=1e-300),
                dict(weight_decay=0),
                dict(peer=1),
                dict(epochs=0),
                dict(widths=(1,)),
                dict(widths=(20,) * 10),
                dict(batch_size=1437),
                dict(target="\0"),
                dict(batch_size=10**6),
                dict(name="a" * 100),
                dict(name="0._-"),
                dict(objective="hinton", options=(("scale", 0.5), ("theta", "units"))),
                dict(widths=(100_000,)),
                dict(epochs=10**6),
                dict(method="random", epochs=0),
                dict(method="pixels", widths=()),
                dict(method="backprop", objective=None),
                dict(full_gradient=True, peer=0.5),
            )
        )
    ), None


@attack("recipe")
def several(rng, folder):
    "Values of every kind in several fields; some of it may be sound."
    names = rng.sample(["name", "target", "alias", "search", *recipes.SETTINGS], rng.choice((2, 3, 5)))
    return made(**{name: rng.choice((anything(rng), rng.choice(ODD))) for name in names}), False


@attack("recipe")
def names(rng, folder):
    name = rng.choice(NAMES)
    calls = (
        lambda: recipes.Recipe(name=name, data="digits"),
        lambda: recipes.recipe(name),
        lambda: runs.run_and_keep(name, 0, folder=folder, progress=False),
        lambda: list(jobs.run_many([name], [0], folder=folder, progress=False)),
        lambda: results.publish(name, source=folder, target=folder / "shipped"),
        lambda: results.published("" if name is None else name),
        lambda: searches.trials(name, folder),
        lambda: searches.publish_trials(name, folder),
        lambda: list(searches.tune(name, folder=folder)),
    )
    return rng.choice(calls), True


@attack("recipe")
def seeds(rng, folder):
    seed = rng.choice(
        (None, "0", "../../up", 0.5, float("nan"), float("inf"), 2**64, 10**400, [0], (0,), b"0", "a\0b", "x" * 10_000)
    )
    quiet = dict(progress=False, device="cpu", precision="fp32")
    calls = (
        lambda: runs.run_and_keep("digits", seed, folder=folder, **quiet),
        lambda: list(jobs.run_many(["digits"], [seed], folder=folder, **quiet)),
        lambda: runs.run(SMALL, seed, **quiet),
    )
    return rng.choice(calls), True


@attack("recipe")
def toml(rng, folder):
    "A file of recipes of the book in which something was changed, doubled, swapped or lost; some of it may be sound."
    lines, path = BOOK.splitlines(), folder / "mine.toml"
    odd = ("inf", "nan", "-1", "9" * 5000, "1979-05-27", "'none'", "'x'", "[[]]", "{}", "[" * 3000, "'''", "\\", "\0")
    for _ in range(rng.choice((1, 2, 5, 20))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        change = rng.choice(("lose", "double", "swap", "value", "key", "cut"))
        if change == "lose":
            lines[at] = ""
        elif change == "double":
            lines.insert(other, lines[at])
        elif change == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif change == "value":
            lines[at] = f"{lines[at].split('=')[0]}= {rng.choice(odd)}"
        elif change == "key":
            lines[at] = lines[at].replace(rng.choice("aeiou"), rng.choice("xyz.[]{}="))
        else:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    path.write_bytes("\n".join(lines).encode())
    return lambda: recipes.load_recipes(path, recipes={}), False


def reached(*arguments, **options):
    raise Broken("nonsense came as far as a network")


@cache
def _warm():
    "The digits, after a run that made the libraries load and cache what they put off until then."
    made()()
    return load("digits")


def call_recipe(rng, folder, given):
    "Whether the call went through; `Broken` if it had to be refused, or only was when the network was made."
    call, refuse = given
    images = _warm()
    guards = [
        mock.patch.object(runs, "load", lambda name, **options: images if name == "digits" else load(name, **options))
    ]
    if refuse:
        guards.append(mock.patch.object(runs, "network_of", reached))
    with guarded(folder) as told, contextlib.ExitStack() as stack:
        for guard in guards:
            stack.enter_context(guard)
        try:
            gave = judged(lambda: [call()])
        except training.Diverged:
            gave = None
    if gave is not None and refuse:
        raise Broken("nonsense was accepted")
    if gave is None and refuse is None:
        raise Broken("what is allowed was refused")
    return gave is not None, told


# Running


def one(kind, family, number, seed, folder):
    "One case, in an empty folder: whether it could be read, and what it took."
    rng = random.Random(f"{seed}/{kind}/{family}/{number}")
    make, whole = ATTACKS[kind][family], ()
    if kind == "checkpoint":
        name = rng.choice(list(RUNS))
        whole = (checkpoints()[name],)
    if kind == "model":
        whole = (models()[rng.choice(list(models()))],)
    given = make(rng, folder, *whole)
    read = {
        "npz": read_npz,
        "checkpoint": read_checkpoint,
        "model": read_model,
        "rows": read_rows,
        "recipe": call_recipe,
        "converter": convert,
    }[kind]
    loaded, told = read(rng, folder, (name, given) if kind == "checkpoint" else given)
    if (folder / "canary").exists() or Path("canary").exists():
        raise Broken("a payload was executed")
    return loaded, told["mb"]


def run(kind, cases, seed=0, say=print, only=None):
    "So many cases of a kind, shared out among its families: a line for each family, and what failed, as (case, error)."
    families, rows, failures = list(ATTACKS[kind]), [], []
    counts = [cases // len(families) + (place < cases % len(families)) for place in range(len(families))]
    with tempfile.TemporaryDirectory() as place:
        for family, count in zip(families, counts):
            start, loaded, peak, failed = time.perf_counter(), 0, 0.0, 0
            for number in range(count) if only is None else only.get((kind, family), ()):
                folder = Path(place) / "case"
                folder.mkdir()
                try:
                    read, mb = one(kind, family, number, seed, folder)
                    loaded, peak = loaded + read, max(peak, mb)
                except Exception as error:
                    failed += 1
                    failures.append((f"{kind}/{family}/{number}", error))
                    say(
                        f"FAILED {kind}/{family}/{number}: {type(error).__name__}: {str(error)[:300]}\n"
                        f"    again: python -m tests.faults.fuzz --case {kind}/{family}/{number} --seed {seed}"
                    )
                shutil.rmtree(folder)
            rows.append(
                dict(
                    kind=kind,
                    family=family.rstrip("_"),
                    cases=count,
                    answered=count - failed,
                    loaded=loaded,
                    failed=failed,
                    peak_extra_memory_mb=round(peak, 1),
                    seconds=round(time.perf_counter() - start, 2),
                    seed=seed,
                    version=ff_research.__version__,
                    time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                )
            )
    return rows, failures


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=list(ATTACKS), action="append")
    parser.add_argument("--case", help="kind/family/number, to run one case again and see all of its error")
    given = parser.parse_args(arguments)
    if given.case:
        kind, family, number = given.case.split("/")
        family = family if family in ATTACKS[kind] else family + "_"
        with tempfile.TemporaryDirectory() as folder:
            print("read" if one(kind, family, int(number), given.seed, Path(folder))[0] else "refused")
        return 0
    chosen, rows, failed = given.kind or list(ATTACKS), [], 0
    print(f"{'kind':11}{'family':20}{'cases':>6}{'answered':>9}{'loaded':>7}{'failed':>7}{'MB':>7}{'s':>8}")
    for kind, count in zip(chosen, itertools.repeat(given.cases // len(chosen))):
        of_kind, failures = run(kind, count, given.seed)
        failed += len(failures)
        rows += of_kind
        for r in of_kind:
            print(
                f"{kind:11}{r['family']:20}{r['cases']:6}{r['answered']:9}{r['loaded']:7}{r['failed']:7}"
                f"{r['peak_extra_memory_mb']:7.1f}{r['seconds']:8.1f}",
                flush=True,
            )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

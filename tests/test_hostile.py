"""Files and values that were made to do harm, or were harmed: a clear line or a sound result, whatever is in them.

`tests/faults/fuzz.py` makes them at random, here in a few hundred cases; below, each attack that somebody has thought of stands on its own.
"""

import io
import json
import os
import pickle
import reprlib
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ff_research import results, runs, searches
from ff_research.checkpoints import read_checkpoint
from ff_research.data import load, load_npz
from ff_research.recipes import RECIPES, Recipe, recipe
from ff_research.results import DamagedRow, column, latest, publish, published, read_rows
from ff_research.jobs import run_many
from ff_research.runs import run, run_and_keep
from tests.faults import fuzz
from tests.faults.fuzz import (
    Broken,
    arrays,
    described,
    guarded,
    headed,
    judged,
    npy,
    packed,
    retold,
    rewritten,
    row,
    shell,
)


@pytest.mark.parametrize("kind", fuzz.ATTACKS)
def test_125_hostile_inputs_are_answered(kind, tmp_path):
    rows, failures = fuzz.run(kind, 125)
    assert failures == []
    assert sum(r["cases"] for r in rows) == 125 and all(r["cases"] and r["answered"] == r["cases"] for r in rows)
    assert 0 < sum(r["loaded"] for r in rows) < 125  # neither is all of it refused, nor all of it let in


# The guards notice


def write_outside():
    Path("../outside").write_text("")


def ask(size):
    try:
        np.ones(size, np.uint8)
    except MemoryError as error:
        raise ValueError("damaged") from error


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda: np.ones(300 << 20, np.uint8).sum(), "it took 3"),
        (lambda: ask(1 << 40), "too much memory"),
        (lambda: pickle.loads(pickle.dumps(1)), "unpickled"),
        (lambda: pickle._loads(pickle.dumps(1)), "unpickled"),
        (write_outside, "reached out of its folder"),
        (lambda: os.system("true"), "reached out of its folder: os.system"),
        (lambda: os.mkdir("../up"), "reached out"),
        (raising(ValueError("two\nlines")), "not one clear line"),
        (raising(ValueError("")), "not one clear line"),
        (raising(OSError("\x1b[31m")), "not one clear line"),
        (raising(ValueError("another")), "'here' is not named"),
        (raising(KeyError("here")), None),
    ],
    ids=[
        "memory",
        "too much memory",
        "pickle",
        "python's pickle",
        "write",
        "program",
        "folder",
        "two lines",
        "nothing said",
        "control characters",
        "no name",
        "other error",
    ],
)
def test_what_must_not_be_is_noticed(act, said, tmp_path):
    (tmp_path / "case").mkdir()
    with pytest.raises(Broken if said else KeyError, match=said), guarded(tmp_path / "case"):
        judged(act, "here" if said and "here" in said else "")


def test_a_hang_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Broken, match="no answer"), guarded(tmp_path):
        open(tmp_path / "pipe", "rb")


def test_a_case_can_be_had_again():
    "The same seed makes the same bytes; another one makes others."

    def bits(seed):
        return [fuzz.ATTACKS["npz"]["flips"](fuzz.random.Random(f"{seed}/{i}"), None) for i in range(3)]

    assert bits(0) == bits(0) != bits(1)


# Data sets


def refused(path, **options):
    "What `load_npz` says to a file, under guard."
    with guarded(path.parent), pytest.raises((ValueError, OSError)) as error:
        judged(lambda: load_npz(path))
        load_npz(path)
    return str(error.value)


def archive(name="x_train", data=None, method=zipfile.ZIP_STORED, lie=None, more=()):
    members = {key: npy(value) for key, value in arrays().items()} | ({} if data is None else {name: data})
    return packed([*((f"{key}.npy", member) for key, member in members.items()), *more], method, lie)


def lying(**changes):
    def lie(entries):
        for key, v in changes.items():
            setattr(entries[0], key, v)

    return lie


TB = described("|u1", (10**6, 10**6, 1, 1), bytes(360))
NPZ = {
    "terabytes": (lambda: archive(data=TB), "claims the shape"),
    "terabytes, and a directory that agrees": (
        lambda: archive(data=TB, lie=lying(file_size=10**12 + 128)),
        "which deflate cannot do",
    ),
    "terabytes, packed and unpacked": (
        lambda: archive(data=TB, lie=lying(file_size=10**12 + 128, compress_size=10**12 + 128)),
        "which deflate cannot do",
    ),
    "a shape below 0": (lambda: archive(data=described("|u1", (-12, -1, 6, 5), bytes(360))), "claims the shape"),
    "a shape that overflows": (lambda: archive(data=described("|u1", (2**32, 2**32), b"")), "claims the shape"),
    "a shape that overflows to the right size": (
        lambda: archive(data=described("|u1", (2**63, 2, 1, 360), bytes(360))),
        "claims the shape",
    ),
    "fewer bytes than the shape": (
        lambda: archive(data=described("|u1", (12, 1, 6, 5), bytes(359))),
        "claims the shape",
    ),
    "more bytes than the shape": (
        lambda: archive(data=described("|u1", (12, 1, 6, 5), bytes(361))),
        "claims the shape",
    ),
    "no bytes a number": (lambda: archive(data=described("|V0", (10**15,), b"")), "holds void, not numbers"),
    "objects": (
        lambda: archive(data=npy(np.array([{}] * 12))),
        "x_train.npy holds Python objects, which are never unpickled",
    ),
    "objects in a structure": (
        lambda: archive(data=described([("a", "|O")], (1,), b"12345678")),
        "holds Python objects",
    ),
    "a structure": (lambda: archive(data=npy(np.zeros(12, [("a", "u1")]))), "not numbers"),
    "text for one part": (lambda: archive("y_train", npy(np.array(list("abcabcabcabc")))), "holds the label 0"),
    "text for images": (lambda: archive(data=npy(np.full((12, 6, 5), "a"))), "expected numbers"),
    "text that is none": (
        lambda: archive("y_train", described("<U1", (12,), struct.pack("<12I", *[97, 2**31] * 6))),
        "text that is none",
    ),
    "complex": (lambda: archive(data=npy(arrays()["x_train"] + 0j)), "complex128; expected numbers"),
    "dates": (lambda: archive("y_train", npy(np.zeros(12, "M8[s]"))), "not numbers"),
    "version 3": (lambda: archive(data=npy(arrays()["x_train"], (3, 0))), "version 3"),
    "version 0": (lambda: archive(data=headed("{}", version=(0, 0))), "damaged"),
    "a header of 4 GB": (lambda: archive(data=headed("{}", version=(2, 0), length=2**32 - 1)), "damaged"),
    "a header of a million blanks": (
        lambda: archive(
            data=described("|u1", "(12, 1, 6, 5)" + " " * 10**6, bytes(360), version=(2, 0)),
            method=zipfile.ZIP_DEFLATED,
        ),
        "max_header_size",
    ),
    "a header that goes deep": (lambda: archive(data=headed("-" * 9000 + "1")), "damaged"),
    "a header with code": (lambda: archive(data=headed("__import__('os').mkdir('canary')")), "damaged"),
    "a pickle": (lambda: pickle.dumps(fuzz.Payload("canary")), "damaged, not an .npz file"),
    "a pickle for an array": (lambda: archive(data=pickle.dumps(fuzz.Payload("canary"))), "damaged"),
    "a bzip2 bomb": (lambda: fuzz.bomb(zipfile.ZIP_BZIP2, 128), "which deflate cannot do"),
    "bzip2": (lambda: archive(method=zipfile.ZIP_BZIP2), "which deflate cannot do"),
    "lzma": (lambda: archive(method=zipfile.ZIP_LZMA), "which deflate cannot do"),
    "a method that nobody knows": (lambda: archive(lie=lying(compress_type=77)), "which deflate cannot do"),
    "a password": (lambda: archive(lie=lying(flag_bits=1)), "damaged"),
    "a checksum that is wrong": (lambda: archive(lie=lying(CRC=1)), "CRC"),
    "two arrays of one name": (
        lambda: archive(more=[("x_train.npy", npy(arrays()["x_test"]))]),
        "two arrays of one name",
    ),
    "one name with and without .npy": (
        lambda: archive(more=[("x_train", npy(arrays()["x_test"]))]),
        "two arrays of one name",
    ),
    "names that lead elsewhere": (
        lambda: packed([(f"../{key}.npy", npy(v)) for key, v in arrays().items()]),
        "lacks x_train, y_train, x_test, y_test; it holds ../x_train, ../y_train",
    ),
    "names with control characters": (lambda: packed([("\x1b[2J\n.npy", b"")]), r"it holds \x1b[2J\n"),
    "a name without end": (lambda: packed([("x" * 60_000, b"")]), "x …"),
    "an array on its own": (lambda: npy(arrays()["x_train"]), "damaged, not an .npz file"),
    "labels of a billion": (
        lambda: archive("y_train", npy(np.array([0, 1, 10**9] * 4))),
        "holds the label 2, which y_train (0, 1, 1000000000) lacks",
    ),
    "labels beyond int64": (
        lambda: archive("y_train", npy(np.array([0, 1, 2**64 - 1] * 4, np.uint64))),
        "which y_train (0, 1, 18446744073709551615) lacks",
    ),
    "test labels beyond int64": (
        lambda: archive("y_test", npy(np.array([0, 1, 2**63] * 2, np.uint64))),
        "holds the label 9223372036854775808",
    ),
    "no images": (lambda: archive(data=npy(arrays()["x_train"][:0])), "none of them 0"),
    "NaN": (lambda: archive(data=npy(np.full((12, 1, 6, 5), np.nan))), "NaN or infinite pixels"),
}


@pytest.mark.parametrize("attack", NPZ)
def test_npz(attack, tmp_path):
    make, said = NPZ[attack]
    (tmp_path / "data.npz").write_bytes(make())
    message = refused(tmp_path / "data.npz")
    assert (
        message.startswith(f"{tmp_path}/data.npz: ")
        and said in message
        and [path.name for path in tmp_path.iterdir()] == ["data.npz"]
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_plain_arrays_of_any_layout_are_read(tmp_path, method):
    "What the checks let in: other orders and precisions, version 2, members without .npy, arrays that shrink a lot."
    x = arrays()["x_train"]
    flat = np.zeros((5000, 1, 32, 32), np.uint8)
    flat[0, 0, 0, 0] = 255
    for changed in (np.asfortranarray(x), (x / 255).astype(">f4"), x.astype(np.longdouble), x.astype("<i2"), flat):
        members = (
            arrays()
            | dict(x_train=changed)
            | (dict(x_test=flat[:6], y_train=np.arange(5000) % 3) if changed is flat else {})
            | (dict(x_test=arrays()["x_test"] / 255) if changed.dtype == ">f4" else {})
        )
        (tmp_path / "data.npz").write_bytes(
            packed([(key, npy(value, (2, 0))) for key, value in members.items()], method)
        )
        images = load(tmp_path / "data.npz")
        assert np.array_equal(images.x_train.numpy(), x if changed is not flat else flat) and len(images.y_test) == 6


def test_entries_that_share_their_bytes_are_no_more_than_one_array(tmp_path):
    def lie(entries):
        for entry in entries:
            entry.header_offset, entry.CRC, entry.file_size, entry.compress_size = (
                0,
                entries[0].CRC,
                entries[0].file_size,
                entries[0].compress_size,
            )

    (tmp_path / "data.npz").write_bytes(archive(lie=lie))
    assert "damaged" in refused(tmp_path / "data.npz")


def test_only_regular_files_are_read(tmp_path):
    good, path = archive(), tmp_path / "data.npz"
    (tmp_path / "real").write_bytes(good)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for target in ("pipe", "folder", "/dev/zero", "/dev/full", "nowhere", "data.npz"):
        path.symlink_to(target)
        said = "a folder, not a file" if target == "folder" else "no such file"
        assert said in refused(path) or target == "data.npz", target
        path.unlink()
    path.symlink_to("real")
    assert len(load_npz(path).y_train) == 12


@pytest.mark.parametrize(
    "path",
    [
        "nul\0.npz",
        "~nobody-of-this-name/data.npz",
        "x" * 10_000 + ".npz",
        "line\nline.npz",
        "\x1b[31m.npz",
        "\udcff.npz",
    ],
)
def test_paths_that_no_file_has(path, tmp_path):
    with guarded(tmp_path):
        assert judged(lambda: load(path)) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "data.npz").write_bytes(archive())
    (tmp_path / "data.npz").chmod(0)
    with pytest.raises(PermissionError, match="data.npz"):
        load_npz(tmp_path / "data.npz")


# Checkpoints


@pytest.fixture(params=fuzz.RUNS)
def run_of(request, tmp_path):
    "A function that puts a checkpoint before a run: what it says to it, with network and file as they were."
    name, path = request.param, tmp_path / "run.safetensors"

    def call(change):
        bits = change(fuzz.checkpoints()[name])
        path.write_bytes(bits)
        network, train = fuzz.trained(name, path)
        start = [p.detach().clone() for p in network.parameters()]
        with guarded(tmp_path), pytest.raises(ValueError) as error:
            judged(train, "run.safetensors")
            train()
        assert path.read_bytes() == bits and all(torch.equal(p, w) for p, w in zip(network.parameters(), start))
        return str(error.value)

    call.name, call.path = name, path
    return call


def of_history(change):
    "A checkpoint whose history went through `change`, which gives another one or changes it in place."

    def retell(whole):
        epochs = json.loads(fuzz.opened(whole)[0]["__metadata__"]["history"])
        new = change(epochs)
        return retold(whole, history=json.dumps(epochs if new is None else new))

    return retell


def of_settings(change):
    def retell(whole):
        told = json.loads(fuzz.opened(whole)[0]["__metadata__"]["settings"])
        change(told)
        return retold(whole, settings=json.dumps(told))

    return retell


def of_tensors(change):
    return lambda whole: rewritten(whole, change)


def with_number(number):
    def change(held):
        name = next(name for name, t in held.items() if t[0] == "F32")
        held[name][2] = struct.pack("<f", number) + held[name][2][4:]

    return of_tensors(change)


def retyped(dtype, size):
    def change(held):
        name = next(name for name, t in held.items() if t[0] == "F32")
        held[name] = [dtype, held[name][1], bytes(len(held[name][2]) // 4 * size)]

    return of_tensors(change)


def generator(*changed):
    def change(held):
        held["generator"] = list(changed[0](held["generator"][2]) if callable(changed[0]) else changed)

    return of_tensors(change)


CHECKPOINTS = {
    "settings that go deep": (lambda whole: retold(whole, settings=fuzz.nested(100_000)), "damaged"),
    "a history that goes deep": (lambda whole: retold(whole, history=fuzz.nested(100_000)), "damaged"),
    "settings in a list": (lambda whole: retold(whole, settings="[1, 2]"), "damaged"),
    "settings that are a number": (lambda whole: retold(whole, settings="1"), "damaged"),
    "no settings": (lambda whole: retold(whole, settings=None), "damaged"),
    "a thousand settings more": (
        of_settings(lambda told: told.update({f"key {i}": i for i in range(1000)})),
        "; and more",
    ),
    "a line end more in a setting": (
        of_settings(lambda told: told.update(network=told["network"] + "\n")),
        "belongs to another run: network is",
    ),
    "a setting with control characters": (
        of_settings(lambda told: told.update({"\x1b[2J\n": 1})),
        r"belongs to another run: \x1b[2J\n is 1 there, None here",
    ),
    "no epochs": (lambda whole: retold(whole, epoch=None), "damaged"),
    "epoch -1": (lambda whole: retold(whole, epoch="-1"), "history is not that of the -1 epochs"),
    "an epoch less": (lambda whole: retold(whole, epoch="0"), "history is not that of the 0 epochs"),
    "an epoch of 5000 digits": (lambda whole: retold(whole, epoch="9" * 5000), "damaged"),
    "an epoch in words": (lambda whole: retold(whole, epoch="one"), "damaged"),
    "a history without end": (
        lambda whole: of_history(lambda epochs: epochs * 50)(retold(whole, epoch="50")),
        "history is not that of the 50 epochs",
    ),
    "no history": (of_history(lambda epochs: []), "history is not that"),
    "a history that is a dictionary": (of_history(lambda epochs: {"0": epochs[0]}), "history is not that"),
    "a history that is a number": (of_history(lambda epochs: 1), "history is not that"),
    "epochs that are lists": (of_history(lambda epochs: [list(epochs[0])]), "history is not that"),
    "an epoch without seconds": (of_history(lambda epochs: epochs[0].pop("seconds") and None), "history is not that"),
    "losses in words": (of_history(lambda epochs: epochs[0].update(loss=["small"])), "history is not that"),
    "a loss that no float can hold": (
        of_history(lambda epochs: epochs[0].update(loss=[10**400])),
        "history is not that",
    ),
    "NaN": (with_number(float("nan")), "holds NaN or infinite numbers"),
    "infinity": (with_number(float("inf")), "holds NaN or infinite numbers"),
    "complex weights": (retyped("C64", 8), "do not match"),
    "weights of double precision": (retyped("F64", 8), "do not match"),
    "weights of half precision": (retyped("F16", 2), "do not match"),
    "a dtype of 8 bits": (retyped("F8_E4M3", 1), "do not match"),
    "no generator": (of_tensors(lambda held: held.pop("generator")), "generator do not match"),
    "an empty generator": (generator("U8", [0], b""), "generator do not match"),
    "a generator of another type": (generator(lambda bits: ("I8", [len(bits)], bits)), "generator do not match"),
    "a generator in rows": (generator(lambda bits: ("U8", [8, len(bits) // 8], bits)), "generator do not match"),
    "a generator of noise": (generator(lambda bits: ("U8", [len(bits)], b"\xff" * len(bits))), "random generator"),
    "a tensor less": (
        of_tensors(lambda held: held.pop(next(name for name in held if name.startswith("network.")))),
        "do not match",
    ),
    "a tensor more": (of_tensors(lambda held: held.update({"more\n": ["F32", [1], bytes(4)]})), r"more\n do not match"),
    "a thousand tensors more": (
        of_tensors(lambda held: held.update({f"more {i}": ["F32", [1], bytes(4)] for i in range(1000)})),
        " … do not match",
    ),
    "an empty tensor of 2^62 columns": (
        of_tensors(lambda held: held.update(more=["F32", [0, 2**62], b""])),
        "do not match",
    ),
    "the same key twice": (
        lambda whole: fuzz.closed(
            json.dumps(fuzz.opened(whole)[0]).encode()[:-1] + b', "__metadata__": {}}', fuzz.opened(whole)[1]
        ),
        "damaged",
    ),
    "a header that goes deep": (lambda whole: fuzz.closed(fuzz.nested(100_000).encode()), "damaged"),
    "a header of 2^63 bytes": (lambda whole: struct.pack("<Q", 2**63) + whole[8:], "damaged"),
    "a pickle": (lambda whole: pickle.dumps(fuzz.Payload("canary")), "damaged"),
    "nothing but numbers": (
        lambda whole: fuzz.closed({"weight": dict(dtype="F32", shape=[1], data_offsets=[0, 4])}, bytes(4)),
        "damaged, or no checkpoint",
    ),
}


@pytest.mark.parametrize("attack", CHECKPOINTS)
@pytest.mark.parametrize("run_of", ["together"], indirect=True)
def test_checkpoint(attack, run_of):
    change, said = CHECKPOINTS[attack]
    assert said in run_of(change)


def test_no_run_has_more_epochs_than_it_asks_for(run_of):
    "A layer-by-layer run has as many for each layer."
    most = fuzz.QUIET["epochs"] * (2 if run_of.name == "greedy" else 1)
    assert "history is not that" in run_of(
        lambda whole: of_history(lambda epochs: epochs * (most + 1))(retold(whole, epoch=str(most + 1)))
    )
    run_of.path.write_bytes(
        of_history(lambda epochs: epochs * most)(retold(fuzz.checkpoints()[run_of.name], epoch=str(most)))
    )
    assert len(fuzz.trained(run_of.name, run_of.path)[1]()) == most


def test_a_good_checkpoint_is_taken(run_of):
    run_of.path.write_bytes(fuzz.checkpoints()[run_of.name])
    unbroken, resumed = fuzz.trained(run_of.name, None), fuzz.trained(run_of.name, run_of.path)
    unbroken[1](), resumed[1]()
    assert all(torch.equal(p, w) for p, w in zip(unbroken[0].parameters(), resumed[0].parameters()))


def test_torch_files_are_not_unpickled(tmp_path):
    torch.save({"epoch": fuzz.Payload(tmp_path / "canary")}, tmp_path / "run.safetensors")
    with guarded(tmp_path):
        assert judged(lambda: read_checkpoint(tmp_path / "run.safetensors", {}, 1), "run.safetensors") is None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("target", ["pipe", "folder", "/dev/zero"])
def test_checkpoints_are_regular_files(target, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run.safetensors").symlink_to(target)
    with guarded(tmp_path), pytest.raises(ValueError, match="run.safetensors: damaged"):
        fuzz.trained("together", tmp_path / "run.safetensors")[1]()


# Rows


def told(folder, *arguments):
    "Exit and output of `ff-research table`, on the rows of a folder."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FF_RESEARCH_RESULTS", str(folder))
        patch.setattr("sys.stdout", io.TextIOWrapper(out := io.BytesIO(), "utf-8", write_through=True))
        with guarded(folder):
            good = fuzz.cli.main(["table", *arguments, "--own"]) is None
    return good, out.getvalue().decode()


@pytest.mark.parametrize(
    "change",
    [
        dict(recipe=["loewe"]),
        dict(recipe=None),
        dict(recipe={}),
        dict(seed={}),
        dict(seed="0"),
        dict(seed=0.0),
        dict(seed=True),
        dict(seed=None),
    ],
)
def test_rows_that_tell_no_run(change, tmp_path):
    (tmp_path / "loewe.jsonl").write_bytes(fuzz.lines(row(), row() | change))
    with pytest.raises(DamagedRow, match="no name of a recipe, or no whole number"):
        latest(read_rows(tmp_path / "loewe.jsonl"))
    with pytest.raises(DamagedRow, match="loewe.jsonl: a row has no name"):
        publish("loewe", source=tmp_path, target=tmp_path / "shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FF_RESEARCH_RESULTS", str(tmp_path))
        assert not shell("table", "loewe", "--own")
        patch.setattr(results, "files", lambda package: tmp_path)
        (tmp_path / "published").symlink_to(tmp_path)
        with pytest.raises(DamagedRow, match="loewe.jsonl"):
            published()
    assert not (tmp_path / "shipped").exists()


@pytest.mark.parametrize(
    "change",
    [
        dict(data="mnist"),
        dict(data=dict(name=["mnist"])),
        dict(data=None),
        dict(errors="none"),
        dict(errors=[]),
        dict(seconds="fast"),
        dict(seconds=[1, 2]),
        dict(seconds={}),
        dict(seconds=10**400),
        dict(seconds=True),
        dict(seconds=float("inf")),
        dict(errors=dict(test=dict(per_label=[[1.0]]))),
        dict(errors=dict(test=dict(per_label="1.5"))),
        dict(errors=dict(test=dict(probe={"a": {}}))),
    ],
)
def test_rows_that_hold_no_numbers(change, tmp_path, monkeypatch):
    (tmp_path / "loewe.jsonl").write_bytes(fuzz.lines(row() | change))
    monkeypatch.setenv("FF_RESEARCH_RESULTS", str(tmp_path))
    assert not shell("table", "loewe", "--own")
    with pytest.raises(ValueError, match="no data.name|no errors|expected a number"):
        fuzz.cli.summary_table([row() | change])


@pytest.mark.parametrize("probe", [3, "text", [1.0], True, {}, None])
def test_a_probe_that_is_none_shows_no_number(probe):
    assert fuzz.cli.summary_table([row(errors=dict(test=dict(probe=probe)))])[0]["probe"] == "n/a"


def test_numbers_of_any_type_are_numbers_and_nothing_else_is():
    assert column(
        [dict(seed=0, e=np.float32(1)), dict(seed=1, e=2), dict(seed=2, e=np.int64(3)), dict(seed=3, e=None)], "e"
    ) == {0: 1, 1: 2, 2: 3}
    for odd in (True, "1", [1], {}, 1j, 10**309, float("inf")):
        with pytest.raises(ValueError, match="'e' of recipe 'r', seed 7"):
            column([dict(recipe="r", seed=7, e=odd)], "e")


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "..", ".", "", "a/b", "a\0b", "a\nb", "x" * 10_000, None, 7, ["loewe"], ".hidden", "a b"]
)
def test_published_names_stay_in_their_folder(name, tmp_path):
    (tmp_path / "own").mkdir()
    for place in (tmp_path / "up.jsonl", tmp_path / "own" / "loewe.jsonl"):
        place.write_bytes(fuzz.good_rows())
    with guarded(tmp_path / "own"):
        assert judged(lambda: publish(name, source=tmp_path / "own", target=tmp_path / "own" / "shipped")) is None
        assert judged(lambda: published("" if name is None else name)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "up.jsonl"] and [
        path.name for path in (tmp_path / "own").iterdir()
    ] == ["loewe.jsonl"]


@pytest.mark.parametrize("target", ["pipe", "folder", "/dev/zero"])
def test_rows_are_read_from_regular_files(target, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loewe.jsonl").symlink_to(target)
    monkeypatch.setenv("FF_RESEARCH_RESULTS", str(tmp_path))
    with guarded(tmp_path):
        with pytest.raises(OSError, match="loewe.jsonl: expected a file of rows"):
            read_rows(tmp_path / "loewe.jsonl")
        assert not shell("table", "loewe", "--own")


@pytest.mark.parametrize("odd", ["\ud800", "\x1b[2J", "a\nb", "a\rb", "\0", "x" * 100_000])
def test_what_a_terminal_should_not_see_does_not_reach_it(odd, tmp_path):
    (tmp_path / "loewe.jsonl").write_bytes(fuzz.lines(row(), row("other", data=dict(name="mnist")) | dict(recipe=odd)))
    good, out = told(tmp_path, "mnist")
    assert good and out.count("\n") == 4 and all(line.isprintable() for line in out.splitlines())


@pytest.mark.parametrize("name", ["line\nline.jsonl", "\x1b[31m.jsonl", "\udcff.jsonl", "'.jsonl"])
def test_files_of_odd_names_are_named_on_one_line(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"{")
    monkeypatch.setenv("FF_RESEARCH_RESULTS", str(tmp_path))
    with guarded(tmp_path):
        assert judged(lambda: read_rows(tmp_path / name), ".jsonl, line 1: damaged") is None
        assert not shell("table", "loewe", "--own")


# Recipes


@pytest.mark.parametrize(
    "changes",
    [
        dict(lr=10**400),
        dict(lr=float("nan")),
        dict(lr=-1),
        dict(lr="0.1"),
        dict(lr=True),
        dict(peer=float("inf")),
        dict(weight_decay=None),
        dict(epochs=10**12),
        dict(epochs=-1),
        dict(epochs=1.5),
        dict(epochs=True),
        dict(batch_size=0),
        dict(widths=()),
        dict(widths=(0,)),
        dict(widths=(-5,)),
        dict(widths=(10**12,)),
        dict(widths=[8]),
        dict(widths="8"),
        dict(widths=((8,),)),
        dict(widths=(8,) * 10**5),
        dict(widths=fuzz.tower(3000)),
        dict(widths=(100_000,) * 1000),
        dict(options=fuzz.tower(3000)),
        dict(options=(("scale", 1.0),)),
        dict(objective="hinton", options=(("nonsense", 1),)),
        dict(objective="hinton", options=(("scale", 10**400),)),
        dict(objective="hinton", options=(("scale", float("inf")),)),
        dict(objective="hinton", options=(("scale", "much"),)),
        dict(objective="nonsense"),
        dict(strategy="nonsense"),
        dict(strategy=None),
        dict(method=["ff"]),
        dict(schedule="later"),
        dict(optimizer=""),
        dict(lr_schedule={}),
        dict(full_gradient=1),
        dict(data="nonsense"),
        dict(data="/dev/zero"),
        dict(data="nul\0.npz"),
        dict(data=""),
        dict(data=7),
        dict(target=None),
        *(dict(name=name) for name in fuzz.NAMES),
    ],
    ids=lambda changes: reprlib.repr(changes)[:40],
)
def test_nonsense_in_a_recipe_is_refused_before_a_network_is_made(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "network_of", fuzz.reached)
    with guarded(tmp_path):
        assert judged(fuzz.made(**changes)) is None
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="recipe 'fuzz': depth is unknown.* Known: like, name"):
        Recipe(name="fuzz", data="digits", depth=3)


@pytest.mark.parametrize("name", fuzz.NAMES, ids=lambda name: reprlib.repr(name)[:20])
def test_names_that_no_recipe_has(name, tmp_path):
    with guarded(tmp_path):
        for call in (
            lambda: recipe(name),
            lambda: run_and_keep(name, 0, folder=tmp_path),
            lambda: list(run_many([name], [0], folder=tmp_path)),
            lambda: searches.trials(name, tmp_path),
        ):
            assert judged(lambda call=call: [call()]) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["0", "../../up", None, 0.5, float("nan"), 2**64, [0], "a\0b"])
def test_seeds_are_whole_numbers(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "network_of", fuzz.reached)
    with guarded(tmp_path):
        for call in (
            lambda: run(RECIPES["digits"], seed),
            lambda: run_and_keep("digits", seed, folder=tmp_path, progress=False),
            lambda: list(run_many(["digits"], [seed], folder=tmp_path)),
        ):
            assert judged(call) is None
    assert list(tmp_path.iterdir()) == []

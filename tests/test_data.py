"""Data sets from files that are damaged, folders that cannot be written, and downloads that fail halfway."""

import io
import random
import warnings
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from ff_research.data import (
    Images,
    as_float,
    centred,
    data_root,
    from_arrays,
    hold_out,
    load,
    load_npz,
    validation_size,
)

KEYS = ("x_train", "y_train", "x_test", "y_test")


def arrays(train=12, test=6, classes=3, shape=(1, 6, 5), seed=0):
    rng = np.random.default_rng(seed)
    x = [rng.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (train, test)]
    return dict(x_train=x[0], y_train=np.arange(train) % classes, x_test=x[1], y_test=np.arange(test) % classes)


def npz(save=np.savez, **changes):
    "The bytes of an .npz file."
    out = io.BytesIO()
    save(out, **(arrays() | changes))
    return out.getvalue()


def same(images, expected):
    return all(np.array_equal(getattr(images, key).numpy(), expected[key]) for key in KEYS)


# Images


def test_images_are_frozen_and_compared_by_identity():
    images = from_arrays("a", **arrays())
    with pytest.raises(FrozenInstanceError):
        images.x_test = images.x_train
    assert images == images and images != images.to("cpu")
    assert {images: 1}[images] == 1


@pytest.mark.parametrize("batch, sizes", [(3, [3, 3, 3, 4]), (4, [4, 4, 5]), (12, [13]), (13, [13]), (1, [1] * 13)])
def test_no_image_is_left_over_alone(batch, sizes):
    images = from_arrays("a", **arrays(train=13))
    parts = list(images.batches(batch, torch.Generator().manual_seed(0)))
    assert [len(x) for x, *_ in parts] == sizes
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([rows for *_, rows in parts]), order)
    assert torch.equal(torch.cat([y for _, y, _ in parts]), images.y_train[order])


def test_to_moves_every_tensor_and_keeps_the_rest():
    images = from_arrays("a", **arrays())
    moved = images.to("meta")
    assert {getattr(moved, key).device.type for key in KEYS} == {"meta"}
    assert (moved.name, moved.num_classes, moved.shape) == ("a", 3, (1, 6, 5))
    assert images.x_train.device.type == "cpu" and images.to("cpu").x_train.data_ptr() == images.x_train.data_ptr()


def test_the_printed_form_is_short():
    assert len(repr(load("digits"))) < 120


def test_as_float_passes_floats_uncopied_and_empty_batches():
    x = torch.rand(3, 4)
    assert as_float(x) is x
    assert as_float(x, torch.float64).dtype == torch.float64
    assert as_float(torch.zeros(0, 1, 8, 8, dtype=torch.uint8)).shape == (0, 1, 8, 8)
    every = torch.arange(256, dtype=torch.uint8)
    as_float(every)
    assert torch.equal(every, torch.arange(256, dtype=torch.uint8))


# Arrays

GREY = np.random.default_rng(0).random((6, 5, 4))
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(x_train=np.where(np.arange(6)[:, None, None] == 4, np.nan, GREY)),
            "x_train holds NaN or infinite pixels, first in image 4",
        ),
        (dict(x_test=GREY[:3] * np.inf), "x_test holds NaN or infinite"),
        (dict(x_train=-GREY), "x_train reaches from -0.99"),
        (dict(x_train=GREY * 1e30), "scaled differently"),
        (dict(x_train=(GREY * 255).astype(np.int64) + 1000, x_test=GREY[:3] * 1000), "0…255"),
        (dict(x_train=GREY.astype(complex)), "complex"),
        (dict(x_train=np.full((6, 5, 4), "a")), "expected numbers"),
        (dict(x_train=np.full((6, 5, 4), None)), "object"),
        (dict(x_train=GREY[0]), "shape (5, 4)"),
        (dict(x_train=GREY[None, None]), "shape"),
        (dict(x_train=7), "shape ()"),
        (dict(x_train=GREY[:, :0]), "none of them 0"),
        (dict(x_test=GREY[:0], y_test=LABELS[:0]), "x_test has shape"),
        (dict(x_test=GREY[:3, :, :3]), "test images [1, 5, 3]"),
        (dict(y_train=LABELS[:5]), "5 labels for 6 images"),
        (dict(y_test=LABELS[:2]), "2 labels for 3 images"),
        (dict(y_train=LABELS - 1), "label -1"),
        (dict(y_train=LABELS + 0.5), "float64"),
        (dict(y_train=np.where(LABELS == 2, np.nan, LABELS)), "no whole number"),
        (dict(y_train=LABELS > 0), "the label 2, which y_train (False, True) lacks"),
        (dict(y_train=np.array(list("abcabc"))), "the label 0, which y_train (a, b, c) lacks"),
        (dict(y_train=np.tri(3, dtype=int)[LABELS]), "multi-label, image 1 has 2 classes"),
        (dict(y_train=np.full((6, 3), 1 / 3)), "take y_train.argmax(1)"),
        (dict(y_train=np.full((6, 3), 0)), "multi-label, image 0 has 0 classes"),
        (dict(y_train=np.arange(6)), "a label of its own"),
        (dict(y_train=np.array([{}] * 6)), "Python objects"),
        (dict(y_train=LABELS * 0), "one class only"),
        (dict(y_test=np.array([0, 1, 900])), "label 900"),
        (dict(y_test=np.array([0, 1, 3])), "which y_train (0, 1, 2) lacks"),
    ],
)
def test_unusable_arrays_are_refused(change, words):
    with pytest.raises(ValueError, match=r"^here: ") as error:
        from_arrays(
            "mine", **(dict(x_train=GREY, y_train=LABELS, x_test=GREY[:3], y_test=LABELS[:3]) | change), source="here"
        )
    assert words in str(error.value)


def test_pixels_of_any_type_become_the_same_bytes():
    x = np.random.default_rng(1).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    for kind in (x, x.astype(np.int16), x.astype(np.float32), x / 255, (x / 255).astype(np.float32), x.tolist()):
        images = from_arrays("x", kind, LABELS, kind, LABELS)
        assert images.x_train.dtype == torch.uint8 and np.array_equal(images.x_train[:, 0].numpy(), x)
    almost = np.full((6, 2, 2), 254.9999)  # rounded, not cut off
    assert from_arrays("x", almost, LABELS, almost, LABELS).x_train.unique().tolist() == [255]


def test_transposed_and_read_only_arrays_pass_without_a_warning():
    x = np.random.default_rng(1).integers(0, 256, (4, 5, 6), dtype=np.uint8).T
    x.flags.writeable = False
    fixed = x.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in (x, fixed):
            assert np.array_equal(from_arrays("x", array, LABELS, array, LABELS).x_test[:, 0].numpy(), x)


@pytest.mark.parametrize("samples", [0, -1, 12, 9999])
def test_hold_out_leaves_something_on_both_sides(samples):
    with pytest.raises(ValueError, match=f"cannot hold out {samples} of 12"):
        hold_out(from_arrays("a", **arrays()), samples)


def test_hold_out_never_hands_on_a_test_image():
    images = from_arrays("a", **arrays())
    for samples in (1, 5, 11):
        split = hold_out(images, samples)
        assert torch.equal(torch.cat([split.x_train, split.x_test]), images.x_train) and len(split.y_test) == samples
        assert torch.equal(torch.cat([split.y_train, split.y_test]), images.y_train)
    assert same(images, arrays())


def test_validation_sizes():
    images = from_arrays("a", **arrays())
    sizes = {
        name: validation_size(replace(images, name=name))
        for name in ("digits", "mnist", "fashion_mnist", "cifar10", "a")
    }
    assert sizes == {"digits": 300, "mnist": 10_000, "fashion_mnist": 10_000, "cifar10": 5_000, "a": 2}
    assert validation_size(replace(images, name="mnist, centred to 10")) == 10_000


@pytest.mark.parametrize("energy", [0.5, 10.0, 1000.0])
@pytest.mark.parametrize("floats", [False, True])
def test_centred_images_have_mean_zero_and_their_energy(energy, floats):
    images = load("digits")
    images = replace(images, x_train=as_float(images.x_train)) if floats else images
    kept = images.x_train.clone(), images.x_test.clone()
    middle = centred(images, energy)
    assert middle.x_train.dtype == torch.float32 and middle.x_train.flatten(1).mean(0).abs().max() < 1e-4 * energy**0.5
    assert middle.x_train.flatten(1).square().sum(1).mean().item() == pytest.approx(energy, rel=1e-4)
    # one affine map for both parts, whose statistics are those of the training images
    mean = as_float(images.x_train).mean(0)
    assert torch.allclose(
        as_float(images.x_test) - mean,
        middle.x_test * (as_float(images.x_train) - mean).norm() / middle.x_train.norm(),
        atol=1e-5,
    )
    assert torch.equal(kept[0], images.x_train) and torch.equal(kept[1], images.x_test)
    other = centred(replace(images, x_test=images.x_test.flip(0)[:7]), energy)
    assert torch.equal(other.x_train, middle.x_train)
    assert (middle.y_train is images.y_train, middle.num_classes, middle.shape) == (True, 10, images.shape)


@pytest.mark.parametrize("energy", [0, -1.0, float("nan")])
def test_images_that_cannot_be_centred(energy):
    with pytest.raises(ValueError, match="cannot be centred"):
        centred(load("digits"), energy)
    alike = load("digits")
    with pytest.raises(ValueError, match="all the same"):
        centred(replace(alike, x_train=torch.full_like(alike.x_train, 7)))


# Files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, save):
    whole, path = npz(save), tmp_path / "cut.npz"
    for size in [*range(0, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            load_npz(path)
        assert str(error.value).startswith(f"{path}: damaged"), size
    path.write_bytes(whole)
    assert same(load_npz(path), arrays())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_is_refused_by_name_or_harmless(tmp_path, save):
    whole, path, harmless = npz(save), tmp_path / "flip.npz", 0
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= random.Random(place).randrange(1, 256)
        path.write_bytes(damaged)
        try:
            images = load_npz(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), place
        else:
            harmless += 1  # a time stamp, for instance
            assert same(images, arrays()), place
    assert harmless < len(whole) / 4


class Evil:
    "Unpickled, it leaves a trace."

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_ever_unpickled(tmp_path, key):
    trace, path = tmp_path / "trace", tmp_path / "evil.npz"
    path.write_bytes(npz(**{key: np.array([Evil(trace)] * len(arrays()[key]), dtype=object)}))
    assert not trace.exists()
    with pytest.raises(ValueError, match="never unpickled"):
        load_npz(path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)[key]  # the trap is armed: whoever does unpickle springs it
    assert trace.exists()


def test_a_bare_pickle_is_refused(tmp_path):
    import pickle

    trace, path = tmp_path / "trace", tmp_path / "evil.npz"
    path.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(ValueError, match="damaged"):
        load_npz(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"x_train,y_train\n0,1\n", bytes(5000)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.npz: damaged, not an \.npz file"):
        load_npz(path)


def test_a_single_array_is_refused(tmp_path):
    with open(tmp_path / "single.npz", "wb") as f:
        np.save(f, arrays()["x_train"])
    with pytest.raises(ValueError, match=r"single\.npz: damaged, not an \.npz file"):
        load_npz(tmp_path / "single.npz")


def test_missing_arrays_are_named_with_those_that_are_there(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=arrays()["x_train"], labels=arrays()["y_train"])
    with pytest.raises(ValueError, match="lacks y_train, x_test, y_test; it holds x_train, labels"):
        load_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="it holds nothing"):
        load_npz(tmp_path / "b.npz")


def test_unusable_arrays_in_a_file_are_refused_with_its_path(tmp_path):
    path = tmp_path / "mine.npz"
    path.write_bytes(npz(y_test=np.arange(6)))
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: y_test holds the label 3")


def test_what_a_file_leaves_open_it_can_say_itself(tmp_path):
    path, kept = tmp_path / "mine.npz", arrays(train=60, test=30, classes=7, shape=(2, 16, 16))
    np.savez(path, **kept)
    with pytest.raises(ValueError, match="channels='first' .* An array named channels in the file says it as well$"):
        load(path)
    np.savez(path, **kept, channels="first")
    assert load(path).shape == (2, 16, 16)
    np.savez(path, **kept, channels="middle")
    with pytest.raises(ValueError, match="channels=middle; expected 'first', 'last'") as error:
        load(path)
    assert "An array named" not in str(error.value)  # it is there, and wrong


def test_own_data_of_any_shape(tmp_path, monkeypatch):
    expected = arrays(train=60, test=30, classes=26, shape=(3, 7, 5))
    np.savez(tmp_path / "letters.npz", **expected, notes=np.array("what else is in the file does not matter"))
    images = load(tmp_path / "letters.npz")
    assert same(images, expected) and (images.name, images.shape, images.num_pixels, images.num_classes) == (
        "letters",
        (3, 7, 5),
        105,
        26,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("letters.npz", "./letters.npz", "~/letters.npz", str(tmp_path / "letters.npz")):
        assert same(load(path), expected)


# Names and folders


@pytest.mark.parametrize(
    "name, near",
    [
        ("MNIST", "mnist"),
        ("fashion", "fashion_mnist"),
        ("Fashion-MNIST", "fashion_mnist"),
        ("cifar-10", "cifar10"),
        ("digit", "digits"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'; did you mean '{near}'"):
        load(name)


@pytest.mark.parametrize("name", ["", "xyzzy"])
def test_a_name_like_no_other_is_answered_with_all(name):
    with pytest.raises(
        ValueError, match=f"unknown data set '{name}'. Known: digits, mnist, fashion_mnist, cifar10, or the path"
    ):
        load(name)


def test_a_path_where_nothing_is(tmp_path):
    for path in (tmp_path / "nothing.npz", "nowhere/mine", Path("mine")):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(path)
    for path in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(IsADirectoryError, match=r"a folder, not a file; .* from_dataset\(.*ImageFolder"):
            load(path)


def test_the_root_is_the_argument_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FF_RESEARCH_DATA", "~/shared")
    assert data_root("mine") == Path("mine") and data_root("~/mine") == tmp_path / "mine"
    assert data_root() == tmp_path / "shared"
    for unset in (lambda: monkeypatch.setenv("FF_RESEARCH_DATA", ""), lambda: monkeypatch.delenv("FF_RESEARCH_DATA")):
        unset()
        assert data_root() == tmp_path / ".cache/ff_research"


def test_stored_sets_are_read_from_the_folder_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("FF_RESEARCH_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "MNIST", None)  # a download would fail
    (tmp_path / "mnist.npz").write_bytes(npz())
    images = load("mnist")
    assert images.name == "mnist" and same(images, arrays())
    other = tmp_path / "other"
    other.mkdir()
    (other / "mnist.npz").write_bytes(npz(y_test=np.arange(6)[::-1] % 3))
    assert load("mnist", root=other).y_test.tolist() == [2, 1, 0, 2, 1, 0]


# Downloads


class Fetch:
    "Stands in for a data set of torchvision; `fails` names the call that fails, if one is to."

    calls, fails, error = 0, None, OSError("no route to host")

    def __init__(self, root, train, download):
        cls = type(self)
        cls.calls += 1
        assert download and root.name == "downloads"
        if cls.calls == cls.fails:
            raise cls.error
        part = "train" if train else "test"
        self.data = torch.from_numpy(arrays()[f"x_{part}"][:, 0])  # [samples, height, width], as torchvision has it
        self.targets = torch.from_numpy(arrays()[f"y_{part}"])


@pytest.fixture
def fetch(monkeypatch):
    cls = type("Fetch", (Fetch,), {})
    monkeypatch.setattr(torchvision.datasets, "MNIST", cls)
    return cls


def test_a_data_set_is_fetched_once_and_kept(tmp_path, fetch):
    root = tmp_path / "new" / "folder"
    images = load("mnist", root=root)
    assert same(images, arrays()) and images.y_train.dtype == torch.int64
    assert [path.name for path in root.iterdir()] == ["mnist.npz"]
    assert same(load("mnist", root=root), arrays()) and fetch.calls == 2  # training and test part, once each


def test_colour_comes_channels_first_and_in_one_order(tmp_path, monkeypatch):
    expected = arrays(shape=(3, 4, 4))
    turn = {"train": np.random.default_rng(1).permutation(12), "test": np.arange(6)[::-1]}
    moved = {key: expected[key][turn[key[2:]]] for key in KEYS}

    class Colour:
        def __init__(self, root, train, download):
            part = "train" if train else "test"
            self.data, self.targets = (
                moved[f"x_{part}"].transpose(0, 2, 3, 1),
                moved[f"y_{part}"].tolist(),
            )  # as torchvision has them

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Colour)
    images = load("cifar10", root=tmp_path)
    assert not same(images, expected) and images.shape == (3, 4, 4)
    for part in ("train", "test"):  # the same pairs of image and label
        pairs = [
            sorted((x.tolist(), int(y)) for x, y in zip(d[f"x_{part}"], d[f"y_{part}"]))
            for d in (expected, vars(images))
        ]
        assert pairs[0] == pairs[1]
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "cifar10.npz", **expected)
    again = load("cifar10", root=tmp_path / "other")
    assert all(torch.equal(getattr(again, key), getattr(images, key)) for key in KEYS)


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("File not found or corrupted.")])
@pytest.mark.parametrize("fails", [1, 2])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, fetch, fails, error):
    fetch.fails, fetch.error = fails, error
    with pytest.raises(OSError) as raised:
        load("mnist", root=tmp_path)
    for words in (str(tmp_path), str(error), "put mnist.npz there", "FF_RESEARCH_DATA"):
        assert words in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert same(load("mnist", root=tmp_path), arrays())  # the next call starts anew


def test_a_full_disk_leaves_no_half_file(tmp_path, fetch, monkeypatch):
    def full(file, **kwargs):
        file.write(b"PK\3\4 and then no more")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            load("mnist", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert same(load("mnist", root=tmp_path), arrays())


def test_the_file_appears_complete_or_not_at_all(tmp_path, fetch, monkeypatch):
    savez = np.savez

    def watched(file, **kwargs):
        assert not (tmp_path / "mnist.npz").exists()
        savez(file, **kwargs)
        assert not (tmp_path / "mnist.npz").exists()

    monkeypatch.setattr(np, "savez", watched)
    assert same(load("mnist", root=tmp_path), arrays())


def test_a_folder_that_cannot_be_written(tmp_path, fetch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="FF_RESEARCH_DATA"):
        load("mnist", root=tmp_path / "file" / "root")
    assert fetch.calls == 0


# The real sets, where they are


@pytest.mark.parametrize(
    "name, sizes, shape, mean, std",
    [
        pytest.param("mnist", (60_000, 10_000), (1, 28, 28), [0.1307], [0.3081], marks=pytest.mark.data("mnist")),
        pytest.param(
            "fashion_mnist", (60_000, 10_000), (1, 28, 28), [0.2860], [0.3530], marks=pytest.mark.data("fashion_mnist")
        ),
        pytest.param(
            "cifar10",
            (50_000, 10_000),
            (3, 32, 32),
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
            marks=pytest.mark.data("cifar10"),
        ),
    ],
)
def test_public_sets_are_what_everybody_calls_by_their_name(name, sizes, shape, mean, std):
    images = load(name)
    assert (len(images.y_train), len(images.y_test)) == sizes and images.shape == shape and images.num_classes == 10
    pixels = images.x_train.numpy()
    for channel in range(shape[0]):
        assert pixels[:, channel].mean() / 255 == pytest.approx(mean[channel], abs=1e-4)
        assert pixels[:, channel].std() / 255 == pytest.approx(std[channel], abs=1e-4)
    counts = torch.bincount(images.y_train)
    assert counts.tolist() == (
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949] if name == "mnist" else [sizes[0] // 10] * 10
    )


def test_digits_are_all_there_and_split_the_same_way_every_time():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    one, two = load("digits"), load("digits")
    assert isinstance(one, Images) and all(torch.equal(getattr(one, key), getattr(two, key)) for key in KEYS)
    assert (len(one.y_train), len(one.y_test)) == (1437, 360)
    ours = sorted(
        (*row.flatten().tolist(), label)
        for images, labels in ((one.x_train, one.y_train), (one.x_test, one.y_test))
        for row, label in zip(images, labels.tolist())
    )
    theirs = sorted((*row, label) for row, label in zip((x * 255 / 16).round().astype(int).tolist(), y.tolist()))
    assert ours == theirs

"""One's own data: every range, order of axes, kind of labels and container is read right, asked about, or refused."""

import gzip
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ff_research.backprop import train_backprop
from ff_research.checkpoints import History
from ff_research.converters import in_order
from ff_research.data import (
    Images,
    checksum,
    from_arrays,
    from_dataset,
    hold_out,
    learned_from,
    load,
    load_npz,
    save_npz,
    split_rows,
    validation_size,
)
from ff_research.files import read_arrays
from ff_research.network import Network
from ff_research.readout import fit_ridge, linear_probe, per_label_goodness, probe_errors, softmax_head
from ff_research.splits import lacks_classes, stratified
from ff_research.strategies import STRATEGIES, LabelsOnPixels, PlainPositives
from ff_research.training import train
from ff_research.transfer import low_shot_errors

KEYS = ("x_train", "y_train", "x_test", "y_test")
CPU = dict(device="cpu", precision="fp32", progress=False)
LABELS = STRATEGIES["label_embedding"]

rng = np.random.default_rng(0)
BYTES = rng.integers(0, 256, (12, 6, 5), dtype=np.uint8)
BYTES[0, 0, :2] = 0, 255
TEST = rng.integers(0, 256, (6, 6, 5), dtype=np.uint8)
Y, Y_TEST = np.arange(12) % 3, np.arange(6) % 3


def made(x=BYTES, y=Y, x_test=None, y_test=Y_TEST, scale=lambda x: x, **options):
    "Images from arrays, both parts on one scale."
    x_test = scale(TEST) if x_test is None else x_test
    return from_arrays("mine", scale(x), y, x_test, y_test, **options)


def pixels(images):
    return images.x_train[:, 0].numpy()


@pytest.fixture(autouse=True)
def no_warning_unasked():
    "What is right says nothing: a test that expects a warning catches it."
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# Pixel ranges

CERTAIN = {
    "bytes": lambda x: x,
    "integers to 255": lambda x: x.astype(np.int32),
    "floats to 1": lambda x: x / 255,
    "float16 to 1": lambda x: (x / 255).astype(np.float32).astype(np.float16),
    "floats to 255": lambda x: x.astype(np.float32),
    "tensors": lambda x: torch.from_numpy(x).float().div(255).requires_grad_(),
    "bfloat16 tensors": lambda x: torch.from_numpy(x).to(torch.bfloat16),
    "lists": lambda x: x.tolist(),
    "lists of tensors": lambda x: list(torch.from_numpy(x)),
}


@pytest.mark.parametrize("form", CERTAIN)
def test_a_certain_range_gives_the_same_bytes(form):
    assert np.abs(pixels(made(scale=CERTAIN[form])).astype(int) - BYTES).max() <= (1 if "16" in form else 0)


OVER = {
    "x / 254": lambda x: x / 254,
    "a bicubic resize to 1": lambda x: x / 255 * 1.0006 - 0.0003,
    "a bicubic resize to 255": lambda x: x * 1.004 - 0.5,
}


@pytest.mark.parametrize("form", OVER)
def test_a_hair_outside_is_cut_off_with_a_warning(form):
    with pytest.warns(UserWarning, match="mine: some pixels lie a little outside of 0….*pixel_range="):
        images = made(scale=OVER[form])
    assert np.abs(pixels(images).astype(int) - BYTES).max() <= 1


def test_the_test_part_alone_a_hair_outside_does_not_turn_black():
    with pytest.warns(UserWarning, match="cut off"):
        images = made(scale=lambda x: x / 255, x_test=TEST / 254)
    assert np.abs(images.x_test[:, 0].numpy().astype(int) - TEST).max() <= 1


@pytest.mark.parametrize(
    "scale, told, says",
    [
        (lambda x: (x > 127).astype(int), (0, 1), "x_train reaches from 0 to 1"),
        (lambda x: (x > 127).astype(np.uint8), (0, 1), "pixel_range=(0, 1) or"),
        (lambda x: np.rint(x / 255 * 16).astype(np.int64), (0, 16), "pixel_range=(0, 16) or pixel_range=(0, 255)"),
        (lambda x: np.rint(x / 255 * 16).astype(np.uint8), (0, 16), "say what they are"),
        (lambda x: np.rint(x / 255 * 16), (0, 16), "pixel_range=(0, 16)"),
        (lambda x: x / 255 * 100, (0, 100), "the dark end of another"),
        (lambda x: x / 255 / 255, (0, 1 / 255), "the dark end of another"),
        (lambda x: x / 127.5 - 1, (-1, 1), "pixel_range=(-1, 1)"),
        (lambda x: x.astype(np.uint16) * 257, (0, 65535), "pixel_range=(0, 65535)"),
        (lambda x: x / 255 * 6 - 3, (-3, 3), "pixel_range='as_is'"),
        (lambda x: x.astype(np.int16) - 128, (-128, 127), "pixel_range=(low, high)"),
    ],
)
def test_an_uncertain_range_is_refused_with_the_remedy_which_is_right(scale, told, says):
    with pytest.raises(ValueError, match="^mine: ") as error:
        made(scale=scale)
    assert says in str(error.value) and "pixel_range" in str(error.value)
    low, high = told
    exact = np.rint((scale(BYTES).astype(float) - low) / (high - low) * 255)
    assert np.array_equal(pixels(made(scale=scale, pixel_range=told)), exact)


def test_parts_on_two_scales_are_refused():
    for x, x_test in ((BYTES / 255, TEST), (BYTES.astype(float), TEST / 255), (BYTES, np.rint(TEST / 16).astype(int))):
        with pytest.raises(ValueError, match="x_test reaches|x_train reaches.*scaled differently"):
            made(x, x_test=x_test)
    with pytest.raises(ValueError, match="x_val reaches.*scaled differently"):
        made(validation=(TEST / 255, Y_TEST))
    dark = made(x_test=TEST // 4)  # dark, on the same scale
    assert np.array_equal(dark.x_test[:, 0], TEST // 4) and made(x_test=TEST * 0).x_test.max() == 0


def test_pixels_outside_of_the_range_that_was_told_are_refused():
    with pytest.raises(ValueError, match=r"x_train reaches from 0 to 255, outside of pixel_range=\(0, 16\)"):
        made(pixel_range=(0, 16))
    for odd in ((1, 0), (0, 0), "pixels", 7, (0, np.nan), (0,), ("a", "b")):
        with pytest.raises(ValueError, match="mine: pixel_range="):
            made(pixel_range=odd)


def test_black_and_white_pictures():
    images = made(BYTES > 127, x_test=TEST > 127)
    assert images.x_train.unique().tolist() == [0, 255] and np.array_equal(pixels(images) > 0, BYTES > 127)


def test_numbers_that_are_no_pixels_go_in_as_they_are():
    table = rng.normal(size=(12, 13)) * 1000
    images = from_arrays("wine", table, Y, table[:6], Y_TEST, pixel_range="as_is")
    assert images.x_train.dtype == torch.float32 and images.shape == (1, 1, 13)
    assert torch.equal(images.x_train.flatten(1), torch.from_numpy(table).float())
    series = made(scale=lambda x: x / 50 - 2, pixel_range="as_is")
    assert series.shape == (1, 6, 5) and series.x_train.min() < -1.9
    assert from_arrays("n", table.astype(int), Y, table[:6].astype(int), Y_TEST, pixel_range="as_is").x_train.min() < 0
    with pytest.raises(ValueError, match=r"flattened images need x_train.reshape\(-1, 4, 4\), tables and spectra"):
        from_arrays("wine", table[:, :1].repeat(16, 1), Y, table[:6], Y_TEST)
    with pytest.raises(ValueError, match="beyond the range of float32"):
        made(scale=lambda x: x * 1e300, pixel_range="as_is")
    history = train(Network([13, 8]), images, LABELS(3), epochs=1, **CPU)
    assert isinstance(history, History)


def test_many_images_are_converted_in_pieces():
    x = rng.random((30, 3, 400, 400), dtype=np.float32)
    y = np.arange(30) % 3
    assert torch.equal(
        from_arrays("m", x, y, x[:3], y[:3]).x_train, torch.from_numpy(np.rint(x * 255).astype(np.uint8))
    )


# Axes


@pytest.mark.parametrize(
    "shape, count, channels, moved",
    [
        ((9, 8, 8, 3), 9, None, (0, 3, 1, 2)),
        ((9, 8, 7, 1), 9, None, (0, 3, 1, 2)),
        ((9, 8, 7, 4), 9, None, (0, 3, 1, 2)),
        ((9, 3, 8, 8), 9, None, (0, 1, 2, 3)),
        ((9, 3, 4, 4), 9, "first", (0, 1, 2, 3)),
        ((9, 4, 4, 3), 9, "last", (0, 3, 1, 2)),
        ((9, 13, 8, 8), 9, "first", (0, 1, 2, 3)),
        ((9, 8, 8, 2), 9, "last", (0, 3, 1, 2)),
        ((9, 1, 8, 1), 9, None, (0, 1, 2, 3)),
        ((8, 8, 3, 20), 20, None, (3, 2, 0, 1)),  # as Matlab has them
    ],
)
def test_channels_are_found_or_told(shape, count, channels, moved):
    x = rng.random(shape)
    assert np.array_equal(in_order(x, count, "x_train", "here", channels), x.transpose(moved))


@pytest.mark.parametrize("shape", [(9, 3, 4, 4), (9, 4, 4, 4), (9, 13, 8, 8), (9, 3, 8, 3), (9, 8, 8, 2), (9, 5, 5, 5)])
def test_an_uncertain_order_is_refused_with_the_remedy(shape):
    with pytest.raises(ValueError, match="channels='first' or channels='last'"):
        in_order(np.zeros(shape), 9, "x_train", "here")
    with pytest.raises(ValueError, match="mine: channels=middle; expected 'first', 'last'"):
        made(channels="middle")


def test_colour_photographs_with_channels_last_are_read_right():
    x = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    images = from_arrays("photos", x, Y, x[:6], Y_TEST)
    assert images.shape == (3, 32, 32) and np.array_equal(images.x_train, x.transpose(0, 3, 1, 2))
    grey = from_arrays("grey", x[..., 0], Y, x[:6, ..., :1], Y_TEST)  # one part has the axis of the one channel
    assert grey.shape == (1, 32, 32)


# Labels


@pytest.mark.parametrize(
    "labels, names, warned",
    [
        (lambda y: y + 1, (1, 2, 3), True),
        (lambda y: np.array([30, 80, 99])[y], (30, 80, 99), True),
        (lambda y: np.array([-1, 1, 2])[y], (-1, 1, 2), True),
        (lambda y: y.astype(np.uint64) + 2**63, (2**63, 2**63 + 1, 2**63 + 2), True),
        (lambda y: np.array(["cat", "dog", "owl"])[y], ("cat", "dog", "owl"), False),
        (lambda y: np.array(["cat", "dog", "owl"])[y].astype(object), ("cat", "dog", "owl"), False),
        (lambda y: np.array([b"cat", b"dog", b"owl"])[y], ("cat", "dog", "owl"), False),
        (lambda y: y.astype(float), None, False),
        (lambda y: y[:, None], None, False),
        (lambda y: y[None], None, False),
        (lambda y: np.eye(3)[y], None, False),
        (lambda y: np.eye(3, dtype=bool)[y], None, False),
        (lambda y: torch.from_numpy(y), None, False),
        (lambda y: y.astype(np.uint8), None, False),
    ],
)
def test_labels_of_every_kind_become_the_same_classes(labels, names, warned):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        images = made(y=labels(Y), y_test=labels(Y_TEST))
    assert images.y_train.tolist() == Y.tolist() and images.y_test.tolist() == Y_TEST.tolist()
    assert (images.num_classes, images.class_names, images.y_train.dtype) == (3, names, torch.int64)
    assert [str(one.message).startswith("mine: the labels ") for one in said] == [True] * warned
    assert names is None or str(names[0]) in repr(images)


def test_truth_values_are_two_classes():
    images = made(y=Y > 0, y_test=Y_TEST > 0)
    assert images.class_names == (False, True) and images.y_train.tolist() == (Y > 0).astype(int).tolist()


def test_names_that_are_given_number_the_classes():
    images = made(class_names=["a", "b", "c", "d"])  # a class without images is one, where it is named
    assert (images.num_classes, images.class_names) == (4, ("a", "b", "c", "d"))
    words = np.array(["owl", "cat", "dog"])
    images = made(y=words[Y], y_test=words[Y_TEST], class_names=words)
    assert images.y_train.tolist() == Y.tolist() and images.class_names == ("owl", "cat", "dog")
    ten = made(y=Y * 4, y_test=Y_TEST * 4, class_names=range(10))
    assert (ten.num_classes, ten.class_names, ten.y_train.max()) == (10, None, 8)
    for names, said in (
        (["a", "b"], "label 2, which class_names"),
        (["a"] * 3, "different"),
        ("abc", "a list of"),
        ([0, "a"], "a list"),
    ):
        with pytest.raises(ValueError, match=said):
            made(class_names=names)


def test_an_unlabelled_mark_is_refused():
    with pytest.raises(ValueError, match="label -1, which often marks images without a label"):
        made(y=Y - 1, y_test=Y_TEST - 1)


def test_a_masked_array_is_refused():
    with pytest.raises(ValueError, match="x_train has masked entries"):
        made(np.ma.masked_greater(BYTES, 200), x_test=TEST)


# Splits


def by_class(images, **changes):
    order = images.y_train.argsort(stable=True)
    return replace(images, x_train=images.x_train[order], y_train=images.y_train[order], **changes)


def test_published_sets_hold_out_their_last_images(digits):
    assert split_rows(digits) == (slice(None, 1137), slice(1137, None))
    split = hold_out(digits, 300)
    assert split.x_train.data_ptr() == digits.x_train.data_ptr() and torch.equal(split.y_test, digits.y_train[-300:])
    assert not lacks_classes(digits.y_train, 300)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_stored_sets_hold_out_their_last_images(name):
    from ff_research.data import data_root

    if not (data_root() / f"{name}.npz").exists():
        pytest.skip(f"{name} is not stored here")
    with np.load(data_root() / f"{name}.npz") as held:
        y, y_test = held["y_train"], held["y_test"]
    images = load(name)
    size = 5000 if name == "cifar10" else 10_000
    assert split_rows(images) == (slice(None, len(y) - size), slice(len(y) - size, None))
    assert images.class_names is None and images.split is None
    if name != "cifar10":  # the very tensors of the file
        with np.load(data_root() / f"{name}.npz") as held:
            assert np.array_equal(images.x_train, held["x_train"]) and np.array_equal(images.x_test, held["x_test"])
        assert images.y_train.tolist() == y.tolist() and images.y_test.tolist() == y_test.tolist()


def test_arrays_sorted_by_class_are_held_out_by_class(digits):
    sorted_by_class = by_class(digits, name="mine")
    with pytest.warns(UserWarning, match="mine: the last training images lack classes"):
        split = hold_out(sorted_by_class, 300)
    shares = torch.bincount(split.y_test, minlength=10) / torch.bincount(digits.y_train)
    assert (shares - 300 / 1437).abs().max() < 0.01 and len(split.y_test) == 300
    said = replace(sorted_by_class, split="stratified")
    assert torch.equal(hold_out(said, 300).x_test, split.x_test)
    assert hold_out(replace(said, split="last"), 300).y_test.unique().tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="split='random'"):
        hold_out(replace(said, split="random"), 300)


def test_read_outs_of_sorted_arrays_are_as_good_as_of_shuffled_ones(digits):
    said = by_class(digits, name="mine", split="stratified")
    network = Network([64, 60, 50], seed=0)
    where = dict(device="cpu", precision="fp32")
    for read in (
        lambda images: linear_probe(network, images, **where)["test"]["layer_1"],
        lambda images: probe_errors(
            [images.x_train.flatten(1) / 255], [images.x_test.flatten(1) / 255], images, fit_ridge
        )["test"]["layer_1"],
        lambda images: low_shot_errors(network, images, (20,), neutral_label=False, **where)[20],
    ):
        assert read(said) < read(digits) + 1.5
        assert read(said) < 20
    head = softmax_head(network, said, first=1, **where)
    assert head.weight.shape == (110, 10) and head.bias.argmin() not in (8, 9)
    ruined = linear_probe(network, replace(said, split="last"), **where)["test"]["layer_1"]
    assert ruined > 15  # what the last images did: two classes that no fit has seen


@pytest.mark.parametrize("seed", range(20))
def test_stratified_parts_are_in_proportion(seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 7, (60,), generator=generator) ** 2
    counts = torch.unique(y, return_counts=True)[1]
    for samples in (1, 7, 13, 30, 55, 59):
        fit, held = stratified(y, samples)
        assert len(held) == samples and torch.equal(torch.cat([fit, held]).sort().values, torch.arange(60))
        assert torch.equal(held, held.sort().values)
        assert not lacks_classes(torch.cat([y[fit], y[held]]), samples)
    fit, held = stratified(y, 20)
    taken = torch.stack([(y[held] == k).sum() for k in y.unique()])
    assert (taken - 20 * counts / 60).abs().max() <= 1
    for k in y.unique():  # the last of the class
        own = (y == k).nonzero()[:, 0]
        assert torch.equal(held[y[held] == k], own[len(own) - int((y[held] == k).sum()) :])


def test_a_validation_part_of_ones_own_is_held_out_and_never_learned_from(digits):
    x, y = digits.x_train.numpy(), digits.y_train.numpy()
    images = from_arrays(
        "mine",
        x[:1200],
        y[:1200],
        digits.x_test.numpy(),
        digits.y_test.numpy(),
        validation=(x[1200:1300], y[1200:1300]),
    )
    assert (images.validation, validation_size(images), len(images.y_train)) == (100, 100, 1300)
    assert "1200 training, 100 validation and 360 test images" in repr(images)
    split = hold_out(images, validation_size(images))
    assert torch.equal(split.x_test, digits.x_train[1200:1300]) and (split.validation, len(split.y_train)) == (0, 1200)
    weights = []
    for given in (images, split, learned_from(images)):
        network = Network([64, 20], seed=0)
        train(network, given, LABELS(10), epochs=1, **CPU)
        weights.append(network.layers[0].weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match=r"mine: validation is a int; expected \(images, labels\)"):
        made(validation=7)
    with pytest.raises(ValueError, match=r"validation images \[1, 6, 4\]"):
        made(validation=(TEST[:, :, :4], Y_TEST))


def test_a_lacking_test_part_is_made_and_said():
    x, y = np.concatenate([BYTES] * 3), np.sort(np.concatenate([Y] * 3))
    with pytest.warns(UserWarning, match="no test images were given; 6 of the 36"):
        images = from_arrays("mine", x, y)
    assert (len(images.y_train), images.y_test.tolist()) == (30, [0, 0, 1, 1, 2, 2])


# Containers


class Columns(Dataset):
    "A data set as Hugging Face's: dictionaries, and features that know the names of the classes."

    class Feature:
        names = ["bird", "cat", "dog", "frog"]

    def __init__(self, columns=("img", "label")):
        self.columns, self.features = columns, {columns[1]: self.Feature(), columns[0]: None}

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if not 0 <= i < 12:
            raise IndexError(i)
        return dict(zip(self.columns, (Image.fromarray(BYTES[i]), int(Y[i]) + 1)))


def pairs(x=BYTES, y=Y):
    return [(Image.fromarray(image), int(label)) for image, label in zip(x, y)]


def test_data_sets_of_every_kind_give_the_same_images():
    tensors = TensorDataset(torch.from_numpy(BYTES)[:, None], torch.from_numpy(Y))
    forms = dict(
        pictures=pairs(),
        tensors=tensors,
        floats=[(transforms.ToTensor()(image), label) for image, label in pairs()],
        arrays=list(zip(BYTES, Y)),
        more=[(image, label, "more") for image, label in pairs()],
        dictionaries=[dict(image=image, label=label) for image, label in pairs()],
        subset=Subset(tensors, range(12)),
        parts=dict(train=pairs(), test=pairs(TEST, Y_TEST)),
    )
    for name, form in forms.items():
        test = {"tensors": None, "arrays": list(zip(TEST, Y_TEST))}.get(name, pairs(TEST, Y_TEST))
        test = [(transforms.ToTensor()(image), label) for image, label in test] if name == "floats" else test
        images = from_dataset(form, test or TensorDataset(torch.from_numpy(TEST)[:, None], torch.from_numpy(Y_TEST)))
        assert np.array_equal(pixels(images), BYTES) and images.y_train.tolist() == Y.tolist(), name
        assert images.num_classes == 3 and len(images.y_test) == 6


def test_columns_and_names_of_hugging_face():
    images = from_dataset(Columns(), Columns(), name="hub")
    assert np.array_equal(pixels(images), BYTES) and images.class_names == ("cat", "dog", "frog")
    assert images.y_train.tolist() == Y.tolist()
    odd = Columns(("scan", "finding"))
    with pytest.raises(ValueError, match="have the columns scan, finding; say which"):
        from_dataset(odd, odd)
    assert from_dataset(odd, odd, columns=("scan", "finding")).class_names == ("cat", "dog", "frog")


def folder_of_pictures(root, classes, colours=("red", "green", "blue")):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (6, 5), colours[ord(name[0]) % 3]).save(root / name / f"{i}.png")
    return ImageFolder(root)


def test_folders_are_compared_by_name_and_not_by_number(tmp_path):
    "The test folder lacks a class, so its numbers are others than those of the training folder."
    images = from_dataset(
        folder_of_pictures(tmp_path / "train", ["ant", "bee", "cow"]),
        folder_of_pictures(tmp_path / "test", ["ant", "cow"]),
    )
    assert images.class_names == ("ant", "bee", "cow") and images.shape == (3, 5, 6)
    assert images.y_test.tolist() == [0] * 4 + [2] * 4
    with pytest.raises(ValueError, match="holds the label fox, which class_names"):
        from_dataset(ImageFolder(tmp_path / "train"), folder_of_pictures(tmp_path / "more", ["ant", "fox"]))


@pytest.mark.parametrize(
    "mode, channels", [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1), ("CMYK", 3), ("LA", 2)]
)
def test_pictures_of_any_mode(mode, channels):
    colours = [Image.new("RGB", (5, 4), c).convert(mode) for c in ("white", "red", "black", "white", "red", "black")]
    images = from_dataset([(c, i % 3) for i, c in enumerate(colours)], [(c, i) for i, c in enumerate(colours[:3])])
    assert images.shape == (channels, 4, 5) and images.x_train[0, 0].unique().tolist() == [255]
    assert images.x_train[2, 0].max() == 0


def test_what_is_no_data_set_is_refused_with_the_remedy():
    loader = DataLoader(TensorDataset(torch.zeros(4, 1, 2, 2), torch.zeros(4)))
    for given, said in (
        (loader, "give its data set, loader.dataset"),
        (iter(pairs()), "no map-style data set.*list"),
        ([], "is empty"),
        ("folder", "a str is no map-style"),
        (None, "a NoneType is no map-style"),
        ([7], "its items are ints; expected pairs"),
        ([(None, 1)], "image 0 is a NoneType"),
        ([(BYTES[0], None)], "the label of image 0 is a NoneType"),
        ([*pairs(), (Image.new("L", (9, 9)), 1)], r"image 12 is uint8 \[9, 9\], image 0 uint8 \[6, 5\].*Resize"),
        ([*pairs(), (Image.new("RGB", (5, 6)), 1)], r"image 12 is uint8 \[3, 6, 5\]"),
        ([(np.zeros((4, 4)), 0), (np.zeros((4, 4), np.uint8), 1)], "image 1 is uint8"),
        ([(BYTES[0], [1, 1]), (BYTES[1], [0, 1])], "multi-label"),
    ):
        with pytest.raises(ValueError, match=said):
            from_dataset(given, pairs(TEST, Y_TEST), name="mine")
    for given in (loader, loader.dataset):
        with pytest.raises(ValueError, match="from_dataset"):
            from_arrays("mine", given, Y)


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read():
    class Vast(Dataset):
        def __len__(self):
            return 10**9

        def __getitem__(self, i):
            assert i == 0, "read on"
            return Image.new("RGB", (224, 224)), 0

    with pytest.raises(ValueError, match="1000000000 images .* need 150528 GB"):
        from_dataset(Vast())


def test_a_conversion_can_be_kept(tmp_path):
    path = tmp_path / "new" / "kept.npz"
    test = pairs(TEST, Y_TEST)
    with pytest.raises(ValueError, match="kept: expected a path that ends in .npz"):
        from_dataset(None, keep="kept")  # said before anything is read
    images = from_dataset([(x, "abc"[y]) for x, y in pairs()], [(x, "abc"[y]) for x, y in test], keep=path)
    again = load(path)
    assert checksum(again) == checksum(images) and again.class_names == ("a", "b", "c") and again.name == "kept"


@pytest.mark.parametrize(
    "options",
    [
        dict(scale=lambda x: x / 50 - 2, pixel_range="as_is"),
        dict(scale=lambda x: x // 16, pixel_range=(0, 255)),
        dict(x=BYTES[:, None, :3, :4], x_test=TEST[:, None, :3, :4], channels="first"),
        dict(validation=(TEST, Y_TEST), class_names=["x", "y", "z", "never"]),
        dict(split="last"),
    ],
)
def test_what_is_saved_comes_back(tmp_path, options):
    images = made(**options)
    save_npz(images, tmp_path / "mine.npz")
    again = load_npz(tmp_path / "mine.npz")
    assert checksum(again) == checksum(images)
    for key in ("class_names", "validation", "split", "name", "shape"):
        assert getattr(again, key) == getattr(images, key), key


# Files


def test_names_of_other_projects(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, train_images=BYTES, train_labels=Y[:, None], val_images=TEST, val_labels=Y_TEST[:, None], test_images=TEST, test_labels=Y_TEST[:, None])  # fmt: skip
    images = load(path)
    assert (images.validation, len(images.y_train)) == (6, 18) and np.array_equal(pixels(images)[:12], BYTES)
    np.savez(path, X_train=BYTES, Y_train=Y, X_test=TEST, Y_test=Y_TEST)
    assert np.array_equal(pixels(load(path)), BYTES)
    np.savez(path, x=np.concatenate([BYTES, BYTES]), y=np.concatenate([Y, Y]))
    with pytest.warns(UserWarning, match="no test images were given"):
        assert len(load(path).y_train) == 20
    np.savez(path, train_images=BYTES, train_labels=Y)
    with pytest.raises(ValueError, match="lacks x_test, y_test; it holds train_images, train_labels"):
        load(path)


def test_labels_of_text_in_a_file(tmp_path):
    words = np.array(["cat", "dog", "owl"])
    np.savez(tmp_path / "mine.npz", x_train=BYTES, y_train=words[Y], x_test=TEST, y_test=words[Y_TEST])
    assert load(tmp_path / "mine.npz").class_names == ("cat", "dog", "owl")
    np.savez(tmp_path / "mine.npz", x_train=BYTES, y_train=words[Y].astype(object), x_test=TEST, y_test=words[Y_TEST])
    with pytest.raises(ValueError, match=r"y_train.npy holds Python objects.*labels of text as array.astype\(str\)"):
        load(tmp_path / "mine.npz")


def test_a_file_can_say_how_it_is_meant(tmp_path):
    path, dark = tmp_path / "mine.npz", dict(x_train=BYTES // 16, x_test=TEST // 16, y_train=Y, y_test=Y_TEST)
    np.savez(path, **dark)
    with pytest.raises(ValueError, match=r"mine.npz: x_train reaches from 0 to 15, .*pixel_range=\(0, 15\)"):
        load(path)
    assert pixels(load(path, pixel_range=(0, 15))).max() == 255
    np.savez(path, **dark, pixel_range=(0, 15))
    assert pixels(load(path)).max() == 255 and pixels(load(path, pixel_range=(0, 255))).max() == 15
    with pytest.raises(ValueError, match="'digits' is a data set of the book"):
        load("digits", pixel_range=(0, 1))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_pairs_of_files(tmp_path):
    np.savez(tmp_path / "x.npz", BYTES)
    np.savez_compressed(tmp_path / "y.npz", Y)
    np.save(tmp_path / "x.npy", TEST)
    (tmp_path / "x-idx3-ubyte").write_bytes(idx(BYTES))
    (tmp_path / "y-idx1-ubyte.gz").write_bytes(gzip.compress(idx(Y_TEST.astype(np.uint8))))
    for x in ("x.npz", "x-idx3-ubyte"):
        paths = [tmp_path / name for name in (x, "y.npz", "x.npy", "y-idx1-ubyte.gz")]
        images = from_arrays("mine", *paths[:2], str(paths[2]), paths[3])
        assert np.array_equal(pixels(images), BYTES) and images.y_test.tolist() == Y_TEST.tolist()
    np.savez(tmp_path / "two.npz", a=Y, b=Y)
    with pytest.raises(ValueError, match="two.npz: holds a, b; expected one array"):
        from_arrays("mine", BYTES, tmp_path / "two.npz")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?"])
def test_matlab_files_are_read_as_scipy_writes_them(tmp_path, packed, kind):
    x = (rng.random((4, 5, 3, 12)) * 100).astype(kind)
    other = dict(cell=np.array([{}], object), z=1j * np.ones(3), s="text", struct={"a": 1}, a_longer_name=x[0, 0])
    savemat(tmp_path / "a.mat", {"X": x} | other, do_compression=packed)
    found = read_arrays(tmp_path / "a.mat")
    assert list(found) == ["X", "a_longer_name"]
    assert np.array_equal(found["X"], x) and np.array_equal(found["a_longer_name"], x[0, 0])


def test_matlab_files_with_samples_last_and_labels_from_1(tmp_path):
    "The layout of SVHN: X [32, 32, 3, N], y [N, 1] from 1 to 10."
    x = rng.integers(0, 256, (8, 8, 3, 20), dtype=np.uint8)
    y = np.arange(20)[:, None] % 10 + 1
    savemat(tmp_path / "train.mat", dict(X=x, y=y), do_compression=True)
    part = read_arrays(tmp_path / "train.mat")
    with pytest.warns(UserWarning, match="the labels 1, 2, 3, …, 10 count as the classes 0…9"):
        images = from_arrays("svhn", part["X"], part["y"], part["X"], part["y"])
    assert np.array_equal(images.x_train, x.transpose(3, 2, 0, 1)) and images.class_names == tuple(range(1, 11))
    savemat(tmp_path / "whole.mat", dict(x_train=BYTES, y_train=Y, x_test=TEST, y_test=Y_TEST))
    assert np.array_equal(pixels(load(tmp_path / "whole.mat")), BYTES)


def test_files_of_pickles_and_folders_are_told_apart(tmp_path):
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a file of torch.save is a pickle, which is never unpickled here"):
        load(tmp_path / "a.pt")
    with pytest.raises(IsADirectoryError, match="a folder, not a file"):
        load(tmp_path)


# What is given instead of images or a strategy


def test_what_is_given_instead_of_images_or_a_strategy(digits):
    network, data = Network([64, 10]), TensorDataset(digits.x_train, digits.y_train)
    for given, said in (
        (DataLoader(data), r"images is a DataLoader; give its data set to .*from_dataset\(loader.dataset\)"),
        (data, r"images is a TensorDataset; .*from_dataset"),
        ("mnist", "images is the text 'mnist'; expected Images, as load"),
        ((digits.x_train, digits.y_train), "images is a tuple; expected Images"),
        (digits.x_train, "images is a Tensor; expected Images"),
    ):
        for call in (
            lambda given: train(network, given, LABELS(10), **CPU),
            lambda given: train_backprop(network, given, **CPU),
            lambda given: linear_probe(network, given),
            lambda given: per_label_goodness(network, given),
        ):
            with pytest.raises(ValueError, match=said):
                call(given)
    for strategy, said in (
        ("label_embedding", r"is a name; pass STRATEGIES\['label_embedding'\]\(num_classes\)"),
        ("label_embeding", "did you mean 'label_embedding'"),
        (LABELS, "strategy=LabelEmbeddingStrategy is a class; make one of it"),
        (7, "strategy=7: expected a Strategy"),
    ):
        with pytest.raises(ValueError, match=said):
            train(network, digits, strategy, **CPU)
        with pytest.raises(ValueError, match=said):
            train_backprop(network, digits, strategy=strategy, **CPU)
    with pytest.raises(ValueError, match="expected a Network"):
        train(torch.nn.Linear(64, 10), digits, LABELS(10), **CPU)


class Several(LabelsOnPixels):
    "Gives two negatives an image, one after the other."

    name = "several"

    def generate(self, x, y):
        return torch.cat([self.create_positive(x, (y + k) % self.num_classes) for k in (1, 2)])


class Smaller(PlainPositives):
    name = "smaller"

    def generate(self, x, y):
        return x[..., :4] / 255


@pytest.mark.parametrize("schedule", ["together", "greedy"])
def test_several_negatives_an_image_are_refused(digits, schedule):
    network = Network([64, 20, 20], seed=0)
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(
        ValueError, match="100 \\+ 200 rows; generate gives one|gave 2874 for 1437|gave \\d+ for \\d+ images"
    ):
        train(network, digits, Several(10), epochs=1, schedule=schedule, **CPU)
    assert all(torch.equal(p, w) for p, w in zip(network.parameters(), before))
    with pytest.raises(ValueError, match=r"positives are \[1, 8, 8\], negatives \[1, 8, 4\]"):
        train(network, digits, Smaller(10), epochs=1, **CPU)


def test_images_made_by_hand_still_are_six_fields():
    images = Images("a", *(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6) % 2) * 2, 2)
    assert (images.class_names, images.split, images.validation, images.origin) == (None, None, 0, None)

"""Pretext tasks: against torch, numpy and hand-made pictures; what the draw may know, what is kept."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from ff_research.data import Images, centred, hold_out, load, validation_size
from ff_research.pretext import PRETEXTS, pretext

each_task = pytest.mark.parametrize("task", PRETEXTS)


def pictures(samples, channels, height, width, seed=0, device="cpu"):
    "Random pictures, no two pixels of one channel alike where there are at most 256."
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack(
        [
            torch.randperm(256, generator=generator)[: height * width].view(height, width)
            if height * width <= 256
            else torch.randint(0, 256, (height, width), generator=generator)
            for _ in range(2 * samples * channels)
        ]
    ).to(torch.uint8)
    x, y = x.view(2, samples, channels, height, width).to(device), torch.arange(samples, device=device) % 3
    return Images("pictures", x[0], y, x[1], y, 3)


def by_numpy(image, task, k):
    "What class k of a task makes of an image `[channels, height, width]`."
    if task == "rotation":
        return np.rot90(image, k, axes=(1, 2))
    if task == "flip":
        return image[:, :, ::-1] if k else image
    if task == "flips":
        return (image, image[:, :, ::-1], image[:, ::-1], image[:, ::-1, ::-1])[k]
    tiles = [tile for half in np.split(image, 2, axis=1) for tile in np.split(half, 2, axis=2)]
    return np.block([[tiles[i] for i in list(itertools.permutations(range(4)))[k][j : j + 2]] for j in (0, 2)])


@each_task
@pytest.mark.parametrize("channels, size", [(1, (8, 8)), (3, (6, 6)), (2, (32, 32))])
def test_pictures_are_those_of_numpy(task, channels, size):
    images = pictures(60, channels, *size)
    made = pretext(images, task, seed=5)
    assert set(made.y_train.tolist()) == set(range(PRETEXTS[task]))
    for part in ("train", "test"):
        x, old, y = (getattr(*pair) for pair in ((made, f"x_{part}"), (images, f"x_{part}"), (made, f"y_{part}")))
        assert x.dtype == torch.uint8 and x.is_contiguous() and x.shape == old.shape and y.dtype == torch.int64
        assert all(np.array_equal(new, by_numpy(image.numpy(), task, k)) for new, image, k in zip(x, old, y.tolist()))


def test_wide_pictures_can_be_mirrored_and_cut_up():
    images = pictures(50, 3, 4, 10)
    for task in ("flip", "flips", "jigsaw"):
        made = pretext(images, task)
        assert all(
            np.array_equal(new, by_numpy(image.numpy(), task, k))
            for new, image, k in zip(made.x_test, images.x_test, made.y_test.tolist())
        )


def arrangements(task, height, width):
    "From where each class takes its pixels, `[classes, pixels]`: read off images whose pixels say where they stand."
    x = torch.arange(float(height * width)).view(1, 1, height, width).expand(48, -1, -1, -1)
    made = pretext(Images("places", x, torch.zeros(48).long(), x, torch.zeros(48).long(), 2), task)
    return torch.stack([made.x_train[made.y_train == k][0].flatten().long() for k in range(PRETEXTS[task])])


@each_task
def test_classes_are_a_group_of_permutations(task):
    table = arrangements(task, 4, 4)
    assert table.shape == (PRETEXTS[task], 16) and torch.equal(table[0], torch.arange(16))
    assert torch.equal(table.sort(1).values, torch.arange(16).expand_as(table))
    rows = {tuple(row) for row in table.tolist()}
    assert len(rows) == PRETEXTS[task] and {tuple(a[b].tolist()) for a in table for b in table} == rows


def test_four_quarter_turns_and_two_flips_are_none():
    images = pictures(40, 3, 8, 8)
    for task, k, times in (
        ("rotation", 1, 4),
        ("rotation", 3, 4),
        ("rotation", 2, 2),
        ("flip", 1, 2),
        ("flips", 2, 2),
        ("flips", 3, 2),
    ):
        order, places = arrangements(task, 8, 8)[k], torch.arange(64)
        x = images.x_train.flatten(2)
        for turn in range(times):
            assert torch.equal(x, images.x_train.flatten(2)) == (turn == 0)
            x, places = x[:, :, order], places[order]
        assert torch.equal(x, images.x_train.flatten(2)) and torch.equal(places, torch.arange(64))


@each_task
def test_everything_can_be_undone_and_class_0_is_the_picture(task):
    images = pictures(100, 3, 8, 8)
    made = pretext(images, task)
    back = made.x_train.flatten(2).gather(
        2, arrangements(task, 8, 8).argsort(1)[made.y_train][:, None].expand(-1, 3, -1)
    )
    assert torch.equal(back.view_as(images.x_train), images.x_train)
    same = (made.x_train == images.x_train).flatten(1).all(1)
    assert (
        torch.equal(same, made.y_train == 0) and same.any()
    )  # no two pixels are alike, so no other class can look like it


@each_task
def test_labels_are_dealt_evenly_and_know_nothing(task):
    x = torch.zeros(4801, 1, 2, 2, dtype=torch.uint8)
    true = torch.arange(4801) % 10
    images, classes, p = Images("blank", x, true, x[:1000], true[:1000], 10), PRETEXTS[task], []
    for seed in range(40):
        made = pretext(images, task, seed)
        assert all(
            np.ptp(torch.bincount(y, minlength=classes).numpy()) == (1 if len(y) % classes else 0)
            for y in (made.y_train, made.y_test)
        )
        table = np.zeros((10, classes))
        np.add.at(table, (true.numpy(), made.y_train.numpy()), 1)
        place = np.histogram2d(np.arange(4801), made.y_train.numpy(), bins=(8, classes))[
            0
        ]  # nor does the place in the set tell anything
        p += [
            stats.chi2_contingency(table).pvalue,
            stats.chi2_contingency(place).pvalue,
            stats.chisquare(torch.bincount(made.y_train[-1000:], minlength=classes)).pvalue,
        ]
    assert (
        min(p) > 1e-4
        and stats.kstest(p[::3], "uniform").pvalue > 1e-3
        and stats.kstest(p[1::3], "uniform").pvalue > 1e-3
    )


@each_task
def test_a_seed_is_a_draw(task):
    images, state = load("digits"), torch.get_rng_state()
    before = [images.x_train.clone(), images.y_train.clone(), images.x_test.clone()]
    a, b, c = pretext(images, task), pretext(images, task), pretext(images, task, seed=1)
    for key in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(a, key), getattr(b, key)) and not torch.equal(getattr(a, key), getattr(c, key))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, old) for x, old in zip((images.x_train, images.y_train, images.x_test), before))
    assert not torch.equal(a.y_train[:360], a.y_test), "test images have a draw of their own"
    assert torch.equal(
        pretext(replace(images, y_train=images.y_train.flip(0), num_classes=77), task).y_train, a.y_train
    ), "labels are not looked at"


def test_name_validation_part_and_what_comes_after():
    for name, held in (("mnist", 10_000), ("cifar10", 5_000), ("mine", 1437 // 6)):
        made = pretext(replace(load("digits"), name=name), "rotation")
        assert made.name == f"{name}, rotation" and validation_size(made) == validation_size(centred(made)) == held
    digits = load("digits")
    assert (
        pretext(digits, "jigsaw", 7).name == "digits, jigsaw 7"
        and centred(pretext(digits, "flip")).name == "digits, flip, centred to 10"
    )
    held = hold_out(pretext(digits, "flip"), 300)
    assert len(held.y_train) == 1137 and held.num_classes == 2
    floats = replace(digits, x_train=digits.x_train / 255, x_test=digits.x_test / 255)
    assert torch.equal(pretext(floats, "flips").x_train, pretext(digits, "flips").x_train / 255)


@pytest.mark.parametrize(
    "size, task, said",
    [
        ((8, 8), "rotaton", "unknown pretext task 'rotaton'; did you mean 'rotation'"),
        ((8, 8), "Jigsaw", "did you mean 'jigsaw'"),
        ((8, 8), None, "unknown pretext task None"),
        ((8, 8), 3, "Known: rotation, flip, flips, jigsaw"),
        ((8, 6), "rotation", "8 x 6 pixels.*square"),
        ((7, 8), "jigsaw", "7 x 8 pixels.*even"),
        ((8, 7), "jigsaw", "even"),
        ((8, 1), "flip", "look the same"),
        ((1, 8), "flips", "look the same"),
        ((1, 1), "rotation", "look the same"),
    ],
)
def test_tasks_that_pictures_cannot_have(size, task, said):
    with pytest.raises(ValueError, match=said):
        pretext(pictures(30, 1, *size), task)


def test_fewer_images_than_classes():
    with pytest.raises(ValueError, match="'pictures' has 23 training images, fewer than the 24 classes of jigsaw"):
        pretext(pictures(23, 1, 4, 4), "jigsaw")
    images = pictures(24, 1, 4, 4)
    few = pretext(replace(images, x_test=images.x_test[:5], y_test=images.y_test[:5]), "jigsaw")
    assert sorted(few.y_train.tolist()) == list(range(24)) and len(few.y_test) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_draw_is_the_same_on_a_gpu():
    a, b = (pretext(pictures(60, 3, 8, 8, device=device), "jigsaw") for device in ("cpu", "cuda"))
    assert (
        b.x_train.is_cuda
        and b.y_train.is_cuda
        and torch.equal(a.y_train, b.y_train.cpu())
        and torch.equal(a.x_test, b.x_test.cpu())
    )


@pytest.mark.data("mnist")
@each_task
def test_mnist_can_have_every_task(task):
    images = load("mnist")
    made = pretext(images, task)
    assert (
        made.num_classes == PRETEXTS[task]
        and validation_size(made) == 10_000
        and np.ptp(torch.bincount(made.y_train).numpy()) <= 1
    )
    assert torch.equal(made.x_train.flatten(1).sum(1), images.x_train.flatten(1).sum(1))

"Models: whatever was trained comes back in another process and predicts the same to the bit; inputs that fit or are refused."

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import nn

import ff_research as ff
from ff_research.data import centred, from_arrays
from ff_research.layers import FFConv, FFLinear, Layer, Merge
from ff_research.modelfiles import digest, load_network, save
from ff_research.models import export_onnx, layer_images
from ff_research.network import Network
from ff_research.objectives import ChannelCompetition, GoodnessObjective, hinton
from ff_research.predictions import fit_readout, inputs_of, predict, reading_of, scores
from ff_research.pretext import pretext
from ff_research.readout import fit_probe, head_error, per_label_goodness, scores_errors
from ff_research.strategies import STRATEGIES, LabelInFrontStrategy, PlainPositives

ROOT = Path(__file__).resolve().parents[1]
WHERE = dict(precision="fp32", device="cpu")
QUIET = WHERE | dict(progress=False, batch_size=100, seed=0)
OWN = """
import torch
from torch import nn
from torch.nn import functional as F
from ff_research.layers import Layer
from ff_research.objectives import Objective
from ff_research.strategies import Strategy


class Recurrent(Layer):
    reads = (-1, 0, 1)

    def __init__(self, below, units, above):
        super().__init__()
        self.below, self.units, self.above = below, units, above
        self.up, self.down = nn.Linear(below, units), nn.Linear(above, units, bias=False)

    def forward(self, x, own, above):
        z = self.up(x.flatten(1))
        return (z if above is None else z + self.down(above)).relu()


class Counting(Layer):
    "A constructor that computes with numbers, and a buffer that the file does not hold."

    def __init__(self, inputs, units):
        super().__init__()
        self.inputs, self.units = inputs, units
        self.linear = nn.Linear(inputs, units)
        self.register_buffer("twice", 2 * torch.ones(units), persistent=False)
        self.scale = float(self.twice.sum() / units)

    def forward(self, x):
        return self.twice * self.linear(x.flatten(1)).relu()


class TopTen(Objective):
    def __init__(self, scale=4.0):
        super().__init__()
        self.scale = scale

    def goodness(self, h, s):
        return h.flatten(1).topk(10, dim=1).values.mean(1, keepdim=True)

    def loss(self, g, s):
        positive, negative = s.split(g)
        return F.softplus(self.scale * (negative - positive)).mean()


class Waves(Strategy):
    name, contrasts_labels = "waves", True

    def create_positive(self, x, y):
        k = torch.arange(1, self.num_classes + 1).view(-1, 1, 1)
        across, down = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy")
        return x.float() / 255 + 0.5 * torch.cos(2 * torch.pi * (k * across + (k * 3 % 7) * down) / 8)[y][:, None]

    def generate(self, x, y, network=None, generator=None):
        shift = torch.randint(1, self.num_classes, y.shape, generator=generator)
        return self.create_positive(x, (y + shift) % self.num_classes)


def largest(h):
    return h.square().amax(1)
"""
PROGRAM = """
import json, sys
import numpy as np
from pathlib import Path
import own
from ff_research.modelfiles import load_network
from ff_research.predictions import scores
folder, x = Path(sys.argv[1]), np.load(Path(sys.argv[1]) / "x.npy")
classes = [own.Recurrent, own.Counting, own.TopTen, own.Waves, own.largest]
for path in sorted(folder.glob("*.safetensors")):
    network = load_network(path, layers=classes)
    found = scores(network, x, precision="fp32", device="cpu").numpy()
    print(json.dumps([path.stem, found.tobytes().hex()]))
"""


@pytest.fixture(scope="module")
def images():
    digits = ff.load("digits")
    parts = dict(x_train=digits.x_train[:300], y_train=digits.y_train[:300])
    return replace(digits, **parts, x_test=digits.x_test[:60], y_test=digits.y_test[:60])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "The classes of a user, in a module of its own."
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    import own

    yield own
    sys.path.remove(str(folder))


def trained(network, images, strategy, **options):
    ff.train(network, images, strategy, **QUIET | dict(epochs=2, lr=3e-3) | options)
    try:
        reading_of(network)
    except ValueError:
        fit_readout(network, images, **WHERE)
    return network


def networks(images, own):
    "Whatever can be trained, by name."
    labels = STRATEGIES["label_embedding"](10)
    torch.manual_seed(0)
    for name, cls in STRATEGIES.items():
        if cls.__module__ == "ff_research.strategies":
            yield name, trained(Network([64, 30, 30]), images, cls(10), peer=0.0 if name == "mono_forward" else 0.03)
    yield "bf16", trained(Network([64, 32, 32]), images, labels, precision="bf16")
    yield "triangle", trained(Network([64, 30], triangle=True), images, STRATEGIES["self_contrastive"](10, shift=1))
    head, pairs = Network([64, 30, 30]), Network([64, 30, 30])
    ff.train_backprop(head, images, epochs=2, **QUIET)
    yield "backprop", head
    ff.train_backprop(pairs, images, epochs=2, strategy=labels, **QUIET)
    yield "pairwise", pairs
    convolutions = [FFConv(1, 10, kernel=5, pool=2, norm="batch"), FFConv(10, 20, groups=5, stride=2, norm="channel")]
    conv = Network([*convolutions, FFConv(20, 20, dropout=0.1)])
    yield "convolution", trained(conv, images, STRATEGIES["mono_forward"](10), objective=ChannelCompetition(10))
    skip = [FFConv(1, 8, pool=2), FFConv(8, 8), Merge((-1, -2), "cat"), FFLinear(256, 30, reads=(-1,))]
    yield "skip", trained(Network(skip), images, labels)
    recurrent = Network(
        [own.Recurrent(64, 20, 20), own.Recurrent(20, 20, 20), FFLinear(20, 20)],
        iterations=3, learn_at=(2, 3), read_at=(2, 3),
    )  # fmt: skip
    yield "recurrent", trained(recurrent, images, labels)
    yield "counting", trained(Network([own.Counting(64, 30), FFLinear(30, 20)]), images, labels)
    objective = [own.TopTen(2.0), GoodnessObjective(own.largest, theta=1.0, scale=2.0)]
    yield "objectives", trained(Network([64, 30, 30]), images, labels, objective=objective)
    yield "strategy", trained(Network([64, 30, 30]), images, own.Waves(10))
    block = nn.Sequential(nn.Flatten(), nn.Linear(64, 30, bias=False), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.1))
    yield "modules", trained(Network([block, nn.Sequential(nn.Linear(30, 20), nn.GELU())]), images, labels)
    yield "centred", trained(Network([64, 30, 30], inputs="plain"), centred(images), labels)
    yield "front", trained(Network([74, 30, 30]), images, LabelInFrontStrategy(10))
    probed = trained(Network([64, 30, 30]), images, labels, objective=hinton(theta=2.0))
    fit_readout(probed, images, neutral_label=True, first=1, **WHERE)
    yield "probe", probed


def test_whatever_was_trained_predicts_the_same_to_the_bit_elsewhere(tmp_path, images, own):
    expected = {}
    np.save(tmp_path / "x.npy", images.x_test.numpy())
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", message="batch normalisation saw")  # these trainings are short on purpose
        for name, network in networks(images, own):
            save(network, tmp_path / f"{name}.safetensors")
            expected[name] = scores(network, images.x_test, **WHERE).numpy().tobytes().hex()
            again = load_network(
                tmp_path / f"{name}.safetensors", [own.Recurrent, own.Counting, own.TopTen, own.Waves, own.largest]
            )
            assert repr(again) == repr(network), name
            assert {k: t.dtype for k, t in again.state_dict().items()} == {
                k: t.dtype for k, t in network.state_dict().items()
            }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, cwd=Path(own.__file__).parent,
        env={"PYTHONPATH": f"{ROOT}:{Path(own.__file__).parent}", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == 25 and found == expected


def test_predictions_agree_with_the_read_outs(images, own):
    def error(network):
        return 100 * (predict(network, images.x_test, **WHERE) != images.y_test).float().mean().item()

    for name, network in networks(images, own):
        by = reading_of(network)
        if by == "labels" and name != "centred":
            assert error(network) == pytest.approx(per_label_goodness(network, images, **WHERE)), name
        if by == "scores":
            assert error(network) == pytest.approx(scores_errors(network, images, **WHERE)["sum"]), name
        if by == "head":
            assert error(network) == pytest.approx(head_error(network, images, **WHERE)), name


def test_a_loaded_network_trains_on_as_the_one_it_was(tmp_path, images):
    networks = [trained(Network([64, 30, 30]), images, STRATEGIES["hard_mining"](10), peer=0.1)]
    save(networks[0], tmp_path / "m.safetensors")
    networks.append(load_network(tmp_path / "m.safetensors"))
    for network in networks:
        ff.train(network, images, STRATEGIES["hard_mining"](10), epochs=1, lr=3e-3, peer=0.1, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in networks)))


def test_loading_draws_no_random_number_and_keeps_the_precision(tmp_path, images):
    network = trained(Network([64, 30]), images, STRATEGIES["label_embedding"](10)).double()
    save(network, tmp_path / "m.safetensors")
    state = torch.get_rng_state()
    again = load_network(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), state) and again.dtype == torch.float64


def test_names_and_images_come_along(tmp_path, images):
    network = trained(Network([64, 30]), images, STRATEGIES["label_embedding"](10))
    network.class_names = [np.str_(c) for c in "abcdefghij"]
    save(network, tmp_path / "m.safetensors")
    again = load_network(tmp_path / "m.safetensors")
    assert again.class_names == list("abcdefghij") and again.image_shape == (1, 8, 8) and again.pixels == "uint8"
    assert again.class_names[predict(again, images.x_test[0], **WHERE)] in "abcdefghij"


def test_what_cannot_be_written_down_is_warned_of_and_comes_back_into_a_network(tmp_path, images):
    class Forgetful(Layer):
        def __init__(self, inputs, size):
            super().__init__()
            self.linear = nn.Linear(inputs, size)

        def forward(self, x):
            return self.linear(x.flatten(1)).relu()

    path = tmp_path / "m.safetensors"
    network = trained(Network([Forgetful(64, 30), FFLinear(30, 20)]), images, STRATEGIES["label_embedding"](10))
    with pytest.warns(UserWarning, match=r"Forgetful takes 'inputs'.*into=network"):
        save(network, path)
    with pytest.raises(ValueError, match="Build the network, then"):
        load_network(path, layers=[Forgetful])
    into = Network([Forgetful(64, 30), FFLinear(30, 20)])
    assert load_network(path, into=into) is into
    assert torch.equal(scores(into, images.x_test, **WHERE), scores(network, images.x_test, **WHERE))
    with pytest.raises(ValueError, match="shape"):
        load_network(path, into=Network([Forgetful(64, 31), FFLinear(31, 20)]))


def test_what_comes_back_as_something_else_is_not_written_down(tmp_path, images):
    network = trained(Network([64, 30]), images, STRATEGIES["label_embedding"](10))
    network.layers[0].full_gradient = True  # the constructor knows it
    save(network, tmp_path / "m.safetensors")
    assert load_network(tmp_path / "m.safetensors").layers[0].full_gradient
    network.layers[0].flat = False  # and this it does not
    with pytest.warns(UserWarning, match="flat of FFLinear"):
        save(network, tmp_path / "m.safetensors")
    other = trained(Network([64, 30]), images, STRATEGIES["label_embedding"](10))
    other.objectives[0] = hinton(goodness=lambda h: h.square().sum(1))
    with pytest.warns(UserWarning, match="no name to find it by"):
        save(other, tmp_path / "m.safetensors")


def test_save_replaces_a_file_whole_or_not_at_all(tmp_path, images):
    path = tmp_path / "m.safetensors"
    network = trained(Network([64, 30]), images, STRATEGIES["label_embedding"](10))
    save(network, path)
    before = path.read_bytes()
    with torch.no_grad():
        network.layers[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.0.weight holds NaN"):
        save(network, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(OSError, match="cannot write the model"):
        save(load_network(path), tmp_path / "m.safetensors" / "below")


# What is refused


def resealed(path, change):
    "A model file whose header went through `change`, with the digest that belongs to it."
    with safe_open(path, framework="pt") as f:
        held, tensors = json.loads(f.metadata()["ff_research"]), {name: f.get_tensor(name) for name in f.keys()}
    text = change(held)
    text = text if isinstance(text, str) else json.dumps(held)
    path.write_bytes(serialize(tensors, {"ff_research": text, "digest": digest(text, tensors)}))


@pytest.fixture
def model(tmp_path, images):
    path = tmp_path / "m.safetensors"
    save(trained(Network([FFConv(1, 4, pool=2), FFLinear(64, 20)]), images, STRATEGIES["label_embedding"](10)), path)
    return path


def told(held):
    return held["parts"]["layers"]["list"][0]["module"]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda held: told(held).update({"class": "Popen"}), "classes of your own: Popen"),
        (lambda held: held.update(own=["Mine", "Yours"]), "classes of your own: Mine, Yours"),
        (lambda held: told(held)["arguments"].update(channels=10**9), "has the shape"),
        (lambda held: told(held)["arguments"].update(kernel=10**6), "has the shape"),
        (lambda held: told(held)["arguments"].update(groups=0), "cannot be read as a network"),
        (lambda held: told(held)["arguments"].update(unheard=1), "unexpected keyword"),
        (lambda held: held["parts"]["layers"]["list"].append({"module": {}}), "cannot be read as a network"),
        (lambda held: held["parts"].pop("objectives"), "not those of a network"),
        (lambda held: held["parts"].update(strategy=held["parts"]["layers"]["list"][0]), "its strategy is none"),
        (lambda held: held["options"].update(iterations=10**9), "iterations"),
        (lambda held: held["images"].update(shape=[-1]), "images of shape"),
        (lambda held: json.dumps(held)[:-1] + ', "parts": {}}', "stands there twice"),
        (lambda held: json.dumps(held).replace('"dropout": 0.0', '"dropout": NaN'), "NaN is no number"),
        (lambda held: "[" * 100_000, "damaged"),
        (lambda held: " " * 2_000_000, "longer than any architecture"),
    ],
)
def test_headers_that_no_model_has(model, change, said):
    resealed(model, change)
    with pytest.raises(ValueError, match=said) as error:
        load_network(model)
    assert str(error.value).isprintable() and "m.safetensors" in str(error.value)


def test_a_network_that_would_blow_images_up_is_refused(tmp_path, images):
    block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.ReLU())
    path = tmp_path / "m.safetensors"
    save(trained(Network([block]), images, STRATEGIES["label_embedding"](10)), path)
    load_network(path)
    resealed(path, lambda held: json.dumps(held).replace('"scale_factor": 2.0', '"scale_factor": 100000.0'))
    with pytest.raises(ValueError, match="Upsample makes"):
        load_network(path)


def test_classes_that_are_no_modules_are_never_called(model):
    "A caller may pass all that a file of his defines; a model file cannot choose what of it is run."
    resealed(model, lambda held: told(held).update({"class": "Path", "arguments": {}}))
    with pytest.raises(ValueError, match="classes of your own: Path"):
        load_network(model, layers=[Path])


def test_files_that_are_no_models(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_network(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        load_network(tmp_path)
    ff.train(
        Network([64, 30]), images, STRATEGIES["label_embedding"](10), epochs=1, checkpoint=tmp_path / "run", **QUIET
    )
    with pytest.raises(ValueError, match="checkpoint of a run"):
        load_network(tmp_path / "run")
    with pytest.raises(TypeError, match="expected classes"):
        load_network(tmp_path / "run", layers=["MyLayer"])


def test_loading_imports_nothing_that_the_file_names(model):
    code = (
        "import sys; from ff_research.modelfiles import load_network; load_network(sys.argv[1])\n"
        "before = set(sys.modules)\n"
        "try: load_network(sys.argv[2])\n"
        "except ValueError as error: print(error, set(sys.modules) - before)"
    )
    named = model.with_name("named")
    named.write_bytes(model.read_bytes())
    resealed(named, lambda held: told(held).update({"class": "antigravity"}))
    done = subprocess.run([sys.executable, "-c", code, model, named], capture_output=True, text=True, cwd=ROOT)
    assert "classes of your own: antigravity" in done.stdout and done.stdout.endswith("set()\n"), done.stdout


# Inputs


@pytest.fixture(scope="module")
def network(images):
    return trained(Network([64, 30, 30]), images, STRATEGIES["label_embedding"](10))


FORMS = {
    "bytes": lambda x: x,
    "numpy": lambda x: x.numpy(),
    "floats to 1": lambda x: x.float() / 255,
    "halves to 1": lambda x: (x.double() / 255).numpy().astype(np.float16),
    "floats to 255": lambda x: x.double(),
    "integers": lambda x: x.numpy().astype(np.int32),
    "sixteen bits": lambda x: x.numpy().astype(np.uint16),
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "no channel": lambda x: x[:, 0],
    "channel last": lambda x: x.movedim(1, -1).numpy(),
    "flat": lambda x: x.flatten(1),
    "read-only": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "reversed": lambda x: x.numpy()[::-1][::-1],
    "tensors": lambda x: list(x),
    "arrays": lambda x: [one.numpy() for one in x],
    "PIL": lambda x: [Image.fromarray(one[0].numpy()) for one in x],
    "colour PIL": lambda x: [Image.fromarray(one[0].numpy()).convert("RGB") for one in x],
    "opaque PIL": lambda x: [Image.fromarray(one[0].numpy()).convert("RGBA") for one in x],
    "numbers": lambda x: x.tolist(),
    "with a gradient": lambda x: (x.float() / 255).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_converted_as_training_did(network, images, form):
    x = images.x_test
    assert torch.equal(inputs_of(network, FORMS[form](x)), x)
    assert torch.equal(predict(network, FORMS[form](x)[3], **WHERE), predict(network, x[3:4], **WHERE))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda x: x / 254, "pixel_range"),
        (lambda x: (x > 128).int(), "pixel_range"),
        (lambda x: x.float() / 255 * 16, "pixel_range"),
        (lambda x: x.float() / 255 - 0.5, "range from -0.5"),
        (lambda x: x.int() * 256, "range from 0 to 65280"),
        (lambda x: x.float() / 255 + torch.tensor([0.0, torch.nan]).repeat(30).view(-1, 1, 1, 1), "image 1 holds NaN"),
        (lambda x: x[:, :, :7], r"shape \[60, 1, 7, 8\]; this network takes"),
        (lambda x: x.repeat(1, 3, 1, 1), "this network takes"),
        (lambda x: np.array(["a"]), "no array of pixels"),
        (lambda x: "digits.png", "no array of pixels"),
        (lambda x: [[1], [1, 2]], "no array of pixels"),
        (lambda x: [x[0], x[1].float()], "different shapes or types"),
        (lambda x: Image.new("L", (28, 30)), r"28 x 30 pixels.*resize\(\(8, 8\)\)"),
        (lambda x: Image.new("F", (8, 8)), "mode F"),
        (lambda x: Image.new("RGBA", (8, 8), (9, 9, 9, 254)), "paste it on a background"),
    ],
)
def test_inputs_that_leave_a_doubt_are_refused(network, images, wrong, said):
    with pytest.raises(ValueError, match=said):
        predict(network, wrong(images.x_test))
    with pytest.raises(ValueError, match="x_test"):
        predict(network, images)


def test_dark_bytes_are_warned_of(network, images):
    "Digits from 0 to 16 as bytes are nearly black to a network that learned from 0 to 255."
    raw = (images.x_test.float() / 255 * 16).round().to(torch.uint8)
    with pytest.warns(UserWarning, match="brightest pixel is 16 of 255.*pixel_range"):
        predict(network, raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(inputs_of(network, raw, pixel_range=(0, 16)), images.x_test)
        inputs_of(network, images.x_test)
        inputs_of(network, torch.zeros_like(raw))


def test_pixel_range_says_what_black_and_white_are(network, images):
    x = images.x_test
    assert torch.equal(inputs_of(network, x / 254, pixel_range=(0, 255 / 254)), x)
    assert torch.equal(inputs_of(network, x.int() * 256 - 5, pixel_range=(-5, 65275)), x)
    for wrong in ((0, 100), (5, 5), (0, float("nan"))):
        with pytest.raises(ValueError, match="outside pixel_range"):
            inputs_of(network, x.float(), pixel_range=wrong)


def test_images_with_three_channels(images):
    colour = replace(images, x_train=images.x_train.repeat(1, 3, 1, 1), x_test=images.x_test.repeat(1, 3, 1, 1))
    network = trained(Network([FFConv(3, 4), FFConv(4, 4)]), colour, STRATEGIES["mono_forward"](10))
    x = colour.x_test
    assert torch.equal(inputs_of(network, x.movedim(1, -1)), x) and torch.equal(inputs_of(network, x[0]), x[:1])
    assert torch.equal(inputs_of(network, Image.fromarray(x[0].movedim(0, -1).numpy())), x[:1])


def test_centred_images_are_centred_again(images):
    middle = centred(images)
    network = trained(Network([64, 30, 30]), middle, STRATEGIES["label_embedding"](10))
    plain = inputs_of(network, images.x_test)
    assert torch.allclose(plain, middle.x_test, atol=1e-6)
    assert torch.equal(inputs_of(network, middle.x_test), middle.x_test)
    assert torch.equal(inputs_of(network, images.x_test.float() / 255), plain)
    turned = trained(Network([64, 30, 30]), pretext(middle, "rotation"), STRATEGIES["label_embedding"](4))
    assert turned.centring is None  # turned images have another mean


def test_floats_that_are_no_pixels_pass_within_their_range(images):
    spread = replace(images, x_train=5 * torch.randn(300, 1, 8, 8), x_test=5 * torch.randn(60, 1, 8, 8))
    network = trained(Network([64, 30]), spread, STRATEGIES["label_embedding"](10))
    assert torch.equal(inputs_of(network, spread.x_test), spread.x_test)
    with pytest.raises(ValueError, match="the same scale"):
        predict(network, 1000 * spread.x_test)


def test_nothing_in_gives_nothing_out(network, images):
    assert predict(network, images.x_test[:0], **WHERE).shape == (0,)
    assert scores(network, images.x_test[:0], **WHERE).shape == (0, 10)


# Who answers


def test_a_read_out_that_training_made_stale_is_not_asked(images):
    network = Network([64, 30, 30])
    mono, mixing = STRATEGIES["mono_forward"](10), STRATEGIES["image_mixing"](10)
    trained(network, images, mono)
    assert reading_of(network) == "scores"
    ff.train_backprop(network, images, epochs=1, **QUIET)
    assert reading_of(network) == "head"
    text = repr(network)
    fit_readout(network, images, **WHERE)
    assert reading_of(network) == "probe"
    ff.train_backprop(network, images, epochs=1, **QUIET)
    assert reading_of(network) == "head" and repr(network) == text
    ff.train(network, images, mixing, epochs=1, **QUIET)
    with pytest.raises(ValueError, match="image_mixing.*fit_readout"):
        predict(network, images.x_test)
    with pytest.raises(ValueError, match="was not trained"):
        predict(Network([64, 30]), images.x_test)


def test_by_chooses_who_is_asked(network, images):
    network = trained(Network([64, 30, 30]), images, STRATEGIES["label_embedding"](10))
    labels = scores(network, images.x_test, **WHERE)
    fit_readout(network, images, **WHERE)
    assert torch.equal(scores(network, images.x_test, by="labels", **WHERE), labels)
    assert not torch.equal(scores(network, images.x_test, **WHERE), labels)
    for by, said in (("head", "by='head'"), ("scores", "no layer of the network has class scores"), ("x", "unknown")):
        with pytest.raises(ValueError, match=said):
            scores(network, images.x_test, by=by)


def test_a_probe_of_class_sorted_images_is_as_good(digits):
    network = trained(Network([64, 60, 60]), digits, STRATEGIES["image_mixing"](10))
    order = digits.y_train.argsort()
    fit_readout(network, replace(digits, x_train=digits.x_train[order], y_train=digits.y_train[order]), **WHERE)
    assert (predict(network, digits.x_test, **WHERE) != digits.y_test).float().mean() < 0.08


def test_memory_is_flat_in_classes(images, monkeypatch):
    "As many rows go up at once for 2 classes as for 60."
    seen = []

    def watch(module, given):
        seen.append(len(given[0]))

    for classes in (2, 60):
        few = replace(images, y_train=images.y_train % classes, num_classes=classes)
        network = trained(Network([64, 30, 30]), few, STRATEGIES["label_embedding"](classes), epochs=0)
        hook = network.layers[1].register_forward_pre_hook(watch)
        predict(network, images.x_test.repeat(40, 1, 1, 1), **WHERE)
        hook.remove()
        assert 500 < max(seen) <= 1000, classes
        seen.clear()


def test_loss_of_one_image_is_the_loss_of_many(network, images):
    each = torch.cat([predict(network, x, **WHERE) for x in images.x_test])
    assert torch.equal(each, predict(network, images.x_test, **WHERE))


# Looking, exporting


def test_layer_images_scale_each_filter_and_leave_labels_out(images):
    network = trained(Network([64, 30, 30]), images, STRATEGIES["label_embedding"](10))
    with torch.no_grad():
        network.layers[0].weight[0, 10:] = torch.linspace(-3, 3, 54)
    grid, labels = layer_images(network, columns=7, most=20)
    assert grid.shape == (3 * 9, 7 * 9) and labels.shape == (20, 10)
    first = grid[:8, :8].flatten()
    assert torch.allclose(first[10:], torch.linspace(0, 1, 54), atol=1e-6) and (first[:10] == 0.5).all()
    assert (grid[:, 8] == 1).all() and 0 <= grid.min() and grid.max() == 1
    plain, none = layer_images(trained(Network([64, 30]), images, STRATEGIES["image_mixing"](10)))
    assert none is None and (plain[:8, :8] != 0.5).all()
    grid, _ = layer_images(Network([FFConv(3, 5)]), columns=2)
    assert grid.shape == (12, 8, 3)
    front, labels = layer_images(trained(Network([74, 30]), images, LabelInFrontStrategy(10)))
    assert labels.shape == (30, 10) and (front[:8, :8] != 0.5).all()
    for wrong in (dict(layer=2), dict(layer=3)):
        with pytest.raises(ValueError, match="layer"):
            layer_images(network, **wrong)


def test_onnx_gives_the_same_scores(tmp_path, images, own):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")
    pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
    pixels = images.x_test.numpy().astype(np.float32) / 255
    some = ("convolution", "backprop", "probe", "centred", "strategy")
    for name, network in networks(images, own):
        if name not in some:
            continue
        if reading_of(network) == "labels":
            with pytest.raises(ValueError, match="fit_readout first"):
                export_onnx(network, tmp_path / "m.onnx")
            fit_readout(network, centred(images) if name == "centred" else images, **WHERE)
        export_onnx(network, tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        ours = scores(network, images.x_test, **WHERE).numpy()
        for count in (1, 60):
            (out,) = session.run(None, {"images": pixels[:count]})
            assert np.allclose(out, ours[:count], atol=2e-3), (name, abs(out - ours[:count]).max())


def test_plain_subclasses_of_the_packages_classes_are_ones_own(tmp_path, images):
    class Mixed(PlainPositives):
        name = "mixed"

        def generate(self, x, y):
            return self.create_positive(x, y).flip(0)

    network = trained(Network([64, 30]), images, Mixed(10))
    save(network, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="Mixed"):
        load_network(tmp_path / "m.safetensors")
    again = load_network(tmp_path / "m.safetensors", layers=[Mixed])
    assert torch.equal(scores(again, images.x_test, **WHERE), scores(network, images.x_test, **WHERE))


def test_a_given_validation_part_chooses_the_probe_and_is_never_fitted(digits):
    "Its labels are nonsense: a probe that was fitted to them would have other weights than one that never saw them."
    x, y = digits.x_train[:900].numpy(), digits.y_train[:900].numpy()
    test = digits.x_test[:50].numpy(), digits.y_test[:50].numpy()
    network = Network([64, 40])
    found = []
    for wrong in (0, 5):
        images = from_arrays("mine", x[:700], y[:700], *test, validation=(x[700:], (y[700:] + wrong) % 10))
        found.append(
            fit_readout(network, images, fit=lambda *a, **k: fit_probe(*a, **k | dict(l2=(1e-2,))), device="cpu")
        )
    assert torch.equal(found[0].weight, found[1].weight)
    alone = from_arrays("alone", x[:700], y[:700], *test)
    alone = fit_readout(network, alone, fit=lambda *a, **k: fit_probe(*a, **k | dict(l2=(1e-2,))), device="cpu")
    torch.testing.assert_close(found[0].weight, alone.weight)

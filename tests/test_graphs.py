"""Graphs: layers against torch_geometric, virtual nodes by hand, locality, learning, bad graphs, a missing extra."""

import builtins
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import ff_research.graphs as graphs
from ff_research.checkpoints import Diverged
from ff_research.graphlayers import (
    Graph,
    GraphLayer,
    as_graph,
    block_graph,
    check_graph,
    forwardgnn_masks,
    graph_network,
    load_graph,
    sparse_product,
    structure,
    with_split,
)
from ff_research.graphs import (
    GRAPH_RUNS,
    GRAPH_STRATEGIES,
    ClassNodes,
    GraphRun,
    NodeGoodness,
    SingleForward,
    keep_graph_rows,
    kept_bytes,
    logits_of,
    node_features,
    node_probe,
    node_scores,
    right_share,
    run_graph,
    train_graph,
    train_graph_backprop,
)
from ff_research.results import published
from ff_research.streams import Streams

needs_geometric = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("torch_geometric"),
    reason='torch_geometric is missing: pip install "ff_research[graph]"',
)
FAST = dict(epochs=60, lr=1e-2)


@pytest.fixture(scope="module")
def blocks():
    return block_graph(120).scaled("unit")


def made(graph, name, widths=(16, 16), kind="gcn", seed=0):
    strategy = GRAPH_STRATEGIES[name](graph.num_classes, kind)
    return graph_network(graph, widths, kind, seed, extra=strategy.extra_inputs), strategy


# Layers


@needs_geometric
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
def test_a_layer_is_that_of_torch_geometric(blocks, kind, sparse):
    "Activity and gradients; edges as torch_geometric reads them."
    x = blocks.x.to_sparse_csr() if sparse else blocks.x
    edges = torch.cat([blocks.edges, torch.tensor([[0, 1], [5, 5]])], 1).unique(dim=1)  # two that lead one way only
    layer = GraphLayer(32, 8, kind)
    mine, theirs = layer(x, structure(edges, len(blocks), kind)), layer.conv(blocks.x, edges).relu()
    torch.testing.assert_close(mine, theirs)
    weights = [p for p in layer.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(h.square().sum(), weights) for h in (mine, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_geometric
def test_gcn_is_its_formula():
    "Two nodes and an edge: every entry of the normalised adjacency is 1/2."
    layer = GraphLayer(3, 4)
    x = torch.rand(2, 3)
    edges = structure(torch.tensor([[0, 1], [1, 0]]), 2, "gcn")
    torch.testing.assert_close(edges.to_dense(), torch.full((2, 2), 0.5))
    torch.testing.assert_close(layer(x, edges), (x.mean(0, keepdim=True) @ layer.conv.lin.weight.T).relu().expand(2, 4))


def test_sparse_product_has_autograds_gradient():
    a, w = torch.rand(5, 4).relu().bernoulli() * torch.rand(5, 4), torch.rand(4, 3, requires_grad=True)
    g = torch.rand(5, 3)
    for side in (a, a.to_sparse_csr()):
        torch.testing.assert_close(torch.autograd.grad(sparse_product(side, w), w, g)[0], a.T @ g)


# Objectives and strategies


def test_class_nodes_score_by_scalar_products():
    h, y = torch.rand(6, 3), torch.tensor([1, -100, 0, -100])
    s = Streams(h, y, (4, 2))
    own = ClassNodes()
    torch.testing.assert_close(own.scores(h, s), h[:4] @ h[4:].T)
    expected = F.cross_entropy((h[:4] @ h[4:].T)[[0, 2]], y[[0, 2]])
    torch.testing.assert_close(own.loss(own.goodness(h, s), s), expected)


def test_goodness_of_nodes_is_binary_cross_entropy_with_theta():
    "The source's loss, of the nodes with a label only."
    h, y = torch.randn(6, 5), torch.tensor([1, -100, 0])
    s, own, known = Streams(h, y, (3, 3)), NodeGoodness(2.0), [0, 2]
    z = h.square().sum(1) - 2
    bce = F.binary_cross_entropy_with_logits
    expected = bce(z[:3][known], torch.ones(2)) + bce(z[3:][known], torch.zeros(2))
    torch.testing.assert_close(own.loss(own.goodness(h, s), s), expected)


@needs_geometric
def test_class_nodes_are_joined_with_what_is_learned_from_and_no_other(blocks):
    strategy = SingleForward(3)
    y = strategy.known(blocks)
    new = strategy.joined(blocks, y)[:, blocks.edges.shape[1] :]
    up, down = new.chunk(2, 1)
    assert torch.equal(up, down.flip(0)) and torch.equal(up[0].sort().values, blocks.train.nonzero()[:, 0])
    assert torch.equal(up[1], len(blocks) + blocks.y[up[0]])
    one_way = SingleForward(3, back=False).joined(blocks, y)
    assert one_way.shape[1] == blocks.edges.shape[1] + up.shape[1]
    s = strategy.streams(blocks, y)
    assert s.sizes == (len(blocks), 3) and s.x.shape == (len(blocks) + 3, 32)


@needs_geometric
@pytest.mark.parametrize("name", ["label_appended", "virtual_negatives"])
def test_negatives_differ_in_the_labels_of_what_is_learned_from(blocks, name):
    network, strategy = made(blocks, name)
    y, draws = strategy.known(blocks), torch.Generator().manual_seed(0)
    wrong = graphs._wrong(blocks.y, 3, draws)
    assert (wrong != blocks.y).all() and wrong.min() == 0 and wrong.max() == 2
    s = strategy.streams(blocks, y, None, draws)
    pos, neg = s.split(s.x.to_dense() if s.x.layout != torch.strided else s.x)
    if name == "label_appended":
        torch.testing.assert_close(pos.norm(dim=1), torch.ones(len(pos)))
        changed = (pos != neg).any(1)
        assert torch.equal(changed, blocks.train)
    else:
        assert torch.equal(pos, neg)  # the rows are alike, the edges are not
        a = s.side["edges"].to_dense()
        n = len(pos)
        assert not a[:n, n:].any() and not torch.equal(a[:n, :n], a[n:, n:])


@needs_geometric
@pytest.mark.parametrize("name", sorted(GRAPH_STRATEGIES))
def test_no_read_out_sees_a_label_it_must_not(blocks, name):
    "Other labels on validation and test nodes change neither streams, scores nor features."
    network, strategy = made(blocks, name)
    network.strategy = strategy
    network.objectives = torch.nn.ModuleList(strategy.objective(layer, i) for i, layer in enumerate(network.layers, 1))
    hidden = replace(blocks, y=torch.where(blocks.train, blocks.y, (blocks.y + 1) % 3))
    for read in (node_scores, node_features):
        assert torch.equal(read(network, blocks), read(network, hidden))
    y = [strategy.known(graph) for graph in (blocks, hidden)]
    assert torch.equal(*y)


# Learning, alone


@needs_geometric
@pytest.mark.parametrize("name", sorted(GRAPH_STRATEGIES))
def test_it_learns_and_no_layer_teaches_the_one_below(blocks, name):
    network, strategy = made(blocks, name)
    before = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in network.layers]
    seen = {}

    def watch(i):
        def hook(module, args, out):
            if out.requires_grad:
                seen.setdefault(i, []).append(
                    [{k: v.clone() for k, v in n.state_dict().items()} for n in network.layers]
                )

        return hook

    handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(network.layers)]
    history = train_graph(network, blocks, strategy, **FAST)
    for handle in handles:
        handle.remove()
    for k, v in before[1].items():  # while layer 1 learned, layer 2 stood still
        assert all(torch.equal(state[1][k], v) for state in seen[0])
    first = network.layers[0].state_dict()
    assert all(torch.equal(state[0][k], v) for state in seen[1] for k, v in first.items())  # and the other way round
    assert any(not torch.equal(first[k], v) for k, v in before[0].items())
    assert right_share(node_scores(network, blocks), blocks, blocks.test) > 0.45
    assert len(history) == 2 and history[0]["loss"][-1] < history[0]["loss"][0]


@needs_geometric
def test_a_step_leaves_no_gradient_in_the_layer_below(blocks):
    network, strategy = made(blocks, "single_forward")
    train_graph(network, blocks, strategy, epochs=1)
    for p in network.parameters():
        p.grad = None
    y = strategy.known(blocks)
    options = dict(epochs=1, lr=0.0, weight_decay=0.0, every=1, patience=1)
    graphs._alone(network, blocks, strategy, 2, y, strategy.write(blocks, blocks.validation), None, True, options)
    assert all(p.grad is None for p in network.layers[0].parameters())
    assert all(p.grad is not None for p in network.layers[1].parameters())


@needs_geometric
def test_cached_is_uncached_and_a_seed_is_a_run(blocks):
    def weights(seed=0, **options):
        network, strategy = made(blocks, "single_forward", seed=seed)
        train_graph(network, blocks, strategy, epochs=10, seed=seed, **options)
        return torch.cat([p.flatten() for p in network.parameters()])

    assert torch.equal(weights(), weights(cached=False)) and torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(seed=1))


@needs_geometric
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
def test_backprop_learns(blocks, kind):
    network = graph_network(blocks, (16, 3), kind, backprop=True)
    (history,) = train_graph_backprop(network, blocks, **FAST)
    assert right_share(logits_of(network, blocks), blocks, blocks.test) > 0.65
    assert history["best_epoch"] <= history["epochs"] <= 60
    assert node_probe(node_features(network, blocks), blocks).float().mean() < 0.3


@needs_geometric
def test_the_best_state_is_put_back(blocks):
    "The share on the validation nodes is that of the history, also where training went on."
    network = graph_network(blocks, (16, 3), backprop=True)
    (history,) = train_graph_backprop(network, blocks, epochs=80, lr=5e-2, patience=3)
    share = right_share(logits_of(network, blocks), blocks, blocks.validation)
    assert abs(100 * (1 - share) - history["validation"]) < 1e-4 and history["epochs"] < 80


@needs_geometric
def test_memory_that_is_kept():
    w = torch.rand(10, 10, requires_grad=True)
    assert kept_bytes(lambda: (torch.rand(10, 10) @ w).sum()) == 400


# Data


def test_the_split_of_forwardgnn_covers_every_node_once():
    masks = torch.stack([forwardgnn_masks(2995, i) for i in range(5)])
    assert masks.sum((0, 2))[2] == 2995 and (masks[:, 2].sum(0) == 1).all() and (masks.sum(1) == 1).all()
    assert masks[0].sum(1).tolist() == [1916, 480, 599]
    with pytest.raises(ValueError, match="split=5"):
        forwardgnn_masks(2995, 5)


@pytest.mark.data("cora_ml")
def test_stored_graphs(tmp_path):
    for split in (0, 4):
        graph = check_graph(load_graph("cora_ml", split))
        assert torch.equal(torch.stack(list(graph.masks().values())), forwardgnn_masks(len(graph), split))
    assert repr(graph) == "Graph('cora_ml': 2995 nodes, 2879 features, 16316 edges, 7 classes; 1916 / 480 / 599)"
    assert graph.x.values().unique().tolist() == [1.0]
    rows = graph.scaled("sum").x.to_dense().sum(1)
    torch.testing.assert_close(rows, torch.ones(2995))
    with pytest.raises(ValueError, match="splits 0 to 4"):
        load_graph("cora_ml", 5)
    with pytest.raises(ValueError, match="did you mean 'cora_ml'"):
        load_graph("coraml")


@needs_geometric
def test_graphs_of_torch_geometric():
    from torch_geometric.data import Data
    from torch_geometric.datasets import KarateClub

    club = as_graph(KarateClub()[0], "karate")
    assert (len(club), club.num_classes, club.edges.shape[1]) == (34, 4, 156) and club.train.sum() == 4
    with pytest.raises(ValueError, match="'karate' has no validation mask"):
        check_graph(club)
    masks = torch.zeros(4, 2, dtype=torch.bool)
    masks[0, 0] = masks[1, 1] = True
    data = Data(
        x=torch.eye(4), edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0, 1, 0, 1]), train_mask=masks
    )
    assert as_graph(data, split=1).train.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="splits 0 to 1"):
        as_graph(data, split=2)


def changed(graph, **parts):
    return replace(graph, **parts)


BAD = {
    "no train mask": dict(train=None),
    "labels out of range, 0 to 2; expected 0 to 1": dict(num_classes=2),
    "edges name the nodes 0 to 120": dict(edges=torch.tensor([[0], [120]])),
    "expected int64": dict(edges=torch.zeros(2, 3)),
    r"labels \[120\] torch.int8; expected int64": dict(y=torch.zeros(120, dtype=torch.int8)),
    r"for 119 labels": dict(y=torch.zeros(119, dtype=torch.int64)),
    "NaN": dict(x=torch.full((120, 32), float("nan"))),
    "names no node": dict(test=torch.zeros(120, dtype=torch.bool)),
    r"expected bool \[120\]": dict(test=torch.zeros(5, dtype=torch.bool)),
    "two of the three masks": dict(validation=torch.ones(120, dtype=torch.bool)),
}


@pytest.mark.parametrize("message", BAD)
def test_graphs_that_cannot_be_used(blocks, message):
    with pytest.raises(ValueError, match=message):
        check_graph(changed(blocks, **BAD[message]))


def test_negative_labels_and_empty_graphs_are_refused(blocks):
    with pytest.raises(ValueError, match="labels out of range, -1 to 2"):
        check_graph(changed(blocks, y=blocks.y.clone().index_fill(0, torch.tensor([3]), -1)))
    empty = Graph("none", torch.zeros(0, 3), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="labels out of range, none"):
        check_graph(empty)


@needs_geometric
def test_training_says_what_is_wrong(blocks):
    network, strategy = made(blocks, "single_forward")
    plain = block_graph(120)
    with pytest.raises(ValueError, match=r"graph.scaled\('unit'\)"):
        train_graph(network, plain, strategy)
    with pytest.raises(ValueError, match="scaled already"):
        blocks.scaled("sum")
    with pytest.raises(ValueError, match="extra=strategy.extra_inputs"):
        train_graph(network, blocks, GRAPH_STRATEGIES["label_appended"](3))
    with pytest.raises(ValueError, match="backprop=True"):
        train_graph_backprop(network, blocks)
    with pytest.raises(ValueError, match="multiple of the 4 heads"):
        GraphLayer(3, 6, "gat")
    with pytest.raises(ValueError, match="did you mean 'gcn'"):
        GraphLayer(3, 6, "gnc")
    with pytest.raises(Diverged, match="smaller lr"):
        train_graph(network, blocks, strategy, epochs=5, lr=1e30)


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    "The package imports without it; what needs it says how to get it."
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch_geometric"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: GraphLayer(3, 4),
        lambda: load_graph("cora", root=tmp_path),
        lambda: structure(None, 3, "gcn"),
    ):
        with pytest.raises(ImportError, match=r'pip install "ff_research\[graph\]"'):
            call()


# Rows


def test_runs_are_named_once_and_rows_are_theirs():
    for name, run in GRAPH_RUNS.items():
        for row in published(name, part="graphs"):
            assert row["config"] == run.identity() and json.loads(json.dumps(row["config"])) == row["config"]
            assert row["commit"] and "dirty" not in row["commit"]


@needs_geometric
def test_a_row_of_a_small_graph(monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "load_graph", lambda name, split, root: block_graph(120, seed=split))
    methods = [*GRAPH_STRATEGIES, "backprop", "untrained", "features"]
    runs = [GraphRun(f"blocks-{m}", "blocks", m.replace("-", "_"), widths=(8, 8), epochs=4) for m in methods]
    rows = {row["recipe"]: row for row in keep_graph_rows(runs, [0], tmp_path)}
    assert list(keep_graph_rows(runs, [0], tmp_path)) == []
    assert rows["blocks-backprop"]["errors"]["test"].keys() == {"head", "ridge"}
    assert rows["blocks-label_appended"]["errors"]["test"].keys() == {"per_label", "ridge"}
    assert rows["blocks-features"]["weights"] is None and len(rows["blocks-single_forward"]["epochs"]) == 2
    again, row = run_graph(runs[0], 0), rows[runs[0].name]
    assert again["weights"] == row["weights"] and again["errors"] == row["errors"]
    assert with_split(block_graph(50), 1).train.sum() == 30

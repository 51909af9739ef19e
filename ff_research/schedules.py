"""Who learns when: a table of epochs and layers."""

import torch

from ff_research.checks import one_of


def together(layers, epochs):
    "Each batch trains every layer: bool `[epochs, layers]`."
    return torch.ones(epochs, layers, dtype=torch.bool)


def greedy(layers, epochs, rounds=1):
    """Layer after layer, `epochs` each (or a list, one number a layer), in `rounds` equal parts; bool `[sum, layers]`."""
    each = list(epochs) if isinstance(epochs, (list, tuple)) else [epochs] * layers
    order = [layer for _ in range(rounds) for layer, n in enumerate(each) for _ in range(n // rounds)]
    return torch.eye(layers, dtype=torch.bool)[torch.tensor(order, dtype=torch.long)]


def spans(*ends):
    """Interleaved training: layer i learns in the epochs `ends[i] = (first, end)`, of which `end` itself is left out.

    Gives a schedule for `train`. Source: Papachristodoulou et al. (2024), who call it interleaved layer training.
    """

    def schedule(layers, epochs):
        if len(ends) != layers:
            raise ValueError(f"spans has {len(ends)} pairs for {layers} layers that learn")
        return torch.tensor([[a <= epoch < b for a, b in ends] for epoch in range(epochs)])

    return schedule


SCHEDULES = {"together": together, "greedy": greedy}


def check_rounds(schedule, each, rounds):
    "Raise ValueError unless `rounds` divides the epochs of a greedy schedule."
    if rounds != 1 and (schedule != "greedy" or rounds < 1 or any(n % rounds for n in each)):
        shown = each if len(set(each)) > 1 else each[0]
        raise ValueError(f"rounds={rounds}: expected 1, or with schedule='greedy' a divisor of epochs={shown}")


def epochs_of_each(epochs, layers, schedule):
    "The number of epochs of each layer, where the greedy schedule may give them different ones."
    several = isinstance(epochs, (list, tuple))
    if several and (schedule != "greedy" or len(epochs) != layers):
        raise ValueError(
            f"epochs={epochs!r}: expected one number, or with schedule='greedy' one for each of the {layers} layers"
        )
    return list(epochs) if several else [epochs] * layers


def table_of(schedule, learns, epochs, rounds=1):
    """The schedule of a network, bool `[epochs, layers]`. learns: for each layer whether it has an objective.

    schedule: a name of `SCHEDULES`, or a function `schedule(layers, epochs)` of the layers that learn. Raises ValueError for
    an unknown name, or a table of the wrong shape.
    """
    columns = [i for i, learning in enumerate(learns) if learning]
    each = epochs_of_each(epochs, len(columns), schedule)
    check_rounds(schedule, each, rounds)
    if callable(schedule):
        made = torch.as_tensor(schedule(len(columns), epochs))
    else:
        one_of(schedule, SCHEDULES, "schedule")
        made = greedy(len(columns), each, rounds) if schedule == "greedy" else together(len(columns), epochs)
    if made.ndim != 2 or made.shape[1] != len(columns) or made.dtype != torch.bool:
        raise ValueError(
            f"the schedule gave {made.dtype} {list(made.shape)}; expected bool [epochs, {len(columns)}], "
            "a column for each layer that has an objective"
        )
    if len(made) and not made.any(1).all():
        raise ValueError(f"the schedule leaves every layer idle in epoch {int((~made.any(1)).int().argmax()) + 1}")
    table = torch.zeros(len(made), len(learns), dtype=torch.bool)
    table[:, columns] = made
    return table

"""Arms of a tuning comparison: which linear maps are trained, with which rank, and how many weights that is. No weights are read.

Two comparisons are fair: every arm at equal rank, or every arm with an equal number of trained weights. For the second one the rank of each map is
chosen so that the number agrees within 1 %; what was reached stands in the arm.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lens_affect.sizes import MODULES, choose_blocks, choose_modules, count_layers, module_shapes
from lens_affect.statistics import derive_generator

METHODS = ("lora", "full")
"""How maps learn: by low-rank updates, or themselves."""
TOLERANCE = 0.01
"""Largest difference in trained weights, as a share, at which two arms count as equal in size."""


@dataclass(frozen=True)
class Arm:
    """Linear maps that are trained together. Places are named `layers.3.gate`."""

    name: str
    """What was asked for, such as `gate`, `attention`, `random` or `none`."""
    method: str
    """`lora` (low-rank updates) or `full` (the maps themselves)."""
    ranks: Mapping[str, int]
    """Rank by place, in order of blocks; 0 in full tuning."""
    n_parameters: int
    """Weights that are trained."""
    n_wanted: int
    """Weights that were asked for; what is trained where nothing was."""

    @property
    def difference(self) -> float:
        """Trained over wanted, minus 1."""
        return self.n_parameters / self.n_wanted - 1 if self.n_wanted else 0.0

    def __str__(self) -> str:
        used = sorted({rank for rank in self.ranks.values() if rank})
        rank = f", rank {used[0]}" + (f" to {used[-1]}" if len(used) > 1 else "") if used else ""
        wanted = f" ({self.difference:+.2%} of {self.n_wanted:,})" if self.n_parameters != self.n_wanted else ""
        return f"{self.name}, {self.method}{rank}: {self.n_parameters:,} weights{wanted} in {len(self.ranks)} maps"


def plan_arm(
    config: Any,
    modules: str | Sequence[str],
    *,
    method: str = "lora",
    rank: int | None = None,
    n_parameters: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Arm:
    """Choose what an arm trains.

    Args:
        config: of the model: a dict, a transformers config, a JSON file, or a folder with a `config.json`.
        modules: a module (q, k, v, o, gate, up, down), a group (attention, mlp, all, none), several of these, or `random`: maps drawn from all
            modules and layers.
        method: `lora` or `full`.
        rank: of LoRA in every map (equal rank).
        n_parameters: weights to train (equal size); ranks differ between maps by at most one then, and where even rank 1 is too much, maps of some
            layers stay frozen. For `random` it defaults to what `gate` trains at this rank.
        layers: 0-based blocks; all by default.
        seed: of the draw of `random`.

    Raises:
        ValueError: neither or both of rank and n_parameters for LoRA, an unknown module, or a size that cannot be reached within 1 %.

    Source: LoRA (Hu et al., 2021, arXiv:2106.09685).

    Example:
        >>> sizes = {"hidden_size": 8, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2}
        >>> print(plan_arm(sizes, "gate", rank=2))
        gate, lora, rank 2: 112 weights in 2 maps
    """
    if method not in METHODS:
        raise ValueError(f"received method {method!r}; allowed are {list(METHODS)}")
    name = modules if isinstance(modules, str) else "+".join(modules)
    shapes = module_shapes(config)
    blocks = choose_blocks(layers, count_layers(config))
    if name == "random":
        return _random_arm(shapes, blocks, method, rank, n_parameters, seed)
    chosen = choose_modules(modules, present=tuple(shapes))
    places = [(block, module) for block in blocks for module in chosen]
    if not places:
        return Arm(name, method, {}, 0, 0)
    cost = {module: _cost(shapes[module], method) for module in chosen}
    if method == "full":
        return _full_arm(name, places, cost, n_parameters)
    if (rank is None) == (n_parameters is None):
        raise ValueError(f"received rank={rank} and n_parameters={n_parameters}; allowed is one of the two for LoRA")
    if rank is not None:
        if rank < 1:
            raise ValueError(f"received rank={rank}; allowed are whole numbers from 1")
        ranks = dict.fromkeys(places, rank)
    else:
        ranks = _equal_size(chosen, blocks, cost, int(n_parameters or 0))
    return _arm(name, method, ranks, cost, n_parameters)


def _cost(shape: tuple[int, int], method: str) -> int:
    """Weights per unit of rank, or of the whole map."""
    outputs, inputs = shape
    return outputs + inputs if method == "lora" else outputs * inputs


Place = tuple[int, str]


def _arm(name: str, method: str, ranks: Mapping[Place, int], cost: Mapping[str, int], wanted: int | None) -> Arm:
    total = sum((rank if method == "lora" else 1) * cost[module] for (_, module), rank in ranks.items())
    arm = Arm(
        name,
        method,
        {f"layers.{block}.{module}": rank for (block, module), rank in sorted(ranks.items(), key=_in_order)},
        total,
        wanted or total,
    )
    if abs(arm.difference) > TOLERANCE:
        raise ValueError(
            f"received n_parameters={wanted} for {name!r}; the nearest is {total} ({arm.difference:+.1%}), beyond {TOLERANCE:.0%}: ask for a "
            "larger size, or for other modules"
        )
    return arm


def _in_order(item: tuple[Place, int]) -> tuple[int, int]:
    (block, module), _ = item
    return block, MODULES.index(module)


def _full_arm(name: str, places: Sequence[Place], cost: Mapping[str, int], wanted: int | None) -> Arm:
    """All maps, or those of evenly spread layers that come nearest to a size."""
    if wanted is None:
        return _arm(name, "full", dict.fromkeys(places, 0), cost, None)
    return _arm(name, "full", dict.fromkeys(_spread(places, cost, wanted), 0), cost, wanted)


def _spread(places: Sequence[Place], cost: Mapping[str, int], budget: int) -> list[Place]:
    """Places that together cost the budget within 1 %: evenly spread ones, or else the first of some random orders that fits, or the nearest."""
    rng = derive_generator(0, "spread")
    orders = [[place for start in (1, 0) for place in places[start::2]]]  # every second one first
    orders += [[places[i] for i in rng.permutation(len(places))] for _ in range(_DRAWS)]
    walks = [_walk(order, cost, budget) for order in orders]
    misses = [abs(sum(cost[module] for _, module in walk) / budget - 1) if budget else 0.0 for walk in walks]
    fits = (i for i, miss in enumerate(misses) if miss <= TOLERANCE)
    return walks[next(fits, min(range(len(walks)), key=lambda i: misses[i]))]


def _walk(order: Sequence[Place], cost: Mapping[str, int], budget: int) -> list[Place]:
    """Places in order, as long as each fits."""
    taken, total = [], 0
    for place in order:
        if total + cost[place[1]] <= budget * (1 + TOLERANCE / 2):
            taken.append(place)
            total += cost[place[1]]
    return taken


def _equal_size(chosen: Sequence[str], blocks: Sequence[int], cost: Mapping[str, int], wanted: int) -> dict[Place, int]:
    """Ranks that train the wanted number of weights: alike in all layers where that comes within 1 %, else one more in some layers."""
    if wanted < 1:
        raise ValueError(f"received n_parameters={wanted}; allowed are whole numbers from 1")
    unit = len(blocks) * sum(cost[m] for m in chosen)
    low = wanted // unit
    options = [
        dict(zip(chosen, (low + more for more in extra), strict=True))
        for extra in itertools.product((0, 1), repeat=len(chosen))
    ]
    best = min(options, key=lambda r: abs(sum(r[m] * cost[m] for m in chosen) * len(blocks) - wanted))
    reached = sum(best[m] * cost[m] for m in chosen) * len(blocks)
    if abs(reached / wanted - 1) <= TOLERANCE and all(best.values()):
        return {(block, m): best[m] for block in blocks for m in chosen}
    ranks = {(block, m): low for block in blocks for m in chosen}
    for place in _spread(list(ranks), cost, wanted - low * unit):
        ranks[place] += 1
    return {place: rank for place, rank in ranks.items() if rank}


def _random_arm(
    shapes: Mapping[str, tuple[int, int]],
    blocks: Sequence[int],
    method: str,
    rank: int | None,
    wanted: int | None,
    seed: int,
) -> Arm:
    """Maps drawn from all modules and layers up to a size; the last ones get a smaller rank so that it is met."""
    cost = {module: _cost(shape, method) for module, shape in shapes.items()}
    if method == "lora" and rank is None:
        raise ValueError(
            "received no rank for random maps; pass rank=, and n_parameters= for another size than the gate's"
        )
    unit = int(rank or 1) if method == "lora" else 1
    like = "gate" if "gate" in cost else "up"
    budget = wanted or len(blocks) * cost[like] * unit
    places = [(block, module) for block in blocks for module in shapes]
    rng = derive_generator(seed, "random maps")
    drawn = [_draw([places[i] for i in rng.permutation(len(places))], cost, unit, budget) for _ in range(_DRAWS)]
    totals = [sum(rank * cost[module] for (_, module), rank in ranks.items()) for ranks in drawn]
    fits = (i for i, total in enumerate(totals) if abs(total / budget - 1) <= TOLERANCE)
    ranks = drawn[next(fits, max(range(_DRAWS), key=lambda i: totals[i]))]
    if method == "full":
        ranks = dict.fromkeys(ranks, 0)
    return _arm("random", method, ranks, cost, budget)


_DRAWS = 50


def _draw(places: Sequence[Place], cost: Mapping[str, int], unit: int, budget: int) -> dict[Place, int]:
    """Places in order, each with the full rank or what the budget has left."""
    ranks: dict[Place, int] = {}
    for place in places:
        rank = min(unit, budget // cost[place[1]])
        if rank:
            ranks[place] = rank
            budget -= rank * cost[place[1]]
    return ranks

"""Prefixes: the prompts that several rows of a batch share are read once, and every row goes on from their keys and values.

In a sweep over doses a dozen prompts stand before hundreds of texts; reading each of them for every text costs more than the texts themselves.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from lens_affect.adapter import LensModel, device_of, is_bridge, pad_token_id


class Prefix(NamedTuple):
    """Distinct prompts without their last token, which every row reads itself, because its output is a response's."""

    cache: Any
    """Keys and values of the distinct prompts."""
    which: Int[Tensor, " row"]
    """Which of them stands before each row."""
    mask: Int[Tensor, "row position"]
    """1 where a token is real; prompts are padded on the left."""

    def expanded(self) -> Any:
        """Keys and values for every row, in memory of their own: a pass adds to them."""
        found = copy.deepcopy(self.cache)
        found.batch_select_indices(self.which)
        return found


@torch.no_grad()
def read_prefix(model: LensModel, heads: Sequence[Sequence[int]]) -> Prefix | None:
    """Read the distinct prompts of a batch.

    Args:
        model: a bridge; a HookedTransformer has another kind of cache.
        heads: tokens of each row's prompt, special ones included.

    Returns:
        None where nothing would be saved (no prompt twice), or a prompt has a single token, or the model keeps no such cache.
    """
    distinct = list(dict.fromkeys(tuple(head) for head in heads))
    if not is_bridge(model) or len(distinct) == len(heads) or min(map(len, distinct)) < 2:
        return None
    anything: Any = model
    tokens, mask = pad_left([head[:-1] for head in distinct], pad_token_id(model))
    device = device_of(model)
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = anything.original_model.base_model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True
    ).past_key_values
    if not hasattr(found, "batch_select_indices"):
        return None
    number = {head: i for i, head in enumerate(distinct)}
    which = torch.tensor([number[tuple(head)] for head in heads], device=device)
    return Prefix(found, which, mask[which])


def is_hooked(model: Any) -> bool:
    """Whether hooks stand on the model. What they do to a position may depend on the pass that it is read in, so a prompt must then not be read once for all."""
    return any(getattr(module, "fwd_hooks", None) for module in model.modules())


def pad_left(
    rows: Sequence[Sequence[int]], filler: int
) -> tuple[Int[Tensor, "row position"], Int[Tensor, "row position"]]:
    """Token ids with the last one of each row in the last column, and 1 where a token is real."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return tokens, mask

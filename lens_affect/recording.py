"""Recordings: one forward pass of some texts, kept so that it can be resumed at any layer and any position.

Kept are the stream that enters every block, the keys and values that its attention made, and what the block was called with
(masks, rotary tables), all right-aligned: the last real token of each text is in the last column, so that a suffix is a slice
for texts of any length. Models whose blocks cannot be resumed are recorded without that, with the reason.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_affect.adapter import LensModel, device_of, is_bridge, run_logits, run_trunk, soft_cap

BATCH_TOKENS = 2048
"""Positions that go through a block at once; beyond this a CPU gains nothing and memory grows."""
LOGITS_AT_ONCE = 2**24
"""Logits of last positions that exist at once: 64 MB in float32. A full pass, which makes them at every position, may have four times as many."""


@dataclass(frozen=True)
class BlockArguments:
    """What a block was called with beside the stream, right-aligned; layers of one kind share one object."""

    mask: Float[Tensor, "text head position key"] | Bool[Tensor, "text head position key"]
    """The attention mask as the block takes it; padded keys are shut out."""
    rotary: tuple[Float[Tensor, "text position d_rotary"], ...]
    """Cosines and sines of the positions; empty where the model has no rotary embedding."""
    position_ids: Int[Tensor, "text position"] | None
    """Positions as the model counted them, where the block is told."""
    constants: dict[str, Any]
    """Everything else; no tensors."""

    def of(self, texts: Int[Tensor, " row"], n: int, width: int) -> dict[str, Any]:
        """Keyword arguments for the last n positions of these texts, with keys in the last `width` columns."""
        found = dict(self.constants, attention_mask=self.mask[:, :, -n:, -width:][texts])
        if self.rotary:
            found["position_embeddings"] = tuple(table[:, -n:][texts] for table in self.rotary)
        if self.position_ids is not None:
            found["position_ids"] = self.position_ids[:, -n:][texts]
        return found


@dataclass(frozen=True)
class Trunk:
    """What is needed to resume: right-aligned, position -1 is the last real token of each text."""

    stream: Float[Tensor, "entry text position d_model"]
    """Entry l enters block l; the last one enters the final norm."""
    keys: tuple[Float[Tensor, "text key_head position d_head"], ...]
    """Per layer, as the attention takes them (after the rotary embedding)."""
    values: tuple[Float[Tensor, "text key_head position d_head"], ...]
    """Per layer."""
    arguments: tuple[BlockArguments, ...]
    """Per layer."""


@dataclass(frozen=True)
class Recording:
    """Unpatched runs of some texts."""

    tokens: Int[Tensor, "text position"]
    """Token ids, padded on the right."""
    mask: Int[Tensor, "text position"]
    """1 where a token is real."""
    lengths: Int[Tensor, " text"]
    """Real tokens of each text."""
    logits: Float[Tensor, "text vocab"]
    """At the last real position, float32."""
    trunk: Trunk | None
    """None where the model cannot be resumed."""
    obstacle: str
    """Why there is no trunk; empty where there is one."""


@torch.no_grad()
def record(
    model: LensModel,
    tokens: Int[Tensor, "text position"],
    mask: Int[Tensor, "text position"],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Recording:
    """Run texts once and keep what is needed to resume them at any layer.

    Put both sides of each pair into one recording: then each can be patched with the other.

    Args:
        model: a bridge or a HookedTransformer; the latter is recorded without a trunk.
        tokens: token ids, padded on the right.
        mask: 1 where a token is real.
        batch_tokens: padded tokens per forward pass.

    Returns:
        The recording, on the model's device; about `n_layers x (d_model + 2 x n_key_heads x d_head)` numbers per token.

    Raises:
        ValueError: a mask that is not ones followed by zeros.

    Example:
        >>> recording = record(model, *pad_right(encoded, pad_token_id(model), device_of(model)))  # doctest: +SKIP
    """
    tokens, mask = tokens.to(device_of(model)), mask.to(device_of(model))
    lengths = mask.sum(1)
    if bool((lengths == 0).any()) or not torch.equal(mask, _right_padded(lengths, mask.shape[1])):
        raise ValueError(
            "received a mask with padding on the left or inside, or an empty text; allowed are ones followed by zeros: "
            "use adapter.pad_right"
        )
    obstacle = "a HookedTransformer's blocks cannot be resumed with recorded keys"
    if is_bridge(model):
        try:
            trunk = _record_trunk(model, tokens, mask, lengths, max(1, batch_tokens // tokens.shape[1]))
            logits = torch.cat([logits for _, logits in unembed(model, trunk.stream[-1, :, -1])])
            return Recording(tokens, mask, lengths, logits, trunk, "")
        except _CannotResumeError as error:
            obstacle = str(error)
    parts = slices(len(tokens), rows_of_full_pass(model, tokens.shape[1], batch_tokens))
    logits = torch.cat([last_logits(model, tokens[rows], mask[rows]) for rows in parts])
    return Recording(tokens, mask, lengths, logits, None, obstacle)


class _CannotResumeError(Exception):
    """What stands in the way of resuming a model's blocks; record turns it into Recording.obstacle."""


def _right_padded(lengths: Int[Tensor, " text"], width: int) -> Int[Tensor, "text position"]:
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def slices(n: int, size: int) -> Iterator[slice]:
    """Neighbouring slices of at most `size` (at least 1) that cover 0 to n."""
    size = max(1, size)
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def rows_of_full_pass(model: LensModel, width: int, batch_tokens: int) -> int:
    """Rows of `width` tokens that a full forward pass can take: within the budget, and so that its logits fit into memory."""
    return max(1, min(batch_tokens, 4 * LOGITS_AT_ONCE // int(model.cfg.d_vocab)) // width)


def last_logits(
    model: LensModel, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row position"]
) -> Float[Tensor, "row vocab"]:
    """Logits at the last real position of each text, from a full forward pass; float32."""
    logits = run_logits(model, tokens, mask)
    return logits[torch.arange(len(tokens), device=logits.device), mask.sum(1) - 1]


def _record_trunk(model: Any, tokens: Tensor, mask: Tensor, lengths: Tensor, rows_at_once: int) -> Trunk:
    recorders = []
    for rows in slices(len(tokens), rows_at_once):
        recorder = _Recorder(model)
        try:
            with recorder:
                run_trunk(model, tokens[rows], mask[rows])
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _CannotResumeError(f"a pass with a recorder in place of the cache failed: {error}") from error
        columns = _columns(lengths[rows], tokens.shape[1])
        recorders.append(recorder.aligned(columns, lengths[rows]))
    layers = range(len(model.blocks))
    return Trunk(
        stream=torch.stack([torch.cat([part.stream[entry] for part in recorders]) for entry in range(len(layers) + 1)]),
        keys=tuple(torch.cat([part.keys[layer] for part in recorders]) for layer in layers),
        values=tuple(torch.cat([part.values[layer] for part in recorders]) for layer in layers),
        arguments=_join_arguments([part.arguments for part in recorders]),
    )


def _columns(lengths: Int[Tensor, " text"], width: int) -> Int[Tensor, "text position"]:
    """Position of each column of the right-aligned text; columns before its start repeat position 0."""
    return (torch.arange(width, device=lengths.device) - (width - lengths)[:, None]).clamp(min=0)


class _Recorder:
    """Listens to one forward pass: what enters each block, what it was called with, and its keys and values."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stream: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.called_with: list[dict[str, Any]] = []
        self.arguments: list[BlockArguments] = []
        self._handles = ExitStack()

    def __enter__(self) -> "_Recorder":
        with ExitStack() as handles:
            for block in self.model.blocks:
                names = tuple(inspect.signature(block.original_component.forward).parameters)
                handle = block.register_forward_pre_hook(self._enter_block(names), with_kwargs=True)
                handles.callback(handle.remove)
            handles.callback(self.model.blocks[-1].register_forward_hook(self._leave_last_block).remove)
            self._handles = handles.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handles.close()

    def _enter_block(self, names: tuple[str, ...]) -> Callable[..., Any]:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            called = dict(zip(names, args, strict=False)) | kwargs
            self.stream.append(called.pop("hidden_states"))
            self.called_with.append(called)
            # The recorder poses as the cache of earlier positions: attention hands it keys and values as a cache wants them.
            return (self.stream[-1],), called | {"past_key_values": self}

        return hook

    def _leave_last_block(self, block: Any, args: tuple[Any, ...], output: Any) -> None:
        self.stream.append(output[0] if isinstance(output, tuple) else output)

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any) -> tuple[Tensor, Tensor]:
        """What attention calls with its keys and values."""
        self.keys.append(keys)
        self.values.append(values)
        return keys, values

    def aligned(self, columns: Int[Tensor, "text position"], lengths: Int[Tensor, " text"]) -> "_Recorder":
        """Itself, with everything right-aligned."""
        n_layers = len(self.model.blocks)
        if len(self.stream) != n_layers + 1 or len(self.keys) != n_layers:
            raise _CannotResumeError(
                f"{len(self.stream)} streams and {len(self.keys)} caches of keys were seen for {n_layers} blocks"
            )
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        self.stream = [stream[rows, columns] for stream in self.stream]
        self.keys = [keys[rows, :, columns].transpose(1, 2).contiguous() for keys in self.keys]
        self.values = [values[rows, :, columns].transpose(1, 2).contiguous() for values in self.values]
        known: dict[Any, BlockArguments] = {}
        for called in self.called_with:
            signature = tuple((name, _identity(value)) for name, value in called.items())
            if signature not in known:
                known[signature] = _align(called, columns, lengths)
            self.arguments.append(known[signature])
        return self


def _identity(value: Any) -> Any:
    return tuple(map(id, value)) if isinstance(value, tuple) else id(value)


def _align(
    called: dict[str, Any], columns: Int[Tensor, "text position"], lengths: Int[Tensor, " text"]
) -> BlockArguments:
    """The right-aligned arguments of a block.

    Raises:
        _CannotResumeError: there is a tensor whose axes are not known, or no mask to cut from.
    """
    called = {name: value for name, value in called.items() if name not in ("past_key_values", "use_cache")}
    mask = called.pop("attention_mask", None)
    rotary = called.pop("position_embeddings", None)
    positions = called.pop("position_ids", None)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise _CannotResumeError("its blocks are called without a mask of four axes")
    unknown = [name for name, value in called.items() if isinstance(value, (Tensor, tuple, list))]
    if unknown:
        raise _CannotResumeError(f"its blocks take {unknown}, whose axes are not known here")
    n_texts, width = columns.shape
    rows = torch.arange(n_texts, device=columns.device)
    cut = mask.expand(n_texts, -1, -1, -1)[rows[:, None, None], :, columns[:, :, None], columns[:, None, :]]
    shut = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    padded = ~_right_padded(lengths, width).flip(1).bool()
    return BlockArguments(
        mask=cut.permute(0, 3, 1, 2).masked_fill(padded[:, None, None, :], shut),
        rotary=tuple(t.expand(n_texts, -1, -1)[rows[:, None], columns] for t in rotary or ()),
        position_ids=None if positions is None else positions.expand(n_texts, -1)[rows[:, None], columns],
        constants=called,
    )


def _join_arguments(parts: list[list[BlockArguments]]) -> tuple[BlockArguments, ...]:
    known: dict[Any, BlockArguments] = {}
    joined = []
    for layer in zip(*parts, strict=True):
        signature = tuple(map(id, layer))
        if signature not in known:
            ids = [a.position_ids for a in layer if a.position_ids is not None]
            known[signature] = BlockArguments(
                mask=torch.cat([a.mask for a in layer]),
                rotary=tuple(torch.cat(tables) for tables in zip(*(a.rotary for a in layer), strict=True)),
                position_ids=torch.cat(ids) if ids else None,
                constants=layer[0].constants,
            )
        joined.append(known[signature])
    return tuple(joined)


def unembed(
    model: Any, stream: Float[Tensor, "row d_model"], tokens: Sequence[int] | None = None
) -> Iterator[tuple[int, Float[Tensor, "part token"]]]:
    """Logits of streams that leave the last block, in parts that fit into memory, with the row that each part starts at.

    Final norm, unembedding and Gemma 2's soft cap, in float32; Replay compares them with the model's own logits.

    Args:
        model: a bridge or a HookedTransformer.
        stream: what enters the final norm.
        tokens: only these tokens' logits, in this order; a large vocabulary costs more than all blocks together.
    """
    cap = soft_cap(model)
    n_tokens = int(model.cfg.d_vocab) if tokens is None else len(tokens)
    columns = None if tokens is None else (model.W_U[:, list(tokens)], model.unembed.b_U[list(tokens)])
    for rows in slices(len(stream), LOGITS_AT_ONCE // n_tokens):
        normed = model.ln_final(stream[rows, None])
        logits = (model.unembed(normed) if columns is None else normed @ columns[0] + columns[1])[:, 0].float()
        yield rows.start, logits if cap is None else cap * torch.tanh(logits / cap)

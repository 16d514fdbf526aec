"""Replay: patched forward passes that start where the patch is, from residual streams and keys recorded once.

A patch at layer l leaves everything before block l as it was, and in block l and above every position before the first patched
one. So each patch needs blocks l to the last, for the positions from its first one on, with the recorded keys and values of
the positions before; only the last position is unembedded. Patches share the batch: one pass goes up through the blocks, and
the patches of layer l join it there, together with the texts that the replacement comes from, so that a replacement is copied
from one row of the batch to another inside the hook and nothing but the streams, keys and values has to be kept.

Texts are kept right-aligned: the last real token of each is in the last column, so a suffix is a slice for texts of any length.

What is computed are the blocks of the bridge themselves, with their hook points, so that a patch hits what `Site.at(layer)`
names. Whether that is exact is not looked up in a list of architectures but measured: `Replay` compares patches at each kind
of layer with full forward passes and falls back to those, with the reason, where they differ.
"""

import inspect
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_affect.adapter import LensModel, add_hooks, device_of, is_bridge, run_logits, run_trunk
from lens_affect.sites import Site, resolve_site

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
"""Positions that go through a block at once; beyond this a CPU gains nothing and memory grows."""
LOGITS_AT_ONCE = 2**24
"""Logits that exist at once: 64 MB in float32."""
KEY_SHARE = 4
"""So many keys of earlier positions weigh as much memory as one position that is computed."""


class Outcome(NamedTuple):
    """Some patched runs, for a measure to keep what it wants of them."""

    logits: Float[Tensor, "row vocab"]
    """At the last real position, float32."""
    texts: Int[Tensor, " row"]
    """The text that each row runs."""
    change: Float[Tensor, " row"]
    """Relative change of resid_post of the patched layer, |patched - own| / |own|, mean over the patched positions."""


Measure = Callable[[Outcome], Tensor]
"""From patched runs to what is kept of each, `[row, *output]`."""
Edit = Callable[[Tensor, Tensor, str, int, Tensor, Tensor], Tensor]
"""From own and source activation (both `[row, position, width]`), site, layer, text `[row]` and place counted from the end `[row, position]`
(1 is the last real position; what stands at places below 1 is padding and never used) to what is put there, `[row, position, width]`."""


class Patch(NamedTuple):
    """One patched run: the activation of a site in one text is replaced by another text's at the same positions."""

    site: str
    """One of sites.SITES."""
    layer: int
    """0-based block."""
    text: int
    """Row of the recorded text that is run."""
    source: int
    """Row of the recorded text that the replacement comes from; positions correspond counted from the end."""
    first: int
    """First patched position, 0-based from the start of the text."""
    last: int
    """Last patched position, included."""
    edit: str = ""
    """Name of the edit that makes the replacement out of own and source activation; empty for the source's activation as it is."""


@dataclass(frozen=True)
class _Arguments:
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
    arguments: tuple[_Arguments, ...]
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
            logits = torch.cat([_head(model, part) for part in _head_parts(model, trunk.stream[-1, :, -1])])
            return Recording(tokens, mask, lengths, logits, trunk, "")
        except _CannotResumeError as error:
            obstacle = str(error)
    logits = torch.cat(
        [
            _last_logits(model, tokens[rows], mask[rows])
            for rows in _slices(len(tokens), batch_tokens // tokens.shape[1])
        ]
    )
    return Recording(tokens, mask, lengths, logits, None, obstacle)


class _CannotResumeError(Exception):
    """What stands in the way of resuming a model's blocks; never leaves this module."""


def _right_padded(lengths: Int[Tensor, " text"], width: int) -> Int[Tensor, "text position"]:
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def _slices(n: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def _last_logits(
    model: LensModel, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row position"]
) -> Float[Tensor, "row vocab"]:
    logits = run_logits(model, tokens, mask)
    return logits[torch.arange(len(tokens), device=logits.device), mask.sum(1) - 1]


def _record_trunk(model: Any, tokens: Tensor, mask: Tensor, lengths: Tensor, rows_at_once: int) -> Trunk:
    recorders = []
    for rows in _slices(len(tokens), rows_at_once):
        recorder = _Recorder(model)
        with recorder:
            run_trunk(model, tokens[rows], mask[rows])
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
        self.arguments: list[_Arguments] = []
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
        known: dict[Any, _Arguments] = {}
        for called in self.called_with:
            signature = tuple((name, _identity(value)) for name, value in called.items())
            if signature not in known:
                known[signature] = _align(called, columns, lengths)
            self.arguments.append(known[signature])
        return self


def _identity(value: Any) -> Any:
    return tuple(map(id, value)) if isinstance(value, tuple) else id(value)


def _align(called: dict[str, Any], columns: Int[Tensor, "text position"], lengths: Int[Tensor, " text"]) -> _Arguments:
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
    return _Arguments(
        mask=cut.permute(0, 3, 1, 2).masked_fill(padded[:, None, None, :], shut),
        rotary=tuple(t.expand(n_texts, -1, -1)[rows[:, None], columns] for t in rotary or ()),
        position_ids=None if positions is None else positions.expand(n_texts, -1)[rows[:, None], columns],
        constants=called,
    )


def _join_arguments(parts: list[list[_Arguments]]) -> tuple[_Arguments, ...]:
    known: dict[Any, _Arguments] = {}
    joined = []
    for layer in zip(*parts, strict=True):
        signature = tuple(map(id, layer))
        if signature not in known:
            ids = [a.position_ids for a in layer if a.position_ids is not None]
            known[signature] = _Arguments(
                mask=torch.cat([a.mask for a in layer]),
                rotary=tuple(torch.cat(tables) for tables in zip(*(a.rotary for a in layer), strict=True)),
                position_ids=torch.cat(ids) if ids else None,
                constants=layer[0].constants,
            )
        joined.append(known[signature])
    return tuple(joined)


def _head(model: Any, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Final norm, unembedding and Gemma 2's soft cap, in float32; compared with the model's own logits by Replay."""
    logits = model.unembed(model.ln_final(stream[:, None]))[:, 0].float()
    cap = getattr(model.original_model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _head_parts(model: Any, stream: Float[Tensor, "row d_model"]) -> Iterator[Float[Tensor, "part d_model"]]:
    return (stream[part] for part in _slices(len(stream), LOGITS_AT_ONCE // int(model.cfg.d_vocab)))


class _Row(NamedTuple):
    """A patch as the pass up the blocks sees it."""

    entry: int
    """Block that it enters; n_layers for the final norm."""
    site: str
    """Empty where the stream itself is replaced on entry."""
    text: int
    source: int
    first: int
    """Patched columns of the suffix, from the end: `-first` to `-last`, so first >= last >= 1."""
    last: int
    edit: str = ""
    of: tuple[str, int] = ("", -1)
    """Site and layer that the edit is told; empty without one, so that equal rows are run once."""


class _Prefix:
    """Poses as transformers' cache: puts the keys and values of the earlier positions before those of the suffix."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any) -> tuple[Tensor, Tensor]:
        """What attention calls with the keys and values of the suffix."""
        return torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)


class _Plan(NamedTuple):
    """What a hook does: rows that are patched, rows that each takes its replacement from, and the positions."""

    targets: Int[Tensor, " target"]
    sources: Int[Tensor, " target"]
    patched: Bool[Tensor, "target position"]
    columns: Int[Tensor, "target position"] | None
    """Column of the source that corresponds to each column; None where they are the same."""
    edit: Callable[[Tensor, Tensor], Tensor] | None


class _Exchange:
    """Hooks that copy activations from row to row of the batch; they stay on the model and follow the plans of the moment."""

    def __init__(self, edits: Mapping[str, Edit]) -> None:
        self.edits = edits
        self.plans: dict[tuple[str, int], list[_Plan]] = {}

    def hook(self, site: Site, layer: int) -> tuple[str, Callable[..., Tensor | None]]:
        """The hook of a site at a layer; without a plan it does nothing."""

        def exchange(activation: Tensor, hook: Any) -> Tensor | None:
            plans = self.plans.get((site.name, layer), [])
            if not plans:
                return None
            flat = activation.flatten(2)
            changed = flat.clone()
            for plan in plans:
                own, source = flat[plan.targets], flat[plan.sources]
                if plan.columns is not None:
                    source = source.gather(1, plan.columns[:, :, None].expand_as(own))
                new = source if plan.edit is None else plan.edit(own, source)
                changed[plan.targets] = torch.where(plan.patched[:, :, None], new, own)
            return changed.reshape(activation.shape)

        return site.at(layer), exchange

    def plan(
        self,
        rows: Sequence[_Row],
        offset: int,
        source_rows: dict[int, int],
        from_end: Int[Tensor, "row position"],
        columns: Int[Tensor, "row position"] | None = None,
    ) -> None:
        """Plan for rows that stand in the batch from row `offset` on; `source_rows` says where each source text stands."""
        members: dict[tuple[str, int, str], list[int]] = {}
        for i, row in enumerate(rows):
            if row.site:
                members.setdefault((row.site, row.entry, row.edit), []).append(i)
        self.plans = {}
        for (site, entry, edit), chosen in members.items():
            mine = [rows[i] for i in chosen]
            plan = _Plan(
                torch.tensor(chosen, device=from_end.device) + offset,
                torch.tensor([source_rows[row.source] for row in mine], device=from_end.device),
                _patched(mine, from_end[chosen]),
                None if columns is None else columns[chosen],
                self.bound(mine, from_end[chosen]) if edit else None,
            )
            self.plans.setdefault((site, entry), []).append(plan)

    def bound(self, rows: Sequence[_Row], from_end: Int[Tensor, "row position"]) -> Callable[[Tensor, Tensor], Tensor]:
        """The edit that these rows share, told everything but the activations."""
        texts = torch.tensor([row.text for row in rows], device=from_end.device)
        edit, (site, layer) = self.edits[rows[0].edit], rows[0].of
        return lambda own, source: edit(own, source, site, layer, texts, from_end)


class Replay:
    """Patched runs of recorded texts, resumed at the patch where that is exact.

    Args:
        model: the model that was recorded.
        recording: unpatched runs of all texts that are patched or that replacements come from.
        sites: the sites that will be patched; the way is checked for each kind of them.
        edits: ways to make a replacement out of own and source activation, by name.
        batch_tokens: positions that go through a block at once.

    Attributes:
        way: `resumed`, or `full` where every patch takes a forward pass through the whole model.
        reason: why the way is `full`; empty otherwise.
        difference: largest difference of a logit between the two ways in the check; NaN where nothing was compared.

    Example:
        >>> replay = Replay(model, recording, sites=["gate"])  # doctest: +SKIP
        >>> logits = replay.run([Patch("gate", 3, text=0, source=1, first=4, last=9)])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: LensModel,
        recording: Recording,
        *,
        sites: Sequence[str],
        edits: Mapping[str, Edit] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.model: Any = model
        self.recording = recording
        self.edits: Mapping[str, Edit] = edits or {}
        self.batch_tokens = batch_tokens
        self.sites = {name: resolve_site(model, name) for name in sites}
        self.n_layers = int(self.model.cfg.n_layers)
        self.way: Literal["resumed", "full"] = "full" if recording.trunk is None else "resumed"
        self.reason = recording.obstacle
        self.difference = float("nan")
        if recording.trunk is not None:
            self._verify()

    @torch.no_grad()
    def run(
        self,
        patches: Sequence[Patch],
        *,
        measure: Measure | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[Tensor, "patch *output"]:
        """Run the text of every patch with the replacement in it.

        Hooks are on the model only while this runs. Patches are independent of each other, in any order.

        Args:
            patches: any mixture of sites, layers, texts and positions; many at once share the batch.
            measure: what to keep of an Outcome, e.g. a logit difference; all logits by default.
            progress: called with (patches done, patches in all).

        Returns:
            What was measured at the last real position of each patched text, in the order of the patches.

        Raises:
            ValueError: an unannounced site or edit, a layer, text or position that there is not, or a source that is too short.
        """
        self._check(patches)
        return self._run(patches, self.way, measure or _all_logits, progress)

    def _check(self, patches: Sequence[Patch]) -> None:
        if not patches:
            raise ValueError("received no patches; allowed are one or more")
        lengths = self.recording.lengths.tolist()
        for patch in patches:
            if patch.site not in self.sites:
                raise ValueError(
                    f"received a patch at {patch.site!r}; allowed are {list(self.sites)}: name every site in Replay(sites=...)"
                )
            if not 0 <= patch.layer < self.n_layers:
                raise ValueError(f"received a patch at layer {patch.layer}; allowed are 0 to {self.n_layers - 1}")
            if not (0 <= patch.text < len(lengths) and 0 <= patch.source < len(lengths)):
                raise ValueError(
                    f"received text {patch.text} and source {patch.source}; recorded are texts 0 to {len(lengths) - 1}"
                )
            if patch.edit and patch.edit not in self.edits:
                raise ValueError(
                    f"received the edit {patch.edit!r}; allowed are {list(self.edits)}: name it in Replay(edits=...)"
                )
            if not 0 <= patch.first <= patch.last < lengths[patch.text]:
                raise ValueError(
                    f"received positions {patch.first} to {patch.last}; text {patch.text} has 0 to {lengths[patch.text] - 1}"
                )
            if lengths[patch.source] < lengths[patch.text] - patch.first:
                raise ValueError(
                    f"received source {patch.source} of {lengths[patch.source]} tokens for the last {lengths[patch.text] - patch.first} positions of "
                    f"text {patch.text}; allowed are texts that are long enough: positions correspond counted from the end"
                )

    def _run(
        self,
        patches: Sequence[Patch],
        way: Literal["resumed", "full"],
        measure: Measure,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        slots = self._rows(patches, way)
        found: Tensor | None = None
        exchange, changes = _Exchange(self.edits), _Changes(self.model)
        used = sorted({(row.site, row.entry) for row in slots if row.site})
        hooks = [exchange.hook(self.sites[site], layer) for site, layer in used]
        if way == "full":  # after the exchange, so that a patched residual stream is seen patched
            hooks += [changes.hook(layer) for layer in sorted({row.entry for row in slots})]
        done = 0
        with add_hooks(self.model, hooks):
            for rows, n in self._waves(list(slots), way):
                for i, logits, change in (
                    self._climb(rows, n, exchange) if way == "resumed" else self._pass_fully(rows, exchange, changes)
                ):
                    part = rows[i : i + len(logits)]
                    of_row = [j for j, row in enumerate(part) for _ in slots[row]]
                    answered = [slot for row in part for slot in slots[row]]
                    # A stream that leaves block l enters block l + 1: the change is the one on entry for the former.
                    at_once = torch.tensor(
                        [int(patches[slot].site != "resid_post") for slot in answered], device=logits.device
                    )
                    texts = torch.tensor([part[j].text for j in of_row], device=logits.device)
                    measured = measure(Outcome(logits[of_row], texts, change[of_row, at_once]))
                    if found is None:
                        found = measured.new_empty(len(patches), *measured.shape[1:])
                    found[answered] = measured
                    done += len(of_row)
                    if progress is not None:
                        progress(done, len(patches))
        assert found is not None
        return found

    def _rows(self, patches: Sequence[Patch], way: Literal["resumed", "full"]) -> dict[_Row, list[int]]:
        """Different rows to be run, with the patches that each answers: what leaves block l enters block l + 1."""
        lengths = self.recording.lengths.tolist()
        slots: dict[_Row, list[int]] = {}
        for i, patch in enumerate(patches):
            length = lengths[patch.text]
            site, entry = patch.site, patch.layer
            if site in ("resid_pre", "resid_post") and way == "resumed":
                site, entry = "", entry + (site == "resid_post")
            of = (patch.site, patch.layer) if patch.edit else ("", -1)
            row = _Row(entry, site, patch.text, patch.source, length - patch.first, length - patch.last, patch.edit, of)
            slots.setdefault(row, []).append(i)
        return slots

    def _waves(self, rows: list[_Row], way: Literal["resumed", "full"]) -> Iterator[tuple[list[_Row], int]]:
        """Batches that go up together, lowest entry first, with the number of positions that they need."""
        lengths = self.recording.lengths.tolist()
        if way == "full":
            width = max(max(lengths[row.text], lengths[row.source]) for row in rows)
            yield from ((rows[part], width) for part in _slices(len(rows), self.batch_tokens // (3 * width)))
            return
        rows = sorted(rows, key=lambda row: (-row.first, row.entry, row.site, row.text))
        while rows:
            n = rows[0].first
            # A suffix that is up to 1/8 shorter joins a small batch: some positions too many cost less than another pass.
            equal = sum(1 for row in rows if row.first == n)
            share = 1.0 if 4 * equal * n >= self.batch_tokens else 7 / 8
            similar = sum(1 for row in rows if row.first >= n * share)
            together = sorted(rows[:similar], key=lambda row: (row.entry, row.site, row.text))
            width = max(max(lengths[row.text], lengths[row.source]) for row in together)
            for part in _slices(similar, int(self.batch_tokens / (n + width / KEY_SHARE))):
                yield together[part], n
            rows = rows[similar:]

    def _climb(
        self, rows: list[_Row], n: int, exchange: _Exchange
    ) -> Iterator[tuple[int, Float[Tensor, "row vocab"], Float[Tensor, "row when"]]]:
        """Logits and changes of rows, part by part with the number of the first: up through the blocks, each row from its entry on."""
        trunk = self.recording.trunk
        assert trunk is not None
        device = trunk.stream.device
        texts = torch.tensor([row.text for row in rows], device=device)
        width = int(self.recording.lengths[[t for row in rows for t in (row.text, row.source)]].max())
        from_end = torch.arange(n, 0, -1, device=device).expand(len(rows), -1)
        patched = _patched(rows, from_end)
        entries = [row.entry for row in rows]
        stream = trunk.stream.new_empty(0, n, trunk.stream.shape[-1])
        change = torch.full((len(rows), 2), torch.nan, device=device)
        for layer in range(entries[0], self.n_layers + 1):
            old, now = len(stream), bisect_right(entries, layer)
            if now > old:
                entering = _enter(trunk, rows[old:now], layer, n, patched[old:now], exchange, from_end[old:now])
                change[old:now, 0] = _relative_change(
                    entering, trunk.stream[layer, texts[old:now], -n:], patched[old:now]
                )
                stream = torch.cat([stream, entering])
            if layer == self.n_layers:
                break
            # The texts that replacements come from pass this block beside the rows that enter here, and are dropped after it.
            sources = sorted({row.source for row in rows[old:now] if row.site})
            exchange.plan(rows[old:now], old, {source: now + i for i, source in enumerate(sources)}, from_end[old:now])
            batch = torch.cat([texts[:now], torch.tensor(sources, dtype=torch.long, device=device)])
            prefix = slice(trunk.stream.shape[2] - width, trunk.stream.shape[2] - n)
            output = self.model.blocks[layer](
                torch.cat([stream, trunk.stream[layer, sources, -n:]]),
                past_key_values=_Prefix(
                    trunk.keys[layer][:, :, prefix][batch], trunk.values[layer][:, :, prefix][batch]
                ),
                **trunk.arguments[layer].of(batch, n, width),
            )
            stream = (output[0] if isinstance(output, tuple) else output)[:now]
            if now > old:
                base = trunk.stream[layer + 1, texts[old:now], -n:]
                change[old:now, 1] = _relative_change(stream[old:now], base, patched[old:now])
        i = 0
        for part in _head_parts(self.model, stream[:, -1]):
            yield i, _head(self.model, part), change[i : i + len(part)]
            i += len(part)

    def _pass_fully(
        self, rows: list[_Row], exchange: _Exchange, changes: "_Changes"
    ) -> Iterator[tuple[int, Float[Tensor, "row vocab"], Float[Tensor, "row when"]]]:
        """Logits and changes of rows by one forward pass through the whole model, their texts and sources beside them."""
        beside = sorted({t for row in rows for t in (row.text, row.source)})
        batch = [row.text for row in rows] + beside
        lengths = self.recording.lengths[batch]
        width = int(lengths.max())
        places = {text: len(rows) + i for i, text in enumerate(beside)}
        columns = torch.arange(width, device=lengths.device)
        from_end = lengths[: len(rows), None] - columns
        shift = self.recording.lengths[[row.source for row in rows]] - lengths[: len(rows)]
        exchange.plan(rows, 0, places, from_end, (columns + shift[:, None]).clamp(0, width - 1))
        changes.expect(rows, places, _patched(rows, from_end))
        logits = _last_logits(self.model, self.recording.tokens[batch, :width], self.recording.mask[batch, :width])
        yield 0, logits[: len(rows)], changes.found[:, None].expand(-1, 2)

    @torch.no_grad()
    def _verify(self) -> None:
        """Compare both ways at each kind of layer and site, for the longest and the shortest text."""
        patches = self._samples()
        texts = sorted({patch.text for patch in patches})
        own = _last_logits(self.model, self.recording.tokens[texts], self.recording.mask[texts])
        full = self._run(patches, "full", _all_logits)
        try:
            resumed = self._run(patches, "resumed", _all_logits)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._give_up(f"resuming its blocks failed: {error}")
            return
        unpatched = (own - self.recording.logits[texts]).abs().max()
        self.difference = float(torch.maximum((full - resumed).abs().max(), unpatched))
        allowed = tolerance(full, next(self.model.parameters()).dtype)
        if not self.difference <= allowed:
            self._give_up(f"resumed logits differ from a full pass by {self.difference:.2g}; allowed is {allowed:.2g}")

    def _give_up(self, reason: str) -> None:
        self.way, self.reason = "full", reason
        log.warning("patches take full forward passes, which is slower: %s", reason)

    def _samples(self) -> list[Patch]:
        trunk = self.recording.trunk
        assert trunk is not None
        lengths = self.recording.lengths.tolist()
        kinds = {id(arguments): layer for layer, arguments in enumerate(trunk.arguments)}
        layers = sorted({0, self.n_layers - 1, *kinds.values()})
        sites = {_family(site): site for site in self.sites}.values()
        by_length = sorted(range(len(lengths)), key=lambda text: (lengths[text], text))
        samples = []
        for text, whole in ((by_length[-1], False), (by_length[0], True)):
            length = lengths[text]
            # Positions from the first difference on, since a patch with the same activation proves nothing.
            differs = self.recording.tokens[text, :length] != self.recording.tokens[:, :length]
            others = [t for t in range(len(lengths)) if lengths[t] == length and bool(differs[t].any())]
            source = (others or [text])[0]
            first = int(differs[source].long().argmax())
            last = length - 1 if whole else first
            samples += [Patch(s, layer, text, source, first, last) for s in sites for layer in layers]
        return samples


def _all_logits(outcome: Outcome) -> Tensor:
    return outcome.logits


class _Changes:
    """Hooks that compare the residual stream behind the patched layer with that of the unpatched text in the same batch."""

    def __init__(self, model: LensModel) -> None:
        self._site = resolve_site(model, "resid_post")
        self.found = torch.empty(0)
        self._rows: Sequence[_Row] = ()
        self._places: dict[int, int] = {}
        self._patched = torch.empty(0, 0, dtype=torch.bool)

    def expect(self, rows: Sequence[_Row], places: dict[int, int], patched: Bool[Tensor, "row position"]) -> None:
        """Rows of the next pass, and where their texts run unpatched."""
        self._rows, self._places, self._patched = rows, places, patched
        self.found = torch.full((len(rows),), torch.nan, device=patched.device)

    def hook(self, layer: int) -> tuple[str, Callable[..., None]]:
        """The hook of one layer."""

        def compare(activation: Tensor, hook: Any) -> None:
            mine = [i for i, row in enumerate(self._rows) if row.entry == layer]
            own = [self._places[self._rows[i].text] for i in mine]
            if mine:
                self.found[mine] = _relative_change(activation[mine], activation[own], self._patched[mine])

        return self._site.at(layer), compare


def _relative_change(
    new: Float[Tensor, "row position d_model"],
    old: Float[Tensor, "row position d_model"],
    patched: Bool[Tensor, "row position"],
) -> Float[Tensor, " row"]:
    relative = (new - old).float().norm(dim=-1) / old.float().norm(dim=-1).clamp(min=1e-30)
    return torch.where(patched, relative, 0.0).sum(1) / patched.sum(1)


def tolerance(logits: Float[Tensor, "*row vocab"], dtype: torch.dtype) -> float:
    """Difference of logits that rounding explains: in float32 2e-4 or 1e-5 of the largest logit, else eight units of rounding."""
    largest = float(logits.abs().max())
    return (
        max(2e-4, 1e-5 * largest) if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps * largest
    )


def _family(site: str) -> str:
    if site.startswith("resid"):
        return site
    return "attention" if site in ("attn_out", "q", "k", "v", "z", "o") else "mlp"


def _enter(
    trunk: Trunk,
    rows: Sequence[_Row],
    layer: int,
    n: int,
    patched: Bool[Tensor, "row position"],
    exchange: _Exchange,
    from_end: Int[Tensor, "row position"],
) -> Float[Tensor, "row position d_model"]:
    """The recorded stream of rows that enter a block; where the patch is the stream itself, with the replacement in it."""
    entering = trunk.stream[layer, [row.text for row in rows], -n:]
    members: dict[tuple[str, tuple[str, int]], list[int]] = {}
    for i, row in enumerate(rows):
        if not row.site:
            members.setdefault((row.edit, row.of), []).append(i)
    for (edit, _), chosen in members.items():
        own, new = entering[chosen], trunk.stream[layer, [rows[i].source for i in chosen], -n:]
        if edit:
            new = exchange.bound([rows[i] for i in chosen], from_end[chosen])(own, new)
        entering[chosen] = torch.where(patched[chosen][:, :, None], new, own)
    return entering


def _patched(rows: Sequence[_Row], from_end: Int[Tensor, "#row position"]) -> Bool[Tensor, "row position"]:
    """Where rows are patched, given each column's position counted from the end (1 is the last)."""
    first = torch.tensor([row.first for row in rows], device=from_end.device)[:, None]
    last = torch.tensor([row.last for row in rows], device=from_end.device)[:, None]
    return (from_end <= first) & (from_end >= last)

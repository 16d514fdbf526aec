"""Replay: patched forward passes that start where the patch is, from residual streams and keys recorded once.

A patch at layer l leaves everything before block l as it was, and in block l and above every position before the first patched
one. So each patch needs blocks l to the last, for the positions from its first one on, with the recorded keys and values of
the positions before; only the last position is unembedded. Patches share the batch: one pass goes up through the blocks, and
the patches of layer l join it there, together with the texts that the replacement comes from, so that a replacement is copied
from one row of the batch to another inside the hook and nothing but the streams, keys and values has to be kept.

What is computed are the blocks of the bridge themselves, with their hook points, so that a patch hits what `Site.at(layer)`
names. Whether that is exact is not looked up in a list of architectures but measured: `Replay` compares patches at each kind
of layer with full forward passes and falls back to those, with the reason, where they differ.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_affect.adapter import LensModel, add_hooks, run_trunk
from lens_affect.recording import BATCH_TOKENS, Recording, Trunk, last_logits, rows_of_full_pass, slices, unembed
from lens_affect.sites import Site, resolve_site

log = logging.getLogger(__name__)

KEY_SHARE = 4
"""So many keys of earlier positions weigh as much memory as one position that is computed."""


class Outcome(NamedTuple):
    """Some patched runs, for a measure to keep what it wants of them."""

    output: Float[Tensor, "row output"]
    """Logits at the last real position, or what Replay reads there instead of them; float32."""
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
        read: a 0-based block whose resid_post is the output, at the last real position, instead of the logits; runs end there.
        tokens: the output is the logits of these tokens only, in this order; it spares the rest of the vocabulary.
        batch_tokens: positions that go through a block at once.

    Attributes:
        way: `resumed`, or `full` where every patch takes a forward pass through the whole model.
        reason: why the way is `full`; empty otherwise.
        difference: largest difference of an output between the two ways in the check; NaN where nothing was compared.

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
        read: int | None = None,
        tokens: Sequence[int] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.model: Any = model
        self.recording = recording
        self.edits: Mapping[str, Edit] = edits or {}
        self.read = read
        self.tokens = None if tokens is None else list(tokens)
        self.batch_tokens = batch_tokens
        self.sites = {name: resolve_site(model, name) for name in sites}
        n_layers = int(self.model.cfg.n_layers)
        if read is not None and not 0 <= read < n_layers:
            raise ValueError(f"received read={read}; allowed are layers 0 to {n_layers - 1}, or None for the logits")
        self.top = n_layers if read is None else read + 1  # entry where runs end
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
            measure: what to keep of an Outcome, e.g. a logit difference; the whole output by default.
            progress: called with (patches done, patches in all).

        Returns:
            What was measured at the last real position of each patched text, in the order of the patches.

        Raises:
            ValueError: an unannounced site or edit, a layer, text or position that there is not, or a source that is too short.
        """
        self._check(patches)
        return self._run(patches, self.way, measure or _whole_output, progress)

    def _check(self, patches: Sequence[Patch]) -> None:
        if not patches:
            raise ValueError("received no patches; allowed are one or more")
        lengths = self.recording.lengths.tolist()
        for patch in patches:
            if patch.site not in self.sites:
                raise ValueError(
                    f"received a patch at {patch.site!r}; allowed are {list(self.sites)}: name every site in Replay(sites=...)"
                )
            if not 0 <= patch.layer < self.top:
                raise ValueError(f"received a patch at layer {patch.layer}; allowed are 0 to {self.top - 1}")
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
                for i, output, change in (
                    self._climb(rows, n, exchange) if way == "resumed" else self._pass_fully(rows, exchange, changes)
                ):
                    part = rows[i : i + len(output)]
                    of_row = [j for j, row in enumerate(part) for _ in slots[row]]
                    answered = [slot for row in part for slot in slots[row]]
                    # A stream that leaves block l enters block l + 1: the change is the one on entry for the former.
                    at_once = torch.tensor(
                        [int(patches[slot].site != "resid_post") for slot in answered], device=output.device
                    )
                    texts = torch.tensor([part[j].text for j in of_row], device=output.device)
                    measured = measure(Outcome(output[of_row], texts, change[of_row, at_once]))
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
            at_once = (
                rows_of_full_pass(self.model, width, self.batch_tokens) // 3
            )  # each row may bring its text and its source
            yield from ((rows[part], width) for part in slices(len(rows), at_once))
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
            for part in slices(similar, int(self.batch_tokens / (n + width / KEY_SHARE))):
                yield together[part], n
            rows = rows[similar:]

    def _climb(
        self, rows: list[_Row], n: int, exchange: _Exchange
    ) -> Iterator[tuple[int, Float[Tensor, "row output"], Float[Tensor, "row when"]]]:
        """Outputs and changes of rows, part by part with the number of the first: up through the blocks, each row from its entry on."""
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
        for layer in range(entries[0], self.top + 1):
            old, now = len(stream), bisect_right(entries, layer)
            if now > old:
                entering = _enter(trunk, rows[old:now], layer, n, patched[old:now], exchange, from_end[old:now])
                change[old:now, 0] = _relative_change(
                    entering, trunk.stream[layer, texts[old:now], -n:], patched[old:now]
                )
                stream = torch.cat([stream, entering])
            if layer == self.top:
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
        for i, output in self._outputs(stream[:, -1]):
            yield i, output, change[i : i + len(output)]

    def _outputs(self, stream: Float[Tensor, "row d_model"]) -> Iterator[tuple[int, Float[Tensor, "part output"]]]:
        """What is read of streams that stand at the top, in parts with the row that each starts at."""
        return unembed(self.model, stream, self.tokens) if self.read is None else iter([(0, stream.float())])

    def _outputs_of_full_pass(
        self, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row position"]
    ) -> Float[Tensor, "row output"]:
        """The same from a forward pass through the whole model, under whatever hooks are on it."""
        if self.read is None:
            logits = last_logits(self.model, tokens, mask)
            return logits if self.tokens is None else logits[:, self.tokens]
        found: list[Tensor] = []
        rows, last = torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1

        def keep(stream: Tensor, hook: Any) -> None:
            found.append(stream[rows, last].float())

        with add_hooks(self.model, [(resolve_site(self.model, "resid_post").at(self.read), keep)]):
            run_trunk(self.model, tokens, mask)
        return found[0]

    @torch.no_grad()
    def unpatched(self) -> Float[Tensor, "text output"]:
        """Outputs of the recorded texts as they are, float32."""
        recording = self.recording
        if self.read is None:
            return recording.logits if self.tokens is None else recording.logits[:, self.tokens]
        if recording.trunk is not None:
            return recording.trunk.stream[self.top, :, -1].float()
        at_once = rows_of_full_pass(self.model, recording.tokens.shape[1], self.batch_tokens)
        parts = slices(len(recording.tokens), at_once)
        return torch.cat([self._outputs_of_full_pass(recording.tokens[rows], recording.mask[rows]) for rows in parts])

    def _pass_fully(
        self, rows: list[_Row], exchange: _Exchange, changes: "_Changes"
    ) -> Iterator[tuple[int, Float[Tensor, "row output"], Float[Tensor, "row when"]]]:
        """Outputs and changes of rows by one forward pass through the whole model, their texts and sources beside them."""
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
        output = self._outputs_of_full_pass(self.recording.tokens[batch, :width], self.recording.mask[batch, :width])
        yield 0, output[: len(rows)], changes.found[:, None].expand(-1, 2)

    @torch.no_grad()
    def _verify(self) -> None:
        """Compare both ways at each kind of layer and site, for the longest and the shortest text."""
        patches = self._samples()
        texts = sorted({patch.text for patch in patches})
        own = self._outputs_of_full_pass(self.recording.tokens[texts], self.recording.mask[texts])
        full = self._run(patches, "full", _whole_output)
        try:
            resumed = self._run(patches, "resumed", _whole_output)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._give_up(f"resuming its blocks failed: {error}")
            return
        unpatched = (own - self.unpatched()[texts]).abs().max()
        self.difference = float(torch.maximum((full - resumed).abs().max(), unpatched))
        allowed = tolerance(full, next(self.model.parameters()).dtype)
        if not self.difference <= allowed:
            self._give_up(f"resumed outputs differ from a full pass by {self.difference:.2g}; allowed is {allowed:.2g}")

    def _give_up(self, reason: str) -> None:
        self.way, self.reason = "full", reason
        log.warning("patches take full forward passes, which is slower: %s", reason)

    def _samples(self) -> list[Patch]:
        trunk = self.recording.trunk
        assert trunk is not None
        lengths = self.recording.lengths.tolist()
        kinds = {id(arguments): layer for layer, arguments in enumerate(trunk.arguments[: self.top])}
        layers = sorted({0, self.top - 1, *kinds.values()})
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


def _whole_output(outcome: Outcome) -> Tensor:
    return outcome.output


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


def tolerance(output: Float[Tensor, "*row output"], dtype: torch.dtype) -> float:
    """Difference of outputs that rounding explains: in float32 2e-4 or 1e-5 of the largest, else eight units of rounding."""
    largest = float(output.abs().max())
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

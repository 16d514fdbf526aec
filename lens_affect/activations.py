"""Read sites over stimuli: one pooled vector per text, site and layer, streamed to disk.

Pooling happens inside the hook and the unembedding is never computed, so reading costs what a bare forward pass costs.
Batches are padded on the right with a mask, so a text gives the same vector alone and in any batch.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_affect.adapter import (
    Encoded,
    LensModel,
    add_hooks,
    cast_parameters,
    context_window,
    device_of,
    encode,
    model_info,
    pad_right,
    pad_token_id,
    run_trunk,
)
from lens_affect.results import Provenance, Stopwatch, load_result, save_result
from lens_affect.selfchecks import ensure_checked
from lens_affect.sites import SITES, Site, resolve_site
from lens_affect.spool import Moments, Spool
from lens_affect.stimuli import Stimuli
from lens_affect.unwrapping import plain_hooks, plain_trunk, reads_plain

log = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 1024
"""Padded tokens per batch on a CPU: more does not run faster there and only takes memory."""
SINK_RATIO = 3.0
"""A token is a sink at a layer when its norm exceeds this many times its text's median norm there. In SmolLM2-135M ordinary
tokens stay below 2.5 and sinks lie between 5 and 180 (" the" in blocks 2 to 8, some first words from block 11 on)."""
POOLINGS = ("mean", "mean_without_sinks", "last", "midpoint")
"""Poolings by name; beside them `after:N`."""
_AFTER = re.compile(r"after:\d+", re.ASCII)
MINIMUM_COSINE = 0.999
"""bfloat16 is kept only while pooled vectors agree with float32 at least this well."""

Progress = Callable[[int, int], None]
"""Called with the number of texts done and in all."""


@dataclass(frozen=True)
class Activations:
    """Pooled activations with their stimuli."""

    arrays: dict[str, Float[Tensor, "stimulus layer width"]]
    """One array per site; memory-mapped after extraction, so pages are read when they are touched."""
    squares: dict[str, Float[Tensor, "stimulus layer width"]]
    """With keep="moments": mean square of each cell; empty otherwise."""
    counts: Int[Tensor, " stimulus"]
    """Texts behind each row: 1 with keep="pooled"; the size of the (emotion, group) cell with keep="moments"."""
    layers: tuple[int, ...]
    """0-based block of each entry of the layer axis."""
    embedding: dict[str, Float[Tensor, "stimulus d_model"]]
    """`{"embedding": ...}`: pooled input of block 0, the lexical baseline; empty if resid_post was not read."""
    stimuli: Stimuli
    """The texts; with keep="moments" the first text of each cell stands for it."""
    n_layers: int
    """Blocks of the model, for depths."""
    pooling: str
    """`mean`, `mean_without_sinks`, `last`, `midpoint` or `after:N`."""
    texts_with_sinks: dict[str, Int[Tensor, " layer"]]
    """Per site and layer: texts in which some pooled token is a sink (`SINK_RATIO`). With `mean` one such token can outweigh all others.
    Counted over the texts that were read; rows taken out by `select` keep this count."""
    provenance: Provenance
    """Model, numerics, stimuli, versions."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that were read."""
        return tuple(self.arrays)

    @property
    def values(self) -> Float[Tensor, "stimulus layer width"]:
        """The array of a single site.

        Raises:
            ValueError: several sites were read; choose one with `at(site)`.
        """
        if len(self.arrays) != 1:
            raise ValueError(
                f"received activations of {list(self.sites)}; .values needs one site: use .at('{self.sites[0]}').values"
            )
        return next(iter(self.arrays.values()))

    def at(self, site: str) -> "Activations":
        """The activations of one site."""
        if site not in self.arrays:
            raise ValueError(
                f"site {site!r} was not read; there are {list(self.sites)}: extract it with sites=[{site!r}]"
            )
        squares = {site: self.squares[site]} if self.squares else {}
        return replace(
            self,
            arrays={site: self.arrays[site]},
            squares=squares,
            embedding=self.embedding if site == "resid_post" else {},
            texts_with_sinks={site: self.texts_with_sinks[site]},
        )

    def select(
        self,
        *,
        emotions: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        rows: Sequence[int] | None = None,
    ) -> "Activations":
        """The rows with these emotions, of these groups, at these row numbers (as Stimuli.select)."""
        chosen = range(len(self.stimuli)) if rows is None else rows
        keep = [
            i
            for i in chosen
            if (emotions is None or self.stimuli.emotions[i] in emotions)
            and (groups is None or self.stimuli.groups[i] in groups)
        ]
        stimuli = self.stimuli.select(emotions=emotions, groups=groups, rows=rows)  # raises for unknown labels
        index = torch.tensor(keep)
        return replace(
            self,
            arrays={k: v[index] for k, v in self.arrays.items()},
            squares={k: v[index] for k, v in self.squares.items()},
            embedding={k: v[index] for k, v in self.embedding.items()},
            counts=self.counts[index],
            stimuli=stimuli,
        )

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Save as a folder (see results.py)."""
        return save_result(self, folder, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Activations":
        """Load what `save` wrote; arrays are memory-mapped."""
        return load_result(cls, folder)

    def __str__(self) -> str:
        shapes = ", ".join(f"{site} {list(values.shape)}" for site, values in self.arrays.items())
        return (
            f"{self.provenance.title}: {int(self.counts.sum())} texts, {self.pooling} pooling, {shapes}\n"
            f"{self.provenance.dtype}, {self.provenance.numerics} numerics, BOS {self.provenance.bos}"
        )

    def _repr_html_(self) -> str:
        import html

        return "<p>" + html.escape(str(self)).replace("\n", "<br>") + "</p>"


def extract_activations(
    model: LensModel,
    stimuli: Stimuli,
    *,
    sites: Sequence[str] | str = ("resid_post",),
    layers: Sequence[int] | None = None,
    pooling: str = "mean",
    keep: Literal["pooled", "moments"] = "pooled",
    batch_tokens: int | Literal["auto"] = "auto",
    own_bos: bool = False,
    tokens: Sequence[Sequence[int]] | None = None,
    spool: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Read sites over stimuli and pool over each text's own tokens.

    Special tokens, padding, the prompt and position 0 (the attention sink) never enter. A text with a prompt is read after
    it, so that generated and given texts share this one reader.

    Args:
        model: a bridge or a HookedTransformer.
        stimuli: the texts.
        sites: names from sites.SITES.
        layers: 0-based blocks; all by default. The forward pass ends after the last one.
        pooling: `mean` over the text's tokens, `mean_without_sinks` (leaving out, layer by layer, tokens whose norm exceeds SINK_RATIO
            times the text's median: attention sinks beyond position 0), `last` token, `midpoint` (token n // 2 of the text; the last prompt token if the
            text has at most 10: arXiv:2604.04064), or `after:N` (mean from the text's token N on).
        keep: `pooled` keeps one row per text, in memory-mapped files; `moments` keeps mean and mean square per (emotion, group)
            cell, in memory that does not grow with the number of texts.
        batch_tokens: padded tokens per batch.
        own_bos: keep the tokenizer's own BOS default (protocol jeong2026).
        tokens: of each text as a model generated it, without those of the prompt; by default the tokenizer cuts the texts.
        spool: folder for the memory-mapped files; by default a temporary one that lives as long as the result.
        progress: called with (texts done, texts in all).

    Returns:
        Activations with `values[stimulus, layer, width]` per site in float32; the same text gives the same vector in any batch.

    Raises:
        ValueError: a text beyond the context window or too short for the pooling, an unknown site or layer, or activations
            that are not finite.
        OSError: the disk is full.

    Example:
        >>> extract_activations(model, load_stimuli("passages"), pooling="mean").values.shape  # doctest: +SKIP
        torch.Size([276, 30, 576])
    """
    return extract_poolings(
        model,
        stimuli,
        (pooling,),
        sites=sites,
        layers=layers,
        keep=keep,
        batch_tokens=batch_tokens,
        own_bos=own_bos,
        tokens=tokens,
        spool=spool,
        progress=progress,
    )[pooling]


def extract_poolings(
    model: LensModel,
    stimuli: Stimuli,
    poolings: Sequence[str],
    *,
    sites: Sequence[str] | str = ("resid_post",),
    layers: Sequence[int] | None = None,
    keep: Literal["pooled", "moments"] = "pooled",
    batch_tokens: int | Literal["auto"] = "auto",
    own_bos: bool = False,
    tokens: Sequence[Sequence[int]] | None = None,
    spool: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Activations]:
    """Several poolings of the same texts from one reading; arguments, result and errors as in extract_activations.

    Args:
        model: a bridge or a HookedTransformer.
        stimuli: the texts.
        poolings: names as in extract_activations, each once.
        sites: names from sites.SITES.
        layers: 0-based blocks; all by default. The forward pass ends after the last one.
        keep: `pooled` or `moments`.
        batch_tokens: padded tokens per batch.
        own_bos: keep the tokenizer's own BOS default.
        tokens: of each text as a model generated it.
        spool: folder for the files, with one folder per pooling in it if there are several.
        progress: called with (texts done, texts in all).
    """
    clock = Stopwatch()
    ensure_checked(model)
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    if not names:
        raise ValueError(f"received no sites; allowed are {list(SITES)}")
    if not poolings or len(set(poolings)) != len(poolings):
        raise ValueError(f"received poolings {list(poolings)}; allowed are one or more different ones")
    for name in poolings:
        check_pooling(name)
    resolved = [resolve_site(model, name) for name in names]
    chosen = _check_layers(layers, int(model.cfg.n_layers))
    encoded = _encode_all(model, stimuli, own_bos=own_bos, tokens=tokens)
    weights = {p: [_pooling_weights(e, p, row) for row, e in enumerate(encoded)] for p in poolings}
    if keep not in ("pooled", "moments"):
        raise ValueError(f"received keep={keep!r}; allowed are 'pooled' and 'moments'")
    _settle_precision(model, encoded, weights)

    reader = _Reader(model, resolved, chosen, poolings)
    folders = {p: spool if spool is None or len(poolings) == 1 else Path(spool) / p.replace(":", "-") for p in poolings}
    stores: dict[str, Spool | Moments] = {}
    try:
        for p in poolings:
            pooled = keep == "pooled"
            stores[p] = Spool(len(stimuli), reader.shapes, folders[p]) if pooled else Moments(stimuli, reader.shapes)
        _read_all(reader, stores, encoded, weights, batch_tokens, progress)
        stored = {p: store.finish() for p, store in stores.items()}
    except BaseException:
        for store in stores.values():
            store.discard()
        raise
    provenance = model_info(model).provenance.updated(
        stimuli_hash=stimuli.hash,
        bos="+".join(sorted({e.bos for e in encoded})),
        elapsed_seconds=clock.seconds,
    )
    found = {}
    for pooling, kept in stored.items():
        sinks = reader.texts_with_sinks[pooling]
        _warn_of_sinks(sinks, pooling, len(stimuli))
        embedding = kept.arrays.pop("embedding", None)
        kept.squares.pop("embedding", None)
        found[pooling] = Activations(
            arrays=kept.arrays,
            squares=kept.squares,
            counts=kept.counts,
            layers=chosen,
            embedding={} if embedding is None else {"embedding": embedding[:, 0]},
            stimuli=stimuli if keep == "pooled" else stimuli.select(rows=kept.rows),
            n_layers=int(model.cfg.n_layers),
            pooling=pooling,
            texts_with_sinks=sinks,
            provenance=provenance,
        )
    return found


class _Reader:
    """Hooks that pool, kept on the model while batch after batch passes: adding them costs a bridge 2 % of a batch's time."""

    def __init__(self, model: LensModel, sites: list[Site], layers: tuple[int, ...], poolings: Sequence[str]) -> None:
        self.poolings = tuple(poolings)
        self.texts_with_sinks = {
            p: {s.name: torch.zeros(len(layers), dtype=torch.long) for s in sites} for p in self.poolings
        }
        self.shapes = {s.name: (len(layers), s.width) for s in sites}
        self.model, self.layers = model, layers
        self._weights: dict[str, Tensor] = {}
        self._pooled: dict[str, dict[str, Tensor]] = {}
        self._sites = {s.name: s for s in sites}
        if "resid_post" in self.shapes:
            self.shapes["embedding"] = (1, int(model.cfg.d_model))
        self._placed = contextlib.ExitStack()

    def __enter__(self) -> "_Reader":
        between_blocks = set(self._sites) <= {"resid_post"} and reads_plain(self.model)
        with contextlib.ExitStack() as placed:
            if between_blocks:
                blocks = placed.enter_context(plain_trunk(self.model))
                placed.enter_context(plain_hooks(blocks, {0: self._pool("embedding", 0)}, self._of_blocks()))
            else:
                placed.enter_context(add_hooks(self.model, self._of_points()))
            self._placed = placed.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._placed.__exit__(*error)

    def _of_blocks(self) -> dict[int, Callable[..., None]]:
        """What is done with the output of each block that is read."""
        pools = {layer: self._pool("resid_post", i) for i, layer in enumerate(self.layers)}
        if max(self.layers) + 1 == int(self.model.cfg.n_layers):
            return pools
        last = pools[max(self.layers)]

        def pool_and_stop(value: Tensor) -> None:
            last(value)
            _stop(value)

        return {**pools, max(self.layers): pool_and_stop}

    def _of_points(self) -> list[tuple[str, Callable[..., None]]]:
        """What is done at each hook point that is read."""
        found = [
            (s.at(layer), self._pool(s.name, i)) for s in self._sites.values() for i, layer in enumerate(self.layers)
        ]
        if "resid_post" in self._sites:
            found.append((resolve_site(self.model, "resid_pre").at(0), self._pool("embedding", 0)))
        if max(self.layers) + 1 < int(self.model.cfg.n_layers):
            found.append((resolve_site(self.model, "resid_post").at(max(self.layers)), _stop))
        return found

    def read(self, batch: list[Encoded], weights: dict[str, list[dict[int, float]]]) -> dict[str, dict[str, Tensor]]:
        """Pooled rows of one batch, `[row, layer, width]`, by pooling and site; `embedding` beside resid_post."""
        device = device_of(self.model)
        tokens, mask = pad_right(batch, pad_token_id(self.model), device)
        self._weights = {}
        for pooling, of_rows in weights.items():
            weight = torch.zeros(tokens.shape, dtype=torch.float32)
            for row, positions in enumerate(of_rows):
                weight[row, list(positions)] = torch.tensor(list(positions.values()))
            self._weights[pooling] = weight.to(device)
        self._pooled = {
            p: {name: torch.full((len(batch), *shape), math.nan) for name, shape in self.shapes.items()}
            for p in weights
        }
        with contextlib.suppress(_Enough):
            run_trunk(self.model, tokens, mask)
        return self._pooled

    def _pool(self, name: str, entry: int) -> Callable[..., None]:
        width = self.shapes[name][1] if name in self.shapes else int(self.model.cfg.d_model)

        def hook(value: Tensor, hook: Any = None) -> None:
            flat = value.flatten(2)
            if flat.shape[-1] != width:
                raise RuntimeError(
                    f"{getattr(hook, 'name', 'a hook')} is {flat.shape[-1]} wide; its config promises {width}"
                )
            flat = flat.float()
            for pooling, weight in self._weights.items():
                used = weight
                if name != "embedding":
                    is_sink = _sinks(flat, weight)
                    self.texts_with_sinks[pooling][name][entry] += int(is_sink.any(1).sum())
                    if pooling == "mean_without_sinks":
                        used = weight * ~is_sink
                        used = used / used.sum(1, keepdim=True)
                self._pooled[pooling][name][:, entry].copy_(torch.bmm(used[:, None, :], flat)[:, 0])

        return hook


class _Enough(Exception):
    """The last block that is read has been read."""


def _stop(value: Tensor, hook: Any = None) -> None:
    raise _Enough


def _read_all(
    reader: _Reader,
    stores: dict[str, Spool | Moments],
    encoded: list[Encoded],
    weights: dict[str, list[dict[int, float]]],
    batch_tokens: int | Literal["auto"],
    progress: Progress | None,
) -> None:
    """Every text through the model, in batches of similar length."""
    budget = DEFAULT_BATCH_TOKENS if batch_tokens == "auto" else int(batch_tokens)
    done = 0
    with reader:
        for rows in _batches([len(e.ids) for e in encoded], budget):
            pooled = reader.read([encoded[r] for r in rows], {p: [w[r] for r in rows] for p, w in weights.items()})
            for pooling, values in pooled.items():
                _require_finite(values, rows, reader)
                stores[pooling].write(rows, values)
            done += len(rows)
            if progress:
                progress(done, len(encoded))


def check_pooling(pooling: str) -> None:
    """Whether a pooling is known.

    Raises:
        ValueError: it is not.
    """
    if pooling not in POOLINGS and not _AFTER.fullmatch(pooling):
        allowed = ", ".join(map(repr, POOLINGS))
        raise ValueError(f"received pooling={pooling!r}; allowed are {allowed} and 'after:N' (N a number)")


def _check_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    chosen = tuple(range(n_layers)) if layers is None else tuple(layers)
    if not chosen or any(not 0 <= layer < n_layers for layer in chosen):
        raise ValueError(
            f"received layers {list(chosen)}; allowed are 0 to {n_layers - 1} (layer l is the output of block l)"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"received layers {list(chosen)}; allowed is each layer once: leave out the repeated ones")
    return chosen


def _encode_all(
    model: LensModel, stimuli: Stimuli, *, own_bos: bool, tokens: Sequence[Sequence[int]] | None
) -> list[Encoded]:
    if tokens is not None and len(tokens) != len(stimuli):
        raise ValueError(
            f"received tokens of {len(tokens)} texts for {len(stimuli)} texts; allowed is one entry per text"
        )
    encoded = [
        encode(model, text, prompt, own_bos=own_bos, tokens=cut)
        for text, prompt, cut in zip(stimuli.texts, stimuli.prompts, tokens or [None] * len(stimuli), strict=True)
    ]
    window = context_window(model)
    long = [(row, len(e.ids)) for row, e in enumerate(encoded) if len(e.ids) > window]
    if long:
        row, length = max(long, key=lambda item: item[1])
        raise ValueError(
            f"received {len(long)} texts beyond the context window of {window} tokens (row {row} has {length}); shorten them, or "
            "leave them out with stimuli.select(rows=...)"
        )
    return encoded


def _pooling_weights(encoded: Encoded, pooling: str, row: int) -> dict[int, float]:
    """Position -> weight; the weights of a text sum to 1."""
    content = encoded.content
    if pooling == "midpoint":
        # The paper's rule counts tokens after the prompt, special ones too.
        n = encoded.n_text
        position = encoded.start + n // 2 if n > 10 else encoded.start - 1
        if position < 1:
            raise ValueError(
                f"received a text of {n} tokens without a prompt in row {row}; midpoint pooling needs more than 10"
            )
        return {position: 1.0}
    if pooling == "last":
        positions = content[-1:]
    elif pooling in ("mean", "mean_without_sinks"):
        positions = content
    else:
        positions = content[int(pooling.removeprefix("after:")) :]
    if not positions:
        raise ValueError(
            f"received a text with {len(content)} usable tokens in row {row}; too short for pooling={pooling!r}: leave it out or pool by 'mean'"
        )
    return {p: 1 / len(positions) for p in positions}


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length whose padded size stays within the budget (always at least one row).

    Longest first: memory peaks at the start, not hours into a run.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        size = max(1, budget // lengths[order[start]])
        yield order[start : start + size]
        start += size


def _sinks(
    flat: Float[Tensor, "row position width"], weight: Float[Tensor, "row position"]
) -> Bool[Tensor, "row position"]:
    """Pooled tokens whose norm exceeds SINK_RATIO times the median norm of their text's pooled tokens."""
    norms = torch.where(weight > 0, flat.norm(dim=-1), torch.nan)
    return norms > SINK_RATIO * norms.nanmedian(dim=1, keepdim=True).values


def _warn_of_sinks(sinks: dict[str, Tensor], pooling: str, n_texts: int) -> None:
    most = int(sinks["resid_post"].max()) if pooling == "mean" and "resid_post" in sinks else 0
    if most:
        log.warning(
            "%d of %d texts hold an attention sink beyond position 0 at some layer; in a plain mean one such token can outweigh all "
            "others: pooling='mean_without_sinks' leaves it out",
            most,
            n_texts,
        )


def _require_finite(pooled: dict[str, Tensor], rows: list[int], reader: "_Reader") -> None:
    for site, values in pooled.items():
        bad = (~values.isfinite()).any(-1).nonzero()
        if len(bad):
            row, entry = bad[0].tolist()
            layer = "embedding" if site == "embedding" else reader.layers[entry]
            raise ValueError(
                f"received activations that are not finite: {site}, layer {layer}, text {rows[row]}, in "
                f"{model_info(reader.model).provenance.dtype}; load the model with dtype=torch.float32 or bfloat16 (Gemma overflows in float16)"
            )


def _settle_precision(model: LensModel, encoded: list[Encoded], weights: dict[str, list[dict[int, float]]]) -> None:
    """Where bfloat16 was chosen automatically: compare it with float32 on the texts that are first read with a pooling, and go back if it is too coarse."""
    info = model_info(model)
    if not info.precision_is_automatic or info.restore_float32 is None or set(weights) <= info.verified_poolings:
        return
    rows = sorted({0, len(encoded) // 3, 2 * len(encoded) // 3, len(encoded) - 1})
    batch, pooling = [encoded[r] for r in rows], {p: [w[r] for r in rows] for p, w in weights.items()}
    site, layers = [resolve_site(model, "resid_post")], tuple(range(int(model.cfg.n_layers)))
    with _Reader(model, site, layers, tuple(weights)) as reader:
        coarse = reader.read(batch, pooling)
    info.restore_float32()  # parameters go by their names, which are others while the wrappers are off
    with _Reader(model, site, layers, tuple(weights)) as reader:
        fine = reader.read(batch, pooling)
    worst = min(torch.cosine_similarity(coarse[p][k], fine[p][k], dim=-1).min().item() for p in fine for k in fine[p])
    if worst >= MINIMUM_COSINE:
        cast_parameters(model, torch.bfloat16)  # pyright: ignore[reportArgumentType]
        info.provenance = replace(info.provenance, dtype="bfloat16")
        info.precision_is_automatic = True
        info.verified_poolings |= set(weights)
    else:
        log.warning("bfloat16 keeps a cosine of only %.4f with float32 under this pooling: reading in float32", worst)

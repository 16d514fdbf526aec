"""LoRA adapters read as what they add to each weight, (alpha / r) B A, without merging and mostly without multiplying out.

Rank and alpha come from the adapter's own config (rank_pattern, alpha_pattern, rsLoRA). Kinds of adapter that change more than that are refused.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.checkpoints import NO_TEXT, Part, Store, find_parts, folder_store, plain_name
from lens_affect.tuned import SCALE, Tuned

CONFIG = "adapter_config.json"
_REFUSED = {
    "use_dora": "DoRA, which rescales the whole weight",
    "lora_bias": "LoRA with biases of its own",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained rows of an embedding",
    "alora_invocation_tokens": "LoRA that switches on within a text",
}


@dataclass(frozen=True)
class LowRank:
    """A change of a weight as a product, `left @ right`, of low rank."""

    left: Float[Tensor, "outputs rank"]
    """Already times alpha / r."""
    right: Float[Tensor, "rank inputs"]
    """The matrix A."""

    def dense(self) -> Float[Tensor, "outputs inputs"]:
        """Multiplied out."""
        return self.left @ self.right


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: what it adds, by the module that it targets."""

    title: str
    """Name as a reader knows it."""
    source: str | None
    """Folder or hub id; None for one in memory."""
    base: str | None
    """Base model that its config names."""
    config: Mapping[str, Any]
    """Its adapter config."""
    targets: Mapping[str, tuple[str, str, float]]
    """Names of B and A, and alpha / r, by owner (checkpoints.Part.owner)."""
    saved: Mapping[str, Part]
    """Tensors that it replaces as a whole, by key."""
    store: Store = field(repr=False)
    """Where tensors are read."""

    def change(self, part: Part) -> LowRank | None:
        """What it adds to a weight of its base; None where it leaves it alone."""
        if part.owner not in self.targets or part.module == "bias":
            return None
        b_name, a_name, scale = self.targets[part.owner]
        b, a = (self.store.read(name, slice(None)).float() for name in (b_name, a_name))
        if part.module in ("embed", "unembed") and "lora_embedding" in b_name:
            return LowRank(scale * a.T, b.T)  # an embedding is stored the other way round
        return LowRank(scale * b[part.start : part.start + part.shape[0]], a)

    def shape(self, owner: str) -> tuple[int, int]:
        """(outputs, inputs) of what it adds to a module."""
        b_name, a_name, _ = self.targets[owner]
        if "lora_embedding" in b_name:
            return self.store.shapes[a_name][1], self.store.shapes[b_name][0]
        return self.store.shapes[b_name][0], self.store.shapes[a_name][1]


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (folder / CONFIG).is_file()


def open_adapter_folder(folder: Path, name: str) -> Adapter:
    """Open an adapter that peft saved.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        name: what the user calls it.

    Raises:
        ValueError: no LoRA, a kind of LoRA that changes more than (alpha / r) B A, a damaged file, or matrices without their partner.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"received the damaged {folder / CONFIG} ({error}); save the adapter again") from error
    store = folder_store(folder, "adapter_model.safetensors")
    return _assemble(Path(name).name, name, base, config, store)


def open_adapter_model(model: Any) -> Adapter:
    """Open the LoRA layers of a model in memory: a PeftModel, or the model inside one.

    Args:
        model: it is read when a change is asked for.

    Raises:
        ValueError: several adapters active at once, or none.
    """
    found = getattr(model, "peft_config", None) or {}
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    active = sorted({name for layer in layers for name in layer.active_adapters if name in {*layer.lora_A, *found}})
    if len(active) != 1:
        raise ValueError(
            f"received a model with the active adapters {active}; allowed is exactly one: model.set_adapter(name), or save it and pass the folder"
        )
    name = active[0]
    config = found[name].to_dict() if name in found else _measured_config(model, name)
    tensors = {
        key.replace(f".{name}.", ".").removesuffix(f".{name}"): tensor
        for key, tensor in model.named_parameters()
        if ".lora_" in key and (f".{name}." in key or key.endswith(f".{name}"))
    }
    tensors |= {
        key.replace(f".modules_to_save.{name}", ""): tensor
        for key, tensor in model.named_parameters()
        if f".modules_to_save.{name}." in key
    }
    store = Store(
        {key: tuple(t.shape) for key, t in tensors.items()},
        {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()},
        lambda key, rows: tensors[key].detach()[rows],
    )
    return _assemble(f"LoRA {name!r} in memory", None, config.get("base_model_name_or_path"), config, store)


def open_adapter_run(run: Tuned) -> Adapter:
    """What tune_module trained, as an adapter: LoRA factors, or whole weights that replace the base's.

    Args:
        run: one run.

    Raises:
        ValueError: a run that trained nothing.
    """
    if not run.trained:
        raise ValueError(f"received the arm {run.arm.name!r}, which trained nothing; there is no change to read")
    factors = {name: value for name, value in run.trained.items() if name.endswith(".lora_A.weight")}
    ranks = {re.escape(name.removesuffix(".lora_A.weight")): value.shape[0] for name, value in factors.items()}
    config = {"peft_type": "LORA", "r": 1, "rank_pattern": ranks}
    config["alpha_pattern"] = {name: SCALE * rank for name, rank in ranks.items()}
    store = Store(
        {name: tuple(value.shape) for name, value in run.trained.items()},
        {name: str(value.dtype).removeprefix("torch.") for name, value in run.trained.items()},
        lambda name, rows: run.trained[name][rows],
    )
    return _assemble(f"{run.arm.name} tuned on {run.task}, seed {run.seed}", None, None, config, store)


def _measured_config(model: Any, name: str) -> dict[str, Any]:
    """A config for LoRA layers whose PeftModel is out of reach: alpha as the layers' own scaling says."""
    scales = {plain_name(path): m for path, m in model.named_modules() if hasattr(m, "lora_A") and name in m.lora_A}
    ranks = {path: int(layer.r[name]) for path, layer in scales.items()}
    alphas = {re.escape(path): float(layer.scaling[name]) * ranks[path] for path, layer in scales.items()}
    dora = any(bool(getattr(layer, "use_dora", {}).get(name)) for layer in scales.values())
    patterns = {re.escape(path): rank for path, rank in ranks.items()}
    return {"peft_type": "LORA", "r": 1, "rank_pattern": patterns, "alpha_pattern": alphas, "use_dora": dora}


def _assemble(title: str, source: str | None, base: str | None, config: Mapping[str, Any], store: Store) -> Adapter:
    _refuse_other_kinds(title, config)
    pairs: dict[str, dict[str, str]] = {}
    rest = {}
    for name in store.shapes:
        match = re.search(r"^(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?$", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = name
        elif ".lora_" in name:
            raise ValueError(f"received the adapter {title} with {name}, which is no matrix of LoRA; it cannot be read")
        else:
            rest[name] = store.shapes[name]
    alone = next((path for path, found in pairs.items() if set(found) != {"A", "B"}), None)
    if alone or not (pairs or rest):
        raise ValueError(
            f"received the adapter {title} with {'one matrix only for ' + alone if alone else 'no LoRA matrices'}; save it again"
        )
    targets = {}
    for path, found in pairs.items():
        plain = plain_name(path)
        a_shape, b_shape = store.shapes[found["A"]], store.shapes[found["B"]]
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
            raise ValueError(
                f"received the adapter {title} with A {a_shape} and B {b_shape} for {plain}; allowed are matrices of one rank: save it again"
            )
        owner = _owner(plain)
        if owner in targets:
            raise ValueError(
                f"received the adapter {title} with {targets[owner][0]} and {found['B']}, which both stand for {owner}; allowed is one change of each "
                "map: merge the adapter and pass the merged folder"
            )
        targets[owner] = (found["B"], found["A"], _scale(plain, a_shape[0], config, title))
    # Whole tensors have the shapes of the base's; the fused ones of a family cannot be told apart without its config.
    saved = find_parts(rest, {"model_type": None})
    return Adapter(title, source, base or None, config, targets, saved, store)


def _owner(path: str) -> str:
    """Name of a target as checkpoints.Part.owner has it, such as `layers.3.mlp.gate_proj`; whole outside the language model."""
    if NO_TEXT.search(path):
        return path
    match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$", path)
    if match:
        return f"layers.{int(match[1])}.{match[2]}"
    names = {"embed_tokens": "embed", "wte": "embed", "lm_head": "unembed"}
    last = path.rsplit(".", maxsplit=1)[-1]
    return names.get(last, path)


def _refuse_other_kinds(title: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        raise ValueError(
            f"received the adapter {title} of kind {kind!r}; allowed is LORA: merge it and pass the merged folder"
        )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ValueError(
                f"received the adapter {title} with {what} ({key}); allowed is plain LoRA: merge it and pass the merged folder"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(
            f"received the adapter {title} started by {start!r}, which changed the base as well; allowed is one that was converted to plain "
            "LoRA (save_pretrained(path_initial_model_for_weight_conversion=...))"
        )


def _scale(path: str, rank: int, config: Mapping[str, Any], title: str) -> float:
    stated = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    if stated != rank or alpha is None:
        raise ValueError(
            f"received the adapter {title} with matrices of rank {rank} for {path}, where its config says {stated} and alpha {alpha}; config "
            "and matrices belong to different adapters"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Value of the first pattern that ends like the path, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def multiplied(change: LowRank | Tensor) -> Tensor:
    """A change as a full matrix, float32."""
    return change.dense() if isinstance(change, LowRank) else change.to(torch.float32)

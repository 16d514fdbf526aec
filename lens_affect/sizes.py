"""Linear modules by name, their shapes from a config, and how many parameters an arm of a comparison trains. No weights are read.

A module is one linear map of a block: q, k, v, o, gate, up, down. GPT-2 has no gate; its two MLP matrices are `up` and `down`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
"""Linear modules of a gated block, in the order of tables and figures."""
GROUPS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "all": MODULES, "none": ()}
"""Names that stand for several modules, or for none."""


def choose_modules(
    modules: str | Sequence[str], *, present: Sequence[str] = MODULES, extra: Sequence[str] = ()
) -> tuple[str, ...]:
    """Module names, groups resolved, each once and in the order of MODULES.

    Args:
        modules: a name, a group (`attention`, `mlp`, `all`, `none`), names joined by commas or plus signs, or several of these.
        present: modules this model has; a group takes those of it that are there.
        extra: further names that are allowed, such as `embed`.

    Returns:
        The names; none for `none` and for an empty sequence.

    Raises:
        ValueError: a name that is unknown, or that matches nothing in this model.

    Example:
        >>> choose_modules("attention+gate")
        ('q', 'k', 'v', 'o', 'gate')
    """
    named = [modules] if isinstance(modules, str) else list(modules)
    words = [word.strip() for name in named for word in name.replace("+", ",").split(",") if word.strip()]
    if named and not words:
        raise ValueError(f"received modules {modules!r}, which name nothing; allowed are {_allowed(present, extra)}")
    found: set[str] = set()
    for word in words:
        if word in GROUPS:
            found |= set(GROUPS[word]) & set(present)
        elif word in present or word in extra:
            found.add(word)
        elif word in MODULES:
            raise ValueError(f"received module {word!r}, which this model does not have; it has {list(present)}")
        else:
            raise ValueError(f"received module {word!r}; allowed are {_allowed(present, extra)}: choose one of them")
    return tuple(name for name in (*MODULES, *extra) if name in found)


def _allowed(present: Sequence[str], extra: Sequence[str]) -> str:
    return f"{[*present, *extra]} and the groups {list(GROUPS)}"


def choose_blocks(layers: int | Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """0-based blocks in order; all of them by default.

    Raises:
        ValueError: none, one twice, or one that is not there.
    """
    chosen = (
        tuple(range(n_layers)) if layers is None else (layers,) if isinstance(layers, int) else tuple(sorted(layers))
    )
    if not chosen or len(set(chosen)) != len(chosen) or any(not 0 <= layer < n_layers for layer in chosen):
        raise ValueError(f"received layers {list(chosen)}; allowed are different ones of 0 to {n_layers - 1}")
    return chosen


def read_config(config: Any) -> dict[str, Any]:
    """A model's config as a dict: of its text part, where it also reads images or audio.

    Args:
        config: a dict, a transformers config, a JSON file, or a folder with a `config.json`.

    Raises:
        ValueError: a file that is not there or holds no JSON object.
    """
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"received {path}, which holds no readable config ({error}); allowed is a model's config.json"
            ) from error
    else:
        found = config if isinstance(config, Mapping) else config.to_dict()
    if not isinstance(found, Mapping):
        raise ValueError(f"received a config that is a {type(found).__name__}; allowed is a JSON object")
    inner = next((found[k] for k in ("text_config", "llm_config") if isinstance(found.get(k), Mapping)), {})
    return {**found, **inner}


_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head": ("head_dim",),
}
_WITHOUT_GATE = {"gpt2", "gpt_neo", "gptj", "phi", "opt", "gpt_bigcode", "starcoder2"}
_MANY_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _field(config: Mapping[str, Any], name: str) -> int | None:
    for key in _NAMES[name]:
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def attention_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Width of q and of k (and v): heads times their size, which need not be the hidden size (Gemma).

    Raises:
        ValueError: a config without the sizes.
    """
    hidden, heads = _field(config, "hidden"), _field(config, "heads")
    if not hidden or not heads:
        raise ValueError(
            f"received a config without {_NAMES['hidden'][0]} or {_NAMES['heads'][0]} (keys: {sorted(config)[:12]}); pass the "
            "config.json of a decoder language model"
        )
    head = _field(config, "head") or hidden // heads
    return heads * head, (_field(config, "kv_heads") or heads) * head


def count_layers(config: Any) -> int:
    """Number of blocks that a config states.

    Raises:
        ValueError: a config that does not state it.
    """
    found = _field(read_config(config), "layers")
    if not found:
        raise ValueError("received a config without the number of layers; pass the config.json of a language model")
    return found


def module_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear module of one block.

    Args:
        config: a dict, a transformers config, a JSON file, or a folder with a `config.json`.

    Raises:
        ValueError: a config without the sizes, or of a mixture of experts.

    Example:
        >>> sizes = {"hidden_size": 8, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> module_shapes(sizes)["gate"]
        (20, 8)
    """
    found = read_config(config)
    if any((found.get(key) or 0) > 1 for key in _MANY_EXPERTS):
        raise ValueError(
            "received the config of a mixture of experts, whose MLP is no single gate, up and down; allowed are dense models"
        )
    q, k = attention_widths(found)
    hidden = _field(found, "hidden") or 0
    inner = _field(found, "inner") or 4 * hidden
    shapes = {"q": (q, hidden), "k": (k, hidden), "v": (k, hidden), "o": (hidden, q)}
    if found.get("model_type") not in _WITHOUT_GATE:
        shapes["gate"] = (inner, hidden)
    return shapes | {"up": (inner, hidden), "down": (hidden, inner)}


def count_parameters(
    config: Any,
    modules: str | Sequence[str] = "all",
    *,
    rank: int | Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
) -> int:
    """Weights that tuning these modules trains, from a config alone; biases are not counted.

    Args:
        config: a dict, a transformers config, a JSON file, or a folder with a `config.json`.
        modules: as for `choose_modules`.
        rank: of LoRA, rank * (inputs + outputs) per module; one number, or one per module. None is full tuning, inputs * outputs.
        layers: 0-based blocks; all by default.

    Returns:
        The number of trained weights.

    Raises:
        ValueError: a config without the sizes, an unknown module, or a rank below 1.

    Source: LoRA (Hu et al., 2021, arXiv:2106.09685).

    Example:
        >>> qwen = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        >>> qwen |= {"num_attention_heads": 28, "num_key_value_heads": 4}
        >>> count_parameters(qwen, rank=16), count_parameters(qwen, "gate", rank=16)
        (40370176, 10092544)
    """
    shapes = module_shapes(config)
    chosen = choose_modules(modules, present=tuple(shapes))
    per_layer = 0
    for module in chosen:
        outputs, inputs = shapes[module]
        used = rank.get(module) if isinstance(rank, Mapping) else rank
        if rank is not None and (used is None or used < 1):
            raise ValueError(f"received rank {used} for {module!r}; allowed are whole numbers from 1, one per module")
        per_layer += outputs * inputs if used is None else used * (outputs + inputs)
    return per_layer * len(choose_blocks(layers, count_layers(config)))

"""Load a model: by catalogue name, hub id, folder or GGUF file, or one that is in memory already.

Example:
    >>> model = load_model("smollm2-135m-instruct")  # doctest: +SKIP
    >>> model.to_tokens("Hello").shape  # doctest: +SKIP
"""

import contextlib
import difflib
import logging
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lens_affect.adapter import (
    LensModel,
    ModelInfo,
    cast_parameters,
    chat_template_hash,
    dtype_name,
    model_info,
    parameter_fingerprint,
    set_model_info,
    update_provenance,
)
from lens_affect.catalogue import BY_FILE, CATALOGUE, FetchError, converted_gguf, fetch, quiet_transformers, read_card
from lens_affect.results import Provenance, git_state, package_versions
from lens_affect.selfchecks import PARITY, ensure_checked, reference_logits
from lens_affect.tokenizer_files import read_tokenizer_file

__all__ = ["LensModel", "load_model", "model_info"]

log = logging.getLogger(__name__)

WORTHWHILE = 1.2
"""bfloat16 is chosen automatically when it is at least this many times faster than float32."""


def load_model(
    name_or_path: Any,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "auto",
    compatibility: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model as a TransformerBridge and check that it is read correctly.

    Args:
        name_or_path: a catalogue name (`lens-affect catalogue`), a hub id, a local folder, a GGUF file, or a Hugging Face
            model in memory (a PEFT model is read through its base model, with its LoRA layers live).
        dtype: precision of the forward pass. `auto` is float32, or bfloat16 where a measurement on this machine shows that
            it pays; extract_activations then checks on its own pooling that vectors keep a cosine of 0.999 and goes back to
            float32 where they don't. A model in memory keeps its own.
        device: `auto` takes CUDA where there is one.
        compatibility: TransformerLens's processed weights (norms folded, weights centred) instead of Hugging Face's.
        revision: of a hub model.
        tokenizer: needed with a model in memory.
        trust_remote_code: run code that comes with a hub model. Off unless asked for.

    Returns:
        The bridge: `.tokenizer`, `.original_model`, and the HookedTransformer hook names.

    Raises:
        ValueError: an unknown name, or a weight file with a wrong hash.
        FetchError: neither the package index nor the hub can be reached.
        SelfCheckError: the model loads, but is not read correctly.

    Example:
        >>> load_model("smollm2-135m-instruct", dtype=torch.float32)  # doctest: +SKIP
    """
    chosen = _precision(dtype)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if isinstance(name_or_path, str | Path):
        folder, facts = _locate(name_or_path, revision)
        first = torch.float32 if chosen == "auto" else chosen
        if first == torch.float16 and facts.weights_sha256 is None:
            # float32 weights that were rounded to float16 have lost the bits that decide how they round to bfloat16
            whole, tokenizer = _read_folder(folder, torch.bfloat16, revision, trust_remote_code, tokenizer)
            facts = facts.updated(weights_sha256=parameter_fingerprint(whole))
            del whole
        hf_model, tokenizer = _read_folder(folder, first, revision, trust_remote_code, tokenizer)
        facts = facts.updated(revision=getattr(hf_model.config, "_commit_hash", None) or revision)
    else:
        hf_model, facts = _unwrap(name_or_path, tokenizer)
        first = chosen = next(hf_model.parameters()).dtype if chosen == "auto" else chosen
        folder = None
    hf_model = hf_model.to(place).eval()
    cast_parameters(hf_model, first)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    bridge, info = _boot(hf_model, tokenizer, facts, place, first, compatibility)
    set_model_info(bridge, info)
    ensure_checked(bridge)
    if chosen == "auto" and folder is not None and not compatibility and _bfloat16_gain(bridge, place) >= WORTHWHILE:
        use_bfloat16(
            bridge,
            lambda: load_model(
                name_or_path,
                dtype=torch.float32,
                device=place,
                revision=revision,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
            ),
        )
    return bridge


def _precision(dtype: torch.dtype | str) -> Any:
    """A torch.dtype, or "auto"; names such as "bfloat16" are taken too."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"received dtype={dtype!r}; allowed are 'auto', torch.float32, torch.bfloat16 and torch.float16"
        )
    return found


def require_known(name_or_path: str | Path) -> None:
    """Whether a name means a model, without fetching or reading it: a catalogue name, a hub id, or a folder or GGUF file that is there.

    Raises:
        ValueError: it does not.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in CATALOGUE:
        return
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"received the GGUF file {name!r}, which is not there; check the path")
    elif not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        close = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"received model {name!r}; allowed are {', '.join(CATALOGUE)}, a hub id (owner/name), a folder or a .gguf file{hint}"
        )


def _locate(name_or_path: str | Path, revision: str | None) -> tuple[str, Provenance]:
    """Folder or hub id to load from, and where it comes from."""
    require_known(name_or_path)
    name, path = str(name_or_path), Path(name_or_path)
    entry = CATALOGUE.get(name)
    if entry is not None and entry.source == "hub":
        return str(entry.hub_id), Provenance(model=entry.title, source=f"hub: {entry.hub_id}", revision=revision)
    if entry is not None:
        path = fetch(entry)
    elif path.suffix == ".gguf":
        path = converted_gguf(path)
    elif not path.is_dir():
        return name, Provenance(model=name.rsplit("/", maxsplit=1)[-1], source=f"hub: {name}", revision=revision)
    card = read_card(path)
    facts = Provenance(
        model=card.get("title") or path.name,
        source=card.get("source") or str(path),
        weights_sha256=card.get("sha256"),
        source_precision=card.get("precision"),
    )
    return str(path), facts


def _read_folder(
    folder: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool, tokenizer: Any
) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": Path(folder).is_dir(),
    }
    try:
        with quiet_transformers():
            if tokenizer is None and read_card(Path(folder)).get("tokenizer") == BY_FILE:
                tokenizer = read_tokenizer_file(Path(folder))
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if Path(folder).is_dir():
            raise ValueError(
                f"received the folder {folder}, which holds no complete Hugging Face model: {error}"
            ) from error
        raise FetchError(
            f"could not fetch {folder} from the Hugging Face hub ({str(error).splitlines()[0]}). Check the id and the network, or "
            "name a model that a package ships (smollm2-135m-instruct, gemma-3-270m), a folder or a GGUF file"
        ) from error
    return model, tokenizer


def _unwrap(model: Any, tokenizer: Any) -> tuple[Any, Provenance]:
    from transformers import PreTrainedModel

    if hasattr(model, "get_base_model"):  # PEFT: the bridge takes only the inner model, whose LoRA layers stay live
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"received {type(model).__name__}; allowed are a name, a path, or a Hugging Face model. A TransformerBridge or "
            "HookedTransformer needs no loading: pass it to the functions as it is"
        )
    if tokenizer is None:
        raise TypeError("received a model in memory without its tokenizer; pass load_model(model, tokenizer=...)")
    name = str(model.config.name_or_path or type(model).__name__)
    return model, Provenance(model=name.rsplit("/", maxsplit=1)[-1], source=f"in memory ({name})")


def _boot(
    hf_model: Any,
    tokenizer: Any,
    facts: Provenance,
    device: torch.device,
    dtype: torch.dtype,
    compatibility: bool,
) -> tuple[Any, ModelInfo]:
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config.architectures = [type(hf_model).__name__]  # the bridge reads the architecture from here
    _require_text_model(hf_model)
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if adds_bos:
        tokenizer.init_kwargs["add_bos_token"] = (
            True  # spares the host library from loading it a second time to that end
        )
    commit, dirty = git_state()
    info = ModelInfo(
        facts.updated(
            dtype=dtype_name(dtype),
            numerics="compatibility" if compatibility else "hf",
            weights_sha256=facts.weights_sha256 or parameter_fingerprint(hf_model),
            chat_template_hash=chat_template_hash(tokenizer),
            device=device.type,
            versions=package_versions(),
            git_commit=commit,
            git_dirty=dirty,
        ),
        tokenizer_adds_bos=adds_bos,
        reference_logits=reference_logits(hf_model, tokenizer),
    )
    with _named_tokenizer(tokenizer) as named, quiet_transformers(), _no_package_installation():
        name = str(hf_model.config.name_or_path or type(hf_model).__name__)
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=hf_model, tokenizer=named, device=str(device), dtype=dtype
        )
        if compatibility:
            bridge.enable_compatibility_mode()
    if bridge.tokenizer.pad_token is None:
        bridge.tokenizer.pad_token = tokenizer.pad_token
    return bridge, info


def _require_text_model(hf_model: Any) -> None:
    for part in ("vision_config", "audio_config"):
        if getattr(hf_model.config, part, None) is not None:
            raise ValueError(
                f"received {type(hf_model).__name__}, which also reads images or audio; allowed here are text models: pass its "
                "language model (model.get_decoder's causal LM) instead"
            )


@contextlib.contextmanager
def _named_tokenizer(tokenizer: Any) -> Iterator[Any]:
    """The host library loads the tokenizer again by its name; one made in memory has none, so it gets a folder meanwhile."""
    if getattr(tokenizer, "name_or_path", ""):
        yield tokenizer
        return
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _no_package_installation() -> Iterator[None]:
    """The host library runs `pip install torchvision` for some architectures, which would replace the CPU build of torch."""
    real = subprocess.check_call

    def refuse(command: Any, *args: Any, **kwargs: Any) -> int:
        if "install" in list(command):
            raise RuntimeError(
                f"refused to install packages unasked: {command}; install what is missing yourself and load again"
            )
        return real(command, *args, **kwargs)

    subprocess.check_call = refuse
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        subprocess.check_call = real


def _bfloat16_gain(bridge: Any, device: torch.device) -> float:
    """How many times faster bfloat16 is than float32 for this model's MLP on this machine (median of 5 interleaved rounds)."""
    if device.type != "cpu":
        return 0.0  # precision on an accelerator is the user's choice
    width, hidden = int(bridge.cfg.d_model), int(bridge.cfg.d_mlp)
    ratios = []
    for round_number in range(6):
        taken = {}
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.ones(64, width, dtype=dtype), torch.ones(width, hidden, dtype=dtype)
            start = time.perf_counter()
            torch.mm(x, w)
            taken[dtype] = time.perf_counter() - start
        if round_number > 0:  # the first one also sets up the kernels
            ratios.append(taken[torch.float32] / taken[torch.bfloat16])
        if ratios and ratios[-1] < 0.5:  # emulated bfloat16: no need to measure more precisely how slow it is
            return ratios[-1]
    return sorted(ratios)[2]


def use_bfloat16(bridge: Any, load_again: Callable[[], Any]) -> None:
    """What `dtype="auto"` does where bfloat16 pays: round the weights, and have every reader check that its pooling survives it.

    Args:
        bridge: a model in float32 that load_model made.
        load_again: gives the same model in float32, for a reader that finds bfloat16 too coarse.
    """
    info = model_info(bridge)
    info.restore_float32 = lambda: _restore(bridge, load_again())
    cast_parameters(bridge, torch.bfloat16)
    info.precision_is_automatic = True
    update_provenance(bridge, dtype="bfloat16", checks={})
    info.reference_logits = {}  # parity was shown in float32, where a difference means a mistake and not rounding
    ensure_checked(bridge)
    update_provenance(
        bridge, checks={**info.provenance.checks, PARITY: "passed: in float32, before rounding to bfloat16"}
    )


def _restore(bridge: Any, fresh: Any) -> None:
    """Take over the weights of a bridge that was just loaded in float32, tensor by tensor."""
    for mine, theirs in (
        (bridge.named_parameters(), fresh.named_parameters()),
        (bridge.named_buffers(), fresh.named_buffers()),
    ):
        for (name, tensor), (other_name, other) in zip(mine, theirs, strict=True):
            if name != other_name or tensor.shape != other.shape:
                raise RuntimeError(
                    f"cannot restore float32: {name} and {other_name} differ; load the model again with dtype=torch.float32"
                )
            tensor.data = other.data
    update_provenance(bridge, dtype="float32")
    model_info(bridge).precision_is_automatic = False

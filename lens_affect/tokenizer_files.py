"""Tokenizers of converted models, read without the detours of their own class.

A class of its own builds its tokenizer in Python and parses the file twice: four seconds for 262,144 pieces, where the file itself is read in one and a
half. A conversion checks once that both do the same, and notes it in the model's card.
"""

import json
from pathlib import Path
from typing import Any

from lens_affect.stimuli import load_stimuli

CONFIG, FILE, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
_ABOUT_THE_CLASS = ("backend", "tokenizer_class", "auto_map", "is_local", "local_files_only")
_SAME = ("special_tokens_map", "all_special_ids", "padding_side", "model_max_length", "chat_template", "vocab_size")


def read_tokenizer_file(folder: Path) -> Any:
    """The tokenizer of a folder by its file alone, whatever class its config names.

    Args:
        folder: with tokenizer.json and tokenizer_config.json.
    """
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    options = {key: value for key, value in config.items() if key not in _ABOUT_THE_CLASS}
    if (folder / TEMPLATE).is_file():
        options["chat_template"] = (folder / TEMPLATE).read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / FILE), name_or_path=str(folder), **options)


def save_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Save a tokenizer as Hugging Face does, and say whether `read_tokenizer_file` gives the same one.

    Same: ids of our passages in three languages, with and without special tokens, the texts decoded from them, and all settings.

    Args:
        tokenizer: any Hugging Face tokenizer.
        folder: where to.
    """
    tokenizer.save_pretrained(folder)
    if not (folder / FILE).is_file():
        return False
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # a class may have a default of its own, which is not written
    (folder / CONFIG).write_text(
        json.dumps(config | {"padding_side": tokenizer.padding_side}, indent=2), encoding="utf-8"
    )
    found = read_tokenizer_file(folder)
    texts = [text for name in ("passages", "passages_es", "passages_zh") for text in load_stimuli(name).texts[::4]]
    return (
        all(getattr(found, name) == getattr(tokenizer, name) for name in _SAME)
        and all(_ids(found, texts, special) == _ids(tokenizer, texts, special) for special in (True, False))
        and all(found.decode(ids) == tokenizer.decode(ids) for ids in _ids(tokenizer, texts[:8], True))
    )


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special)["input_ids"]

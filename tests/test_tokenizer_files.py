"""A tokenizer read by its file is the one that its class gives, or it is not read so."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lens_affect.catalogue import BY_FILE, CARD
from lens_affect.models import load_model
from lens_affect.tokenizer_files import CONFIG, read_tokenizer_file, save_tokenizer
from tests.tiny import make_hf_model, make_tokenizer

TEXT = "She sat down.\n\n  <bos> 東京 🙂"


@pytest.mark.parametrize("chat", [True, False])
def test_the_file_gives_the_same_tokenizer(tmp_path, chat):
    tokenizer = make_tokenizer(chat=chat)
    tokenizer.padding_side = "left"
    assert save_tokenizer(tokenizer, tmp_path)
    for found in (read_tokenizer_file(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert found(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert found.padding_side == "left"
        assert found.special_tokens_map == tokenizer.special_tokens_map
        assert found.chat_template == tokenizer.chat_template
    assert read_tokenizer_file(tmp_path).name_or_path == str(tmp_path)


class Lowercase(PreTrainedTokenizerFast):
    """Does what its file does not say."""

    def __call__(self, text, **options):
        return super().__call__([t.lower() for t in text] if isinstance(text, list) else text.lower(), **options)


def test_a_class_that_does_something_else_is_noticed(tmp_path):
    plain = make_tokenizer()
    other = Lowercase(tokenizer_object=plain.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    assert save_tokenizer(plain, tmp_path / "plain")
    assert not save_tokenizer(other, tmp_path / "other")


def test_a_model_is_loaded_so_only_where_its_card_says_so(tmp_path, monkeypatch):
    make_hf_model("llama").save_pretrained(tmp_path)
    assert save_tokenizer(make_tokenizer(), tmp_path)
    asked = []
    theirs = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(a) or theirs(*a, **k))
    by_class = load_model(tmp_path)
    by_ours_and_by_the_host = len(asked)
    asked.clear()
    (tmp_path / CARD).write_text(json.dumps({"title": "Tiny", "sha256": "0" * 64, "tokenizer": BY_FILE}))
    by_file = load_model(tmp_path)
    assert len(asked) == by_ours_and_by_the_host - 1
    assert by_file.tokenizer(TEXT)["input_ids"] == by_class.tokenizer(TEXT)["input_ids"]
    assert json.loads((tmp_path / CONFIG).read_text())["padding_side"] == "right"

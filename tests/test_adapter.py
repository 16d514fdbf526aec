"""The adapter: tokens with BOS exactly once, prompts, padding, and what counts as a model."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from lens_affect.adapter import (
    add_hooks,
    chat_template_hash,
    context_window,
    encode,
    encode_prompt,
    final_norm_scale,
    model_info,
    pad_right,
    pad_token_id,
    parameter_fingerprint,
    render_chat,
    require_model,
    run_logits,
    run_trunk,
    special_mask,
    text_of_token,
    unembedding,
)
from lens_affect.models import load_model
from tests.tiny import DENSE, FAMILIES, make_hf_model, make_tokenizer

BOS, EOS, PAD = 0, 1, 2
TEXT = "She read the note twice, folded it, and put the kettle on."
PROMPT = "Write a story about a train."
WITH_BOS = tuple(f for f in FAMILIES if f != "qwen2")


def plain_ids(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def tokenizer_with_own_bos():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    assert tokenizer("a")["input_ids"][0] == BOS
    return tokenizer


@pytest.fixture(scope="module")
def own_bos_model():
    """A model whose tokenizer adds its own BOS."""
    return load_model(make_hf_model("llama"), tokenizer=tokenizer_with_own_bos())


@pytest.mark.parametrize("family", WITH_BOS)
def test_a_plain_text_gets_one_bos_and_the_same_tokens_as_the_host_library(tiny_model, family):
    model = tiny_model(family)
    encoded = encode(model, TEXT)
    assert list(encoded.ids) == [BOS, *plain_ids(TEXT)]
    assert list(encoded.ids) == model.to_tokens(TEXT)[0].tolist()
    assert (encoded.start, encoded.bos, encoded.n_text) == (1, "prepended", len(plain_ids(TEXT)))
    assert encoded.content == tuple(range(1, len(encoded.ids)))


def test_a_family_without_bos_gets_none_and_its_first_token_still_never_counts(tiny_model):
    model = tiny_model("qwen2")
    encoded = encode(model, TEXT)
    assert list(encoded.ids) == plain_ids(TEXT) == model.to_tokens(TEXT)[0].tolist()
    assert (encoded.start, encoded.bos) == (0, "none")
    assert encoded.content == tuple(range(1, len(encoded.ids)))


def test_a_tokenizer_that_adds_its_own_bos_does_not_double_ours(own_bos_model):
    assert list(encode(own_bos_model, TEXT).ids) == [BOS, *plain_ids(TEXT)]
    assert own_bos_model.to_tokens(TEXT)[0].tolist() == [BOS, *plain_ids(TEXT)]


def test_own_bos_keeps_what_the_tokenizer_does_by_itself(tiny_model, own_bos_model):
    bare, adding = encode(tiny_model("llama"), TEXT, own_bos=True), encode(own_bos_model, TEXT, own_bos=True)
    assert (list(bare.ids), bare.bos, bare.start) == (plain_ids(TEXT), "none", 0)
    assert (list(adding.ids), adding.bos, adding.start) == ([BOS, *plain_ids(TEXT)], "prepended", 1)
    assert 0 not in bare.content


@pytest.mark.parametrize("own_bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_brings_its_own_bos_and_never_gets_a_second_one(tiny_model, family, own_bos):
    encoded = encode(tiny_model(family), TEXT, PROMPT, own_bos=own_bos)
    head = plain_ids(f"<bos>[user] {PROMPT}\n[assistant] ")
    assert list(encoded.ids) == head + plain_ids(TEXT)
    assert encoded.ids.count(BOS) == 1
    assert (encoded.bos, encoded.start) == ("template", len(head))
    assert encoded.content == tuple(range(len(head), len(encoded.ids)))


def test_a_tokenizer_that_adds_its_own_bos_does_not_put_it_before_a_chat(own_bos_model):
    ids, bos = encode_prompt(own_bos_model, PROMPT)
    assert (ids.count(BOS), bos) == (1, "template")


def test_without_a_chat_template_the_prompt_stands_before_the_text_with_an_empty_line_between(tiny_model):
    encoded = encode(tiny_model("llama", chat=False), TEXT, PROMPT)
    head = [BOS, *plain_ids(PROMPT + "\n\n")]
    assert list(encoded.ids) == head + plain_ids(TEXT)
    assert (encoded.bos, encoded.start) == ("prepended", len(head))


def test_special_tokens_inside_a_text_are_not_content(tiny_model):
    encoded = encode(tiny_model("llama"), "The end.<eos><bos>Again.<pad>")
    assert {EOS, BOS, PAD} <= set(encoded.ids[1:])
    assert [encoded.ids[i] for i in encoded.content] == [i for i in encoded.ids if i not in (BOS, EOS, PAD)]


def test_a_prompt_with_braces_and_newlines_is_rendered_as_it_is(tiny_model):
    prompt = "Say {emotion}\n{{ 1 + 1 }} & <b>"
    assert render_chat(tiny_model("llama").tokenizer, prompt) == f"<bos>[user] {prompt}\n[assistant] "


def test_padding_goes_to_the_right_and_is_masked(tiny_model):
    model = tiny_model("llama")
    short, long = encode(model, "Rain."), encode(model, TEXT)
    tokens, mask = pad_right([short, long], pad_token_id(model), torch.device("cpu"))
    n = len(short.ids)
    assert tokens[0].tolist() == list(short.ids) + [PAD] * (len(long.ids) - n)
    assert tokens[1].tolist() == list(long.ids)
    assert mask[0].tolist() == [1] * n + [0] * (len(long.ids) - n)
    assert mask[1].all()


@pytest.mark.parametrize(("eos", "expected"), [(7, 7), (None, 0)])
def test_a_tokenizer_without_padding_pads_with_its_end_of_text_or_any_id(eos, expected):
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=eos)
    model = SimpleNamespace(cfg=None, tokenizer=tokenizer, hook_dict={}, hooks=print, to_tokens=print)
    assert pad_token_id(model) == expected


def test_special_tokens_are_masked_by_id(tiny_model):
    seen = special_mask(tiny_model("llama"), torch.tensor([[BOS, 50, EOS], [PAD, 60, 61]]))
    assert seen.tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_a_model_that_was_never_booted(tiny_model, family):
    model, hf = tiny_model(family), make_hf_model(family)
    batch = [encode(model, text) for text in ("Rain.", TEXT)]
    logits = run_logits(model, *pad_right(batch, PAD, torch.device("cpu")))
    for row, encoded in enumerate(batch):
        with torch.no_grad():
            expected = hf(torch.tensor([encoded.ids])).logits[0]
        torch.testing.assert_close(logits[row, : len(encoded.ids)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_the_trunk_never_computes_the_unembedding_and_no_gradient(tiny_model, family):
    model, called, states = tiny_model(family), [], []
    handle = model.original_model.lm_head.register_forward_hook(lambda *args: called.append(1))
    batch = pad_right([encode(model, TEXT)], PAD, torch.device("cpu"))
    try:
        with add_hooks(model, [("blocks.2.hook_resid_post", lambda value, hook: states.append(value))]):
            run_trunk(model, *batch)
        assert not called
        run_logits(model, *batch)
        assert called
    finally:
        handle.remove()
    assert len(states) == 1  # the hook is gone after the block
    assert not states[0].requires_grad


def test_hooks_are_gone_after_an_exception(tiny_model):
    model, fired = tiny_model("llama"), []
    batch = pad_right([encode(model, TEXT)], PAD, torch.device("cpu"))

    def fail(value, hook):
        fired.append(1)
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"), add_hooks(model, [("blocks.0.hook_resid_post", fail)]):
        run_trunk(model, *batch)
    run_trunk(model, *batch)
    assert fired == [1]


@pytest.mark.parametrize("compatibility", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "llama"])
def test_the_measured_norm_scale_is_the_weight_as_it_acts(family, compatibility):
    hf = make_hf_model(family)
    norm = hf.transformer.ln_f if family == "gpt2" else hf.model.norm
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    weight = norm.weight.detach().clone()
    model = load_model(hf, tokenizer=make_tokenizer(), compatibility=compatibility)
    expected = weight + 1 if family.startswith("gemma") else weight
    if compatibility:
        expected = torch.ones_like(weight)  # folded into the unembedding
    torch.testing.assert_close(final_norm_scale(model), expected, rtol=1e-4, atol=1e-4)


def test_the_unembedding_is_hugging_faces(tiny_model):
    hf = make_hf_model("llama")
    torch.testing.assert_close(unembedding(tiny_model("llama")), hf.lm_head.weight.detach().T)


def test_the_context_window_is_the_configs(tiny_model):
    assert {context_window(tiny_model(family)) for family in FAMILIES} == {512}


def test_a_token_is_shown_as_its_text(tiny_model):
    model = tiny_model("llama")
    assert "".join(text_of_token(model, i) for i in plain_ids(TEXT)) == TEXT


def test_a_plain_hugging_face_model_is_refused_with_the_way_to_load_it():
    with pytest.raises(TypeError, match=r"received LlamaForCausalLM, which lacks .*hook_dict.*load_model\(hf_model"):
        require_model(make_hf_model("llama"))


def test_a_model_without_a_tokenizer_is_refused():
    model = SimpleNamespace(cfg=None, tokenizer=None, hook_dict={}, hooks=None, to_tokens=None)
    with pytest.raises(TypeError, match="without a tokenizer.*set model.tokenizer or use load_model"):
        require_model(model)


def test_a_bridge_that_somebody_else_booted_is_described_as_it_is(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    hf = make_hf_model("llama")
    fingerprint = parameter_fingerprint(hf)
    model = TransformerBridge.boot_transformers(
        "LlamaForCausalLM", hf_model=hf, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )
    seen = model_info(model).provenance
    assert (seen.dtype, seen.numerics, seen.device, seen.weights_sha256) == ("float32", "hf", "cpu", fingerprint)
    assert seen.source == "in memory (TransformerBridge)"
    assert seen.chat_template_hash == chat_template_hash(make_tokenizer())
    assert model_info(model) is model_info(model)


def test_the_fingerprint_tells_checkpoints_apart():
    same, other = make_hf_model("llama"), make_hf_model("llama", seed=1)
    assert parameter_fingerprint(same) == parameter_fingerprint(make_hf_model("llama"))
    assert parameter_fingerprint(same) != parameter_fingerprint(other)


def test_the_chat_template_hash_follows_the_template():
    tokenizer = make_tokenizer()
    before = chat_template_hash(tokenizer)
    tokenizer.chat_template += " "
    assert before != chat_template_hash(tokenizer)
    assert chat_template_hash(make_tokenizer(chat=False)) is None

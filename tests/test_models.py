"""Loading: every source, both numerics, every precision, and what each wrong input is told."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from lens_affect import activations, models
from lens_affect.activations import extract_activations
from lens_affect.adapter import encode, model_info, parameter_fingerprint, run_logits
from lens_affect.catalogue import FetchError
from lens_affect.generation import generate
from lens_affect.models import load_model
from lens_affect.selfchecks import SelfCheckError, check_model
from lens_affect.stimuli import Stimuli
from lens_affect.unwrapping import CHECK
from lens_affect.vectors import fit_vectors
from tests.tiny import FAMILIES, make_hf_model, make_tokenizer

STORY = "She read the note twice, folded it along the old crease, and put the kettle on."
STIMULI = Stimuli((STORY, "Rain fell. " + STORY), ("a", "b"), ("g", "h"), ("test",) * 2, ("",) * 2)


def make_vivid_model(family):
    """Norm weights and biases away from their initial 1 and 0, so that folding them is not nothing."""
    model = make_hf_model(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved("llama") -> a folder with a tiny model and its tokenizer."""
    folders = {}

    def make(family):
        if family not in folders:
            folders[family] = save(make_vivid_model(family), tmp_path_factory.mktemp(family) / "tiny")
        return folders[family]

    return make


@pytest.fixture(scope="module")
def exact(saved):
    """exact("llama") -> that folder loaded in float32; shared, so tests must not change it."""
    loaded = {}

    def make(family):
        if family not in loaded:
            loaded[family] = load_model(saved(family), dtype=torch.float32)
        return loaded[family]

    return make


def log_probabilities(model):
    ids = torch.tensor([[0, *make_tokenizer()(STORY)["input_ids"]]])
    with torch.no_grad():
        return getattr(model, "original_model", model)(input_ids=ids).logits.log_softmax(-1)


def test_a_model_in_memory_keeps_its_precision_and_its_weights():
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        hf = make_hf_model("llama").to(dtype)
        fingerprint = parameter_fingerprint(hf)
        facts = model_info(load_model(hf, tokenizer=make_tokenizer())).provenance
        assert (facts.dtype, facts.weights_sha256, facts.numerics) == (name, fingerprint, "hf")
        assert (facts.model, facts.source) == ("LlamaForCausalLM", "in memory (LlamaForCausalLM)")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_as_the_model_it_was(saved, exact, family):
    model = exact(family)
    assert (log_probabilities(model) - log_probabilities(make_vivid_model(family))).abs().max() <= 1e-4
    facts = model_info(model).provenance
    assert (facts.model, facts.source, facts.dtype) == ("tiny", str(saved(family)), "float32")
    assert facts.weights_sha256 == parameter_fingerprint(make_vivid_model(family))


def test_a_folder_named_by_a_string_and_with_a_tokenizer_of_the_users_loads_too(saved):
    tokenizer = make_tokenizer(chat=False)
    assert load_model(str(saved("llama")), dtype=torch.float32, tokenizer=tokenizer).tokenizer.chat_template is None


def test_a_peft_model_is_read_with_its_adapters():
    peft = get_peft_model(
        make_hf_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    ).eval()
    ids = encode(load_model(make_hf_model("llama"), tokenizer=make_tokenizer()), STORY)
    gates = []
    handle = (
        peft.get_base_model()
        .model.layers[1]
        .mlp.gate_proj.register_forward_hook(lambda module, inputs, output: gates.append(output))
    )
    with torch.no_grad():
        states = peft(torch.tensor([ids.ids]), output_hidden_states=True).hidden_states
    handle.remove()

    sites = ("resid_post", "gate")
    base = extract_activations(load_model(make_hf_model("llama"), tokenizer=make_tokenizer()), STIMULI, sites=sites)
    found = extract_activations(load_model(peft, tokenizer=make_tokenizer()), STIMULI, sites=sites)
    content = list(ids.content)
    for layer in (0, 1):  # Hugging Face gives the last one after the final norm
        expected = states[layer + 1][0, content].mean(0)
        torch.testing.assert_close(found.arrays["resid_post"][0, layer], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.arrays["gate"][0, 1], gates[0][0, content].mean(0), rtol=1e-4, atol=1e-5)
    for site in sites:
        assert not torch.isclose(found.arrays[site], base.arrays[site], rtol=0.01).all(-1).any()


def test_a_tokenizer_without_padding_gets_one():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = load_model(make_hf_model("llama"), tokenizer=tokenizer)
    assert model.tokenizer.pad_token == "<eos>"
    assert extract_activations(model, STIMULI).values.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_compatibility_folds_the_norms_keeps_the_log_probabilities_and_is_recorded(family):
    model = load_model(make_vivid_model(family), tokenizer=make_tokenizer(), compatibility=True)
    assert (log_probabilities(model) - log_probabilities(make_vivid_model(family))).abs().max() <= 1e-4
    norms = [
        parameter
        for name, parameter in model.original_model.named_parameters()
        if ("input_layernorm" in name or "ln_1" in name) and name.endswith("weight")
    ]
    neutral = 0.0 if family.startswith("gemma") else 1.0
    assert norms
    assert all((p == neutral).all() for p in norms)  # folded: the weights are not Hugging Face's any more
    facts = extract_activations(model, STIMULI).provenance
    assert facts.numerics == "compatibility"
    assert facts.weights_sha256 == parameter_fingerprint(make_vivid_model(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_bfloat16_when_asked_for_is_kept_and_stays_close(saved, exact, family):
    coarse = load_model(saved(family), dtype=torch.bfloat16)
    found = extract_activations(coarse, STIMULI)
    assert next(coarse.parameters()).dtype == torch.bfloat16
    assert found.provenance.dtype == "bfloat16"
    assert all(text.startswith("passed") for name, text in found.provenance.checks.items() if name != CHECK)
    fine = extract_activations(exact(family), STIMULI)
    assert torch.cosine_similarity(found.values, fine.values, dim=-1).min() > 0.99
    assert not torch.equal(found.values, fine.values)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_float16_reads_and_writes_where_nothing_overflows(saved, exact, family):
    half = load_model(saved(family), dtype=torch.float16)
    found = extract_activations(half, STIMULI)
    assert next(half.parameters()).dtype == torch.float16
    assert found.provenance.dtype == "float16"
    assert all(text.startswith("passed") for name, text in found.provenance.checks.items() if name != CHECK)
    fine = extract_activations(exact(family), STIMULI)
    assert torch.cosine_similarity(found.values, fine.values, dim=-1).min() > 0.999
    assert not torch.equal(found.values, fine.values)
    assert generate(half, ["He felt"], max_new_tokens=4).finite == (True,)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_one_folder_is_one_model_in_every_precision(tmp_path, stored):
    hf = make_hf_model("llama")
    with torch.no_grad():  # with values that float16 cannot hold exactly
        hf.model.embed_tokens.weight[:64] *= torch.logspace(-6, 0, 64)[:, None]
    folder = save(hf.to(stored), tmp_path / "tiny")
    models = [load_model(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert len({model_info(model).provenance.weights_sha256 for model in models}) == 1
    assert [model_info(model).provenance.dtype for model in models] == ["float32", "bfloat16", "float16"]
    vectors = fit_vectors(extract_activations(models[0], STIMULI))
    for model in models[1:]:
        assert vectors.project(extract_activations(model, STIMULI)).isfinite().all()
    in_memory = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    same = parameter_fingerprint(in_memory) == model_info(models[0]).provenance.weights_sha256
    assert same == (stored != torch.float32)


def test_a_small_update_is_another_model():
    before, after = make_hf_model("llama"), make_hf_model("llama")
    with torch.no_grad():
        weight = after.model.layers[1].mlp.gate_proj.weight
        weight += 1e-3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert parameter_fingerprint(before) != parameter_fingerprint(after)


def test_a_model_that_overflows_in_float16_is_refused_when_it_is_loaded(tmp_path):
    """65,504 is the largest number there; Gemma's residual stream exceeds it."""
    hf = make_hf_model("gemma3")
    with torch.no_grad():
        hf.model.embed_tokens.weight.mul_(1e5)
    folder = save(hf, tmp_path / "large")
    assert extract_activations(load_model(folder, dtype=torch.float32), STIMULI).values.isfinite().all()
    with pytest.raises(SelfCheckError, match=r"float32"):
        load_model(folder, dtype=torch.float16)


def test_a_text_that_overflows_in_float16_is_refused_with_its_layer_and_what_to_do(saved):
    half = load_model(saved("llama"), dtype=torch.float16)
    with (
        torch.no_grad()
    ):  # after the self-checks, so that the reader has to see it; every weight is finite, their sums are not
        half.original_model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    assert all(p.isfinite().all() for p in half.parameters())
    message = (
        r"not finite: resid_post, layer 1, text \d, in float16; load the model with dtype=torch.float32 or bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        extract_activations(half, STIMULI)
    assert generate(half, ["The kettle"], max_new_tokens=4, greedy=True).finite == (False,)


@pytest.fixture
def bfloat16_pays(monkeypatch):
    monkeypatch.setattr(models, "_bfloat16_gain", lambda *args: 3.0)


def test_float32_is_kept_where_bfloat16_does_not_pay(saved, monkeypatch):
    monkeypatch.setattr(models, "_bfloat16_gain", lambda *args: 1.1)
    assert model_info(load_model(saved("llama"))).provenance.dtype == "float32"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_automatic_bfloat16_survives_where_vectors_agree_with_float32(saved, exact, family, bfloat16_pays, monkeypatch):
    model = load_model(saved(family))
    facts = model_info(model).provenance
    assert facts.dtype == "bfloat16"
    assert facts.checks["logits equal Hugging Face's"].startswith("passed: in float32, before rounding")
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 0.99)
    found = extract_activations(model, STIMULI)
    fine = extract_activations(exact(family), STIMULI)
    assert found.provenance.dtype == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.cosine_similarity(found.values, fine.values, dim=-1).min() >= 0.99
    assert not torch.equal(found.values, fine.values)
    again = extract_activations(model, STIMULI)  # and the check of the second run changes nothing
    assert torch.equal(found.values, again.values)


def test_a_pooling_that_survived_bfloat16_is_not_compared_again(saved, bfloat16_pays, monkeypatch):
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 0.9)
    model = load_model(saved("llama"))
    info, restored = model_info(model), []
    load_again = info.restore_float32
    info.restore_float32 = lambda: (restored.append(1), load_again())
    first = extract_activations(model, STIMULI)
    assert torch.equal(extract_activations(model, STIMULI).values, first.values)
    assert len(restored) == 1
    extract_activations(model, STIMULI, pooling="last")
    assert len(restored) == 2


def test_the_users_tokenizer_stays_where_bfloat16_is_left_again(tmp_path, bfloat16_pays, monkeypatch):
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 1.1)
    make_hf_model("llama").save_pretrained(tmp_path / "weights only")
    model = load_model(tmp_path / "weights only", tokenizer=make_tokenizer(chat=False))
    found = extract_activations(model, STIMULI)
    assert found.provenance.dtype == "float32"
    assert model.tokenizer.chat_template is None


def test_the_doctor_shows_the_parity_that_was_found_before_rounding(saved, bfloat16_pays):
    found = {c.name: c for c in check_model(load_model(saved("llama"))).checks}["logits equal Hugging Face's"]
    assert (found.outcome, found.measured) == ("passed", "in float32, before rounding to bfloat16")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_automatic_bfloat16_gives_logits_and_text_before_and_after_a_reading(
    saved, exact, family, bfloat16_pays, monkeypatch
):
    """The bridge's unembedding has a bias of its own: rounding all but that one would stop the first forward pass to the logits."""
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 0.9)
    model = load_model(saved(family))
    tokens = torch.arange(5, 25)[None]
    expected = run_logits(exact(family), tokens, torch.ones_like(tokens))
    for _ in range(2):
        assert model_info(model).provenance.dtype == "bfloat16"
        found = run_logits(model, tokens, torch.ones_like(tokens))
        assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.98
        assert generate(model, ["He felt"], max_new_tokens=3).finite == (True,)
        extract_activations(model, STIMULI)


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic_bfloat16_goes_back_to_the_exact_float32_weights(
    saved, exact, family, bfloat16_pays, monkeypatch, caplog
):
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 1.1)
    model = load_model(saved(family))
    assert next(model.parameters()).dtype == torch.bfloat16
    found = extract_activations(model, STIMULI)
    assert "reading in float32" in caplog.text
    assert found.provenance.dtype == model_info(model).provenance.dtype == "float32"
    for (name, restored), expected in zip(model.named_parameters(), exact(family).parameters(), strict=True):
        assert torch.equal(restored, expected), name
    for (name, restored), expected in zip(model.named_buffers(), exact(family).buffers(), strict=True):
        assert torch.equal(restored, expected), name
    expected = extract_activations(exact(family), STIMULI).values
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-6)


def test_the_real_threshold_gives_vectors_that_agree_with_float32_either_way(saved, exact, bfloat16_pays):
    found = extract_activations(load_model(saved("llama")), STIMULI)
    fine = extract_activations(exact("llama"), STIMULI)
    assert torch.cosine_similarity(found.values, fine.values, dim=-1).min() >= 0.999


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_bfloat16_the_rotary_frequencies_stay_in_float32_as_in_hugging_face(saved, family):
    theirs = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.bfloat16)
    expected = {n.split(".")[-1]: b for n, b in theirs.named_buffers() if "inv_freq" in n}
    assert expected
    assert {b.dtype for b in expected.values()} == {torch.float32}
    ours = load_model(saved(family), dtype=torch.bfloat16).original_model.named_buffers()
    seen = {n.split(".")[-1]: b for n, b in ours if "inv_freq" in n}
    for name, buffer in expected.items():
        torch.testing.assert_close(seen[name], buffer, rtol=0, atol=0)


def test_float32_comes_back_exactly_from_a_folder_saved_without_the_causal_head(tmp_path, bfloat16_pays, monkeypatch):
    """The hub's GPT-2 names its tensors `h.0...`, without `transformer.` in front."""
    hf = make_hf_model("gpt2")
    hf.config.tie_word_embeddings = True
    hf.tie_weights()
    save(hf.transformer, tmp_path / "tiny")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    monkeypatch.setattr(activations, "MINIMUM_COSINE", 1.1)
    model = load_model(tmp_path / "tiny")
    found = extract_activations(model, STIMULI)
    assert found.provenance.dtype == "float32"
    expected = extract_activations(load_model(whole, tokenizer=make_tokenizer()), STIMULI)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("device", "gain"), [("cuda", 0.0)])
def test_on_an_accelerator_precision_is_the_users_choice(tiny_model, device, gain):
    assert models._bfloat16_gain(tiny_model("llama"), torch.device(device)) == gain


def test_the_gain_is_measured_on_this_machine(tiny_model):
    assert 0 < models._bfloat16_gain(tiny_model("llama"), torch.device("cpu")) < np.inf


@pytest.mark.parametrize(
    ("name", "close"), [("smollm-135m", "smollm2-135m-instruct"), ("gemma-270m", "gemma-3-270m"), ("gpt-2", "gpt2")]
)
def test_an_unknown_name_is_refused_with_a_close_one(name, close):
    with pytest.raises(ValueError, match=rf"received model '{name}'; allowed are .*hub id.*did you mean '{close}'\?"):
        load_model(name)


def test_a_name_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ValueError, match=r"received model 'xyzzy'; allowed are .*\.gguf file$"):
        load_model("xyzzy")


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"GGUF file '.*missing.gguf', which is not there; check the path"):
        load_model(tmp_path / "missing.gguf")


def damage(folder, what):
    weights = folder / "model.safetensors"
    if what == "no weights":
        weights.unlink()
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "no tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    elif what == "broken config":
        (folder / "config.json").write_text("{")
    else:
        for file in folder.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    "what",
    [
        "no weights",
        "broken config",
        pytest.param("nothing at all"),
        pytest.param("cut weights"),
        pytest.param("no tokenizer"),
    ],
)
def test_a_folder_without_a_complete_model_is_refused_and_named(tmp_path, what):
    folder = save(make_hf_model("llama"), tmp_path / "tiny")
    damage(folder, what)
    with pytest.raises(ValueError, match=r"received the folder .*tiny.*no complete Hugging Face model"):
        load_model(folder)


@pytest.mark.parametrize("name", ["somebody/some-model", "gpt2"])
def test_without_a_network_a_hub_model_is_refused_with_what_works_offline(name):
    with pytest.raises(FetchError, match=r"could not fetch .*hub.*network.*smollm2-135m-instruct, gemma-3-270m"):
        load_model(name)


def test_a_model_in_memory_without_its_tokenizer_is_refused():
    with pytest.raises(TypeError, match=r"without its tokenizer; pass load_model\(model, tokenizer=\.\.\.\)"):
        load_model(make_hf_model("llama"))


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2), {"model": 1}])
def test_what_is_no_model_is_refused_by_its_type(thing):
    with pytest.raises(
        TypeError, match=rf"received {type(thing).__name__}; allowed are a name, a path, or a Hugging Face"
    ):
        load_model(thing, tokenizer=make_tokenizer())


def test_a_bridge_is_not_loaded_a_second_time(tiny_model):
    with pytest.raises(
        TypeError, match="received TransformerBridge.*needs no loading: pass it to the functions as it is"
    ):
        load_model(tiny_model("llama"))


@pytest.mark.parametrize("part", ["vision_config", "audio_config"])
def test_a_model_that_also_reads_images_or_audio_is_refused(part):
    hf = make_hf_model("llama")
    setattr(hf.config, part, {"hidden_size": 8})
    with pytest.raises(
        ValueError, match="received LlamaForCausalLM, which also reads images or audio.*pass its language"
    ):
        load_model(hf, tokenizer=make_tokenizer())


def test_nothing_is_installed_while_a_model_is_booted(monkeypatch):
    real_boot, real_call = TransformerBridge.boot_transformers, subprocess.check_call
    refused = []

    def boot(*args, **kwargs):
        for command in (["uv", "pip", "install", "x"], [sys.executable, "-m", "pip", "install", "x", "-q"]):
            with pytest.raises(RuntimeError, match="refused to install packages unasked.*install what is missing") as e:
                subprocess.check_call(command)
            refused.append(str(e.value))
        assert subprocess.check_call([sys.executable, "-c", "pass"]) == 0  # anything else still runs
        return real_boot(*args, **kwargs)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot)
    load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    assert len(refused) == 2
    assert "torch" not in refused[0]
    assert subprocess.check_call is real_call


def test_installing_works_again_after_a_boot_that_failed():
    real = subprocess.check_call
    with pytest.raises(KeyError), models._no_package_installation():
        raise KeyError("planted")
    assert subprocess.check_call is real


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_precision_may_be_named(name):
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), dtype=name)
    assert next(model.parameters()).dtype == getattr(torch, name)


@pytest.mark.parametrize("wrong", ["int64", "half precision", torch.int8])
def test_what_is_no_precision_is_refused(wrong):
    with pytest.raises(ValueError, match="allowed are 'auto', torch.float32"):
        load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), dtype=wrong)

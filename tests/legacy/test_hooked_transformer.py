"""HookedTransformer objects of TransformerLens 3.9 are read, steered and asked to write as they are; plain Hugging Face is the oracle."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from lens_affect.activations import extract_activations
from lens_affect.adapter import final_norm_scale, model_info, run_logits
from lens_affect.attribution import attribute_direction
from lens_affect.generation import Intervention, generate
from lens_affect.localization import localize
from lens_affect.matching import match_pairs
from lens_affect.models import load_model
from lens_affect.neurons import top_neurons
from lens_affect.patching import patch_sites
from lens_affect.projections import projection_by_layer
from lens_affect.protocols import extract_protocol
from lens_affect.selfchecks import SelfCheckError, check_model, ensure_checked
from lens_affect.sites import SITES, resolve_site
from lens_affect.statistics import derive_generator
from lens_affect.stimuli import Stimuli, load_stimuli
from lens_affect.stories import write_stories
from lens_affect.sweeps import load_sweep, make_spec, run_sweep
from lens_affect.unwrapping import CHECK as WITHOUT_WRAPPERS
from lens_affect.vectors import fit_vectors
from tests.legacy.conftest import make_hooked, settings_of, take_over
from tests.test_donors import make_pairs
from tests.tiny import make_tokenizer

FAMILIES = ("llama", "gpt2")
MODULES = {
    "llama": {
        "resid_pre": ("model.layers.{}", "in"),
        "resid_mid": ("model.layers.{}.post_attention_layernorm", "in"),
        "resid_post": ("model.layers.{}", "out"),
        "attn_out": ("model.layers.{}.self_attn.o_proj", "out"),
        "mlp_out": ("model.layers.{}.mlp.down_proj", "out"),
        "q": ("model.layers.{}.self_attn.q_proj", "out"),
        "k": ("model.layers.{}.self_attn.k_proj", "out"),
        "v": ("model.layers.{}.self_attn.v_proj", "out"),
        "z": ("model.layers.{}.self_attn.o_proj", "in"),
        "o": ("model.layers.{}.self_attn.o_proj", "out"),
        "gate": ("model.layers.{}.mlp.gate_proj", "out"),
        "up": ("model.layers.{}.mlp.up_proj", "out"),
        "act": ("model.layers.{}.mlp.down_proj", "in"),
        "down": ("model.layers.{}.mlp.down_proj", "out"),
    },
    "gpt2": {
        "resid_pre": ("transformer.h.{}", "in"),
        "resid_mid": ("transformer.h.{}.ln_2", "in"),
        "resid_post": ("transformer.h.{}", "out"),
        "attn_out": ("transformer.h.{}.attn.c_proj", "out"),
        "mlp_out": ("transformer.h.{}.mlp.c_proj", "out"),
        "q": ("transformer.h.{}.attn.c_attn", "out 0"),
        "k": ("transformer.h.{}.attn.c_attn", "out 1"),
        "v": ("transformer.h.{}.attn.c_attn", "out 2"),
        "z": ("transformer.h.{}.attn.c_proj", "in"),
        "o": ("transformer.h.{}.attn.c_proj", "out"),
        "act": ("transformer.h.{}.mlp.c_proj", "in"),
        "down": ("transformer.h.{}.mlp.c_proj", "out"),
    },
}
"""Which Hugging Face module holds a site, and on which side."""
ALL = [(family, site) for family in FAMILIES for site in MODULES[family]]
REQUESTS = ["How was it?", "Tell me what the woman at the station had in her bag that morning.", "Why?"]


def first(value):
    return value[0] if isinstance(value, tuple) else value


def read_hf(model, ids):
    """Every site of one text at every position, `[layer, position, width]` each, by plain PyTorch hooks in one forward pass."""
    places = MODULES[model.config.model_type]
    seen, handles = {}, []
    for name in {name.format(layer) for name, _ in places.values() for layer in range(3)}:

        def hook(module, inputs, output, name=name):
            seen[name] = {"in": first(inputs)[0], "out": first(output)[0]}

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    read = {}
    for site, (name, side) in places.items():
        direction, _, third = side.partition(" ")
        value = torch.stack([seen[name.format(layer)][direction] for layer in range(3)])
        read[site] = value.chunk(3, dim=-1)[int(third)] if third else value
    return read


def ids_of(text, prompt="", *, chat=True):
    """Token ids and where the text starts, put together by hand."""
    tokenizer = make_tokenizer(chat=chat)
    head = [0]
    if prompt and chat:
        turns = [{"role": "user", "content": prompt}]
        head = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]
    elif prompt:
        head = [0, *tokenizer(prompt + "\n\n")["input_ids"]]
    return [*head, *tokenizer(text)["input_ids"]], len(head)


def pooled_hf(model, stimuli, site="resid_post", pool=lambda x: x.mean(1)):
    """`[text, layer, width]` from single texts without padding."""
    rows = []
    for text, prompt in zip(stimuli.texts, stimuli.prompts, strict=True):
        ids, start = ids_of(text, prompt)
        rows.append(pool(read_hf(model, ids)[site][:, start:]))
    return torch.stack(rows)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def everything(hooked, few_passages):
    """All sites of a family, read in padded batches; made once."""
    made = {}

    def read(family):
        if family not in made:
            made[family] = extract_activations(hooked(family), few_passages, sites=list(MODULES[family]))
        return made[family]

    return read


@pytest.fixture(scope="module")
def expected(hf_model, few_passages):
    """The same from Hugging Face, text by text."""
    made = {}

    def read(family):
        if family not in made:
            rows = []
            for text in few_passages.texts:
                ids, start = ids_of(text)
                rows.append({site: x[:, start:].mean(1) for site, x in read_hf(hf_model(family), ids).items()})
            made[family] = {site: torch.stack([row[site] for row in rows]) for site in MODULES[family]}
        return made[family]

    return read


# Reading


@pytest.mark.parametrize(("family", "site"), ALL)
def test_a_site_read_in_padded_batches_equals_hugging_face_on_single_texts(everything, expected, family, site):
    close(everything(family).at(site).values, expected(family)[site])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_row_is_the_input_of_the_first_block(everything, expected, family):
    close(everything(family).embedding["embedding"], expected(family)["resid_pre"][:, 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("last", lambda x: x[:, -1]),
        ("midpoint", lambda x: x[:, x.shape[1] // 2]),
        ("after:3", lambda x: x[:, 3:].mean(1)),
    ],
)
def test_every_pooling_picks_the_tokens_it_names(hooked, hf_model, few_passages, family, pooling, pool):
    few = few_passages.select(groups=["kitchen"])
    seen = extract_activations(hooked(family), few, pooling=pooling)
    close(seen.values, pooled_hf(hf_model(family), few, pool=pool))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_read_after_its_request(hooked, hf_model, family):
    asked = Stimuli(
        texts=("She was glad of it.", "He sat down on the step and said nothing for a while."),
        emotions=("happy", "sad"),
        groups=("a", "a"),
        sources=("us", "us"),
        prompts=(REQUESTS[0], REQUESTS[1]),
        name="answers",
    )
    seen = extract_activations(hooked(family), asked)
    assert seen.provenance.bos == "template"
    close(seen.values, pooled_hf(hf_model(family), asked))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_text_gives_the_same_vector_alone_and_in_any_batch(hooked, few_passages, family, padding_side):
    model = hooked(family, padding_side=padding_side)
    assert model.tokenizer.padding_side == padding_side
    alone = extract_activations(model, few_passages, sites=["resid_post", "z"], batch_tokens=1)
    together = extract_activations(model, few_passages, sites=["resid_post", "z"], batch_tokens=100_000)
    for site in ("resid_post", "z"):
        close(together.arrays[site], alone.arrays[site], 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_padding_on_either_side_equal_hugging_face(hooked, hf_model, few_passages, family):
    ids = [ids_of(text)[0] for text in few_passages.texts[:2]]
    width = max(map(len, ids)) + 5
    for left in (False, True):
        tokens, mask = torch.full((2, width), 2), torch.zeros(2, width, dtype=torch.long)
        for row, line in enumerate(ids):
            inside = slice(width - len(line), None) if left else slice(0, len(line))
            tokens[row, inside], mask[row, inside] = torch.tensor(line), 1
        seen = run_logits(hooked(family), tokens, mask)
        for row, line in enumerate(ids):
            with torch.no_grad():
                expected = hf_model(family)(input_ids=torch.tensor([line])).logits[0]
            close(seen[row][mask[row].bool()], expected, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hooked_transformer_and_a_bridge_around_the_same_weights_read_alike(
    everything, hf_model, few_passages, family
):
    bridge = load_model(copy.deepcopy(hf_model(family)), tokenizer=make_tokenizer())
    seen = extract_activations(bridge, few_passages, sites=list(MODULES[family]))
    for site in MODULES[family]:
        close(everything(family).arrays[site], seen.arrays[site])


def test_moments_hold_mean_and_mean_square_of_each_cell(hooked, everything, few_passages):
    twice = few_passages.select(rows=[0, 1, 2, 3]).select(rows=[0, 0, 1, 2])
    seen = extract_activations(hooked("llama"), twice, sites="gate", keep="moments")
    rows = everything("llama").at("gate").values[:4]
    assert seen.counts.tolist() == [2, 1, 1]
    close(seen.values, rows[:3])
    close(seen.squares["gate"], rows[:3] ** 2)


def test_gpt2_has_no_gate(hooked, few_passages):
    for site in ("gate", "up"):
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no gated MLP.*allowed are 'act', 'down'"):
            extract_activations(hooked("gpt2"), few_passages, sites=site)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_gone_after_reading_and_after_an_exception(hooked, few_passages, family):
    model = hooked(family)

    def hooks():
        return sum(len(point.fwd_hooks) for point in model.hook_dict.values())

    def stop(done, total):
        raise KeyboardInterrupt

    before = hooks()
    with pytest.raises(KeyboardInterrupt):
        extract_activations(model, few_passages, progress=stop)
    tilted = Intervention(layer=1, site="resid_post", vector=torch.ones(7))
    with pytest.raises(ValueError, match="width 7"):
        generate(model, REQUESTS, interventions=[tilted], max_new_tokens=2)
    assert before == hooks() == 0


# Self-checks and provenance


@pytest.mark.parametrize("family", FAMILIES)
def test_every_self_check_that_applies_passes(hooked, family):
    report = check_model(hooked(family))
    outcomes = {c.name: c.outcome for c in report.checks}
    assert not report.failed, report.to_frame().to_string()
    # there is no Hugging Face model to compare with, and there are no wrappers to read without
    for name in ("logits equal Hugging Face's", WITHOUT_WRAPPERS):
        assert outcomes.pop(name) == "not applicable"
    assert set(outcomes.values()) == {"passed"}
    assert len(outcomes) == 7


def test_a_hooked_transformer_that_overflows_fails_the_self_checks(hf_model, few_passages):
    model = take_over(hf_model("llama"))
    with torch.no_grad():
        model.blocks[1].mlp.W_gate[0, 0] = torch.inf
    with pytest.raises(SelfCheckError, match="failed the self-check"):
        extract_activations(model, few_passages)


def test_a_hooked_transformer_whose_hook_fires_twice_fails_the_self_checks(hf_model):
    model = take_over(hf_model("llama"))
    inner = model.blocks[2].mlp.forward
    model.blocks[2].mlp.forward = lambda x: inner(x) + 0 * inner(x)
    failed = {c.name: c.measured for c in check_model(model).failed}
    assert "blocks.2.mlp.hook_pre fired 2 times" in failed["each hook fires once"]


@pytest.mark.parametrize("family", FAMILIES)
def test_provenance_says_where_a_model_comes_from_and_in_which_numerics(hooked, few_passages, family):
    seen = extract_activations(hooked(family), few_passages).provenance
    assert (seen.numerics, seen.dtype, seen.bos) == ("hf", "float32", "prepended")
    assert seen.source == "in memory (HookedTransformer)"
    assert seen.versions["transformer-lens"].startswith("3.9")
    assert seen.checks["each hook fires once"].startswith("passed")


@pytest.mark.parametrize(
    ("family", "processing", "numerics"),
    [
        ("llama", {}, "compatibility"),
        ("gpt2", {}, "compatibility"),
        ("gpt2", {"fold_ln": False}, "compatibility"),  # still centres what is written to the residual stream
        ("gpt2", {"fold_ln": False, "center_writing_weights": False}, "hf"),
    ],
)
def test_provenance_says_whether_weights_were_processed(hf_model, family, processing, numerics):
    model = take_over(hf_model(family))
    model.process_weights_(**processing)
    assert model_info(model).provenance.numerics == numerics
    ensure_checked(model)


def test_vectors_are_refused_on_a_model_in_other_numerics(hf_model, everything, few_passages):
    processed = take_over(hf_model("llama"))
    processed.process_weights_()
    theirs = extract_activations(processed, few_passages)
    with pytest.raises(ValueError, match=r"received (weights_sha256|numerics)"):
        fit_vectors(everything("llama").at("resid_post")).project(theirs)


# Vectors and localization


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_differences_of_hugging_face_means(everything, expected, few_passages, family):
    vectors = fit_vectors(everything(family).at("resid_post"))
    values = expected(family)["resid_post"].double()
    labels = np.array(few_passages.emotions)
    means = torch.stack([values[torch.from_numpy(labels == e)].mean(0) for e in vectors.emotions])
    raw = means - means.mean(0)
    close(vectors.raw_norms.double(), raw.norm(dim=-1), 1e-4)
    close(vectors.directions.double(), raw / raw.norm(dim=-1, keepdim=True), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_top_tokens_are_those_of_hugging_faces_norm_and_unembedding(hooked, everything, hf_model, family):
    vectors = fit_vectors(everything(family).at("resid_post"))
    table = vectors.top_tokens(hooked(family), 2, k=5)
    hf = hf_model(family)
    norm = hf.model.norm if family == "llama" else hf.transformer.ln_f
    tokenizer = make_tokenizer()
    for emotion in vectors.emotions:
        direction = vectors.vector(emotion, 2)
        if family == "gpt2":
            direction = direction - direction.mean()  # LayerNorm takes the mean out
        logits = hf.lm_head.weight.detach() @ (direction * norm.weight.detach())
        assert table.loc[emotion, "top"] == tuple(tokenizer.decode([t]) for t in logits.topk(5).indices)
        assert table.loc[emotion, "bottom"] == tuple(tokenizer.decode([t]) for t in (-logits).topk(5).indices)


@pytest.mark.parametrize("family", FAMILIES)
def test_processed_weights_give_the_same_top_tokens(hooked, everything, hf_model, few_passages, family):
    processed = take_over(hf_model(family))
    processed.process_weights_()
    theirs = fit_vectors(extract_activations(processed, few_passages)).top_tokens(processed, 2)
    ours = fit_vectors(everything(family).at("resid_post")).top_tokens(hooked(family), 2)
    assert theirs.to_dict() == ours.to_dict()


@pytest.mark.parametrize("score", ["nearest_mean", "dprime"])
def test_localization_finds_the_curve_of_plain_hugging_face_activations(everything, expected, score):
    seen = everything("llama").at("resid_post")
    options = {"score": score, "n_permutations": 20, "seed": 3}
    ours = localize(seen, **options)
    theirs = localize(replace(seen, arrays={"resid_post": expected("llama")["resid_post"]}), **options)
    assert ours.provenance.source == "in memory (HookedTransformer)"
    np.testing.assert_allclose(ours.values, theirs.values, atol=1e-4)
    np.testing.assert_allclose(ours.p, theirs.p)
    assert np.ptp(np.asarray(ours.values)) > 0


# Writing


def hf_greedy(model, ids, n, edit=None):
    """Greedy continuation, one token at a time and without a cache, with an edit at one module."""
    tokens = list(ids)
    for _ in range(n):
        handle = edit(model, len(ids)) if edit else None
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if handle:
            handle.remove()
        if token == model.config.eos_token_id:
            break
        tokens.append(token)
    return tuple(tokens[len(ids) :])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", [True, False])
def test_greedy_texts_equal_hugging_faces_token_for_token(hooked, hf_model, family, chat):
    out = generate(hooked(family, chat=chat), REQUESTS, greedy=True, max_new_tokens=20)
    assert out.form == ("chat" if chat else "plain")
    for request, tokens in zip(REQUESTS, out.tokens, strict=True):
        ids, _ = ids_of("", request, chat=chat)
        with torch.no_grad():
            whole = hf_model(family).generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)[0].tolist()
        expected = whole[len(ids) :]
        assert list(tokens) == (expected[: expected.index(1)] if 1 in expected else expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
def test_adding_a_vector_while_writing_equals_a_hook_on_hugging_face(hooked, hf_model, family, scope):
    vector = 4 * torch.from_numpy(derive_generator(0, "push").standard_normal(32)).float()
    push = Intervention(layer=1, site="resid_post", vector=vector, scope=scope, rows=(0, 2))
    out = generate(hooked(family), REQUESTS, interventions=[push], greedy=True, max_new_tokens=12)

    def edit(model, length):
        def hook(module, inputs, output):
            changed = first(output).clone()
            inside = {"response": slice(length - 1, None), "prompt": slice(0, length - 1), "all": slice(None)}[scope]
            changed[:, inside] += vector
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return model.get_submodule(MODULES[family]["resid_post"][0].format(1)).register_forward_hook(hook)

    plain = [hf_greedy(hf_model(family), ids_of("", r)[0], 12) for r in REQUESTS]
    pushed = [hf_greedy(hf_model(family), ids_of("", r)[0], 12, edit) for r in REQUESTS]
    assert out.tokens == (pushed[0], plain[1], pushed[2])
    assert pushed[0] != plain[0]


def test_ablating_a_gate_direction_while_writing_equals_a_hook_on_hugging_face(hooked, hf_model):
    direction = torch.from_numpy(derive_generator(0, "gate").standard_normal(48)).float()
    unit = direction / direction.norm()
    ablate = Intervention(layer=0, site="gate", vector=direction, mode="ablate", scope="all")
    out = generate(hooked("llama"), REQUESTS, interventions=[ablate], greedy=True, max_new_tokens=12)

    def edit(model, length):
        def hook(module, inputs, output):
            return output - (output @ unit)[..., None] * unit

        return model.get_submodule("model.layers.0.mlp.gate_proj").register_forward_hook(hook)

    assert out.tokens == tuple(hf_greedy(hf_model("llama"), ids_of("", r)[0], 12, edit) for r in REQUESTS)


def test_a_sampled_text_depends_on_its_own_stream_and_not_on_its_batch(hooked):
    options = {"max_new_tokens": 15, "temperature": 1.0, "seed": 5}
    together = generate(hooked("llama"), REQUESTS, row_seeds=["a", "b", "c"], **options)
    alone = generate(hooked("llama"), REQUESTS[2:], row_seeds=["c"], **options)
    other = generate(hooked("llama"), REQUESTS[2:], row_seeds=["d"], **options)
    assert together.tokens[2] == alone.tokens[0] != other.tokens[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_stories_are_written_then_read_after_their_requests(hooked, hf_model, family):
    stories = write_stories(
        hooked(family), ["happy", "sad"], n_stories=2, minimum_tokens=8, max_new_tokens=24, temperature=1.0, seed=1
    )
    assert stories.form == "chat"
    assert len(stories.stimuli) == 6
    assert stories.provenance.source == "in memory (HookedTransformer)"
    seen = extract_activations(hooked(family), stories.stimuli, sites="resid_mid")
    assert seen.provenance.bos == "template"
    close(seen.values, pooled_hf(hf_model(family), stories.stimuli, "resid_mid"))


def test_the_protocol_of_jeong_2026_reads_a_hooked_transformer(hooked, hf_model, few_passages):
    vectors = extract_protocol(hooked("llama"), "jeong2026", source="comprehension", stimuli=few_passages)
    values = pooled_hf(hf_model("llama"), few_passages, pool=lambda x: x[:, -1])
    labels = np.array(few_passages.emotions)
    raw = values[torch.from_numpy(labels == "sad")].mean(0) - values[torch.from_numpy(labels == "neutral")].mean(0)
    close(vectors.directions[vectors.emotions.index("sad")], raw / raw.norm(dim=-1, keepdim=True), 1e-4)


def test_a_sweep_runs_on_a_hooked_transformer(hooked, tmp_path):
    spec = make_spec(
        model="in memory",
        emotions=("happy", "sad"),
        scores=("nearest_mean",),
        n_stories=6,
        story_tokens=24,
        minimum_story_tokens=8,
        n_permutations=10,
    )
    sweep = run_sweep(spec, tmp_path / "run", load=lambda name, dtype: hooked("llama"))
    again = load_sweep(tmp_path / "run")
    assert sweep.vectors["comprehension"].provenance.source == "in memory (HookedTransformer)"
    assert sweep.headline("generation") == again.headline("generation")
    texts = load_stimuli("passages").select(emotions=["happy", "sad", "neutral"])
    direct = fit_vectors(extract_activations(hooked("llama"), texts, pooling="mean_without_sinks"))
    close(again.vectors["comprehension"].directions, direct.directions)


# Kinds of HookedTransformer that a bridge has no counterpart for


def test_loading_a_hooked_transformer_says_that_it_needs_no_loading(hooked):
    with pytest.raises(TypeError, match=r"HookedTransformer needs no loading: pass it to the functions as it is"):
        load_model(hooked("llama"))


def test_a_hooked_transformer_without_a_tokenizer_is_refused(hf_model, few_passages):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**settings_of(hf_model("gpt2").config), device="cpu"))
    with pytest.raises(TypeError, match=r"model without a tokenizer.*set model.tokenizer"):
        extract_activations(model, few_passages)


@pytest.mark.parametrize(
    "change",
    [{"use_normalization_before_and_after": True}, {"original_architecture": "Olmo2ForCausalLM"}],
)
def test_with_post_norms_o_and_down_are_refused_because_their_hooks_come_after_the_norm(hf_model, few_passages, change):
    model = make_hooked(settings_of(hf_model("llama").config) | {"n_key_value_heads": None} | change)
    for site, other in (("o", "attn_out"), ("down", "mlp_out")):
        with pytest.raises(ValueError, match=rf"post-norms, which has no hook before them; allowed is '{other}'"):
            resolve_site(model, site)
    assert "attn_out and mlp_out are what is added to the residual" in {
        c.name for c in check_model(model).checks if c.outcome == "passed"
    }


def test_a_model_of_attention_only_is_read_and_its_missing_mlp_refused(hf_model, few_passages):
    model = make_hooked(settings_of(hf_model("gpt2").config) | {"attn_only": True, "d_mlp": None})
    seen = extract_activations(model, few_passages, sites=["resid_post", "attn_out", "z"])
    sums = seen.arrays["attn_out"].sum(1) + seen.embedding["embedding"]
    close(seen.arrays["resid_post"][:, 2], sums)
    for site in ("mlp_out", "act", "down", "gate"):
        with pytest.raises(ValueError, match=rf"has no MLP, so there is no '{site}'"):
            resolve_site(model, site)


def test_ungrouped_keys_are_read_once_per_head(hf_model, everything, few_passages):
    model = take_over(hf_model("llama"))
    model.set_ungroup_grouped_query_attention(True)
    seen = extract_activations(model, few_passages, sites=["k", "v", "resid_post"])
    grouped = everything("llama")
    for site in ("k", "v"):
        heads = grouped.at(site).values.unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2).flatten(-2)
        close(seen.at(site).values, heads)
    close(seen.at("resid_post").values, grouped.at("resid_post").values)


def test_without_norms_the_logit_lens_is_the_bare_unembedding(hf_model, few_passages):
    model = make_hooked(settings_of(hf_model("gpt2").config) | {"normalization_type": None})
    assert final_norm_scale(model).tolist() == [1.0] * 32
    vectors = fit_vectors(extract_activations(model, few_passages))
    best = (vectors.vector("sad", 0) @ model.W_U.detach()).argmax()
    assert vectors.top_tokens(model, 0, k=1).loc["sad", "top"] == (make_tokenizer().decode([best]),)


def test_a_hooked_transformer_in_bfloat16_is_read_close_to_float32(hf_model, everything, few_passages):
    model = take_over(hf_model("llama")).to(torch.bfloat16)
    seen = extract_activations(model, few_passages, sites=["resid_post", "gate"])
    assert seen.provenance.dtype == "bfloat16"
    for site in ("resid_post", "gate"):
        cosines = torch.cosine_similarity(seen.arrays[site], everything("llama").arrays[site], dim=-1)
        assert 0.99 < cosines.min() < 1


def test_every_site_is_covered_here():
    assert set(MODULES["llama"]) == set(SITES)
    assert set(MODULES["gpt2"]) == set(SITES) - {"gate", "up"}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_neurons_of_a_hooked_transformer_add_up_and_equal_hugging_faces(
    hooked, hf_model, few_passages, family
):
    model, text = hooked(family), few_passages.texts[3]
    vectors = fit_vectors(extract_activations(model, few_passages))
    found = attribute_direction(model, text, vectors, "sad", 2, n_neurons=10_000)
    parts = found.embedding + found.positional + found.heads.sum((1, 2))
    parts = parts + (found.attention_other + found.mlps + found.mlp_other).sum(1)
    close(parts, found.total, 1e-4)
    ids, _ = ids_of(text)
    seen, unit = read_hf(hf_model(family), ids), vectors.vector("sad", 2)
    close(found.total, seen["resid_post"][2] @ unit, 1e-4)
    for layer in range(3):
        own = found.neurons[:, [k for k, at in enumerate(found.neuron_layers) if at == layer]].sum(1)
        close(own + found.mlp_other[:, layer], seen["mlp_out"][layer] @ unit, 1e-4)
        close(found.heads[:, layer].sum(-1) + found.attention_other[:, layer], seen["attn_out"][layer] @ unit, 1e-4)
    by_layer = projection_by_layer(model, text, vectors, "sad")
    close(by_layer.values[2], found.total - found.reference, 1e-4)
    table = top_neurons(model, few_passages, vectors, 1, n=3).to_frame()
    assert table["gate_own"].isna().all() == (family == "gpt2")
    assert table["p"].notna().all()


def test_neurons_of_a_hooked_transformer_with_post_norms_are_refused(hf_model, few_passages):
    model = make_hooked(
        settings_of(hf_model("llama").config) | {"n_key_value_heads": None, "use_normalization_before_and_after": True}
    )
    vectors = fit_vectors(extract_activations(model, few_passages))
    with pytest.raises(ValueError, match="post-norms, which has no hook before them.*TransformerBridge"):
        attribute_direction(model, few_passages.texts[0], vectors, "sad", 1)
    with pytest.raises(ValueError, match="post-norms, which has no hook before them"):
        top_neurons(model, few_passages, vectors, 1)


@pytest.mark.parametrize(
    ("family", "site"), [("llama", "gate"), ("llama", "o"), ("gpt2", "act"), ("gpt2", "resid_post")]
)
def test_patches_of_a_hooked_transformer_equal_patches_of_hugging_face(hooked, hf_model, family, site):
    model, hf = hooked(family), hf_model(family)
    found = patch_sites(model, make_pairs(), sites=[site], positions="all", controls=["self"])
    assert found.way.startswith("full: a HookedTransformer's blocks cannot be resumed")
    matched = match_pairs(model, make_pairs())
    name, side = MODULES[family][site]
    for layer in range(3):
        module = hf.get_submodule(name.format(layer))
        for pair in (0, 4, 11):
            n, start = int(matched.last[pair]) + 1, int(matched.first[pair])
            clean, corrupted = matched.clean[pair : pair + 1, :n], matched.corrupted[pair : pair + 1, :n]
            kept = []

            def keep(value, kept=kept):
                kept.append(value.clone())

            def put(value, kept=kept, start=start):
                changed = value.clone()
                changed[:, start:] = kept[0][:, start:]
                return changed

            logits = []
            for tokens, act in ((clean, keep), (corrupted, put)):
                if side == "in":
                    handle = module.register_forward_pre_hook(
                        lambda _, args, act=act: None if act(args[0]) is None else (act(args[0]),)
                    )
                else:
                    handle = module.register_forward_hook(
                        lambda _, args, out, act=act: (
                            None
                            if (new := act(first(out))) is None
                            else (new, *out[1:])
                            if isinstance(out, tuple)
                            else new
                        )
                    )
                with handle, torch.no_grad():
                    logits.append(hf(tokens).logits[0, -1:])
            with torch.no_grad():
                start_odds = matched.log_odds(hf(corrupted).logits[0, -1:], torch.tensor([pair]))
            expected = matched.log_odds(logits[1], torch.tensor([pair])) - start_odds
            assert float(found.effect_raw[pair, 0, layer, 0] - expected) == pytest.approx(0, abs=1e-4)
    assert float(found.controls["self"].abs().max()) < 1e-5

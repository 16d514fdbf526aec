"""Steering: doses are what they claim to be, act where they should, and leave nothing behind."""

from dataclasses import replace

import pytest
import torch

from lens_affect.activations import extract_activations
from lens_affect.adapter import add_hooks, encode_prompt, model_info, run_logits
from lens_affect.generation import generate
from lens_affect.models import load_model
from lens_affect.scoring import score_texts
from lens_affect.sites import resolve_site
from lens_affect.steering import STRENGTH_LIMIT, calibrate, choose_layers, make_push, residual_norms, steer
from lens_affect.stimuli import load_stimuli
from lens_affect.vectors import fit_vectors
from tests.test_patching import vectors_of
from tests.tiny import make_hf_model, make_tokenizer

PROMPTS = ["Hello there", "Write about a cat in the garden"]
IDS = torch.tensor([[0, 5, 9, 30, 21, 22, 23, 24]])
ONES = torch.ones_like(IDS)


def streams(model, layer: int, **push) -> torch.Tensor:
    """resid_post of a layer under steering, one plain pass."""
    kept = []
    with (
        steer(model, vectors_of(model), "calm", **push),
        add_hooks(model, [(resolve_site(model, "resid_post").at(layer), lambda x, hook: kept.append(x.clone()))]),
    ):
        run_logits(model, IDS, ONES)
    return kept[0][0]


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_reference_norms_are_those_of_ordinary_positions(tiny_model, family):
    model = tiny_model(family)
    found = residual_norms(model)
    assert found.shape == (3,)
    kept = []
    texts = load_stimuli("passages").select(emotions=["neutral"]).texts[:12]
    with add_hooks(model, [(resolve_site(model, "resid_post").at(1), lambda x, hook: kept.append(x[0].norm(dim=-1)))]):
        for text in texts:
            ids = torch.tensor([[0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]])
            run_logits(model, ids, torch.ones_like(ids))
    mean = torch.cat([n[1:][n[1:] <= 3 * n[1:].median()] for n in kept]).mean()
    assert float(found[1]) == pytest.approx(float(mean), rel=0.02)  # 12 of its 36 texts
    assert residual_norms(model) is found


def test_an_attention_sink_does_not_set_the_dose():
    hf = make_hf_model("llama")
    plain = residual_norms(load_model(hf, tokenizer=make_tokenizer()))
    with torch.no_grad():
        hf.model.embed_tokens.weight[0] *= 1000  # BOS stands at position 0
    assert torch.allclose(residual_norms(load_model(hf, tokenizer=make_tokenizer())), plain, rtol=0.2)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_a_strength_moves_the_stream_by_that_share_of_the_norm_and_twice_the_strength_by_twice(tiny_model, family):
    model = tiny_model(family)
    base, once, twice = (streams(model, 1, layers=1, strength=s, scope="all") for s in (0.0, 0.4, 0.8))
    added = once - base
    torch.testing.assert_close(added.norm(dim=-1), (0.4 * residual_norms(model)[1]).expand(8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice - base, 2 * added, rtol=1e-3, atol=1e-5)
    unit = vectors_of(model).vector("calm", 1)
    torch.testing.assert_close(added[3] / added[3].norm(), unit, rtol=1e-3, atol=1e-5)


def test_strength_zero_is_bit_identical_and_opposite_strengths_cancel(tiny_model):
    model = tiny_model("llama")
    plain = run_logits(model, IDS, ONES)
    with steer(model, vectors_of(model), "calm", layers=1, strength=0.0, scope="all"):
        assert torch.equal(run_logits(model, IDS, ONES), plain)
    there = {"layers": 1, "scope": "all"}
    with (
        steer(model, vectors_of(model), "calm", strength=0.7, **there),
        steer(model, vectors_of(model), "calm", strength=-0.7, **there),
    ):
        torch.testing.assert_close(run_logits(model, IDS, ONES), plain, rtol=1e-4, atol=1e-5)
    rows = {"greedy": True, "max_new_tokens": 8}
    zero = make_push(model, vectors_of(model), "calm", strength=0.0).interventions()
    assert generate(model, PROMPTS, interventions=zero, **rows).tokens == generate(model, PROMPTS, **rows).tokens


@pytest.mark.parametrize("factor", [50.0, 0.01])
def test_scaling_a_vector_changes_neither_the_text_nor_the_achieved_change(tiny_model, factor):
    model = tiny_model("llama")
    vectors = vectors_of(model)
    longer = replace(vectors, directions=vectors.directions * factor, raw_norms=vectors.raw_norms * factor)
    heads = [encode_prompt(model, prompt)[0] for prompt in PROMPTS]
    for dose in ({"layers": [0, 2], "strength": 0.3}, {"strength": 0.01, "protocol": "jeong2026"}):
        pushes = [make_push(model, v, "sad", **dose) for v in (vectors, longer)]
        torch.testing.assert_close(pushes[1].vectors, pushes[0].vectors)
        texts = [
            generate(model, PROMPTS, interventions=push.interventions(), max_new_tokens=12, seed=3) for push in pushes
        ]
        assert texts[0].tokens == texts[1].tokens
        assert any(texts[0].tokens)
        if not pushes[0].relative:
            assert texts[0].tokens != generate(model, PROMPTS, max_new_tokens=12, seed=3).tokens
            scores = [score_texts(model, heads, texts[0].tokens, interventions=push.interventions()) for push in pushes]
            torch.testing.assert_close(scores[1].change, scores[0].change)
            torch.testing.assert_close(scores[1].kl, scores[0].kl, rtol=1e-3, atol=1e-6)


def test_scaling_the_activations_behind_a_vector_changes_nothing(tiny_model):
    model = tiny_model("llama")
    passages = load_stimuli("passages").select(emotions=["calm", "sad"], groups=["train", "garden", "school"])
    read = extract_activations(model, passages, pooling="mean")
    fitted = [fit_vectors(replace(read, arrays={k: f * a for k, a in read.arrays.items()})) for f in (1.0, 50.0)]
    assert float(fitted[1].raw_norms.mean() / fitted[0].raw_norms.mean()) == pytest.approx(50, rel=1e-4)
    pushes = [make_push(model, v, "sad", layers=1, strength=0.3) for v in fitted]
    torch.testing.assert_close(pushes[1].vectors, pushes[0].vectors)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_twice_the_strength_adds_exactly_twice_the_tensor(tiny_model, family):
    """Seen where it is added, over a stream that was set to 0, so that no rounding of a sum hides a difference."""
    model = tiny_model(family)
    once, twice = (make_push(model, vectors_of(model), "calm", layers=[0, 1], strength=s) for s in (0.35, 0.7))
    assert torch.equal(twice.vectors, 2 * once.vectors)
    empty = [(resolve_site(model, "resid_post").at(1), lambda x, hook: torch.zeros_like(x))]
    with add_hooks(model, empty):
        seen = [streams(model, 1, layers=1, strength=s, scope="all") for s in (0.35, 0.7)]
    assert torch.equal(seen[1], 2 * seen[0])
    assert torch.equal(seen[0], once.vectors[1].expand(8, -1))


def test_ablating_twice_is_ablating_once_and_clamping_sets_the_component(tiny_model):
    model = tiny_model("gemma3")
    unit = vectors_of(model).vector("calm", 1)
    once = streams(model, 1, layers=1, strength=1.0, mode="ablate", scope="all")
    assert float((once @ unit).abs().max()) < 1e-4
    with steer(model, vectors_of(model), "calm", layers=1, strength=1.0, mode="ablate", scope="all"):
        again = streams(model, 1, layers=1, strength=1.0, mode="ablate", scope="all")
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-5)
    clamped = streams(model, 1, layers=1, strength=-0.5, mode="clamp", scope="all")
    torch.testing.assert_close(clamped @ unit, (-0.5 * residual_norms(model)[1]).expand(8), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("protocol", ["lens_affect", "jeong2026"])
def test_clamping_to_nothing_is_ablating_and_ablating_needs_no_strength(tiny_model, protocol):
    model, unit = tiny_model("gemma3"), vectors_of(tiny_model("gemma3")).vector("calm", 1)
    how = {"layers": 1, "scope": "all", "protocol": protocol}
    ablated = streams(model, 1, mode="ablate", **how)
    for strength in (0.0, -0.0):
        clamped = streams(model, 1, mode="clamp", strength=strength, **how)
        assert torch.equal(clamped, ablated)
    assert bool(ablated.isfinite().all())
    assert float((ablated @ unit).abs().max()) < 1e-4
    assert torch.equal(streams(model, 1, mode="ablate", strength=float("nan"), **how), ablated)


@pytest.mark.parametrize("mode", ["ablate", "clamp"])
def test_nothing_is_set_along_a_direction_of_length_0(tiny_model, mode):
    model, vectors = tiny_model("llama"), vectors_of(tiny_model("llama"))
    none = replace(vectors, directions=torch.zeros_like(vectors.directions))
    with pytest.raises(ValueError, match="whose direction has length 0"):
        make_push(model, none, "calm", layers=1, strength=0.5, mode=mode)
    push = make_push(model, vectors, "calm", layers=1, strength=0.5, mode=mode).interventions()
    with pytest.raises(ValueError, match="received a zero vector to ablate or to clamp"):
        score_texts(model, [(0, 5)], [(6,)], interventions=[replace(push[0], vector=torch.zeros(32))])


@pytest.mark.parametrize(("scope", "moved"), [("response", range(4, 8)), ("prompt", range(4)), ("all", range(8))])
def test_the_scope_says_which_positions_of_a_whole_text_are_moved(tiny_model, scope, moved):
    model = tiny_model("llama")
    base = streams(model, 1, layers=1, strength=0.0)
    found = streams(model, 1, layers=1, strength=0.5, scope=scope, prompt_length=5)
    assert ((found - base).norm(dim=-1) > 1e-6).nonzero().flatten().tolist() == list(moved)
    last = streams(model, 1, layers=1, strength=0.5, scope="response")
    assert ((last - base).norm(dim=-1) > 1e-6).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("scope", ["response", "all"])
def test_steering_around_generation_is_steering_inside_it_with_and_without_a_cache(tiny_model, scope):
    model, vectors = tiny_model("llama"), vectors_of(tiny_model("llama"))
    rows = {"greedy": True, "max_new_tokens": 8}
    push = make_push(model, vectors, "sad", layers=[0, 1], strength=0.8, scope=scope)
    inside = generate(model, PROMPTS[:1], interventions=push.interventions(), **rows)
    uncached = generate(model, PROMPTS[:1], interventions=push.interventions(), use_cache=False, **rows)
    with steer(model, vectors, "sad", layers=[0, 1], strength=0.8, scope=scope):
        around = generate(model, PROMPTS[:1], **rows)
    assert inside.tokens == around.tokens == uncached.tokens
    assert inside.tokens != generate(model, PROMPTS[:1], **rows).tokens


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
def test_steering_around_a_batch_is_steering_around_each_of_its_texts(tiny_model, scope, use_cache):
    model, vectors = tiny_model("llama"), vectors_of(tiny_model("llama"))
    rows = {"max_new_tokens": 8, "seed": 2, "use_cache": use_cache}
    kept: list[torch.Tensor] = []
    last = resolve_site(model, "resid_post").at(2)
    keep = [(last, lambda x, hook: kept.append(x[:, -1].clone()))]

    def written(prompts):
        kept.clear()
        with steer(model, vectors, "sad", layers=1, strength=0.8, scope=scope), add_hooks(model, keep):
            found = generate(model, prompts, row_seeds=["same"] * len(prompts), **rows)
        return found.tokens, torch.stack(kept, dim=1)

    for prompts in (PROMPTS[1:] * 2, PROMPTS):
        tokens, residuals = written(prompts)
        for row, prompt in enumerate(prompts):
            alone, beside = written([prompt])
            assert tokens[row] == alone[0]
            n = min(beside.shape[1], residuals.shape[1], len(alone[0]) + 1)
            if len(set(map(len, tokens))) == 1:  # else a row that is done leaves the batch
                torch.testing.assert_close(residuals[row, :n], beside[0, :n], rtol=1e-3, atol=1e-4)
    push = make_push(model, vectors, "sad", layers=1, strength=0.8, scope=scope)
    inside = generate(model, PROMPTS, interventions=push.interventions(), row_seeds=["same"] * 2, **rows)
    assert inside.tokens == tokens


@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
def test_texts_are_scored_alike_alone_and_in_a_batch_while_the_model_is_steered(tiny_model, scope):
    model, vectors = tiny_model("llama"), vectors_of(tiny_model("llama"))
    heads = [tuple(IDS[0, :4].tolist())] * 2 + [tuple(IDS[0, :3].tolist())]
    responses = [tuple(IDS[0, 4:].tolist())] * 2 + [tuple(IDS[0, 3:6].tolist())]
    other = make_push(model, vectors, "calm", layers=2, strength=0.3).interventions()
    push = make_push(model, vectors, "sad", layers=1, strength=0.8, scope=scope)
    plain = score_texts(model, heads, responses)
    with steer(model, vectors, "sad", layers=1, strength=0.8, scope=scope):
        found = score_texts(model, heads, responses, interventions=other)
        for i in range(3):
            alone = score_texts(model, [heads[i]], [responses[i]], interventions=other)
            for name in ("nll", "kl", "change"):
                torch.testing.assert_close(getattr(found, name)[i], getattr(alone, name)[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found.nll, plain.nll, atol=1e-3)
    # What is added around the reading is what an intervention adds inside it.
    with add_hooks(model, [(resolve_site(model, "resid_post").at(1), _added_to_all(push.vectors[0]))]):
        every = score_texts(model, heads, responses)
    if scope == "all":
        torch.testing.assert_close(found.nll, every.nll, rtol=1e-4, atol=1e-5)


def _added_to_all(vector: torch.Tensor):
    return lambda value, hook: value + vector


def test_hooks_that_act_on_the_last_position_of_a_pass_do_not_reach_into_a_prompt_that_two_rows_share(tiny_model):
    model = tiny_model("llama")

    def push_last(value, hook):
        return torch.cat([value[:, :-1], value[:, -1:] + 3.0], dim=1)

    with add_hooks(model, [(resolve_site(model, "resid_post").at(0), push_last)]):
        both = generate(model, PROMPTS[1:] * 2, row_seeds=["same"] * 2, max_new_tokens=8)
        alone = generate(model, PROMPTS[1:], row_seeds=["same"], max_new_tokens=8)
    assert both.tokens == (alone.tokens[0],) * 2


def test_rows_of_one_batch_are_steered_each_its_own_way(tiny_model):
    model, vectors = tiny_model("llama"), vectors_of(tiny_model("llama"))
    rows = {"greedy": True, "max_new_tokens": 6}
    one = make_push(model, vectors, "sad", layers=1, strength=1.0).interventions(rows=(0,))
    two = make_push(model, vectors, "calm", layers=1, strength=-1.0).interventions(rows=(1,))
    together = generate(model, PROMPTS, interventions=[*one, *two], **rows)
    for i, push in enumerate((one, two)):
        alone = generate(model, [PROMPTS[i]], interventions=[replace(push[0], rows=None)], **rows)
        assert together.tokens[i] == alone.tokens[0]


def test_the_papers_protocol_doses_by_the_pass_it_is_in(tiny_model):
    model, vectors = tiny_model("llama"), vectors_of(tiny_model("llama"))
    push = make_push(model, vectors, "calm", strength=0.05, protocol="jeong2026")
    assert push.layers == (0, 1, 2)
    assert push.scope == "all"
    for vector in push.vectors:
        torch.testing.assert_close(vector, 0.05 * vectors.vector("calm", 1))
    kept: dict[int, torch.Tensor] = {}
    site = resolve_site(model, "resid_post")

    def keep(layer):
        return site.at(layer), lambda x, hook: kept.__setitem__(layer, x.clone())

    with (
        add_hooks(model, [keep(0)]),
        steer(model, vectors, "calm", strength=0.05, protocol="jeong2026"),
    ):
        run_logits(model, IDS, ONES)
    before = kept[0]  # the hook stands before the steering one: first layer, not yet steered
    with (
        steer(model, vectors, "calm", strength=0.05, protocol="jeong2026"),
        add_hooks(model, [keep(0)]),
    ):
        run_logits(model, IDS, ONES)
    expected = 0.05 * before.norm(dim=-1).mean() * vectors.vector("calm", 1)
    torch.testing.assert_close((kept[0] - before)[0, 2], expected, rtol=1e-3, atol=1e-5)
    text = generate(
        model, PROMPTS[:1], interventions=push.interventions(), use_cache=False, greedy=True, max_new_tokens=4
    )
    with steer(model, vectors, "calm", strength=0.05, protocol="jeong2026"):
        around = generate(model, PROMPTS[:1], use_cache=False, greedy=True, max_new_tokens=4)
    assert text.tokens == around.tokens


@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 2]])
def test_several_layers_are_calibrated_to_the_change_they_should_make(tiny_model, layers, scope, mode):
    model, vectors = tiny_model("gemma3"), vectors_of(tiny_model("gemma3"))
    directions = torch.stack([vectors.vector("sad", layer) for layer in layers])
    heads, texts = [tuple(IDS[0, :4].tolist())] * 2, [tuple(IDS[0, 4:].tolist()), tuple(IDS[0, 5:].tolist())]
    how = {"scope": scope, "mode": mode}
    strength = calibrate(model, directions, layers, 0.4, heads, texts, **how)
    push = make_push(model, vectors, "sad", layers=layers, strength=strength, **how)
    found = score_texts(model, heads, texts, interventions=push.interventions())
    weights = torch.tensor([1.0, 1.0]) if scope == "prompt" else torch.tensor([4.0, 3.0])  # tokens that are measured
    achieved = (found.change * weights).sum() / weights.sum()
    assert float(achieved) == pytest.approx(0.4, rel=0.051)
    assert calibrate(model, directions[:1], layers[:1], 0.4, heads, texts, **how) == 0.4
    assert calibrate(model, directions, layers, -0.4, heads, texts, **how) < 0
    with pytest.raises(ValueError, match="received a target change of 1000000"):
        calibrate(model, directions, layers, 1e6, heads, texts, **how)


def test_clamping_that_moves_too_far_at_any_strength_is_refused(tiny_model):
    model, vectors = tiny_model("gemma3"), vectors_of(tiny_model("gemma3"))
    heads, texts = [tuple(IDS[0, :4].tolist())], [tuple(IDS[0, 4:].tolist())]
    directions = torch.stack([vectors.vector("sad", layer) for layer in (0, 1)])
    with pytest.raises(ValueError, match="even the smallest strength moves the stream by"):
        calibrate(model, directions, [0, 1], 1e-4, heads, texts, mode="clamp")


def test_hooks_are_gone_after_an_exception():
    model = load_model(make_hf_model("llama"), tokenizer=make_tokenizer())
    before = run_logits(model, IDS, ONES)
    with pytest.raises(RuntimeError, match="stop"), steer(model, vectors_of(model), "calm", strength=1.0, scope="all"):
        assert not torch.equal(run_logits(model, IDS, ONES), before)
        raise RuntimeError("stop")
    assert torch.equal(run_logits(model, IDS, ONES), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": float("nan")}, "received strength nan; allowed are numbers"),
        ({"strength": STRENGTH_LIMIT + 1}, "received strength 11.0; allowed are numbers"),
        ({"strength": None}, "received no strength for mode='add'; allowed is none for 'ablate' only"),
        ({"layers": 3}, r"received layers \[3\]; allowed are different ones of 0 to 2"),
        ({"layers": []}, r"received layers \[\]; allowed"),
        ({"layers": [1, 1]}, r"received layers \[1, 1\]; allowed"),
        ({"emotion": "hungry"}, "received emotion 'hungry'; there are vectors for"),
    ],
)
def test_a_dose_that_makes_no_sense_is_refused(tiny_model, change, message):
    model = tiny_model("llama")
    asked = {"emotion": "calm", "strength": 0.5} | change
    with pytest.raises(ValueError, match=message):
        make_push(model, vectors_of(model), asked.pop("emotion"), **asked)


def test_vectors_of_another_model_or_site_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="vectors were made with"):
        make_push(tiny_model("qwen2"), vectors_of(model), "calm", strength=0.5)
    with pytest.raises(ValueError, match="read at gate; steering adds to resid_post"):
        make_push(model, replace(vectors_of(model), site="gate"), "calm", strength=0.5)
    assert choose_layers(None, 30) == (15,)
    assert model_info(model).provenance == vectors_of(model).provenance

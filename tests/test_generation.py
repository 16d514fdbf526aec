"""Generation: Hugging Face's own text, one random stream per row, interventions at the right rows and positions."""

import numpy as np
import pytest
import torch
from scipy import stats

from lens_affect.adapter import run_logits
from lens_affect.generation import Intervention, generate, sample, stop_tokens
from tests.tiny import make_hf_model, make_tokenizer

PROMPTS = ("Hello there", "Write a story about a cat in the garden who is sad, and about its dog", "Why")
WIDTH = 32


def prompt_ids(prompt: str) -> list[int]:
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def arrow(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decode_by_hand(hf_model, prompt, n, *, module=None, edit=None, scope=None) -> tuple[int, ...]:
    """Greedy tokens of one row: Hugging Face, no cache, no padding; `edit` changes a module's output at the scope's positions."""
    ids = prompt_ids(prompt)
    first = len(ids) - 1

    def hook(_module, _inputs, output):
        value = (output[0] if isinstance(output, tuple) else output).clone()
        where = {"response": slice(first, None), "prompt": slice(0, first), "all": slice(None)}[scope]
        value[:, where] = edit(value[:, where])
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.register_forward_hook(hook) if module is not None else None
    found: list[int] = []
    with torch.no_grad():
        for _ in range(n):
            logits = hf_model(torch.tensor([ids + found]), use_cache=False).logits[0, -1]
            found.append(int(logits.argmax()))
    if handle:
        handle.remove()
    return tuple(found)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "qwen2", "llama", "mistral", "mixtral"])
def test_greedy_text_is_that_of_hugging_face_generate_for_prompts_of_different_lengths(tiny_model, family):
    hf_model = make_hf_model(family)
    ids = [prompt_ids(p) for p in PROMPTS]
    width = max(map(len, ids))
    tokens = torch.tensor([[2] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    expected = hf_model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=1, pad_token_id=2
    )[:, width:]
    found = generate(tiny_model(family), PROMPTS, greedy=True, max_new_tokens=16)
    for row, wanted in zip(found.tokens, expected.tolist(), strict=True):
        kept = wanted[: wanted.index(1)] if 1 in wanted else wanted
        assert list(row) == kept


def test_a_model_without_chat_template_reads_the_prompt_after_bos_and_an_empty_line(tiny_model):
    tokenizer = make_tokenizer(chat=False)
    ids = torch.tensor([[0, *tokenizer(PROMPTS[1] + "\n\n", add_special_tokens=False)["input_ids"]]])
    expected = make_hf_model("llama").generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=1, pad_token_id=2)
    found = generate(tiny_model("llama", chat=False), PROMPTS, greedy=True, max_new_tokens=10, stop=[])
    assert found.form == "plain"
    assert list(found.tokens[1]) == expected[0, ids.shape[1] :].tolist()


def test_the_chat_form_is_refused_where_there_is_no_chat_template(tiny_model):
    message = "received form='chat' for a tokenizer without a chat template; allowed are 'plain' and 'continue': leave form out"
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("llama", chat=False), PROMPTS, form="chat", max_new_tokens=2)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_sampled_row_does_not_depend_on_the_rows_beside_it(tiny_model, family):
    model, names = tiny_model(family), ["a", "b", "c"]
    together = generate(model, PROMPTS, row_seeds=names, max_new_tokens=16, seed=3)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], row_seeds=[names[i]], max_new_tokens=16, seed=3)
        assert alone.tokens[0] == together.tokens[i]


def test_the_same_seed_gives_the_same_text_and_another_seed_or_row_name_another(tiny_model):
    model = tiny_model("llama")
    first, again, other = (generate(model, PROMPTS, max_new_tokens=12, seed=s) for s in (0, 0, 1))
    assert first.tokens == again.tokens
    assert all(a != b for a, b in zip(first.tokens, other.tokens, strict=True))
    twins = generate(model, [PROMPTS[0]] * 3, row_seeds=["x", "x", "y"], max_new_tokens=12)
    assert twins.tokens[0] == twins.tokens[1] != twins.tokens[2]
    default = generate(model, [PROMPTS[0]] * 2, max_new_tokens=12)
    assert default.tokens[0] != default.tokens[1]


def test_a_low_temperature_gives_the_greedy_text(tiny_model):
    model = tiny_model("llama")
    cold = generate(model, PROMPTS, temperature=1e-4, top_p=1.0, max_new_tokens=12)
    assert cold.tokens == generate(model, PROMPTS, greedy=True, max_new_tokens=12).tokens


def draws(probabilities, uniform, *, top_p, temperature=1.0):
    logits = torch.tensor(probabilities).log().expand(len(uniform), -1) * temperature
    return sample(logits, uniform, temperature=temperature, top_p=top_p).numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_nucleus_distribution(temperature):
    probabilities = [0.15, 0.05, 0.5, 0.3]  # top_p = 0.9 keeps 0.5, 0.3 and 0.15
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    counts = np.bincount(draws(probabilities, uniform, top_p=0.9, temperature=temperature), minlength=4)
    assert counts[1] == 0
    expected = np.array([0.15, 0.5, 0.3]) / 0.95 * 20_000
    assert stats.chisquare(counts[[0, 2, 3]], expected).pvalue > 0.01


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (1.0, 4)])
def test_the_nucleus_is_the_smallest_set_with_at_least_top_p(top_p, kept):
    uniform = torch.linspace(0, 0.9999, 400)
    found = draws([0.5, 0.25, 0.15, 0.1], uniform, top_p=top_p)
    assert set(found.tolist()) == set(range(kept))


def nucleus_by_full_sort(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    order = np.argsort(-logits)
    p = np.exp((logits[order] - logits.max()) / temperature)
    p /= p.sum()
    n = int(np.searchsorted(np.cumsum(p), top_p)) + 1
    found = np.zeros(len(logits))
    found[order[:n]] = p[:n] / p[:n].sum()
    return found


@pytest.mark.parametrize(
    ("vocabulary", "spread", "size"), [(5, 1.0, 2), (128, 1.0, 60), (150, 0.1, 130), (1000, 0.3, 850), (3000, 3.0, 1)]
)
def test_sampling_equals_a_full_sort_also_when_the_nucleus_needs_over_128_candidates(vocabulary, spread, size):
    rng = np.random.default_rng(vocabulary)
    logits = (spread * rng.standard_normal((3, vocabulary))).astype(np.float32)
    uniform = (torch.arange(10_000, dtype=torch.double) + 0.5) / 10_000  # evenly spaced: frequencies are exact shares
    for row in logits:
        found = sample(torch.from_numpy(row).expand(10_000, -1), uniform, temperature=0.7, top_p=0.95)
        counts = np.bincount(found.numpy(), minlength=vocabulary)
        expected = 10_000 * nucleus_by_full_sort(row.astype(float), 0.7, 0.95)
        assert (expected > 0).sum() >= size
        assert np.abs(counts - expected).max() < 1.5


def test_a_rounding_error_in_the_logits_changes_hardly_any_draw():
    # the rows beside a row change its logits by rounding errors, and its text must not depend on them
    rng = np.random.default_rng(0)
    logits = np.repeat(0.3 * rng.standard_normal(200), 2).astype(np.float32)  # 200 pairs of equally likely tokens
    nudged = (logits * (1 + 3e-7 * rng.standard_normal(400))).astype(np.float32)
    uniform = torch.from_numpy(rng.random(2000))
    a, b = (
        sample(torch.from_numpy(x).expand(2000, -1), uniform, temperature=1.0, top_p=0.95) for x in (logits, nudged)
    )
    assert (a != b).float().mean() < 0.01


def test_a_flat_row_beside_peaked_ones_draws_as_alone_and_equal_tokens_stay_in_together():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((4, 20_000)).astype(np.float32))
    logits[1:3] *= 20  # two peaked rows between two flat ones
    uniform = torch.from_numpy(rng.random((50, 4)))
    for numbers in uniform:
        together = sample(logits, numbers, temperature=0.7, top_p=0.95)
        alone = [sample(logits[i : i + 1], numbers[i : i + 1], temperature=0.7, top_p=0.95) for i in range(4)]
        assert torch.equal(together, torch.cat(alone))
    even = (torch.arange(100, dtype=torch.double) + 0.5) / 100
    equal = sample(torch.zeros(100, 10_000), even, temperature=1.0, top_p=0.95)
    assert (equal / 10_000 - even).abs().max() < 1e-3


def test_logits_that_are_not_numbers_still_give_a_token():
    found = sample(torch.full((2, 300), torch.nan), torch.tensor([0.1, 0.9]), temperature=1.0, top_p=0.5)
    assert ((found >= 0) & (found < 300)).all()


def test_the_largest_uniform_number_still_draws_from_the_nucleus():
    assert draws([0.5, 0.3, 0.15, 0.05], torch.tensor([1 - 2**-53], dtype=torch.double), top_p=0.9).tolist() == [2]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3", "llama", "mistral"])
def test_stop_tokens_end_a_row_are_left_out_and_do_not_change_the_other_rows(tiny_model, family):
    model = tiny_model(family)
    prompts = [*PROMPTS, "The bus was late again", "Describe the garden"]
    free = generate(model, prompts, seed=1, temperature=1.5, max_new_tokens=20, stop=[])
    stops = [free.tokens[1][4], free.tokens[3][9]]
    stopped = generate(model, prompts, seed=1, temperature=1.5, max_new_tokens=20, stop=stops)
    assert not any(free.finished)
    for before, after, finished in zip(free.tokens, stopped.tokens, stopped.finished, strict=True):
        ends = [i for i, token in enumerate(before) if token in stops]
        assert after == (before[: ends[0]] if ends else before)
        assert finished == bool(ends)
    assert len(stopped.tokens[1]) <= 4 < 20
    assert not all(stopped.finished)


def test_finished_rows_are_not_computed_any_more(tiny_model):
    model, sizes = tiny_model("llama"), []
    free = generate(model, PROMPTS, greedy=True, max_new_tokens=12, stop=[])
    handle = model.original_model.register_forward_hook(lambda m, a, out: sizes.append(out.logits.shape[0]))
    stop = free.tokens[0][2]
    found = generate(model, PROMPTS, greedy=True, max_new_tokens=12, stop=[stop])
    handle.remove()
    lengths = [len(t) + f for t, f in zip(found.tokens, found.finished, strict=True)]
    assert found.finished[0]
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]


def test_default_stop_tokens_are_those_of_the_tokenizer_and_the_generation_config(tiny_model, monkeypatch):
    model = tiny_model("llama")
    assert stop_tokens(model) == (1,)
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", [1, 7])
    vocabulary = model.tokenizer.get_vocab() | {"<end_of_turn>": 9, "<|eot_id|>": 11, "<turn>": 12}
    monkeypatch.setattr(model.tokenizer, "get_vocab", lambda: vocabulary)
    assert stop_tokens(model) == (1, 7, 9, 11)


@pytest.mark.parametrize("site", ["resid_post", "resid_pre", "attn_out", "mlp_out", "gate", "q", "act"])
def test_adding_the_zero_vector_changes_nothing(tiny_model, site):
    model = tiny_model("llama")
    width = {"gate": 48, "act": 48, "q": 32}.get(site, WIDTH)
    plain = generate(model, PROMPTS, greedy=True, max_new_tokens=8)
    zero = Intervention(1, site, torch.zeros(width), scope="all")
    assert generate(model, PROMPTS, greedy=True, max_new_tokens=8, interventions=[zero]).tokens == plain.tokens


CASES = {
    "llama resid_post": ("llama", "resid_post", 32, lambda m: m.model.layers[1]),
    "gpt2 resid_post": ("gpt2", "resid_post", 32, lambda m: m.transformer.h[1]),
    "gemma3 resid_post": ("gemma3", "resid_post", 32, lambda m: m.model.layers[1]),
    "mistral resid_post": ("mistral", "resid_post", 32, lambda m: m.model.layers[1]),
    "qwen2 gate": ("qwen2", "gate", 48, lambda m: m.model.layers[1].mlp.gate_proj),
    "llama q": ("llama", "q", 32, lambda m: m.model.layers[1].self_attn.q_proj),
    "gemma2 v": ("gemma2", "v", 32, lambda m: m.model.layers[1].self_attn.v_proj),
}


@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("case", CASES)
def test_a_cached_run_with_an_intervention_equals_hugging_face_by_hand_without_a_cache(tiny_model, case, scope):
    family, site, width, module_of = CASES[case]
    hf_model, vector = make_hf_model(family), arrow(0, width, scale=4.0)
    change = Intervention(1, site, vector, scope=scope)
    found = generate(tiny_model(family), PROMPTS, greedy=True, max_new_tokens=8, stop=[], interventions=[change])
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        by_hand = decode_by_hand(
            hf_model, prompt, 8, module=module_of(hf_model), edit=lambda x: x + vector, scope=scope
        )
        assert tokens == by_hand
    plain = generate(tiny_model(family), PROMPTS, greedy=True, max_new_tokens=8, stop=[])
    assert found.tokens != plain.tokens


@pytest.mark.parametrize("mode", ["ablate", "clamp"])
@pytest.mark.parametrize("scope", ["response", "all"])
def test_ablation_and_clamp_equal_hugging_face_by_hand(tiny_model, mode, scope):
    hf_model, vector = make_hf_model("llama"), arrow(5, WIDTH, scale=3.0)
    unit = vector / vector.norm()
    target = 0.0 if mode == "ablate" else vector.norm()

    def edit(x):
        return x + (target - x @ unit)[..., None] * unit

    change = Intervention(1, "resid_post", vector, mode=mode, scope=scope)
    found = generate(tiny_model("llama"), PROMPTS, greedy=True, max_new_tokens=8, stop=[], interventions=[change])
    for prompt, tokens in zip(PROMPTS, found.tokens, strict=True):
        assert tokens == decode_by_hand(hf_model, prompt, 8, module=hf_model.model.layers[1], edit=edit, scope=scope)


def logits_per_step(model, **options):
    seen = []
    handle = model.original_model.register_forward_hook(lambda m, a, out: seen.append(out.logits[:, -1].clone()))
    try:
        generate(model, PROMPTS, greedy=True, max_new_tokens=3, stop=[], **options)
    finally:
        handle.remove()
    return seen


def test_at_the_last_layer_only_the_response_scope_reaches_the_logits(tiny_model):
    # What is added after the last block at earlier positions is read by nobody; the last prompt position predicts the first new token.
    model, vector = tiny_model("llama"), arrow(1, WIDTH, scale=4.0)
    plain = logits_per_step(model)
    response = logits_per_step(model, interventions=[Intervention(2, "resid_post", vector, scope="response")])
    prompt = logits_per_step(model, interventions=[Intervention(2, "resid_post", vector, scope="prompt")])
    assert (response[0] - plain[0]).abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(prompt, plain, strict=True))


def test_below_the_last_layer_the_prompt_scope_reaches_the_first_new_token_through_attention(tiny_model):
    model, vector = tiny_model("llama"), arrow(1, WIDTH, scale=4.0)
    plain = logits_per_step(model)
    prompt = logits_per_step(model, interventions=[Intervention(0, "resid_post", vector, scope="prompt")])
    assert (prompt[0] - plain[0]).abs().amin(0).max() > 1e-3


@pytest.mark.parametrize(("mode", "along"), [("ablate", 0.0), ("clamp", 7.0)])
def test_a_reading_hook_sees_the_component_removed_or_set_at_the_scope_only(tiny_model, mode, along):
    model, unit = tiny_model("llama"), torch.nn.functional.normalize(arrow(2, WIDTH), dim=0)
    seen = []
    reader = model.original_model.model.layers[2].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    try:
        change = Intervention(1, "resid_post", 7 * unit, mode=mode)
        generate(model, [PROMPTS[0]], greedy=True, max_new_tokens=4, stop=[], interventions=[change])
        generate(model, [PROMPTS[0]], greedy=True, max_new_tokens=1, stop=[])
    finally:
        reader.remove()
    prompt, *later, plain = seen
    assert torch.equal(prompt[0, :-1], plain[0, :-1])  # positions that predict prompt tokens stay
    changed = torch.cat([prompt[:, -1:], *later], dim=1)[0]
    torch.testing.assert_close(changed @ unit, torch.full((4,), along), atol=1e-5, rtol=1e-5)
    rest = torch.eye(WIDTH) - unit[:, None] @ unit[None]
    torch.testing.assert_close(prompt[0, -1] @ rest, plain[0, -1] @ rest, atol=1e-5, rtol=1e-5)


def test_an_intervention_changes_only_its_rows(tiny_model):
    model = tiny_model("llama")
    prompts = [PROMPTS[0]] * 2 + list(PROMPTS)
    plain = generate(model, prompts, greedy=True, max_new_tokens=10)
    change = Intervention(1, "resid_post", arrow(3, WIDTH, scale=4.0), rows=(1, 3))
    steered = generate(model, prompts, greedy=True, max_new_tokens=10, interventions=[change])
    changed = [a != b for a, b in zip(plain.tokens, steered.tokens, strict=True)]
    assert changed == [False, True, False, True, False]


@pytest.mark.parametrize("rows", [None, (2, 0)])
def test_each_row_gets_its_own_vector_also_after_other_rows_have_finished(tiny_model, rows):
    model, order = tiny_model("llama"), rows or (0, 1, 2)
    vectors = arrow(4, len(order), WIDTH, scale=3.0)
    single = {}
    for vector, row in zip(vectors, order, strict=True):
        change = Intervention(1, "resid_post", vector)
        single[row] = generate(model, [PROMPTS[row]], greedy=True, max_new_tokens=12, stop=[], interventions=[change])
    stop = single[0].tokens[0][3]
    together = generate(
        model,
        PROMPTS,
        greedy=True,
        max_new_tokens=12,
        stop=[stop],
        interventions=[Intervention(1, "resid_post", vectors, rows=rows)],
    )
    for row in order:
        alone = single[row].tokens[0]
        assert together.tokens[row] == (alone[: alone.index(stop)] if stop in alone else alone)
    assert together.finished[0]
    assert len({len(t) for t in together.tokens}) > 1


def test_two_interventions_at_one_place_add_up(tiny_model):
    model, a, b = tiny_model("llama"), arrow(6, WIDTH), arrow(7, WIDTH, scale=2.0)
    both = [Intervention(1, "resid_post", a), Intervention(1, "resid_post", b)]
    sum_of_both = [Intervention(1, "resid_post", a + b)]
    first, second = (logits_per_step(model, interventions=i)[0] for i in (both, sum_of_both))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_hooks_are_gone_afterwards_and_after_an_exception(tiny_model):
    model = tiny_model("llama")
    tokens = torch.tensor([prompt_ids(PROMPTS[0])])
    before = run_logits(model, tokens, torch.ones_like(tokens))
    change = Intervention(1, "resid_post", arrow(8, WIDTH, scale=5.0), scope="all")
    generate(model, PROMPTS, max_new_tokens=2, interventions=[change])
    assert torch.equal(run_logits(model, tokens, torch.ones_like(tokens)), before)

    def fail(*_):
        raise RuntimeError("power cut")

    handle = model.original_model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="power cut"):
        generate(model, PROMPTS, max_new_tokens=2, interventions=[change])
    handle.remove()
    assert torch.equal(run_logits(model, tokens, torch.ones_like(tokens)), before)


def test_progress_counts_to_the_limit_or_to_the_last_row(tiny_model):
    calls = []
    generate(tiny_model("llama"), PROMPTS, max_new_tokens=4, stop=[], progress=lambda done, n: calls.append((done, n)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        (["a"], {"temperature": 0.0}, r"temperature=0.0.*above 0 \(greedy=True"),
        (["a"], {"temperature": float("nan")}, "temperature=nan"),
        (["a"], {"top_p": 0.0}, r"top_p=0.0.*\(0, 1\]"),
        (["a"], {"top_p": 1.1}, r"top_p=1.1.*\(0, 1\]"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0.*at least one token"),
        (["a", "b"], {"row_seeds": [1]}, "received 1 row_seeds for 2 prompts"),
        (["word " * 400], {"max_new_tokens": 200}, "max_new_tokens=200; the context window holds 512.*shorten the prompt"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_what_is_allowed(tiny_model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("llama"), prompts, **options)


def test_a_single_string_is_not_taken_for_a_list_of_prompts(tiny_model):
    with pytest.raises(ValueError, match="allowed is a list with at least one prompt"):
        generate(tiny_model("llama"), "Hello")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Intervention(1, "resid_post", torch.zeros(31)), "width 31 for resid_post; allowed is 32"),
        (Intervention(1, "gate", torch.zeros(32)), "width 32 for gate; allowed is 48"),
        (Intervention(1, "resid", torch.zeros(32)), "received site 'resid'; allowed are"),
    ],
)
def test_an_intervention_of_the_wrong_width_or_site_is_refused(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("llama"), PROMPTS, max_new_tokens=2, interventions=[change])


def test_an_intervention_at_a_layer_that_is_not_there_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"layer 3.*0 to 2"):
        generate(
            tiny_model("llama"),
            PROMPTS,
            max_new_tokens=2,
            interventions=[Intervention(3, "resid_post", torch.ones(WIDTH))],
        )


def test_an_intervention_on_rows_that_are_not_there_is_refused(tiny_model):
    change = Intervention(1, "resid_post", torch.ones(WIDTH), rows=(0, 3))
    with pytest.raises(ValueError, match=r"rows.*3"):
        generate(tiny_model("llama"), PROMPTS, max_new_tokens=2, interventions=[change])


@pytest.mark.parametrize(("n_vectors", "rows"), [(2, None), (4, None), (3, (0, 2))])
def test_another_number_of_vectors_than_rows_is_refused(tiny_model, n_vectors, rows):
    change = Intervention(1, "resid_post", torch.ones(n_vectors, WIDTH), rows=rows)
    with pytest.raises(ValueError, match=rf"{n_vectors} vectors"):
        generate(tiny_model("llama"), PROMPTS, max_new_tokens=2, interventions=[change])


@pytest.mark.parametrize("mode", ["ablate", "clamp"])
def test_a_zero_direction_cannot_be_ablated_or_clamped(tiny_model, mode):
    change = Intervention(1, "resid_post", torch.zeros(WIDTH), mode=mode)
    with pytest.raises(ValueError, match=r"zero"):
        generate(tiny_model("llama"), PROMPTS, max_new_tokens=2, interventions=[change])

"""Self-checks: a sound model passes each of them, and each fails when its fault is planted."""

import pytest
import torch
from tokenizers import normalizers

from lens_affect import selfchecks
from lens_affect.activations import extract_activations
from lens_affect.adapter import model_info, update_provenance
from lens_affect.models import load_model
from lens_affect.selfchecks import CHECK_TEXTS, SelfCheckError, check_model, ensure_checked
from lens_affect.unwrapping import CHECK as PLAIN
from tests.tiny import CHAT_TEMPLATE, FAMILIES, make_hf_model, make_tokenizer

PARITY = "logits equal Hugging Face's"
PADDING = "a text reads the same alone and in a padded batch"
ONCE = "each hook fires once"
WIDTH = "each site has the width its config promises"
SUMS = "attn_out and mlp_out are what is added to the residual"
FINITE = "activations are finite"
BOS_ONCE = "BOS stands at the start exactly once"
ROUND_TRIP = "the chat template round-trips"
ALL = (PARITY, PADDING, PLAIN, ONCE, WIDTH, SUMS, FINITE, BOS_ONCE, ROUND_TRIP)


def load(family="llama", tokenizer=None):
    return load_model(make_hf_model(family), tokenizer=tokenizer or make_tokenizer())


def outcomes(model):
    return {check.name: check.outcome for check in check_model(model).checks}


def require_only(model, *failed):
    """The checks named fail, the others pass, and ensure_checked names the first with its advice and records nothing."""
    report = check_model(model)
    assert tuple(c.name for c in report.failed) == failed
    update_provenance(model, checks={})
    with pytest.raises(SelfCheckError) as error:
        ensure_checked(model)
    assert f"failed the self-check {failed[0]!r} ({report.failed[0].measured})." in str(error.value)
    assert str(error.value).endswith(report.failed[0].advice)
    assert len(report.failed[0].advice) > 30
    assert model_info(model).provenance.checks == {}
    return report.failed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_passes_on_every_family_and_is_recorded(tiny_model, family):
    model = tiny_model(family)
    report = check_model(model)
    assert tuple(c.name for c in report.checks) == ALL
    plain = "not applicable" if family == "gpt2" else "passed"  # its blocks have another name
    assert {c.name: c.outcome for c in report.checks} == dict.fromkeys(ALL, "passed") | {PLAIN: plain}
    n = 8 if family == "gpt2" else 9
    assert str(report) == f"{model_info(model).provenance.title}: {n} of {n} self-checks passed"
    assert report.to_frame()["check"].tolist() == list(ALL)
    recorded = model_info(model).provenance.checks
    assert tuple(recorded) == ALL
    assert all(text.startswith("passed: ") for name, text in recorded.items() if name != PLAIN)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_passes_in_bfloat16_too(family):
    if family == "mixtral":
        pytest.skip("a random router's choice of experts flips in bfloat16, and with it the logits")
    model = load_model(make_hf_model(family), tokenizer=make_tokenizer(), dtype=torch.bfloat16)
    assert {outcome for name, outcome in outcomes(model).items() if name != PLAIN} == {"passed"}
    assert "allowed 5e-01" in model_info(model).provenance.checks[PARITY]


def test_without_a_chat_template_or_a_reference_a_check_is_not_applicable_and_says_why(tiny_model):
    report = check_model(tiny_model("llama", chat=False))
    found = {c.name: c for c in report.checks}
    assert (found[ROUND_TRIP].outcome, found[ROUND_TRIP].measured[:16]) == ("not applicable", "no chat template")
    assert str(report).endswith("8 of 8 self-checks passed")
    model = load()
    model_info(model).reference_logits = {}
    assert outcomes(model)[PARITY] == "passed"  # as it was found when the model was loaded
    update_provenance(model, checks={})
    assert outcomes(model)[PARITY] == "not applicable"


def test_checks_run_once_per_model(tiny_model, few_passages, monkeypatch):
    model = tiny_model("llama")

    def again(model):
        raise AssertionError("checked a second time")

    monkeypatch.setattr(selfchecks, "check_model", again)
    assert len(extract_activations(model, few_passages.select(rows=[0])).provenance.checks) == 9


def test_a_model_that_passed_none_is_checked_before_it_is_read(few_passages):
    model = load()
    info = model_info(model)
    info.reference_logits = {text: logits.flip(-1) for text, logits in info.reference_logits.items()}
    update_provenance(model, checks={})
    with pytest.raises(SelfCheckError, match=PARITY):
        extract_activations(model, few_passages)


def test_a_logit_that_differs_from_hugging_faces_is_found():
    model = load()
    model_info(model).reference_logits[CHECK_TEXTS[1]][3, 7] += 0.5
    require_only(model, PARITY)


def test_a_constant_added_to_all_logits_changes_no_probability_and_passes():
    model = load()
    for logits in model_info(model).reference_logits.values():
        logits.add_(3.0)
    assert outcomes(model)[PARITY] == "passed"


def test_a_word_that_hardly_occurs_does_not_decide_and_one_that_does_occur_does():
    model = load()
    reference = model_info(model).reference_logits[CHECK_TEXTS[1]]
    reference[3, 7] -= 40.0  # its probability is nearly 0 now,
    model_info(model).reference_logits[CHECK_TEXTS[1]] = reference
    expected = reference.log_softmax(-1)[3]
    n = expected.shape[-1]
    assert expected[7].exp() < 1e-15
    # so that what is left is how much its share raised all others: -log(1 - 1/n), about 1/n in a random model
    found = next(c for c in check_model(model).checks if c.name == PARITY)
    shift = float(found.measured.split("difference of log-probabilities ")[1].split()[0])
    assert shift == pytest.approx(1 / n, rel=0.5)
    reference[3, 8] += 2.0
    require_only(model, PARITY)


def test_logits_that_are_not_numbers_do_not_pass_for_equal():
    model = load()
    model_info(model).reference_logits[CHECK_TEXTS[0]][3, 7] = float("nan")
    require_only(model, PARITY)


def test_an_unembedding_with_nan_does_not_load():
    hf = make_hf_model("llama")
    with torch.no_grad():
        hf.lm_head.weight[5, 5] = float("nan")
    with pytest.raises(SelfCheckError, match="logits"):
        load_model(hf, tokenizer=make_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_padding_that_leaks_because_the_mask_is_ignored_is_found(family):
    model = load(family)
    trunk = model.original_model.base_model
    real = trunk.forward

    def unmasked(input_ids, attention_mask=None, **options):
        rows, width = input_ids.shape
        return real(input_ids=input_ids, attention_mask=torch.zeros(rows, 1, width, width), **options)

    trunk.forward = unmasked
    model_info(model).reference_logits = {}
    failed = require_only(model, PADDING)
    assert "the attention mask is ignored" in failed[0].advice


def test_left_padding_with_the_mask_ignored_is_found():
    model = load()
    trunk = model.original_model.base_model
    real = trunk.forward

    def left_padded(input_ids, attention_mask, **options):
        rows = [row.roll(int((keep == 0).sum())) for row, keep in zip(input_ids, attention_mask, strict=True)]
        return real(input_ids=torch.stack(rows), **options)

    trunk.forward = left_padded
    require_only(model, PADDING)


def test_a_trunk_that_runs_twice_is_found():
    model = load()
    trunk = model.original_model.base_model
    real = trunk.forward
    trunk.forward = lambda *args, **options: (real(*args, **options), real(*args, **options))[1]
    failed = require_only(model, ONCE)
    assert "blocks.0.hook_resid_pre fired 2 times" in failed[0].measured


def test_a_hook_that_never_fires_is_found():
    model = load()
    model.original_model.base_model.forward = lambda *args, **options: None
    report = {c.name: c for c in selfchecks._check_hooks(model, 1e-4)}
    assert report[ONCE].outcome == "failed"
    assert "fired 0 times" in report[ONCE].measured


@pytest.mark.parametrize(("entry", "real", "seen"), [("d_mlp", 48, 48), ("d_head", 16, 64)])
def test_a_config_that_promises_another_width_is_found(entry, real, seen):
    model = load("gemma3")
    assert getattr(model.cfg, entry) == real
    setattr(model.cfg, entry, real + 1)
    report = {c.name: c for c in selfchecks._check_hooks(model, 1e-4)}
    assert report[WIDTH].outcome == "failed"
    assert f"is {seen} wide, the config says" in report[WIDTH].measured


@pytest.mark.parametrize("hook", ["hook_mlp_out", "hook_attn_out"])
def test_an_output_that_is_not_what_is_added_to_the_residual_is_found(hook, monkeypatch):
    model = load()
    real = selfchecks._read

    def before_a_post_norm(model, batch, names):
        seen, fired = real(model, batch, names)
        if f"blocks.1.{hook}" in seen:
            seen[f"blocks.1.{hook}"] = seen[f"blocks.1.{hook}"] * 1.01
        return seen, fired

    monkeypatch.setattr(selfchecks, "_read", before_a_post_norm)
    failed = require_only(model, SUMS)
    assert "layer 1" in failed[0].measured


def test_a_residual_stream_that_something_else_writes_to_is_found():
    model = load()
    model.add_hook("blocks.2.hook_resid_post", lambda value, hook: value + 1.0)
    model_info(model).reference_logits = {}
    failed = require_only(model, SUMS)
    assert "layer 2" in failed[0].measured


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_weight_that_is_not_finite_does_not_load(family):
    hf = make_hf_model(family)
    with torch.no_grad():
        next(p for n, p in hf.named_parameters() if ".1." in n and p.ndim > 1)[3, 3] = float("nan")
    with pytest.raises(SelfCheckError, match="failed the self-check"):
        load_model(hf, tokenizer=make_tokenizer())


def test_activations_that_are_not_finite_are_found_and_float32_is_advised():
    model = load()
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[:] = float("inf")
    found = {c.name: c for c in check_model(model).checks}
    assert found[FINITE].outcome == "failed"
    assert found[FINITE].measured.startswith("first non-finite at blocks.0.hook_resid_pre")
    assert "torch.float32" in found[FINITE].advice


@pytest.mark.parametrize("name", [pytest.param(PARITY), pytest.param(PADDING), SUMS])
def test_a_difference_that_is_not_a_number_does_not_pass_for_small(name):
    model = load()
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[:] = float("nan")
    assert outcomes(model)[name] == "failed"


def test_a_chat_template_that_writes_bos_twice_does_not_load():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'<bos>'", "'<bos><bos>'")
    with pytest.raises(SelfCheckError, match=r"BOS stands at the start exactly once.*\[0, 0\].*check.*chat template"):
        load(tokenizer=tokenizer)


def test_a_host_that_sees_other_tokens_than_we_do_is_found(monkeypatch):
    model = load()
    real = model.to_tokens
    monkeypatch.setattr(model, "to_tokens", lambda text: torch.cat([torch.zeros(1, 1, dtype=int), real(text)], 1))
    failed = require_only(model, BOS_ONCE)
    assert "other tokens as the host library" in failed[0].measured


def test_a_tokenizer_that_changes_the_rendered_chat_does_not_load():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        SelfCheckError, match=r"the chat template round-trips.*decoding its tokens gives '<bos>\[user\] the bus"
    ):
        load(tokenizer=tokenizer)


@pytest.mark.parametrize("change", ["m['content'] | upper", "m['content'] + m['content']", "'hello'"])
def test_a_chat_template_that_changes_the_prompt_does_not_load_and_the_message_says_so(change):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", f"({change})")
    with pytest.raises(SelfCheckError, match="the chat template round-trips") as error:
        load(tokenizer=tokenizer)
    assert "the prompt stands 1 times" not in str(error.value)  # what failed, not what was fine

"""What must be true: a prompt's numbers do not depend on its batch, and equal those of the plain forward pass."""

import pytest
import torch

from lens_affect.adapter import encode_prompt, run_logits, token_ids
from lens_affect.answers import (
    IGNORED,
    answer_loss,
    answer_scores,
    choice_log_probabilities,
    encode_rows,
    make_batch,
    text_losses,
)

PROMPTS = [
    "She laughed.\nEmotion:",
    "The last train had left without him, and it was raining.\nEmotion:",
    "No!\nEmotion:",
]
ANSWERS = [" joy", " sadness and more", " fear", " anger of the third kind"]


def by_hand(model, prompt, answer):
    """Log-likelihood of an answer, one text at a time, no padding."""
    head, body = encode_prompt(model, prompt, form="continue")[0], token_ids(model.tokenizer, answer)
    ids = torch.tensor([[*head, *body]])
    logits = run_logits(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
    return torch.stack([logits[len(head) - 1 + i, token] for i, token in enumerate(body)])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen2", "gpt2"])
def test_likelihoods_of_choices_equal_single_forward_passes(tiny_model, family):
    model = tiny_model(family)
    found = choice_log_probabilities(model, PROMPTS, ANSWERS, batch_size=2)
    expected = torch.tensor([[float(by_hand(model, p, a).sum()) for a in ANSWERS] for p in PROMPTS])
    assert torch.allclose(found, expected, atol=1e-4)


def test_first_tokens_are_the_first_factor(tiny_model):
    model = tiny_model("llama")
    found = choice_log_probabilities(model, PROMPTS, [" joy", " water", " kitchen"], scoring="first_token")
    expected = torch.tensor([[float(by_hand(model, p, a)[0]) for a in (" joy", " water", " kitchen")] for p in PROMPTS])
    assert torch.allclose(found, expected, atol=1e-4)


def test_own_answers_loss_and_exactness(tiny_model):
    model = tiny_model("llama")
    likeliest = []
    for prompt in PROMPTS:
        head = encode_prompt(model, prompt, form="continue")[0]
        ids = torch.tensor([head])
        likeliest.append(int(run_logits(model, ids, torch.ones_like(ids))[0, -1].argmax()))
    words = [model.tokenizer.decode([t]) for t in likeliest]
    usable = [i for i, w in enumerate(words) if token_ids(model.tokenizer, w) == (likeliest[i],)]
    loss, exact = answer_scores(model, [PROMPTS[i] for i in usable], [words[i] for i in usable])
    assert usable
    assert exact.tolist() == [1.0] * len(usable)
    loss, exact = answer_scores(model, PROMPTS, ANSWERS[:3])
    expected = torch.tensor([float(-by_hand(model, p, a).mean()) for p, a in zip(PROMPTS, ANSWERS, strict=False)])
    assert torch.allclose(loss, expected, atol=1e-4)
    assert exact.sum() == 0


def test_the_training_loss_is_the_mean_over_all_answer_tokens(tiny_model):
    model = tiny_model("llama")
    rows = encode_rows(model, PROMPTS, ANSWERS[:3])
    batch = make_batch(model, rows)
    each = torch.cat([by_hand(model, p, a) for p, a in zip(PROMPTS, ANSWERS[:3], strict=True)])
    assert int((batch.targets != IGNORED).sum()) == len(each)
    assert answer_loss(model, batch).item() == pytest.approx(float(-each.mean()), abs=1e-4)


def test_text_loss_leaves_the_first_token_out(tiny_model):
    model = tiny_model("llama")
    texts = ["A short one.", "It rained all day, so the match was moved to the hall behind the school."]
    found = text_losses(model, texts)
    for text, loss in zip(texts, found.tolist(), strict=True):
        ids = torch.tensor([[model.tokenizer.bos_token_id, *token_ids(model.tokenizer, text)]])
        logits = run_logits(model, ids, torch.ones_like(ids))[0].log_softmax(-1)
        each = [float(-logits[i, ids[0, i + 1]]) for i in range(1, ids.shape[1] - 1)]
        assert loss == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_wrong_input_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="cannot be told apart by likelihood"):
        choice_log_probabilities(model, PROMPTS, [" joy", " joy"])
    with pytest.raises(ValueError, match="cannot be told apart by first_token"):
        choice_log_probabilities(model, PROMPTS, [" joy one", " joy two"], scoring="first_token")
    with pytest.raises(ValueError, match="both need at least one token"):
        encode_rows(model, ["a"], [""])
    with pytest.raises(TypeError, match="allowed is a TransformerBridge"):
        answer_scores(object(), ["a"], ["b"])

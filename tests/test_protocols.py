"""The published protocol, step by step, against plain Hugging Face."""

from collections import Counter
from pathlib import Path

import jaxtyping
import pandas as pd
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lens_affect.activations import extract_activations
from lens_affect.adapter import token_ids
from lens_affect.models import load_model
from lens_affect.protocols import ProtocolStories, extract_protocol, protocol_activations, write_protocol_stories
from lens_affect.stimuli import EMOTIONS, NEUTRAL, Stimuli, load_prompts, load_stimuli
from tests.tiny import make_hf_model, make_tokenizer

AUTHORS_PASSAGES = Path(__file__).parents[1] / ".." / "shared" / "data" / "jeong" / "emotion_comprehension_texts.csv"
WRITING = {"max_new_tokens": 14}


@torch.no_grad()
def block_outputs(hf_model, ids) -> torch.Tensor:
    """[layer, position, d_model] of one text, by Hugging Face alone."""
    blocks = hf_model.transformer.h if hasattr(hf_model, "transformer") else hf_model.model.layers
    seen = []
    handles = [
        b.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    hf_model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat(seen)


def class_difference(states, emotions):
    """Class mean minus neutral mean, emotions in the paper's order: [emotion, layer, d_model]."""

    def mean(label):
        return torch.stack([s for s, e in zip(states, emotions, strict=True) if e == label]).mean(0)

    return torch.stack([mean(e) - mean(NEUTRAL) for e in EMOTIONS if e in emotions])


def assert_same_vectors(found, raw):
    torch.testing.assert_close(found.directions, raw / raw.norm(dim=-1, keepdim=True), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.raw_norms, raw.norm(dim=-1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("whose", ["the author's", "ours"])
def test_comprehension_is_the_class_mean_at_the_last_token_minus_the_neutral_mean(tiny_model, family, whose):
    if whose == "the author's":
        if not AUTHORS_PASSAGES.is_file():
            pytest.skip(f"the author's passages are not at {AUTHORS_PASSAGES}")
        table = pd.read_csv(AUTHORS_PASSAGES)
        texts, emotions = list(table["text"]), list(table["emotion"])
        found = extract_protocol(tiny_model(family), source="comprehension", stimuli=AUTHORS_PASSAGES)
        assert found.n_texts == 60
    else:
        passages = load_stimuli("passages")
        chosen = passages.select(groups=["kitchen", "train"])
        texts, emotions = list(chosen.texts), list(chosen.emotions)
        found = extract_protocol(tiny_model(family), source="comprehension", stimuli=chosen)
    hf_model, tokenizer = make_hf_model(family), make_tokenizer()
    states = [block_outputs(hf_model, tokenizer(t)["input_ids"])[:, -1] for t in texts]
    assert found.emotions == tuple(EMOTIONS)
    assert_same_vectors(found, class_difference(states, emotions))
    assert found.baseline == "neutral"
    assert "protocol jeong2026" in found.source


def test_comprehension_reads_our_passages_when_none_are_given(tiny_model):
    found = protocol_activations(tiny_model("llama"), source="comprehension")
    assert found.stimuli == load_stimuli("passages")
    assert found.pooling == "last"
    assert found.provenance.bos == "none"  # this tokenizer adds none by itself, and the protocol keeps its default


@pytest.fixture(scope="module")
def stories(tiny_model):
    return write_protocol_stories(tiny_model("llama"), **WRITING)


@pytest.fixture(scope="module")
def written(stories):
    return stories.stimuli


def test_ten_greedy_stories_per_emotion_are_five_distinct_ones_by_hugging_face(tiny_model, written):
    asked, tokenizer, hf_model = load_prompts("jeong2026"), make_tokenizer(), make_hf_model("llama")
    counts = Counter(written.emotions)
    assert set(counts) == {*EMOTIONS, NEUTRAL}
    assert set(counts.values()) == {10}
    for emotion in ("happy", "exasperated"):
        rows = written.select(emotions=[emotion])
        assert rows.texts[:5] == rows.texts[5:]
        assert len(set(rows.prompts)) == 5
        assert rows.groups == tuple(f"template {k % 5}" for k in range(10))
        for k in range(5):
            prompt = asked.templates[k].replace("{emotion}", emotion)
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
            out = hf_model.generate(ids, do_sample=False, eos_token_id=1, pad_token_id=2, **WRITING)
            assert rows.prompts[k] == prompt
            assert rows.texts[k] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    neutral = written.select(emotions=[NEUTRAL])
    assert neutral.prompts == asked.neutral
    assert len(set(neutral.prompts)) == 10


def midpoint_by_hand(hf_model, tokenizer, prompt, text):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    head = tokenizer(chat, add_special_tokens=False)["input_ids"]
    body = tokenizer(text, add_special_tokens=False)["input_ids"]
    at = len(head) + len(body) // 2 if len(body) > 10 else len(head) - 1
    return block_outputs(hf_model, head + body)[:, at]


def test_generation_reads_the_midpoint_token_of_each_story_after_its_request(tiny_model, written):
    short = Stimuli(
        (*written.texts[:-1], "Too short."),
        written.emotions,
        written.groups,
        written.sources,
        written.prompts,
        written.name,
    )
    chosen = short.select(emotions=["happy", "sad", NEUTRAL])
    found = extract_protocol(tiny_model("llama"), source="generation", stimuli=chosen)
    hf_model, tokenizer = make_hf_model("llama"), make_tokenizer()
    states = [midpoint_by_hand(hf_model, tokenizer, p, t) for p, t in zip(chosen.prompts, chosen.texts, strict=True)]
    assert_same_vectors(found, class_difference(states, chosen.emotions))
    assert found.pooling == "midpoint"


def test_a_story_counted_twice_weighs_twice(tiny_model):
    # six stories are five templates and the first once more
    stimuli = write_protocol_stories(tiny_model("llama"), emotions=("happy",), n_stories=6, **WRITING).stimuli
    happy = stimuli.select(emotions=["happy"])
    assert len(happy) == 6
    assert happy.texts[5] == happy.texts[0] != happy.texts[1]


def test_the_authors_wording_is_taken_from_a_file(tiny_model, tmp_path):
    file = tmp_path / "theirs.json"
    file.write_text('{"templates": ["About {emotion}.", "More {emotion}."], "neutral": ["About a shelf."]}')
    stimuli = write_protocol_stories(
        tiny_model("llama"), prompts=file, emotions=("sad",), n_stories=3, **WRITING
    ).stimuli
    assert stimuli.prompts == ("About sad.", "More sad.", "About sad.", *["About a shelf."] * 3)
    assert stimuli.name == "jeong2026 stories (theirs wording)"


def tokenizer_of(kind):
    """A chat tokenizer, one without a template, and one without a template that puts a BOS before every text by itself."""
    tokenizer = make_tokenizer(chat=kind == "chat")
    if kind == "base with BOS":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return tokenizer


@pytest.mark.parametrize("kind", ["chat", "base", "base with BOS"])
def test_stories_are_written_and_read_with_the_tokenizers_own_bos_at_the_middle_of_the_generated_tokens(kind):
    """Hugging Face alone: its tokenizer's call, its generate, and the middle of the ids that it returned, never of their text."""
    hf_model, tokenizer = make_hf_model("llama"), tokenizer_of(kind)
    model = load_model(make_hf_model("llama"), tokenizer=tokenizer_of(kind))
    asked = {"prompts": load_prompts("jeong2026"), "emotions": ("happy", "sad"), "n_stories": 2}
    stories = write_protocol_stories(model, **asked, **WRITING)
    assert stories.form == ("chat" if kind == "chat" else "plain")
    states = []
    for prompt, tokens in zip(stories.stimuli.prompts, stories.tokens, strict=True):
        if kind == "chat":
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            head = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            head = tokenizer(prompt + "\n\n")["input_ids"]
            assert (head[0] == tokenizer.bos_token_id) == (kind == "base with BOS")
        out = hf_model.generate(torch.tensor([head]), do_sample=False, eos_token_id=1, pad_token_id=2, **WRITING)
        assert out[0, len(head) :].tolist() == list(tokens)
        at = len(head) + len(tokens) // 2 if len(tokens) > 10 else len(head) - 1
        states.append(block_outputs(hf_model, out[0].tolist())[:, at])
    found = protocol_activations(model, source="generation", stimuli=stories)
    torch.testing.assert_close(found.values, torch.stack(states), atol=1e-3, rtol=1e-3)
    assert found.provenance.bos == {"chat": "template", "base": "none", "base with BOS": "prepended"}[kind]
    # cut again, some of these texts have other tokens than were generated, so which ones are read makes a difference
    again = [token_ids(tokenizer, text) for text in stories.stimuli.texts]
    assert any(list(a) != list(b) for a, b in zip(again, stories.tokens, strict=True))


def test_the_token_that_ends_a_story_counts_as_in_hugging_face(tiny_model, monkeypatch):
    """13 ids, the stop token among them, where the text has 12."""
    model, plain = (
        tiny_model("llama"),
        write_protocol_stories(tiny_model("llama"), emotions=("sad",), n_stories=1, **WRITING),
    )
    stop = plain.tokens[0][12]
    assert stop not in plain.tokens[0][:12]
    monkeypatch.setattr("lens_affect.generation.stop_tokens", lambda model: (stop,))
    monkeypatch.setattr("lens_affect.protocols.stop_tokens", lambda model: (stop,))
    ended = write_protocol_stories(model, emotions=("sad",), n_stories=1, **WRITING)
    assert ended.tokens[0] == plain.tokens[0][:13]
    assert token_ids(model.tokenizer, ended.stimuli.texts[0])[-1] != stop


def test_empty_stories_are_counted_and_said(tiny_model, monkeypatch, caplog, tmp_path):
    model = tiny_model("llama", chat=False)
    asked = {"emotions": ("happy", "sad"), "n_stories": 5}
    whole = write_protocol_stories(model, **asked, **WRITING)
    assert (whole.n_empty, whole.empty) == (0, {})
    assert "0 of 15 were empty" in str(whole)
    first = {tokens[0] for e, tokens in zip(whole.stimuli.emotions, whole.tokens, strict=True) if e == "sad"}
    monkeypatch.setattr("lens_affect.generation.stop_tokens", lambda model: tuple(sorted(first)[:1]))
    stories = write_protocol_stories(model, **asked, **WRITING)
    lost = Counter(
        e for e, tokens in zip(whole.stimuli.emotions, whole.tokens, strict=True) if tokens[0] == sorted(first)[0]
    )
    assert stories.empty == dict(lost)
    assert stories.n_empty == 15 - len(stories.stimuli) == len(whole.stimuli) - len(stories.to_frame())
    said = f"{stories.n_empty} of 15"
    assert f"{said} stories are empty and left out" in caplog.text
    assert f"{said} were empty" in str(stories)
    assert f"{said} empty and left out" in stories.stimuli.name
    stories.save(tmp_path / "stories")
    assert ProtocolStories.load(tmp_path / "stories") == stories
    monkeypatch.setattr("lens_affect.generation.stop_tokens", lambda model: tuple(range(480)))
    with pytest.raises(ValueError, match=r"received 15 empty stories from .*; use a model that answers requests"):
        write_protocol_stories(model, **asked, **WRITING)


def test_tokens_are_one_entry_per_text(tiny_model, few_passages):
    with pytest.raises(ValueError, match=r"received tokens of 1 texts for 28 texts; allowed is one entry per text"):
        extract_activations(tiny_model("llama"), few_passages, tokens=[[5, 6]])


def test_generation_takes_stories_from_a_saved_table_too(tiny_model, tmp_path):
    file = tmp_path / "stories.csv"
    rows = [
        {"emotion": e, "text": f"{e} story {i}: one two three four five six"}
        for e in ("sad", "neutral", "happy")
        for i in (1, 2)
    ]
    pd.DataFrame(rows).to_csv(file, index=False)
    found = protocol_activations(tiny_model("llama"), source="generation", stimuli=file, **WRITING)
    assert found.stimuli.texts == tuple(r["text"] for r in rows)


def test_an_unknown_protocol_or_source_and_passages_without_neutral_are_refused(tiny_model, few_passages):
    jaxtyping.config.update(
        "jaxtyping_disable", True
    )  # annotations refuse these too; the messages are for users without a checker
    try:
        with pytest.raises(ValueError, match=r"received protocol 'wang2025'; allowed is 'jeong2026'"):
            extract_protocol(tiny_model("llama"), "wang2025", source="comprehension")
        with pytest.raises(
            ValueError, match=r"received source='reading'; allowed are 'generation' and 'comprehension'"
        ):
            extract_protocol(tiny_model("llama"), source="reading")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(ValueError, match=r"needs texts labelled 'neutral'"):
        extract_protocol(
            tiny_model("llama"), source="comprehension", stimuli=few_passages.select(emotions=["sad", "happy"])
        )

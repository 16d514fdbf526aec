"""Judges: what a probability is, that padding and company change nothing, and what is refused."""

import logging
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lens_affect.catalogue import FetchError
from lens_affect.judges import HuggingFaceJudge, LexiconJudge, load_judge
from lens_affect.stimuli import EMOTIONS

WORDS = "<s> <pad> </s> <unk> she he was so happy sad angry very the dog ran home".split()
TEXTS = ["she was happy", "the dog ran home so very very sad", "he was angry", "home"]
LABELS = ("Anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
_SMALL = {"vocab_size": len(WORDS), "pad_token_id": 1, "num_labels": 7, "initializer_range": 0.5}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """classifier("roberta") -> folder with a tiny random classifier of 16 positions."""

    def make(kind: str, **settings):
        torch.manual_seed(0)
        settings = (
            _SMALL | {"id2label": dict(enumerate(LABELS)), "label2id": {x: i for i, x in enumerate(LABELS)}} | settings
        )
        if kind == "roberta":
            shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            model = RobertaForSequenceClassification(RobertaConfig(**shape, max_position_embeddings=18, **settings))
        else:
            shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
            model = DistilBertForSequenceClassification(
                DistilBertConfig(**shape, max_position_embeddings=16, **settings)
            )
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_a_classifier_from_a_folder_gives_the_softmax_of_its_own_logits(kind, classifier):
    folder = classifier(kind)
    judge = load_judge(folder)
    assert judge.labels == tuple(label.lower() for label in LABELS)
    assert (judge.multi_label, judge.longest) == (False, 16)
    found = judge.score(TEXTS)
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    cls = RobertaForSequenceClassification if kind == "roberta" else DistilBertForSequenceClassification
    model = cls.from_pretrained(folder).eval()
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([[0, *(WORDS.index(w) for w in text.split()), 2]])
        with torch.no_grad():
            expected = torch.softmax(model(ids).logits[0], dim=-1)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    assert math.isnan(judge.auc("happy"))


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_neither_padding_nor_the_order_of_texts_changes_a_probability(kind, classifier):
    judge = HuggingFaceJudge(classifier(kind), batch_size=3)
    alone = torch.cat([judge.score([text]) for text in TEXTS])
    torch.testing.assert_close(judge.score(TEXTS), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(judge.score(TEXTS[::-1]).flip(0), alone, atol=1e-5, rtol=0)
    assert torch.equal(judge.score(TEXTS), judge.score(TEXTS))


def test_a_multi_label_classifier_has_independent_probabilities(classifier):
    folder = classifier("distilbert", problem_type="multi_label_classification")
    judge, single = load_judge(folder), HuggingFaceJudge(folder, multi_label=False)
    assert judge.multi_label
    p = judge.score(TEXTS)
    torch.testing.assert_close(torch.softmax(torch.logit(p), dim=1), single.score(TEXTS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_long_texts_are_cut_and_counted(kind, classifier, caplog):
    judge = load_judge(classifier(kind))
    long = " ".join(["very"] * 14)  # with both ends 16 tokens
    with caplog.at_level(logging.WARNING):
        whole = judge.score([long, "home"])
        assert not caplog.records
        cut = judge.score([long + " very sad dog", "home"])
    assert caplog.records[0].getMessage() == "1 of 2 texts are longer than 16 tokens; the rest of each is not read"
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)


def test_an_empty_text_has_no_probability(classifier):
    for judge in (load_judge(classifier("roberta")), load_judge("lexicon")):
        found = judge.score(["", "she was happy", " \n"])
        assert found.isnan().all(dim=1).tolist() == [True, False, True]
        assert judge.score([]).shape == (0, len(judge.labels))


def test_what_is_no_judge_is_refused_and_an_absent_one_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="received judge 'oracle'; allowed are 'embedded', 'lexicon', a folder"):
        load_judge("oracle")
    judge = load_judge("nobody/has-this")  # nothing is loaded yet
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"could not load the classifier nobody/has-this .*load_judge\('embedded'\)"):
        judge.score(["home"])


def test_the_word_list_counts_words_and_not_negated_ones():
    judge = LexiconJudge()
    happy, afraid = judge.labels.index("happy"), judge.labels.index("afraid")

    def said(text):
        return judge.score([text])[0]

    assert said("She was glad and cheerful.")[happy] == pytest.approx(2 / 3)
    assert said("The table is brown.")[-1] == 1  # neutral has the rest
    assert said("She was not very glad.")[happy] == 0
    assert said("She wasn't glad.")[happy] == 0
    assert said("She wasn’t. Glad she was.")[happy] == pytest.approx(1 / 2)  # a full stop ends a negation
    assert said("Not a single one of them was glad.")[happy] == pytest.approx(1 / 2)  # so does distance
    assert said("TERRIFIED, glad")[afraid] == pytest.approx(1 / 3)
    assert said("The fearless gladiator")[-1] == 1
    torch.testing.assert_close(judge.score(["glad, afraid", "x"]).sum(1), torch.ones(2))


def test_every_emotion_has_words_and_its_own_name_is_one():
    judge = LexiconJudge()
    own = judge.score(list(EMOTIONS))
    assert own.argmax(dim=1).tolist() == list(range(len(EMOTIONS)))
    assert judge.labels == (*EMOTIONS, "neutral")

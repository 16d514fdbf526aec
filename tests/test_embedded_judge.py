"""The embedded judge: its vectors and its head recomputed by hand on a tiny encoder; its published numbers on the real one."""

import json
import logging
import math
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lens_affect import embedded_judge
from lens_affect.catalogue import FetchError
from lens_affect.embedded_judge import ADAPTED, LINEARS, EmbeddedJudge, encoder_folder
from lens_affect.judge_labels import measured_scores, namings
from lens_affect.judgements import judge_texts

WORDS = "[CLS] [PAD] [SEP] [UNK] she he was so happy sad angry very the dog ran home".split()
TEXTS = ["she was happy", "the dog ran home so very very sad", "he was angry", "home"]
WIDTH, HIDDEN = 12, 5


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 20}
    config = BertConfig(
        vocab_size=len(WORDS), pad_token_id=1, initializer_range=0.4, max_position_embeddings=300, **shape
    )
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 0), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_judge(tiny_encoder, tmp_path, monkeypatch):
    """A judge of three labels on the tiny encoder, with an update of rank 2 in every adapted map."""
    torch.manual_seed(1)
    monkeypatch.setattr(embedded_judge, "encoder_folder", lambda: tiny_encoder)
    encoder = BertModel.from_pretrained(tiny_encoder, add_pooling_layer=False)
    shapes = {
        "head.1.weight": (HIDDEN, WIDTH),
        "head.1.bias": (HIDDEN,),
        "head.4.weight": (3, HIDDEN),
        "head.4.bias": (3,),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"scale": torch.tensor([1.0, 2.0, 0.5]), "shift": torch.tensor([0.0, -1.0, 1.0])}
    tensors |= {"thresholds": torch.tensor([0.5, 0.4, 0.3])}
    for layer in ADAPTED:
        for linear in LINEARS:
            rows, columns = encoder.encoder.layer[layer].get_submodule(linear).weight.shape
            tensors[f"layers.{layer}.{linear}.down"] = torch.randn(2, columns)
            tensors[f"layers.{layer}.{linear}.up"] = torch.randn(rows, 2)
    save_file(tensors, tmp_path / "head.safetensors", metadata={"labels": json.dumps(["joy", "fear", "neutral"])})
    return EmbeddedJudge(tmp_path / "head.safetensors", batch_size=3), tensors


def test_a_probability_is_the_heads_on_the_updated_encoders_mean(tiny_judge, tiny_encoder):
    judge, head = tiny_judge
    encoder = BertModel.from_pretrained(tiny_encoder, add_pooling_layer=False).eval()

    def add(name):  # a map plus its update, as a hook: another way than adding to the weight
        return lambda _, inputs, output: output + inputs[0] @ head[f"{name}.down"].T @ head[f"{name}.up"].T

    for layer in ADAPTED:
        for linear in LINEARS:
            encoder.encoder.layer[layer].get_submodule(linear).register_forward_hook(add(f"layers.{layer}.{linear}"))
    found = judge.score(TEXTS)
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([[0, *(WORDS.index(w) for w in text.split()), 2]])
        with torch.no_grad():
            mean = encoder(ids).last_hidden_state[0].mean(0)
        x = mean / mean.norm() * math.sqrt(WIDTH)
        hidden = torch.nn.functional.gelu(head["head.1.weight"] @ x + head["head.1.bias"])
        logits = (head["head.4.weight"] @ hidden + head["head.4.bias"]) * head["scale"] + head["shift"]
        torch.testing.assert_close(found[row], torch.sigmoid(logits), atol=1e-4, rtol=0)


def test_without_updates_the_vectors_are_the_encoders_own(tiny_judge, tiny_encoder, tmp_path):
    _, head = tiny_judge
    kept = {name: tensor for name, tensor in head.items() if not name.startswith("layers.")}
    save_file(kept, tmp_path / "plain.safetensors", metadata={"labels": json.dumps(["joy", "fear", "neutral"])})
    judge = EmbeddedJudge(tmp_path / "plain.safetensors")
    encoder = BertModel.from_pretrained(tiny_encoder, add_pooling_layer=False).eval()
    ids = torch.tensor([[0, *(WORDS.index(w) for w in TEXTS[0].split()), 2]])
    with torch.no_grad():
        mean = encoder(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(judge.embed(TEXTS[:1])[0], mean / mean.norm(), atol=1e-5, rtol=0)


def test_neither_padding_nor_the_order_of_texts_changes_a_probability(tiny_judge):
    judge, _ = tiny_judge
    alone = torch.cat([judge.score([text]) for text in TEXTS])
    torch.testing.assert_close(judge.score(TEXTS), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(judge.score(TEXTS[::-1]).flip(0), alone, atol=1e-5, rtol=0)
    assert torch.equal(judge.score(TEXTS), judge.score(TEXTS))


def test_long_texts_are_cut_and_counted_and_empty_ones_have_no_value(tiny_judge, caplog):
    judge, _ = tiny_judge
    whole = " ".join(["very"] * 254)
    with caplog.at_level(logging.WARNING):
        expected = judge.score([whole])
        assert not caplog.records
        found = judge.score(["", whole + " sad dog"])
    assert caplog.records[0].getMessage().startswith("1 of 1 texts are longer than 256 word pieces")
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=0)
    assert found[0].isnan().all()


def test_the_shipped_head_fits_its_card_and_is_small():
    judge = EmbeddedJudge()
    assert judge.labels == tuple(measured_scores()["judges"]["embedded"]["labels"])
    assert len(judge.labels) == 28
    assert judge._file.stat().st_size < 2_000_000
    for label, cut in zip(judge.labels, judge.thresholds.tolist(), strict=True):
        assert cut == pytest.approx(measured_scores()["judges"]["embedded"]["labels"][label]["threshold"], abs=1e-4)
    assert all(tensor.isfinite().all() for tensor in load_file(judge._file).values())
    assert judge.auc("happy") == measured_scores()["judges"]["embedded"]["emotions"]["happy"]["auc"]


@pytest.fixture(scope="session")
def real_judge():
    try:
        encoder_folder()
    except FetchError as error:
        pytest.skip(f"no weights: {error}")
    return EmbeddedJudge()


def published(file: str) -> Path:
    """A file of a data set that is not part of the repository."""
    data = Path(os.environ.get("LENS_AFFECT_DATA", "")) / file
    if not os.environ.get("LENS_AFFECT_DATA") or not data.is_file():
        pytest.skip(f"{file} is not part of the repository: set LENS_AFFECT_DATA to a folder that holds it")
    return data


@pytest.mark.weights
def test_our_passages_get_the_top_emotions_that_the_card_states(real_judge, passages):
    stated = measured_scores()["judges"]["embedded"]["passages"]
    emotions = [e for e, naming in namings(real_judge.labels).items() if naming.match == "exact"]
    some = passages.select(emotions=emotions)
    judged = judge_texts(real_judge, some.texts, emotions)
    assert len(some) == stated["n"]
    correct = {e: sum(t == e == label for t, label in zip(judged.top, some.emotions, strict=True)) for e in emotions}
    # A text on the edge may fall to either side on another processor.
    assert sum(abs(correct[e] - n) for e, n in stated["correct"].items()) <= 2
    assert sum(correct.values()) / len(some) > 2 * stated["chance"]


@pytest.mark.weights
def test_padding_changes_no_probability_of_the_real_judge(real_judge, passages):
    texts = ["I am so happy!", passages.texts[0], "Thank you."]
    together, alone = real_judge.score(texts), torch.cat([real_judge.score([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert judge_texts(real_judge, texts).top[::2] == ("happy", "grateful")


@pytest.mark.weights
def test_the_shipped_head_reproduces_its_published_numbers(real_judge):
    """On every fourth row of the published test split, which takes seconds; all rows take a minute."""
    data = published("goemotions/test.tsv")
    from sklearn.metrics import f1_score, roc_auc_score

    rows = [line.split("\t") for line in data.read_text(encoding="utf-8").rstrip("\n").split("\n")][::4]
    truth = np.zeros((len(rows), 28))
    for row, (_, ids, _) in enumerate(rows):
        truth[row, [int(i) for i in ids.split(",")]] = 1
    scores = real_judge.score([text for text, _, _ in rows]).numpy()
    stated = measured_scores()["judges"]["embedded"]
    common = [real_judge.labels.index(name) for name in stated["check"]["labels"]]
    assert len(common) >= 15
    found = roc_auc_score(truth[:, common], scores[:, common], average="macro")
    assert found == pytest.approx(stated["check"]["mean_auc"], abs=2e-3)
    for k in common:  # a quarter of the rows has intervals twice as wide
        auc = stated["labels"][real_judge.labels[k]]["auc"]
        assert abs(roc_auc_score(truth[:, k], scores[:, k]) - auc["estimate"]) < 2 * (auc["high"] - auc["low"])
    assert stated["macro"]["n"] == 5427
    given = scores >= real_judge.thresholds.numpy()
    for k, name in enumerate(real_judge.labels):
        f1 = f1_score(truth[:, k], given[:, k], zero_division=0)
        # A text on the edge of a threshold may fall to either side on another processor.
        assert f1 == pytest.approx(stated["check"]["f1"][name], abs=2 / max(2, truth[:, k].sum()))
        whole = stated["labels"][name]["f1"]
        assert abs(f1 - whole["estimate"]) <= 2 * (whole["high"] - whole["low"])


@pytest.mark.weights
def test_the_shipped_head_reproduces_its_numbers_out_of_domain(real_judge):
    """F1 of MELD's emotions on every sixteenth utterance; all of them take minutes."""
    import pandas as pd
    from sklearn.metrics import f1_score

    script = runpy.run_path(str(Path(__file__).parents[1] / "analyses" / "train_judge.py"), run_name="script")
    frames = [
        pd.read_csv(published(f"meld/{split}_sent_emo.csv"), encoding="utf-8", encoding_errors="replace")
        for split in ("train", "dev", "test")
    ]
    stated, meld = measured_scores()["judges"]["embedded"]["meld"], pd.concat(frames, ignore_index=True)
    assert {e: int((meld["Emotion"] == e).sum()) for e in script["GROUPS"]["embedded"]} == {
        e: stated[e]["positives"] for e in script["GROUPS"]["embedded"]
    }
    every = stated["check"]["every"]
    some = meld.iloc[::every]
    given = real_judge.score(some["Utterance"].tolist()).numpy() >= real_judge.thresholds.numpy()
    for emotion, names in script["GROUPS"]["embedded"].items():
        columns = [real_judge.labels.index(name) for name in names.split()]
        truth = (some["Emotion"] == emotion).to_numpy()
        f1 = f1_score(truth, given[:, columns].any(1))
        assert f1 == pytest.approx(stated["check"]["f1"][emotion], abs=2 / truth.sum())
        limits = stated[emotion]["f1"]
        assert limits["low"] < limits["estimate"] < limits["high"]


def test_the_training_script_measures_as_scikit_learn_does(rng_scores):
    from sklearn.metrics import f1_score, roc_auc_score

    script = runpy.run_path(str(Path(__file__).parents[1] / "analyses" / "train_judge.py"), run_name="script")
    scores, truth, weights = rng_scores
    found = script["weighted_auc"](scores, truth, weights)
    for row, w in enumerate(weights):
        assert found[row] == pytest.approx(roc_auc_score(truth, scores, sample_weight=w))
    given = scores > 0.5
    f1 = script["f1_of"](weights @ (given & truth), weights @ given, weights @ truth)
    assert f1 == pytest.approx([f1_score(truth, given, sample_weight=w) for w in weights])
    draws = script["draws_over"](["a", "a", "b", "c"], "test")
    assert draws.shape == (1000, 4)
    assert np.array_equal(draws[:, 0], draws[:, 1])  # a cluster is drawn as a whole
    assert (draws[:, 1:].sum(axis=1) == 3).all()


@pytest.fixture
def rng_scores():
    """Scores with ties, truths, and whole-number weights."""
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    return np.round(rng.random(200) * 0.6 + truth * 0.3, 1), truth, rng.integers(0, 3, (5, 200)).astype(float)

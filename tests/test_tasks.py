"""What must be true: a planted label is found, shuffling moves training labels only, scores survive saving, calibration removes a planted prior."""

import dataclasses
import math

import pytest
import torch

from lens_affect.task_data import Example
from lens_affect.tasks import TASKS, ChoiceTask, Task, TaskScores, TextTask, WritingTask, judge_written, load_task
from tests.affect_data import WORDS, write_goemotions, write_meld


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_AFFECT_DATA", str(tmp_path))
    write_goemotions(tmp_path)
    return write_meld(tmp_path)


@pytest.fixture
def choice(data):
    return load_task("goemotions")


class Judge:
    """Says joy where the text has a vowel more than another; deterministic, no model."""

    name, title, labels, multi_label = "stub", "stub", ("joy", "anger"), True

    def score(self, texts):
        return torch.tensor([[math.nan] * 2 if not t else [len(t) % 7 / 7, 0.5] for t in texts])

    def auc(self, emotion):
        return math.nan


def test_every_task_offers_the_protocol(data):
    for name in TASKS:
        task = load_task(name)
        assert isinstance(task, Task)
        assert task.examples("test")
        assert task.affective == ("control" not in TASKS[name])
        assert task.answer(task.examples("test")[0])


def test_prompts_and_answers_of_a_choice(choice):
    example = Example("What a day", ("joy",), "g")
    assert choice.prompt(example) == "What a day\nEmotion:"
    assert choice.answer(example) == " joy"
    assert set(choice.labels) == set(WORDS)


def test_n_examples_are_drawn_repeatably(choice):
    first = choice.examples("test", n=10, seed=1)
    assert first == choice.examples("test", n=10, seed=1)
    assert first != choice.examples("test", n=10, seed=2)
    assert len(set(first)) == 10
    with pytest.raises(ValueError, match="received n=1000"):
        choice.examples("test", n=1000)
    with pytest.raises(ValueError, match="received split 'dev'"):
        choice.examples("dev")


def test_scores_hold_what_was_said_and_survive_saving(choice, tiny_model, tmp_path):
    model = tiny_model("llama")
    found = choice.score(model, choice.examples(n=12))
    assert found.log_probabilities.shape == (12, 4)
    best = [found.labels[i] for i in found.log_probabilities.argmax(-1).tolist()]
    assert list(found.predicted) == best
    assert found.value == pytest.approx(sum(p in g for p, g in zip(found.predicted, found.gold, strict=True)) / 12)
    shares = found.log_probabilities.softmax(-1)
    right = torch.stack([shares[i, found.labels.index(g[0])] for i, g in enumerate(found.gold)])
    assert torch.allclose(found.gold_log_probability().exp(), right)
    found.save(tmp_path / "scores")
    again = TaskScores.load(tmp_path / "scores")
    assert torch.equal(again.log_probabilities, found.log_probabilities)
    assert again.to_frame().equals(found.to_frame())
    assert "accuracy" in str(again)


def test_calibration_takes_a_planted_prior_out(choice, tiny_model):
    found = choice.score(tiny_model("llama"), choice.examples(n=12))
    truth = torch.tensor([[float(label in g) for label in found.labels] for g in found.gold])
    planted = dataclasses.replace(found, log_probabilities=(truth + torch.tensor([9.0, 0.0, 0.0, 0.0])).log_softmax(-1))
    assert planted.calibrated().value == 1
    assert "calibrated" in planted.calibrated().scoring
    with pytest.raises(ValueError, match="allowed are label likelihoods"):
        dataclasses.replace(found, log_probabilities=torch.zeros(12, 0)).calibrated()


def test_scoring_by_generation_takes_the_first_word(choice, tiny_model):
    found = dataclasses.replace(choice, scoring="generation").score(tiny_model("llama"), choice.examples(n=3))
    assert len(found.predicted) == 3  # a label, or the words that were said instead
    wrong = [v for v, p in zip(found.values.tolist(), found.predicted, strict=True) if p not in choice.labels]
    assert not any(wrong)
    assert found.log_probabilities.shape == (3, 0)
    with pytest.raises(ValueError, match="received scoring='guess'"):
        load_task("goemotions", scoring="guess")


def test_a_label_is_recognised_at_the_start_of_what_was_said():
    from lens_affect.tasks import _said_label

    labels = ("joy", "anger", "joyful")
    assert _said_label(" Joyful, I think", labels) == "joyful"
    assert _said_label("\nanger", labels) == "anger"
    assert _said_label("some anger", labels) == ""


def test_shuffling_moves_training_labels_and_no_test_label(choice):
    other = choice.shuffled(seed=0)
    assert other.splits["test"] == choice.splits["test"]
    assert [e.text for e in other.splits["train"]] == [e.text for e in choice.splits["train"]]
    before, after = ([e.labels for e in t.splits["train"]] for t in (choice, other))
    assert sorted(before) == sorted(after)
    assert before != after
    assert choice.shuffled(seed=0) == other
    assert choice.shuffled(seed=1) != other


def test_exact_answers_and_text_loss(tiny_model):
    model = tiny_model("llama")
    sums = load_task("arithmetic")
    found = sums.score(model, sums.examples(n=10))
    assert found.metric == "exact answers"
    assert set(found.values.tolist()) <= {0.0, 1.0}
    text = load_task("neutral_text")
    assert isinstance(text, TextTask)
    loss = text.score(model, text.examples(n=4))
    assert loss.better == "low"
    assert 4 < loss.value < 9  # a random model on 480 tokens: about log(480) = 6.2


def test_writing_is_judged_and_repeatable(data, tiny_model):
    task = load_task("writing", judge=Judge())
    assert isinstance(task, WritingTask)
    rows = [Example(str(i), ("joy",), "joy") for i in range(3)]
    first, again = (task.score(tiny_model("llama"), rows, seed=3) for _ in range(2))
    assert first.predicted == again.predicted
    assert torch.equal(first.values, judge_written(Judge(), first.predicted, ["joy"] * 3))
    assert not any("\n" in text for text in first.predicted)
    with pytest.raises(ValueError, match="received the emotions \\['grief'\\]"):
        task.score(tiny_model("llama"), [Example("0", ("grief",), "grief")])


def test_a_text_that_only_names_its_emotion_expresses_nothing():
    texts = ["joy joy joyful Joy and joy", "", "We danced all night", "Joy: we danced all night", "We, we danced"]
    found = judge_written(Judge(), texts, ["joy"] * 5)
    plain = len("We danced all night") % 7 / 7
    assert found.tolist() == pytest.approx([0, 0, plain, len(": we danced all night") % 7 / 7, 0])


def test_writing_needs_no_data_unless_it_is_trained(monkeypatch):
    monkeypatch.setenv("LENS_AFFECT_DATA", "/nowhere")
    task = load_task("writing", judge=Judge())
    assert not task.examples("train")
    assert len(task.examples("test")) == 216


def test_tables_and_unknown_names(tmp_path):
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"Text {i},{'ab'[i % 2]}\n" for i in range(16)))
    task = load_task(tmp_path / "mine.csv")
    assert isinstance(task, ChoiceTask)
    assert (task.name, task.labels) == ("mine", ("a", "b"))
    (tmp_path / "one.csv").write_text("text,label\n" + "".join(f"Text {i},a\n" for i in range(16)))
    with pytest.raises(ValueError, match="a choice needs at least two"):
        load_task(tmp_path / "one.csv")
    with pytest.raises(ValueError, match="received task 'goemotion'"):
        load_task("goemotion")
    with pytest.raises(ValueError, match="examples with the labels \\['c'\\]"):
        ChoiceTask(
            "t", "t", True, {"train": (), "validation": (), "test": (Example("x", ("c",), "g"),)}, ("a", "b"), "Q"
        )


def test_a_table_of_ones_own_is_an_affect_task_or_a_control(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"Word {i},{'joy' if i % 2 else 'anger'}\n" for i in range(40)))
    assert load_task(path).affective
    assert load_task(path).title == "mine"
    control = load_task(path, affective=False)
    assert not control.affective
    assert control.title == "mine (control)"
    with pytest.raises(ValueError, match=r"received affective=True for 'topics'"):
        load_task("topics", affective=True)

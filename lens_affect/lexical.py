"""What a bag of words reaches on the same texts and splits: the bar that a model's vectors must clear."""

import html
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lens_affect.designs import make_design
from lens_affect.localization import LocalizationCurve
from lens_affect.scores import SCORES, accuracy_scores
from lens_affect.statistics import Interval, mean_interval, share_interval
from lens_affect.stimuli import Stimuli


@dataclass(frozen=True)
class LexicalBar:
    """What a bag of words reaches on the same texts and splits: the bar that a model's vectors must clear."""

    accuracy: float
    """Held-out accuracy, averaged over groups, of the better of two classifiers (chosen on the same texts: a bar that is rather too high)."""
    low: float
    """Lower 95 % limit over groups."""
    high: float
    """Upper 95 % limit over groups."""
    classifier: str
    """`tf-idf logistic` or `naive Bayes`."""
    per_cluster: Float[Tensor, " cluster"]
    """Accuracy per group."""
    n_texts: int
    """Texts."""

    def compare(self, curve: LocalizationCurve) -> Interval:
        """Accuracy of the curve, each topic at the layer that is best on the other topics, minus the bar, paired by topic.

        Raises:
            ValueError: a score that is no accuracy, or other texts.
        """
        if SCORES[curve.score].kind != "accuracy" or curve.per_cluster.shape[0] != len(self.per_cluster):
            raise ValueError(
                f"received a curve of {curve.score} over {curve.per_cluster.shape[0]} groups; the bar needs an accuracy over {len(self.per_cluster)}"
            )
        return mean_interval((curve.selected() - self.per_cluster).numpy())

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"

    def __str__(self) -> str:
        return f"bag of words ({self.classifier}): held-out accuracy {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}], {self.n_texts} texts"


def lexical_bar(stimuli: Stimuli, *, n_splits: int | None = None, seed: int = 0) -> LexicalBar:
    """Held-out accuracy of bag-of-words classifiers on exactly the folds that `localize` uses.

    Args:
        stimuli: the texts; neutral ones are left out.
        n_splits: as in `localize`.
        seed: as in `localize`.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    design, _ = make_design(stimuli, n_splits=n_splits, seed=seed)
    texts = np.array(stimuli.texts, dtype=object)
    classifiers = {
        "tf-idf logistic": make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)),
        "naive Bayes": make_pipeline(CountVectorizer(), MultinomialNB()),
    }
    found: dict[str, Tensor] = {}
    for name, classifier in classifiers.items():
        correct = torch.full((1, len(texts)), torch.nan, dtype=torch.double)
        for fold in range(design.n_folds):
            train = (design.folds != fold) & (design.labels >= 0)
            test = np.flatnonzero(design.folds == fold)
            classifier.fit(texts[train], design.labels[train])
            correct[0, torch.from_numpy(test)] = torch.from_numpy(
                (classifier.predict(texts[test]) == design.labels[test]).astype(float)
            )
        found[name] = accuracy_scores(correct, torch.from_numpy(design.labels)[None], design).per_cluster[0]
    best = max(found, key=lambda name: float(found[name].mean()))
    interval = share_interval(found[best].numpy())
    return LexicalBar(
        float(interval.estimate),
        float(interval.low),
        float(interval.high),
        best,
        found[best],
        int((design.labels >= 0).sum()),
    )

"""Linear probes: which known factor can be read off which path.

Here: embeddings and labels to cross-validated accuracies. Elsewhere: scenes and labels (``scenes``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

FOLDS = 5


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies of one factor.

    Attributes:
        accuracy: by column (``"aggregate"``, ``"path_0"``, ...), the mean over folds, in [0, 1].
        spread: by column, the standard deviation over folds.
        majority: accuracy of always saying the most frequent value.
        num_values: values of the factor.
        num_inputs: labelled inputs.
    """

    accuracy: dict[str, float]
    spread: dict[str, float]
    majority: float
    num_values: int
    num_inputs: int


def probe(columns: Mapping[str, Tensor], labels: Sequence[str], where: str) -> ProbeResult:
    """Predict a factor from every kind of embedding by logistic regression on standardised dimensions.

    Every column sees the same five stratified folds, so differences between columns are paired.

    Args:
        columns: name to ``[B, D]``, D may differ.
        labels: B values of the factor.
        where: the factor's name, for error messages.

    Raises:
        ValueError: a value has fewer rows than there are folds, there is one value only, or a column has
            another number of rows.
    """
    values, counts = np.unique(list(labels), return_counts=True)
    if len(values) < 2 or counts.min() < FOLDS:
        rarest = f"{str(values[counts.argmin()])!r} {counts.min()} times" if len(values) else "nothing"
        raise ValueError(
            f"probe of {where}: needs two values with {FOLDS} inputs each, has {len(values)} values "
            f"and the rarest is {rarest}; draw more inputs"
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    accuracy, spread = {}, {}
    for name, embeddings_BD in columns.items():
        if len(embeddings_BD) != len(labels):
            raise ValueError(
                f"probe of {where}: {name} has {len(embeddings_BD)} rows for {len(labels)} labels"
            )
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        scores = cross_val_score(model, embeddings_BD.double().numpy(), list(labels), cv=folds)
        accuracy[name], spread[name] = float(scores.mean()), float(scores.std())
    constant = cross_val_score(DummyClassifier(), np.zeros((len(labels), 1)), list(labels), cv=folds)
    return ProbeResult(accuracy, spread, float(constant.mean()), len(values), len(labels))

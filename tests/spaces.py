"""Matrices, results and spaces with made-up numbers."""

import numpy as np

from llfast import LogLikelihoodMatrix, LogLikelihoods

IDS = tuple(f"text {row}" for row in range(60))


def make_matrix(values, **options):
    k, n = np.shape(values)
    defaults = {
        "ids": [f"text {row}" for row in range(n)],
        "textset_digest": "texts",
        "convention": "paper",
    }
    models = options.pop("models", [f"model {row}" for row in range(k)])
    text_bytes = options.pop("text_bytes", np.full(n, 500.0))
    return LogLikelihoodMatrix(models, values, text_bytes, **(defaults | options))


def make_result(values, **options):
    n = len(values)
    fields = {
        "model": "outsider",
        "revision": "",
        "textset_digest": "texts",
        "convention": "paper",
        "dtype": "",
        "scoring_version": 1,
        "ids": tuple(f"text {row}" for row in range(n)),
        "loglikelihoods": np.asarray(values, dtype=np.float64),
        "token_counts": np.ones(n, dtype=np.int64),
        "text_bytes": np.full(n, 500),
        "truncated": np.zeros(n, dtype=bool),
        "token_budgets": np.ones(n, dtype=np.int32),
    }
    return LogLikelihoods(**(fields | options))

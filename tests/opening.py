"""Opening models, and what is said of those that cannot be."""

import pytest
import torch

from llfast import CheckpointError
from llfast.models import open_model

CPU = torch.device("cpu")


def load(folder, **options):
    return open_model(folder, **options).load(torch.float32, CPU)


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(model, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        load(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

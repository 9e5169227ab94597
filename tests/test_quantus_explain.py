"""Quantus judges our methods: three of its metrics call `quantus_explain`. Skipped where Quantus is not installed."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import pullback
from pullback import metrics
from pullback.evaluation import quantus_explain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantus = pytest.importorskip("quantus", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # Quantus warns of its own settings


@pytest.fixture
def judged():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3)).eval()
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    return model, x, np.array([0, 1, 2])


def quiet(metric, **options):
    return metric(disable_warnings=True, display_progressbar=False, **options)


def test_sparseness(judged):
    model, x, y = judged
    explain = quantus_explain(pullback.gradient)
    found = quiet(quantus.Sparseness, abs=True, normalise=False)(
        model=model, x_batch=x, y_batch=y, a_batch=None, explain_func=explain, explain_func_kwargs={}, device="cpu"
    )
    ours = metrics.sparseness(torch.from_numpy(explain(model, x, y)).abs())
    assert np.allclose(found, ours, atol=1e-5)


def test_max_sensitivity(judged):
    model, x, y = judged
    given = {"model": model, "x_batch": x, "y_batch": y, "a_batch": None, "explain_func_kwargs": {}, "device": "cpu"}
    metric = quiet(quantus.MaxSensitivity, nr_samples=3, lower_bound=0.1)
    smooth = quantus_explain(lambda params, model, x, target: torch.arange(x.numel()).reshape(x.shape).to(x))
    assert np.allclose(metric(**given, explain_func=smooth), 0)  # an explanation that never changes
    assert (np.array(metric(**given, explain_func=quantus_explain(pullback.gradient))) > 0).all()


def test_parameter_randomisation(judged):
    model, x, y = judged
    given = {"model": model, "x_batch": x, "y_batch": y, "a_batch": None, "explain_func_kwargs": {}, "device": "cpu"}
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def last(explain):
        metric = quiet(quantus.MPRT, similarity_func=quantus.similarity_func.correlation_spearman)
        found = metric(**given, explain_func=explain)
        scores = found if isinstance(found, dict) else metric.evaluation_scores
        return np.mean(list(scores.values())[-1])

    blind = quantus_explain(lambda params, model, x, target: x)  # never saw the model
    assert last(blind) == pytest.approx(1)
    assert abs(last(quantus_explain(pullback.gradient))) < 0.6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

"""The forecasting example's methods: baselines against their definitions, scores, intervals, and the models."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fastattn.nn
from examples.common import count_parameters
from examples.forecast import baselines, data, experiments
from examples.forecast.evaluate import interval, naive_error, neural_forecast, over_seeds, score
from examples.forecast.experiments import sine_problem
from examples.forecast.models import ModelConfig, build
from fastattn.testing import assert_parity
from tests.support.forecast import KINDS, small_config, small_problem, small_series

# --------------------------------------------------------------------------------------------------- baselines


def test_naive_forecasts():
    values = np.array([1.0, 2, 3, 11, 12, 13, 21])
    origins = np.array([6])  # knows 1 .. 13, season 3
    np.testing.assert_array_equal(baselines.last_value(4)(values, origins), [[13, 13, 13, 13]])
    np.testing.assert_array_equal(baselines.seasonal_naive(4, 3)(values, origins), [[11, 12, 13, 11]])
    np.testing.assert_array_equal(baselines.seasonal_naive(4, 3, drift=True)(values, origins), [[21, 22, 23, 31]])


def test_autoregression_finds_the_recurrence():
    """x[t] = 1.6 x[t-1] - 0.9 x[t-2] + 1 without noise is forecast exactly, 10 steps ahead."""
    values = np.ones(120)
    for t in range(2, 120):
        values[t] = 1.6 * values[t - 1] - 0.9 * values[t - 2] + 1
    origins = np.array([60, 80, 110])
    forecast = baselines.autoregression(values[:60], order=2, horizon=10)(values, origins)
    # Least squares loses the condition of its equations times their size; the recurrence dies out and adds nothing.
    equations = np.column_stack([values[:58], values[1:59], np.ones(58)])
    rounding = np.linalg.cond(equations) * equations.size * np.finfo(np.float64).eps
    np.testing.assert_allclose(forecast, data.targets(values, origins, 10), rtol=rounding)


def test_ridge_against_its_normal_equations():
    values = small_series().values
    train_values, context, horizon, penalty = values[:150], 6, 3, 0.1
    origins = data.make_origins(0, 150, context, horizon)
    known, level = data.contexts(train_values, origins, context)[:, :-1], train_values[origins - 1][:, None]
    # Augmented least squares: sqrt(penalty) * w = 0 as additional rows, and a column of ones that is not penalised.
    strength = np.sqrt(penalty * train_values.var())
    x = np.block(
        [[known - level, np.ones((len(origins), 1))], [strength * np.eye(context - 1), np.zeros((context - 1, 1))]]
    )
    y = np.vstack([data.targets(train_values, origins, horizon) - level, np.zeros((context - 1, horizon))])
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    last = values[199:200]
    expected = last + np.append(values[194:199] - last, 1) @ weights
    forecast = baselines.ridge(train_values, context, horizon, penalty)(values, np.array([200]))
    np.testing.assert_allclose(forecast[0], expected)


def test_ridge_penalty_is_chosen_before_the_test_part():
    values = small_series().values[:192]
    _, penalty = baselines.choose_ridge(values, 153, 12, 5)
    origins = data.make_origins(153, 192, 12, 5)
    actual = data.targets(values, origins, 5)

    def error(penalty):
        return ((baselines.ridge(values[:153], 12, 5, penalty)(values, origins) - actual) ** 2).mean()

    assert error(penalty) <= min(error(p) for p in (0.001, 1, 1000))


def test_harmonic_fit_of_a_clean_sine():
    values = 3 + 2 * data.clean_sine(700)
    forecast = baselines.harmonic(values[:500], 50)(values, np.array([600]))
    # The peak is found to half a bin of the padded spectrum: so much phase is lost per step from the middle of the fit,
    # and at most the amplitude, 2, times that of the value.
    half_bin = np.pi / (100 * 500)
    np.testing.assert_allclose(forecast[0], values[600:650], rtol=0, atol=2 * (650 - 250) * half_bin)


def test_no_forecaster_sees_the_future():
    problem = small_problem()
    values, origins, horizon = problem.series.values, np.array([200]), 5
    changed = values.copy()
    changed[200:] = 1e6
    forecasters = {name: make(horizon) for name, make in experiments.real_baselines(problem).items()}
    forecasters |= {name: make(horizon) for name, make in experiments.sine_baselines(sine_problem(500)).items()}
    for kind in KINDS:
        model = build(small_config(kind, relative=True))
        forecasters[kind] = neural_forecast(model, data.Scaler.standard(values[:150]), horizon)
    forecasters.pop(experiments.NOISE_FLOOR)  # by definition
    forecasters.pop("ridge, context 63")  # its context is longer than this series' training part allows; as "ridge"
    for name, forecast in forecasters.items():
        assert np.isfinite(forecast(values, origins)).all(), name
        np.testing.assert_array_equal(forecast(values, origins), forecast(changed, origins), err_msg=name)


# ------------------------------------------------------------------------------------------------------ scores


def test_scores():
    actual = np.array([[1.0, 2.0], [3.0, 4.0]])
    scores = score(actual + np.array([[1.0, -1.0], [2.0, 0.0]]), actual, naive_error=0.5)
    assert scores == {"mse": 1.5, "mae": 1.0, "mase": 2.0}
    assert naive_error(np.array([0.0, 1, 3, 6]), season=2) == pytest.approx(4)
    assert over_seeds([{"mse": 1.0}, {"mse": 3.0}]) == {"mse": {"mean": 2.0, "min": 1.0, "max": 3.0}}
    with pytest.raises(ValueError, match=r"expected predictions.shape == actual.shape == \(2, 2\), got \(4,\)"):
        score(actual.ravel(), actual, 1.0)


def test_known_baseline_scores_on_the_tutorials_split():
    """The numbers that everything else is measured against."""
    problem = sine_problem(fresh_length=500)
    scores = {name: problem.score(make)[0] for name, make in experiments.sine_baselines(problem).items()}
    expected = {"last value": 0.4513, "seasonal naive": 0.4664, "AR(20)": 0.2704, experiments.NOISE_FLOOR: 0.2405}
    assert {name: round(scores[name]["test"]["mse"], 4) for name in expected} == expected
    assert len(problem.tests["test"].origins) == 180


def test_intervals_hold_as_many_as_they_should():
    """For errors drawn alike, at least the level on average; and no wider than the largest error."""
    errors = np.random.RandomState(0).standard_t(4, size=(2000, 99, 3))
    widths = np.stack([interval(sample, 0.9) for sample in errors])
    held = (np.abs(np.random.RandomState(1).standard_t(4, size=(2000, 3))) <= widths).mean()
    assert abs(held - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 6000)  # rank 90 of 99: exactly 0.9; four standard errors
    np.testing.assert_array_equal(interval(np.array([[1.0], [-3.0], [2.0]]), 0.5), [2.0])  # rank 2 of 3
    assert np.isinf(interval(np.ones((8, 2)), 0.9)).all()  # 9 is the least: rank ceil(9 * 0.9) of 8 is none


def test_intervals_come_from_the_validation_part():
    problem = small_problem()
    horizon, (start, stop) = 5, (problem.split.train_end, problem.split.test_start)
    validating = experiments.real_baselines(problem, validating=True)["AR(20)"](horizon)
    forecast = experiments.real_baselines(problem)["AR(20)"](horizon)
    test = problem.tests["test"]
    ahead = problem.look_ahead(validating, forecast, forecast(test.values, test.origins))
    origins = data.make_origins(start, stop, problem.context, horizon)
    own = baselines.autoregression(problem.series.values[:start], 20, horizon)(problem.series.values, origins)
    errors = data.targets(problem.series.values, origins, horizon) - own
    np.testing.assert_allclose(ahead.half_widths, interval(errors))
    assert 0.5 < ahead.coverage <= 1 and ahead.future.shape == (5,)


# ------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [nn, fastattn.nn], ids=["torch", "fastattn"])
def test_shapes(kind, layers):
    model = build(small_config(kind), layers).eval()
    inputs, targets = torch.randn(3, 12), torch.randn(3, 5)
    assert model(inputs).shape == model(inputs, targets).shape == (3, 5)
    assert model.forecast(inputs, 2).shape == (3, 2)
    assert model.forecast(inputs, 13).shape == (3, 13)
    exact = copy.deepcopy(model).double()(inputs.double())
    assert_parity(model.forecast(inputs, 13)[:, :5], exact, model(inputs))
    with pytest.raises(ValueError, match=r"expected inputs.shape == \(N, 12\), got \(3, 11\)"):
        model(inputs[:, 1:])


def test_sizes_are_alike():
    """The comparison is not one of sizes."""
    sizes = {m.name: count_parameters(build(m.config)) for m in sine_problem(500).methods}
    assert sizes["LSTM, the tutorial's"] == 17_217
    assert sizes["encoder"] == 17_249


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_teacher_forcing_is_step_by_step_decoding(patch):
    """Forced with its own forecasts, the decoder repeats them: the causal mask and the shift by one are right."""
    model = build(small_config("encoder-decoder", patch=patch, relative=True)).eval()
    inputs = torch.randn(4, 12)
    own, exact = model(inputs), copy.deepcopy(model).double()(inputs.double())
    assert_parity(model(inputs, own), exact, own)
    # And a step does not depend on the targets from its own patch on.
    targets = own.clone()
    targets[:, patch:] += 100
    assert_parity(model(inputs, targets)[:, : 2 * patch], exact[:, : 2 * patch], own[:, : 2 * patch])


@pytest.mark.parametrize("kind", KINDS)
def test_relative_forecasts_follow_the_level(kind):
    model = build(small_config(kind, relative=True)).eval()
    inputs = torch.randint(-2048, 2048, (4, 12)) / 1024  # 5 more is exact
    exact = copy.deepcopy(model).double()(inputs.double()) + 5
    assert_parity(model(inputs + 5), exact, model(inputs) + 5)


def test_encoder_uses_positions():
    model = build(small_config("encoder")).eval()
    inputs = torch.randn(4, 12)
    assert not torch.allclose(model(inputs), model(inputs.flip(1)))


def test_model_errors():
    with pytest.raises(ValueError, match="expected context to be a multiple of patch=5, got 12"):
        ModelConfig("encoder", 12, patch=5)
    with pytest.raises(ValueError, match="expected kind to be"):
        build(small_config("transformer"))

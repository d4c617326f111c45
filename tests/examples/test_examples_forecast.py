"""examples/forecast: nothing looks ahead, the baselines are right, and the program runs from a CSV file to figures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fastattn.nn
from examples.common import CheckpointError, count_parameters
from examples.forecast import baselines, data, experiments, train
from examples.forecast.evaluate import interval, naive_error, neural_forecast, over_seeds, score
from examples.forecast.experiments import Method, prepare, real_problem, sine_problem, train_and_score
from examples.forecast.models import ModelConfig, build
from examples.forecast.parity import compare
from examples.forecast.runner import Run, estimate_seconds, execute_all
from examples.forecast.train import Recipe, fit

KINDS = ["lstm", "encoder", "encoder-decoder"]


@pytest.fixture(autouse=True)
def one_thread():
    """As in the program; threads cost more than they bring at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_config(kind, **changes):
    return replace(
        ModelConfig(kind, context=12, horizon=5, patch=2, width=8, heads=2, feedforward=16, layers=1), **changes
    )


def small_series(length=240, season=12, seed=0):
    time = np.arange(length)
    noise = np.random.RandomState(seed).normal(scale=0.1, size=length)
    return data.Series(
        "small", "a small series", "1", "step", 0.01 * time + np.sin(2 * np.pi * time / season) + noise, season
    )


def small_problem(epochs=2):
    """Three models of a few hundred weights on a series of 240 values."""
    problem = real_problem(small_series(), horizon=5, context=12)
    recipe = Recipe(epochs=epochs, warmup_steps=2)
    return replace(problem, methods=[Method(k, small_config(k, relative=True), recipe) for k in KINDS])


# -------------------------------------------------------------------------------------------------------- data


def test_noisy_sine_is_the_tutorials():
    """The same numbers as `np.random.seed(42); np.random.normal(...)`, whose generator is left alone."""
    np.random.seed(42)
    expected = np.sin(0.1 * np.arange(1000)) + np.random.normal(scale=0.5, size=1000)
    before = np.random.get_state()[2]
    np.testing.assert_array_equal(data.noisy_sine(1000, seed=42), expected)
    assert np.random.get_state()[2] == before


@pytest.mark.parametrize(
    ("load", "length", "first", "last"), [(data.load_co2, 2284, 316.1, 371.5), (data.load_elnino, 732, 23.11, 22.07)]
)
def test_bundled_series_are_whole(load, length, first, last):
    values = load().values
    assert len(values) == length and np.isfinite(values).all()
    assert (values[0], values[-1]) == (first, last)


def test_gaps_of_co2_lie_in_the_training_part():
    """Else a repeated value would be scored as if it had been measured."""
    with (data.DATA_FOLDER / "co2.csv").open() as file:
        empty = [index for index, row in enumerate(csv.DictReader(file)) if not row["co2"]]
    assert len(empty) == 59 and max(empty) < data.Split.by_fraction(2284).train_end


def test_windows():
    values = np.arange(20.0)
    origins = data.make_origins(start=10, stop=15, context=3, horizon=2)
    np.testing.assert_array_equal(origins, [10, 11, 12, 13])  # the last target is 14
    np.testing.assert_array_equal(data.contexts(values, origins, 3)[0], [7, 8, 9])
    np.testing.assert_array_equal(data.targets(values, origins, 2)[-1], [13, 14])
    np.testing.assert_array_equal(data.make_origins(0, 5, context=3, horizon=1), [3, 4])  # needs a full context
    np.testing.assert_array_equal(data.contexts(values, np.array([20]), 3), [[17, 18, 19]])  # after the last value


def test_scalers():
    train_values = np.array([1.0, 2.0, 3.0, 6.0])
    standard = data.Scaler.standard(train_values)
    assert standard.transform(train_values).mean() == pytest.approx(0)
    assert standard.transform(train_values).std() == pytest.approx(1)
    np.testing.assert_allclose(data.Scaler.min_max(train_values).transform(train_values), [0, 0.2, 0.4, 1])
    np.testing.assert_allclose(standard.inverse(standard.transform(train_values)), train_values)


@pytest.mark.parametrize("recipe", [Recipe(), train.TUTORIAL], ids=["early stopping", "none"])
def test_no_test_value_reaches_training(recipe):
    """Scaler, training and validation windows are the same whatever the test part holds."""
    problem = small_problem()
    method = Method("x", small_config("encoder"), recipe)
    values = problem.series.values.copy()
    values[problem.split.test_start :] = 1e6
    other = replace(problem, series=replace(problem.series, values=values))
    (scaler, *windows), (other_scaler, *other_windows) = (prepare(p, method, "cpu") for p in (problem, other))
    assert scaler == other_scaler
    for one, two in zip(windows, other_windows, strict=True):
        assert (one is None) == (two is None)
        for a, b in zip(one or (), two or (), strict=True):
            assert torch.equal(a, b)


def test_no_validation_value_reaches_training():
    problem = small_problem()
    values = problem.series.values.copy()
    values[problem.split.train_end :] = 1e6
    other = replace(problem, series=replace(problem.series, values=values))
    (scaler, windows, _), (other_scaler, other_windows, _) = (
        prepare(p, problem.methods[0], "cpu") for p in (problem, other)
    )
    assert scaler == other_scaler
    assert all(torch.equal(a, b) for a, b in zip(windows, other_windows, strict=True))


@pytest.mark.parametrize(
    ("values", "season"),
    [
        (data.load_co2().values, 52),
        (data.load_elnino().values, 12),
        (data.clean_sine(500), 62),
        (np.random.RandomState(0).normal(size=500), 1),
        (np.arange(100.0), 1),
        (np.zeros(50), 1),
    ],
    ids=["co2", "elnino", "sine", "noise", "line", "constant"],
)
def test_estimate_season(values, season):
    assert abs(data.estimate_season(values) - season) <= (1 if season > 1 else 0)


# --------------------------------------------------------------------------------------------------------- CSV


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_read_csv(tmp_path):
    path = write(tmp_path / "x.csv", "\ufeffday, sales\n2024-01-01,1\n2024-01-02, 2.5\n2024-01-03,-3e1\n")
    table = data.read_csv(path, "sales", time_column="day")
    np.testing.assert_array_equal(table.values, [1, 2.5, -30])
    np.testing.assert_array_equal(table.times, np.arange("2024-01-01", "2024-01-04", dtype="datetime64[D]"))


@pytest.mark.parametrize(
    "text",
    ["day;a;b\n2024-01-01;1,5;0\n2024-01-02;-2,25;0\n", "day\ta\tb\n2024-01-01\t1.5\t0\n2024-01-02\t-2.25\t0\n",
     "day|a\n2024-01-01|1.5\n2024-01-02|-2.25\n", "day,a\n2024-01-01,1.5\n2024-01-02,-2.25\n"],
)  # fmt: skip
def test_other_delimiters(tmp_path, text):
    table = data.read_csv(write(tmp_path / "x.csv", text), "a")
    np.testing.assert_array_equal(table.values, [1.5, -2.25])
    assert table.time_column == "day"  # found


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["2024-01-01", "2024-01-03", "2024-01-02"], "order of 'day': '2024-01-03' and then '2024-01-02' in line 4"),
        (["2024-01-03", "2024-01-02", "2024-01-01"], "newest row first"),
        (["2024-01-01", "2024-01-01", "2024-01-02"], "'2024-01-01' stands more than once .* line 3; .*one series"),
    ],
)  # fmt: skip
def test_rows_out_of_order_are_found_without_a_time_column(tmp_path, dates, message):
    path = write(tmp_path / "x.csv", "id,day,a\n" + "".join(f"{n},{date},1\n" for n, date in enumerate(dates)))
    with pytest.raises(data.DataError, match=message):
        data.read_csv(path, "a")


def test_uneven_dates_that_were_found_are_a_note(tmp_path):
    """Trading days have weekends: only a column that was asked for must be evenly spaced."""
    text = "day,a\n2024-01-04,1\n2024-01-05,1\n2024-01-08,1\n2024-01-09,1\n"
    path = write(tmp_path / "x.csv", text)
    assert "got '2024-01-05' and then '2024-01-08' in line 4" in data.read_csv(path, "a").uneven
    with pytest.raises(data.DataError, match="evenly spaced"):
        data.read_csv(path, "a", time_column="day")


@pytest.mark.parametrize(
    ("times", "following"),
    [
        (["2024-01-30", "2024-01-31"], ["2024-02-01", "2024-02-02"]),
        (["2023-10-01", "2023-11-01", "2023-12-01"], ["2024-01-01", "2024-02-01"]),
        (["2022-01-01", "2023-01-01"], ["2024-01-01", "2025-01-01"]),
        (["2024-01-01T00", "2024-01-01T06"], ["2024-01-01T12", "2024-01-01T18"]),
    ],
)
def test_dates_after_the_end(times, following):
    times = np.array(times, dtype="datetime64[s]")
    series = replace(small_series(len(times)), times=times)
    steps = np.arange(len(times) + 2)
    expected = np.concatenate([times, np.array(following, dtype="datetime64[s]")])
    np.testing.assert_array_equal(series.time_axis(steps), expected)
    np.testing.assert_array_equal(replace(series, times=None).time_axis(steps), steps)


def test_fill_gaps_repeats_the_value_before(tmp_path):
    path = write(tmp_path / "x.csv", "a,b\n1,1\n1,\n1,NaN\n1,4\n1\n")
    np.testing.assert_array_equal(data.read_csv(path, "b", fill_gaps=True).values, [1, 1, 1, 4, 4])


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("a,b\n1,2\n", {"column": "c"}, r"no column 'c'; its columns are 'a', 'b'"),
        ("", {"column": "c"}, r"is empty; expected a header line"),
        (" \n", {"column": "c"}, r"is empty"),
        ("a\n1\n", {"column": "a", "time_column": "t"}, r"no column 't'"),
        ("a\n1\ntwo\n", {"column": "a"}, r"expected numbers in column 'a' .* got 'two' in line 3"),
        ("a\n1\ninf\n", {"column": "a"}, r"got 'inf' in line 3"),
        ("a,b\n1,1\n,1\nNA,1\n4,1\n", {"column": "a"}, r"has 2 empty cells, the first in line 3; .*--fill-gaps"),
        ("a,b\n,1\n2,1\n", {"column": "a", "fill_gaps": True}, r"starts with an empty cell"),
        ("a,b\n,1\n", {"column": "a"}, r"holds no values"),
        ("a\n", {"column": "a"}, r"holds no values"),
        ("t,a\n1,1\n2,1\n3,1\n5,1\n", {"column": "a", "time_column": "t"}, r"evenly .* got '3' and then '5' in line 5"),
        ("t,a\n2024-01-31,1\n2024-01-30,1\n", {"column": "a", "time_column": "t"}, r"newest row first"),
        ("t,a\nsoon,1\n", {"column": "a", "time_column": "t"}, r"expected dates .* got 'soon' in line 2"),
    ],
)  # fmt: skip
def test_csv_errors(tmp_path, text, arguments, message):
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(data.DataError, match=message):
        data.read_csv(path, **arguments)


def test_csv_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(data.DataError, match=r"expected a CSV file at .*none\.csv, found none"):
        data.read_csv(tmp_path / "none.csv", "a")
    with pytest.raises(data.DataError, match="is a directory"):
        data.read_csv(tmp_path, "a")
    (tmp_path / "binary.csv").write_bytes(b"a\n\xff\xfe\x00")
    with pytest.raises(data.DataError, match="not a CSV file in UTF-8"):
        data.read_csv(tmp_path / "binary.csv", "a")


@pytest.mark.parametrize(
    "dates", [["2024-01", "2024-02", "2024-03"], ["20240101", "20240108", "20240115"], ["1", "2", "3"]]
)
def test_evenly_spaced_times(tmp_path, dates):
    path = write(tmp_path / "x.csv", "t,a\n" + "".join(f"{date},1\n" for date in dates))
    assert len(data.read_csv(path, "a", time_column="t").values) == 3


def test_too_short_or_constant_series():
    series = small_series(length=60)
    with pytest.raises(data.DataError, match=r"at least \d+ values for horizon 12, context 16 and season 12, got 60"):
        real_problem(series, horizon=12)
    with pytest.raises(data.DataError, match="expected values that vary"):
        real_problem(replace(small_series(), values=np.ones(240)), horizon=5)


def test_the_default_context_fits_a_short_series():
    assert real_problem(small_series(300), horizon=12).context == 48  # four seasons
    assert real_problem(small_series(120), horizon=12).context == 32
    with pytest.raises(data.DataError, match="context 48"):  # what was asked for is not changed
        real_problem(small_series(120), horizon=12, context=48)


@pytest.mark.parametrize("horizon", [1, 7, 24])
@pytest.mark.parametrize("season", [1, 12])
def test_shortest_series_that_is_let_through_works(horizon, season):
    """The length in the error message is enough."""
    series = small_series(length=30, season=season)
    with pytest.raises(data.DataError) as error:
        real_problem(series, horizon)
    enough = int(str(error.value).split("at least ")[1].split()[0])
    problem = real_problem(small_series(enough, season), horizon)
    for make_forecast in experiments.real_baselines(problem).values():
        assert np.isfinite(problem.score(make_forecast)[1]).all()
    _, (inputs, _), validation = prepare(problem, problem.methods[1], "cpu")
    assert validation is not None
    validation_inputs, _ = validation
    assert len(inputs) >= 32 and len(validation_inputs) >= 1


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
    np.testing.assert_allclose(forecast, data.targets(values, origins, 10), rtol=1e-6)


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
    np.testing.assert_allclose(forecast[0], values[600:650], atol=0.05)


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
    torch.testing.assert_close(model.forecast(inputs, 13)[:, :5], model(inputs))
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
    own = model(inputs)
    torch.testing.assert_close(model(inputs, own), own)
    # And a step does not depend on the targets from its own patch on.
    targets = own.clone()
    targets[:, patch:] += 100
    torch.testing.assert_close(model(inputs, targets)[:, : 2 * patch], own[:, : 2 * patch])


@pytest.mark.parametrize("kind", KINDS)
def test_relative_forecasts_follow_the_level(kind):
    model = build(small_config(kind, relative=True)).eval()
    inputs = torch.randn(4, 12)
    torch.testing.assert_close(model(inputs + 5), model(inputs) + 5)


def test_encoder_uses_positions():
    model = build(small_config("encoder")).eval()
    inputs = torch.randn(4, 12)
    assert not torch.allclose(model(inputs), model(inputs.flip(1)))


def test_model_errors():
    with pytest.raises(ValueError, match="expected context to be a multiple of patch=5, got 12"):
        ModelConfig("encoder", 12, patch=5)
    with pytest.raises(ValueError, match="expected kind to be"):
        build(small_config("transformer"))


# ---------------------------------------------------------------------------------------------------- training


def test_the_tutorials_training_is_reproduced():
    """Its first epoch prints "Loss: 0.0665": same data, initial weights, batches and optimiser."""
    problem = sine_problem(fresh_length=500)
    method = problem.methods[0]
    method = replace(method, recipe=replace(method.recipe, epochs=1))
    outcome = train_and_score(problem, method, seed=42, device="cpu")
    assert round(outcome.history.train[0], 4) == 0.0665
    assert outcome.parameters == 17_217 and not outcome.history.validation


def fit_small(kind="encoder", recipe=Recipe(epochs=4, warmup_steps=2), **options):  # noqa: B008
    problem = small_problem()
    method = Method(kind, small_config(kind), recipe)
    _, train_windows, validation = prepare(problem, method, "cpu")
    torch.manual_seed(1)
    model = build(method.config)
    history = fit(model, train_windows, validation, recipe, **options)
    return model, history, train.evaluate_loss(model, validation) if validation else None


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_keeps_the_best_epoch(kind):
    epochs = []
    _, history, loss = fit_small(kind, Recipe(epochs=6, warmup_steps=2), on_epoch=lambda: epochs.append(1))
    assert history.train[-1] < history.train[0]
    assert history.best_epoch == int(np.argmin(history.validation))
    assert loss == pytest.approx(min(history.validation))
    assert len(epochs) == len(history.train)


def test_early_stopping():
    """At a rate that wrecks the model, it stops `patience` epochs after its best one."""
    recipe = Recipe(epochs=30, learning_rate=1.0, warmup_steps=0, cosine=False, patience=2)
    _, history, _ = fit_small(recipe=recipe)
    assert history.best_epoch is not None and recipe.patience is not None
    assert len(history.train) == history.best_epoch + 1 + recipe.patience < 30
    with pytest.raises(ValueError, match="expected validation windows with"):
        fit(build(small_config("lstm")), (torch.zeros(1, 12), torch.zeros(1, 5)), None, Recipe())


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_the_same(kind, tmp_path):
    """Stopped after two of four epochs, with dropout and shuffling: the same losses and weights as in one go."""
    whole, whole_history, _ = fit_small(kind)

    class Stop(Exception):
        pass

    epochs = []

    def stop_after_two():
        epochs.append(1)
        if len(epochs) == 2:
            raise Stop

    path = tmp_path / "folder" / "x.pt"
    with pytest.raises(Stop):
        fit_small(kind, checkpoint=path, on_epoch=stop_after_two)
    torch.manual_seed(99)
    resumed, history, _ = fit_small(kind, checkpoint=path, resume=True)
    assert history == whole_history
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    again, history, _ = fit_small(kind, checkpoint=path, resume=True)  # finished: nothing to do
    assert history == whole_history
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert [file.name for file in path.parent.iterdir()] == ["x.pt"]


def test_checkpoint_is_plain_data(tmp_path):
    path = tmp_path / "x.pt"
    model, history, _ = fit_small(checkpoint=path)
    state = torch.load(path, weights_only=True)
    fresh = build(ModelConfig(**state["config"]))
    fresh.load_state_dict(state["best_model"])
    inputs = torch.randn(2, 12)
    assert torch.equal(fresh.eval()(inputs), model(inputs))
    assert state["history"]["train"] == history.train


def test_checkpoint_errors(tmp_path):
    path = tmp_path / "x.pt"
    fit_small(checkpoint=path)
    with pytest.raises(CheckpointError, match="expected recipe epochs=5, got 4"):
        fit_small(recipe=Recipe(epochs=5, warmup_steps=2), checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="expected config kind='lstm', got 'encoder'"):
        fit_small("lstm", checkpoint=path, resume=True)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"data": {"crc32": 0}}, path)
    with pytest.raises(CheckpointError, match="expected data crc32="):
        fit_small(checkpoint=path, resume=True)
    torch.save(torch.zeros(1), path)
    with pytest.raises(CheckpointError, match="is not a checkpoint: expected a dict, got Tensor"):
        fit_small(checkpoint=path, resume=True)
    for junk in ("", "junk", "no checkpoint at all"):
        path.write_text(junk)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            fit_small(checkpoint=path, resume=True)


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_same_losses_with_torch_and_fastattn_layers(kind):
    """No further apart than rounding takes two runs of torch.nn (with some room: both are single draws)."""
    parity = compare(small_problem(), kind, "cpu", epochs=3)
    assert len(parity.torch) == len(parity.fastattn) == 3
    assert parity.torch[-1] < parity.torch[0]
    assert parity.difference <= 10 * max(parity.rounding, torch.finfo(torch.float32).eps)


# ----------------------------------------------------------------------------------------------------- program


@pytest.fixture
def cli():
    pytest.importorskip("matplotlib")
    from examples.forecast import cli

    return cli


@pytest.fixture
def series_csv(tmp_path):
    rows = "".join(f"{day},{value:.4f}\n" for day, value in enumerate(small_series(200).values))
    return write(tmp_path / "own.csv", "day,Sales (kg)\n" + rows)


def test_from_csv_to_figures(cli, series_csv, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = [
        "--csv",
        str(series_csv),
        "--column",
        "Sales (kg)",
        "--time-column",
        "day",
        "--horizon",
        "5",
        "--quick",
        "--epochs",
        "2",
    ]
    arguments += ["--device", "cpu", "--workers", "1", "--output", str(output)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    expected = [
        "device: cpu",
        "attention backend",
        "expected: at most about",
        "90% held",
        "torch.nn",
        "last value",
        "seasonal naive",
        "AR(20)",
        "ridge",
    ]
    for text in [*expected, "LSTM", "encoder-decoder", "Try next", "metrics.json"]:
        assert text in printed, text
    assert "nan" not in printed.lower()

    for figure in ("forecast", "loss", "comparison", "future"):
        assert (output / f"sales-kg_{figure}.png").read_bytes().startswith(b"\x89PNG")
    with (output / "sales-kg_future.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and all(np.isfinite(float(cell)) for row in rows for cell in row.values() if cell)
    assert [float(row["time"]) for row in rows] == [200, 201, 202, 203, 204]
    for row in rows:
        low, middle, high = (float(row[f"encoder{end}"]) for end in (" low 90%", "", " high 90%"))
        assert low < middle < high

    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"schema", "arguments", "environment", "parity", "series", "seconds"}
    assert metrics["environment"]["attention_backends"]["forecasting"]
    assert {p["method"] for p in metrics["parity"]} == {"encoder", "encoder-decoder"}
    (series,) = metrics["series"].values()
    assert series["season"] == 12 and series["split"] == {"train_end": 128, "test_start": 160, "length": 200}
    assert series["tests"]["test"] == {"origins": 36, "horizon": 5}
    for result in series["results"]:
        assert set(result) == {"name", "kind", "parameters", "seeds", "scores", "intervals", "runs"}
        assert len(result["intervals"]["half_widths"]) == 5
        assert set(result["scores"]["test"]) == {"mse", "mae", "mase"}
        assert set(result["scores"]["test"]["mse"]) == {"mean", "min", "max"}
        assert len(result["runs"]) == len(result["seeds"]) == (1 if result["kind"] == "model" else 0)

    assert cli.main([*arguments, "--resume"]) == 0
    again = json.loads((output / "metrics.json").read_text())["series"]["sales-kg"]["results"]
    assert [r["scores"] for r in again] == [r["scores"] for r in series["results"]]


def test_workers_change_nothing(tmp_path):
    """Two processes give the numbers of one, in the order asked for."""
    problem = small_problem(epochs=1)
    runs = [
        Run(problem, method, seed, "cpu", tmp_path / f"{method.name}{seed}.pt", resume=False, layers="fastattn")
        for method in problem.methods[:2]
        for seed in (1, 2)
    ]
    for run, outcome in zip(runs, execute_all(runs, workers=2), strict=True):
        here = run.execute(on_epoch=lambda: None)
        assert here.scores == outcome.scores and here.history == outcome.history


def test_the_estimate_grows_with_the_work():
    problem = small_problem(epochs=1)
    method = problem.methods[1]
    long = replace(method, recipe=replace(method.recipe, epochs=1000))
    once, often = (estimate_seconds(problem, m, "cpu", "fastattn") for m in (method, long))
    assert 0 < once < often / 10


def test_part_one_text_and_figures(cli, tmp_path):
    """With made-up outcomes: each method one hundredth worse than the one before."""
    problem = sine_problem(fresh_length=300)
    names = [*experiments.sine_baselines(problem), *(method.name for method in problem.methods)]
    ahead = experiments.Ahead(np.zeros(1), np.ones(1), 0.9)
    results = []
    for index, name in enumerate(sorted(names, key=lambda name: name != experiments.NOISE_FLOOR)):
        scores = {test: dict.fromkeys(("mse", "mae", "mase"), 0.25 + index / 100) for test in problem.tests}
        forecasts = np.zeros((180, 1))
        history = train.History([0.3, 0.2], [0.4, 0.3], best_epoch=1)
        outcomes = [experiments.Outcome(scores, forecasts, ahead, history, 1.0, 17)] * 2
        learned = name in {method.name for method in problem.methods}
        results.append(
            cli.report.Result(name, [scores] * (1 + learned), forecasts, outcomes * learned, [1, 2] * learned)
        )
    text = cli.report.results_text(problem, results)
    assert "above the noise floor, 0.2500" in text
    assert "On the fresh series: no network wins: last value beats" in text
    assert "0.0600 -> 0.0700   +17%  LSTM, the tutorial's -> LSTM, standardised" in text
    assert len(cli.plots.plot_all(problem, results, tmp_path)) == 3
    assert json.dumps(cli.report.problem_metrics(problem, results), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--column", "b"], r"no column 'b'; its columns are 'day', 'Sales \(kg\)'"),
        (["--column", "Sales (kg)", "--horizon", "100"], "expected at least .* values for horizon 100"),
    ],
)
def test_input_errors_are_one_line(cli, series_csv, tmp_path, capsys, arguments, message):
    arguments = ["--csv", str(series_csv), "--horizon", "5", "--output", str(tmp_path), *arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "x.csv"], "--csv needs --column and --horizon"),
        (["--horizon", "3"], "--horizon needs --csv"),
        (["--seeds", "0"], "expected a positive integer, got 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_usage_errors(cli, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        cli.parse_arguments(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

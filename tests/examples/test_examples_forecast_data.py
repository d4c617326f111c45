"""The forecasting example's data: series, splits, CSV files of any kind, what is refused."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.forecast import data, experiments, train
from examples.forecast.experiments import Method, prepare, real_problem
from examples.forecast.train import Recipe
from tests.support.forecast import small_config, small_problem, small_series, write

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

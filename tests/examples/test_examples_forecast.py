"""examples/forecast: nothing looks ahead, the baselines are right, and the program runs from a CSV file to figures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.common import CheckpointError
from examples.forecast import experiments, train
from examples.forecast.experiments import Method, prepare, sine_problem, train_and_score
from examples.forecast.models import ModelConfig, build
from examples.forecast.parity import compare
from examples.forecast.runner import Run, estimate_seconds, execute_all
from examples.forecast.train import Recipe, fit
from fastattn.testing import FACTOR
from tests.support.forecast import KINDS, small_config, small_problem, small_series, write

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
    """Two runs of torch.nn from weights a rounding step apart are to each other as eager PyTorch is to float64."""
    parity = compare(small_problem(), kind, "cpu", epochs=3)
    assert len(parity.torch) == len(parity.fastattn) == 3
    assert parity.torch[-1] < parity.torch[0]
    assert parity.difference <= FACTOR * parity.rounding + torch.finfo(torch.float32).eps
    assert parity.step.fastattn > 0 and parity.step.torch > 0


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
        "encoder-decoder: a training step takes",
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
    forecasts, losses = (
        {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
        for figure in (cli.plots._plot_forecasts(problem, results), cli.plots._plot_losses(problem, results))
    )
    shared = forecasts.keys() & losses.keys()  # a method has one colour in all figures
    assert len(shared) == 3 and all(forecasts[name] == losses[name] for name in shared)
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

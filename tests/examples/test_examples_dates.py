"""examples/dates: the formats mean what they say, no test date is learned from, and the program runs end to end."""

import copy
import functools
import io
import json
import re
from datetime import date, datetime

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastattn
from examples import beside
from examples.common import CheckpointError, count_parameters
from examples.dates import data, evaluate, train
from examples.dates.on_torch import OnTorch
from examples.dates.train import Recipe, fit, make_model
from fastattn.functional import one_pass, rotary
from fastattn.testing import assert_parity

EVERY_DAY = [day for days in data.DAYS.values() for day in days]
STRPTIME = {
    "March 5, 1987": "%B %d, %Y",
    "5 Mar 1987": "%d %b %Y",
    "5-Mar-87": "%d-%b-%y",
    "05/03/1987": "%d/%m/%Y",
    "Thursday, 5 March 1987": "%A, %d %B %Y",
    "5th of March 1987": "%d of %B %Y",
    "19870305": "%Y%m%d",
}


# -------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("name", data.FORMATS)
def test_formats_name_one_date(name):
    """Python's own parser reads back the date that was written."""
    write = data.FORMATS[name]
    assert write(date(1987, 3, 5)) == name
    for day in [*EVERY_DAY[::29], date(2000, 2, 29), data.FIRST, data.LAST]:
        text = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", write(day))
        assert datetime.strptime(text, STRPTIME[name]).date() == day
        assert f"{day:%A}" in text or "A" not in STRPTIME[name]


def test_ordinals():
    write = data.FORMATS["5th of March 1987"]
    expected = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 13: "13th", 21: "21st", 22: "22nd"}
    expected |= {23: "23rd", 30: "30th", 31: "31st"}
    assert {n: write(date(1987, 3, n)).split()[0] for n in expected} == expected


def test_every_text_can_be_read():
    texts = [write(day).lower() for day in EVERY_DAY for write in data.FORMATS.values()]
    assert set("".join(texts)) == set(data.SOURCE.characters)
    assert max(map(len, texts)) == data.LONGEST_SOURCE


def test_parts_share_no_date():
    assert len(EVERY_DAY) == len(set(EVERY_DAY)) == (data.LAST - data.FIRST).days + 1
    assert len(data.DAYS["train"]) > 32_000 and min(map(len, data.DAYS.values())) > 1_500
    for part in data.DAYS:
        written = data.examples(part, 700, seed=1)
        assert {data.part_of(day) for _, day in written} == {part}
        assert len({day for _, day in written}) == 700
        counts = [sum(write(day) == text for text, day in written) for write in data.FORMATS.values()]
        assert counts == [100] * len(data.FORMATS)
        assert written == data.examples(part, 700, seed=1) != data.examples(part, 700, seed=2)


def test_batch_round_trip():
    written = data.examples("train", 14, seed=0)
    source, lengths, target = data.batch(written)
    assert source.shape == (14, data.LONGEST_SOURCE) and target.shape == (14, data.LONGEST_TARGET + 1)
    for (text, day), tokens, length, answer in zip(written, source, lengths, target, strict=True):
        assert length == len(text) and (tokens[length:] == data.PAD).all() and (tokens[:length] != data.PAD).all()
        assert data.SOURCE.decode(tokens.tolist()) == text.lower()
        assert answer[0] == data.BOS and answer[-1] == data.EOS
        assert data.TARGET.decode(answer.tolist()) == day.isoformat()


@pytest.mark.parametrize(
    ("text", "message"),
    [("5 März 1987?", r"got '\?', 'z', 'ä'"), ("", "1 to 28 characters, got 0"), ("1" * 29, "1 to 28 .* got 29")],
)
def test_texts_that_cannot_be_read(text, message):
    with pytest.raises(data.TextError, match=message):
        data.encode_source(text)


# ---------------------------------------------------------------------------------------------------- training


def fit_small(model=None, recipe=Recipe(steps=4, batch_size=8, validate_every=2), **options):  # noqa: B008
    model = make_model(0, "cpu") if model is None else model
    return model, fit(model, recipe, **options)


@pytest.fixture(scope="module")
def learned():
    """A model that has seen 30 batches and writes, here and there, what looks like a date."""
    return fit_small(recipe=Recipe(steps=30, batch_size=16, warmup_steps=5, validate_every=20))


def test_training_learns(learned):
    _, history = learned
    assert history.loss[-1] < 0.7 * history.loss[0]
    assert history.validation_step == [20, 30]
    assert history.validation_loss[1] < history.validation_loss[0]


def test_training_sees_no_padding(monkeypatch):
    """Whatever stands there, the losses and weights are the same to the bit."""
    plain, history = fit_small()
    batch = data.batch

    def with_noise(*args):
        source, lengths, target = batch(*args)
        return source.where(source != data.PAD, data.SOURCE.specials), lengths, target

    monkeypatch.setattr(data, "batch", with_noise)
    noisy, noisy_history = fit_small()
    assert noisy_history == history
    assert torch.equal(noisy.decoder.norm.weight, plain.decoder.norm.weight)


def test_resumed_training_is_the_same(tmp_path):
    """Stopped after half of the steps: the same losses and weights, to the bit, as in one go."""
    whole, whole_history = fit_small()

    class Stop(Exception):
        pass

    def stop(history):
        if len(history.loss) == 3:  # the checkpoint is of step 2
            raise Stop

    path = tmp_path / "folder" / "x.pt"
    with pytest.raises(Stop):
        fit_small(checkpoint=path, on_step=stop)
    assert len(torch.load(path, weights_only=True)["history"]["loss"]) == 2
    torch.manual_seed(99)
    steps = []
    resumed, history = fit_small(checkpoint=path, resume=True, on_step=lambda h: steps.append(len(h.loss)))
    assert history == whole_history and steps == [3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="expected recipe steps=6, got 4"):
        fit_small(recipe=Recipe(steps=6, batch_size=8, validate_every=2), checkpoint=path, resume=True)


def test_accumulated_gradients_are_those_of_the_batch():
    """Of a batch in four parts, as the optimiser sees them; and clipped."""

    def gradients(accumulate, dtype, clip=1e6):
        seen = []

        def keep(optimizer, args, kwargs):
            seen.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]))

        hook = register_optimizer_step_pre_hook(keep)
        try:
            fit_small(make_model(0, "cpu").to(dtype), Recipe(steps=1, batch_size=8, accumulate=accumulate, clip=clip))
        finally:
            hook.remove()
        return seen[0]

    exact, plain = gradients(1, torch.float64), gradients(1, torch.float32)
    assert_parity(gradients(4, torch.float32), exact, plain, "gradient")
    assert gradients(4, torch.float64, clip=0.1).norm() <= 0.1 < exact.norm()
    with pytest.raises(ValueError, match="accumulate: expected a divisor of batch_size == 8, got 3"):
        Recipe(batch_size=8, accumulate=3)


def test_mixed_precision():
    """Products in bfloat16, weights in float32."""
    dtypes = []
    model = make_model(0, "cpu")
    model.head.register_forward_hook(lambda module, args, output: dtypes.append((module.training, output.dtype)))
    _, history = fit_small(model, Recipe(steps=2, batch_size=8, amp=True))
    assert {dtype for training, dtype in dtypes if training} == {torch.bfloat16}
    assert {dtype for training, dtype in dtypes if not training} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, plain = fit_small(recipe=Recipe(steps=2, batch_size=8))
    error = abs(history.loss[0] - plain.loss[0]) / plain.loss[0]
    assert 0 < error < torch.finfo(torch.bfloat16).eps


def test_compiled_training_is_the_same(monkeypatch):
    """The graph of torch.compile, run by eager PyTorch; without the passes that eager code alone has kernels for."""
    for module in (rotary, one_pass):
        monkeypatch.setattr(module, "served", lambda *_: False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    recipe = Recipe(steps=2, batch_size=8)
    compiled, compiled_history = fit_small(recipe=recipe, compiled=True)
    plain, history = fit_small(recipe=recipe)
    assert compiled_history == history
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), plain.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.fixture
def model(learned):
    return copy.deepcopy(learned[0])


@pytest.fixture
def written():
    return data.examples("test", 14, seed=0)


def test_cached_decoding_is_teacher_forcing(model, written):
    source, lengths, target = data.batch(written)
    with torch.no_grad():
        cached = evaluate.step_by_step(model, source, lengths, target)
        forced = evaluate.teacher_forced(model, source, lengths, target)
        exact = evaluate.teacher_forced(model.double(), source, lengths, target)
    assert_parity(cached, exact, forced, "logits")


def test_decoding_is_compared(model, written, monkeypatch):
    result = evaluate.compare_decoding(model, written)
    source, lengths, _ = data.batch(written)
    with torch.no_grad():
        answers = evaluate.with_cache(model, source, lengths)
        target = torch.cat([torch.full_like(source[:, :1], data.BOS), answers.tokens[:, :-1]], 1)
        cached = evaluate.step_by_step(model, source, lengths, target)
        forced = evaluate.teacher_forced(model, source, lengths, target)
        exact = evaluate.teacher_forced(copy.deepcopy(model).double(), source, lengths, target)
    assert_parity(cached, exact, forced, "logits")
    assert result["same_tokens"] and result["difference"] <= (forced - cached).abs().max().item()
    assert set(result["seconds"]) == {"1", "14"}
    monkeypatch.setattr(evaluate, "without_cache", lambda model, source, lengths: source)
    assert not evaluate.compare_decoding(model, written)["same_tokens"]


def test_end_and_padding(model, written):
    """A row stops at its EOS whatever the others do, and does not see its padding."""
    texts = [text for text, _ in written]
    source, lengths = data.batch_sources(texts)
    answers = evaluate.with_cache(model, source, lengths)
    assert torch.equal(answers.tokens, evaluate.without_cache(model, source, lengths))
    assert len(set(answers.lengths.tolist())) > 1
    for tokens, length in zip(answers.tokens, answers.lengths, strict=True):
        assert (tokens[:length] != data.PAD).all() and (tokens[length:] == data.PAD).all()
        assert data.EOS not in tokens[: length - 1]
        assert tokens[length - 1] == data.EOS or length == data.LONGEST_TARGET
    noise = source.where(source != data.PAD, data.SOURCE.specials)
    assert torch.equal(answers.tokens, evaluate.with_cache(model, noise, lengths).tokens)
    assert [a.text for a in evaluate.convert(model, texts)] == [evaluate.convert(model, [t])[0].text for t in texts]


def test_score(written, monkeypatch):
    answers = [evaluate.Answer(day.isoformat(), 1.0) for _, day in written]
    answers[3] = evaluate.Answer("1987-03-05", 0.5)
    monkeypatch.setattr(evaluate, "convert", lambda model, texts: answers)
    score = evaluate.score(None, written)
    assert score.accuracy == 13 / 14 and score.count == dict.fromkeys(data.FORMATS, 2)
    assert score.right == score.count | {"05/03/1987": 1}
    text, day = written[3]
    assert score.mistakes == [{"source": text, "expected": day.isoformat(), "got": "1987-03-05"}]


def test_attention_weights_are_the_layers(model):
    """They give what the layer returned."""
    weights, output, rebuilt = evaluate.cross_attention(model, "5 Mar 1987", "1987-03-05")
    assert weights.shape == (4, 11, 10)
    _, exact, _ = evaluate.cross_attention(model.double(), "5 Mar 1987", "1987-03-05")
    assert_parity(rebuilt, exact, output, "output")
    assert not model.decoder.blocks[-1].cross_attn._forward_hooks


def test_torchs_layers_have_as_many_parameters_and_see_no_padding():
    model = make_model(0, "cpu")
    theirs = OnTorch(model)
    assert count_parameters(theirs) == count_parameters(model)
    source, lengths, target = data.batch(data.examples("train", 4, "1"), "cpu")
    out = theirs(source, target[:, :-1], source_lengths=lengths)
    assert out.shape == model(source, target[:, :-1], source_lengths=lengths).shape
    padding = torch.arange(source.shape[1]) >= lengths[:, None]
    assert padding.any()
    junk = source.masked_fill(padding, 1 - data.PAD)
    assert torch.equal(theirs(junk, target[:, :-1], source_lengths=lengths), out)
    later = target[:, :-1].clone()
    later[:, 5:] = 1 - data.PAD
    assert torch.equal(theirs(source, later, source_lengths=lengths)[:, :5], out[:, :5])


# ----------------------------------------------------------------------------------------------------- program


@pytest.fixture(scope="module")
def cli():
    pytest.importorskip("matplotlib")
    from examples.dates import cli

    return cli


@pytest.fixture(scope="module")
def output(cli, tmp_path_factory):
    """The folder that a program run of 30 steps wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("dates") / "output"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "TEST_DATES", 21)
        patch.setattr(beside, "SECONDS", 0.0)
        patch.setattr("sys.stdout", printed := io.StringIO())
        patch.setattr("sys.stderr", progress := io.StringIO())
        assert cli.main(["--steps", "30", "--batch-size", "16", "--device", "cpu", "--output", str(folder)]) == 0
        (folder / "printed.txt").write_text(printed.getvalue())
        (folder / "progress.txt").write_text(progress.getvalue())
    return folder


def test_program(output):
    printed = (output / "printed.txt").read_text()
    for text in ("200,640 parameters", "of 3", "Exact match on 21 dates", "cached decoding equals teacher forcing",
                 "torch.nn's Transformer layers with 200,640 parameters too"):  # fmt: skip
        assert text in printed, text
    assert all(name in printed for name in data.FORMATS)
    progress = (output / "progress.txt").read_text().splitlines()
    assert len(progress) == 10 and "30/30 steps" in progress[-1] and "\r" not in "".join(progress)
    for figure in ("training", "attention"):
        assert (output / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_resumes_to_its_results(cli, output, monkeypatch, capsys):
    monkeypatch.setattr(cli, "TEST_DATES", 21)
    monkeypatch.setattr(beside, "SECONDS", 0.0)
    first = json.loads((output / "metrics.json").read_text())
    arguments = ["--steps", "30", "--batch-size", "16", "--device", "cpu", "--output", str(output)]
    assert cli.main([*arguments, "--resume"]) == 0
    again = json.loads((output / "metrics.json").read_text())
    assert again["training"] == first["training"] and again["test"] == first["test"]
    assert cli.main([*arguments, "--resume", "--seed", "1"]) == 2
    assert "expected recipe seed=1, got 42" in capsys.readouterr().err


def test_metrics(output):
    metrics = json.loads((output / "metrics.json").read_text())
    keys = {"schema", "arguments", "environment", "parameters", "recipe", "training", "test", "decoding"}
    assert set(metrics) == keys | {"seconds", "step_ms"}
    assert all(ms > 0 for ms in metrics["step_ms"].values())
    assert metrics["environment"]["torch"] == torch.__version__
    assert metrics["environment"]["fastattn"] == fastattn.__version__
    assert len(metrics["training"]["loss"]) == metrics["recipe"]["steps"] == 30
    assert set(metrics["training"]) == set(vars(train.History()))
    test = metrics["test"]
    assert set(test) == {"dates", "accuracy", "right", "count", "mistakes"}
    assert test["dates"] == sum(test["count"].values()) == 21
    assert test["dates"] - len(test["mistakes"]) == sum(test["right"].values()) == round(21 * test["accuracy"])
    assert set(metrics["decoding"]) == {"tokens", "same_tokens", "difference", "largest", "seconds"}
    assert metrics["decoding"]["same_tokens"] is True
    for seconds in metrics["decoding"]["seconds"].values():
        assert set(seconds) == {"with_cache", "without_cache"} and min(seconds.values()) > 0


def test_interactive(cli, output, monkeypatch, capsys):
    """Answers, refusals that say why, and an end at an empty line or at the end of the input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("March 5, 1987\n5 März 1987\n" + "1" * 29 + "\n\n5 Mar 1987\n"))
    assert cli.main(["--interactive", "--device", "cpu", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("date> ") == 4
    assert re.search(r"date>   [-0-9]*  \(probability 0\.\d{3}", printed)
    assert "got 'z', 'ä'" in printed and "expected 1 to 28 characters, got 29" in printed
    monkeypatch.setattr("sys.stdin", io.StringIO("5 mar 1987"))
    assert cli.main(["--interactive", "--device", "cpu", "--output", str(output)]) == 0
    assert capsys.readouterr().out.endswith("date> \n")


def test_an_answer_that_is_no_date_is_marked(cli, output, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("5 Mar 1987\n5 Mar 1987\n"))
    answers = iter(["1987-02-30", "1987-03-05"])
    monkeypatch.setattr(evaluate, "convert", lambda model, texts: [evaluate.Answer(next(answers), 0.5)])
    assert cli.main(["--interactive", "--device", "cpu", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["this is no date" in line for line in lines if "probability" in line] == [True, False]


def test_checkpoint_errors_are_one_line(cli, tmp_path, capsys):
    arguments = ["--interactive", "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "found none: run python -m examples.dates first" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_text("junk")
    for mode in (["--interactive"], ["--resume"]):
        assert cli.main([*mode, *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "is not a checkpoint" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected a positive integer, got 0"),
        (["--accumulate", "3"], "expected a divisor of --batch-size 64, got 3"),
    ],
)
def test_usage_errors(cli, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        cli.parse_arguments(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

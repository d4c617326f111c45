"""examples/charlm: nanoGPT's model and recipe, resuming and sampling, and the program from a text to its files."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import fastattn
from examples.beside import time_beside
from examples.charlm import cli
from examples.charlm.data import ALICE, DataError, Text, Vocabulary, random_batch, windows
from examples.charlm.models import KINDS, Shape
from examples.charlm.on_torch import OnTorch
from examples.charlm.sample import continue_text, kept_of, load
from examples.charlm.train import Recipe, build, evaluate, fit, loss_of, make_optimizer
from examples.common import CheckpointError, count_parameters
from fastattn import Sampling
from fastattn.nn import CausalLM, SlidingWindowCache
from fastattn.testing import assert_parity

PANGRAM = "the quick brown fox jumps over the lazy dog.\n"
TINY = {"block": 8, "layers": 1, "heads": 2, "width": 16}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(20 * PANGRAM, encoding="utf-8")
    return Text.read(path)


@pytest.fixture
def trained(text, tmp_path):
    """kind -> a checkpoint of a few steps."""

    def train(kind):
        shape = Shape(kind, **TINY)
        path = tmp_path / f"{kind}.pt"
        fit(build(shape, text.vocabulary, 0), text, shape, Recipe(steps=3, evaluate_every=3), path)
        return load(path, "cpu")

    return train


# -------------------------------------------------------------------------------------------------------- data


def test_vocabulary_round_trip():
    vocabulary = Vocabulary.of(PANGRAM)
    assert len(vocabulary) == len(set(PANGRAM)) and sorted(vocabulary.characters) == list(vocabulary.characters)
    tokens = vocabulary.encode(PANGRAM)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(PANGRAM),)
    assert vocabulary.decode(tokens) == PANGRAM


def test_unknown_characters_are_named():
    with pytest.raises(DataError, match=r"got '£', 'é'; the model knows '\\n"):
        Vocabulary.of(PANGRAM).encode("quick é £ é")


def test_shipped_text():
    text = Text.read(ALICE)
    whole = text.vocabulary.decode(torch.cat([text.train, text.validation]))
    assert len(whole) == 144_337 and len(text.vocabulary) == 69 and len(text.train) == 129_903
    assert whole.startswith("CHAPTER I. Down the Rabbit-Hole\n") and whole.endswith("the happy summer days.\n")
    assert "gutenberg" not in whole.lower()  # neither licence nor trademark comes with it


def test_windows_have_each_target_once():
    tokens = torch.arange(24)
    got = windows(tokens, 5)
    assert torch.equal(got[:, 1:].flatten(), torch.arange(1, 21))  # 21 to 23: the remainder
    assert torch.equal(got[:, 0], torch.arange(0, 20, 5))


def test_random_batch_reaches_both_ends():
    tokens = torch.arange(10)
    batch = random_batch(tokens, 6, 200, torch.Generator().manual_seed(0))
    assert set(batch[:, 0].tolist()) == {0, 1, 2, 3}
    assert torch.equal(batch, batch[:, :1] + torch.arange(7))


# ------------------------------------------------------------------------------------- nanoGPT's model and recipe


def test_parameters_of_both_models():
    """65 characters, as tiny Shakespeare has. nanoGPT counts without positions and says 0.80M."""
    gpt, modern = (count_parameters(CausalLM(Shape(kind).config(65))) for kind in KINDS)
    assert gpt == 804_096 and gpt - 64 * 128 == 795_904
    assert abs(modern / gpt - 1) < 0.01


def test_optimizer_groups_are_nanogpts():
    """nanoGPT reports 802,944 parameters that decay and 1,152 that do not."""
    model = CausalLM(Shape("gpt").config(65))
    optimizer = make_optimizer(model, Recipe())
    decayed, rest = optimizer.param_groups
    assert sum(p.numel() for p in decayed["params"]) == 802_944 and decayed["weight_decay"] == 0.1
    assert sum(p.numel() for p in rest["params"]) == 1_152 and rest["weight_decay"] == 0.0
    assert decayed["betas"] == rest["betas"] == (0.9, 0.99)
    assert model.head.weight is model.embedding.weight


def gpt(model, tokens):
    """GPT-2 without biases, from its definition, with the weights of `model`."""
    table = model.decoder.position.table
    x = model.embedding.weight[tokens] + table[: tokens.shape[1]]
    later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for block in model.decoder.blocks:
        attn, mlp = block.self_attn, block.feed_forward
        h = F.layer_norm(x, x.shape[-1:], block.self_norm.weight)
        q, k, v = (
            (h @ part.weight.T).unflatten(-1, (4, -1)).transpose(1, 2)
            for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ attn.out_proj.weight.T
        h = F.layer_norm(x, x.shape[-1:], block.feed_forward_norm.weight)
        x = x + F.gelu(h @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    return F.layer_norm(x, x.shape[-1:], model.decoder.norm.weight) @ model.embedding.weight.T


def test_gpt_is_nanogpts_architecture():
    torch.manual_seed(0)
    model = CausalLM(Shape("gpt").config(65))
    tokens = torch.randint(65, (2, 64))
    with torch.no_grad():
        for parameter in model.parameters():  # norms that are not 1, or a missing one would not show
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2.0))
        actual, eager = model(tokens), gpt(model, tokens)
        assert_parity(actual, gpt(model.double(), tokens), eager, name="logits")


def test_initial_weights_are_nanogpts():
    model = build(Shape("gpt"), Vocabulary("".join(map(chr, range(65)))), 0)
    block = model.decoder.blocks[0]
    residual = 0.02 / math.sqrt(2 * 4)
    expected = {
        model.embedding.weight: 0.02,
        model.decoder.position.table: 0.02,
        block.self_attn.q_proj.weight: 0.02,
        block.feed_forward.up_proj.weight: 0.02,
        block.self_attn.out_proj.weight: residual,
        block.feed_forward.down_proj.weight: residual,
    }
    for weight, std in expected.items():
        spread = std / math.sqrt(2 * weight.numel())  # of a sample's standard deviation
        assert abs(weight.std().item() - std) < 5 * spread
    assert torch.equal(block.self_norm.weight, torch.ones(128))


def test_learning_rate_is_nanogpts():
    recipe = Recipe()
    assert recipe.rate(0) == pytest.approx(1e-3 / 101)
    assert recipe.rate(99) == pytest.approx(1e-3 * 100 / 101)
    assert recipe.rate(100) == pytest.approx(1e-3)
    assert recipe.rate(1050) == pytest.approx(5.5e-4)  # half way
    assert recipe.rate(2000) == pytest.approx(1e-4)


# ----------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_seen(kind):
    model = build(Shape(kind, **TINY), Vocabulary(PANGRAM), 0).eval()
    tokens = torch.randint(len(PANGRAM), (1, 8))
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % len(PANGRAM)
    a, b = model(tokens), model(other)
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])


def test_evaluation_is_the_mean_over_all_targets(text):
    """Also where the last batch is smaller than the others."""
    shape = Shape("modern", block=2, layers=1, heads=2, width=16)
    model = build(shape, text.vocabulary, 0)
    tokens = torch.cat([text.validation, text.validation])  # 89 windows, in batches of 64
    every = windows(tokens, 2)
    with torch.no_grad():
        nats = [loss_of(model, window[None], amp=False).double() for window in every]
        exact = torch.stack([loss_of(model.double(), window[None], amp=False) for window in every]).mean()
    got = torch.tensor(evaluate(model.float(), tokens, 2), dtype=torch.float32)
    assert len(every) > 64 and len(every) % 64
    assert_parity(got, exact.double(), torch.stack(nats).mean().float(), name="loss")


def test_accumulated_passes_are_one_larger_batch(text, tmp_path):
    """The gradient of the mean is the mean of the gradients: the first step's loss, and the weights after it."""
    shape = Shape("gpt", **TINY)
    weights = []
    for batch, accumulate in ((8, 1), (4, 2)):
        model = build(shape, text.vocabulary, 0).double()  # else only rounding would differ, divided by sqrt(v) of Adam
        fit(model, text, shape, Recipe(steps=1, batch=batch, accumulate=accumulate, warmup=0), tmp_path / f"{batch}.pt")
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_parity(weights[1], weights[0], weights[0], name="weights")  # a rounding apart


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_the_same_bit_for_bit(kind, text, tmp_path):
    """With dropout, whose random state is in the checkpoint too."""
    shape, recipe = Shape(kind, **TINY, dropout=0.1), Recipe(steps=30, warmup=5, evaluate_every=10)
    whole = build(shape, text.vocabulary, recipe.seed)
    expected = fit(whole, text, shape, recipe, tmp_path / "whole.pt")

    class Stopped(Exception):
        pass

    def stop(done, history):
        if done == 25:  # between two evaluations: steps 21 to 25 are done again
            raise Stopped

    with pytest.raises(Stopped):
        fit(build(shape, text.vocabulary, recipe.seed), text, shape, recipe, tmp_path / "broken.pt", on_step=stop)
    torch.manual_seed(99)
    resumed = build(shape, text.vocabulary, 98)  # other weights, another random state
    steps = []
    got = fit(
        resumed, text, shape, recipe, tmp_path / "broken.pt",
        resume=True, on_step=lambda done, history: steps.append(done),
    )  # fmt: skip
    assert steps == list(range(21, 31))
    assert got == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_best_evaluation_is_kept(text, tmp_path):
    """The validation part is noise: what is learned from the text makes it worse."""
    shape = Shape("modern", **TINY)
    text = Text(text.vocabulary, text.train, torch.randint(len(text.vocabulary), (200,)))
    model = build(shape, text.vocabulary, 0)
    history = fit(
        model, text, shape, Recipe(steps=12, warmup=0, learning_rate=0.01, evaluate_every=1), tmp_path / "x.pt"
    )
    assert history.best < 11
    assert evaluate(model, text.validation, shape.block) == history.validation[history.best]
    sampled, _ = load(tmp_path / "x.pt", "cpu")
    assert evaluate(sampled, text.validation, shape.block) == history.validation[history.best]


def test_checkpoint_of_another_run_is_refused(text, tmp_path):
    shape = Shape("gpt", **TINY)
    path = tmp_path / "gpt.pt"
    fit(build(shape, text.vocabulary, 0), text, shape, Recipe(steps=1), path)
    with pytest.raises(CheckpointError, match="expected recipe steps=2, got 1"):
        fit(build(shape, text.vocabulary, 0), text, shape, Recipe(steps=2), path, resume=True)
    other = Text(text.vocabulary, text.train.flip(0), text.validation)
    with pytest.raises(CheckpointError, match="expected text crc32"):
        fit(build(shape, text.vocabulary, 0), other, shape, Recipe(steps=1), path, resume=True)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load(path, "cpu")
    with pytest.raises(CheckpointError, match="train --model modern first"):
        load(tmp_path / "modern.pt", "cpu")


# ------------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("kind", KINDS)
def test_samples_go_on_beyond_the_block_and_repeat_under_a_seed(kind, trained):
    model, vocabulary = trained(kind)
    prompt = vocabulary.encode("the quick brown ")

    def sample(seed):
        torch.manual_seed(seed)
        return list(continue_text(model, prompt, 40, Sampling(temperature=0.9)))

    first = sample(1)
    assert len(first) == 40 and sample(1) == first != sample(2)
    assert all(0 <= token < len(vocabulary) for token in first)


def test_a_streamed_sample_is_what_generate_says(trained):
    model, vocabulary = trained("modern")
    prompt, sampling = vocabulary.encode("the "), Sampling(temperature=0.8, top_k=5, top_p=0.9, seed=3)
    expected = fastattn.generate(model, prompt[None], 30, sampling=sampling, cache=SlidingWindowCache)
    assert list(continue_text(model, prompt, 30, sampling)) == expected.tokens[0].tolist()


def test_modern_sees_a_window_as_long_as_the_block(trained):
    """One layer: what stood before the window cannot matter, what stands at its start does."""
    model, vocabulary = trained("modern")
    tokens = vocabulary.encode(PANGRAM)[None, :20]
    changed = tokens.clone()
    changed[:, -8] = (changed[:, -8] + 1) % len(vocabulary)
    with torch.no_grad():
        whole, last, changed = (model(x)[0, -1] for x in (tokens, tokens[:, -8:], changed))
        exact = model.double()(tokens[:, -8:])[0, -1]
    assert_parity(whole, exact, last, intermediate=20.0)  # angles of positions up to 20
    assert not torch.equal(changed, whole)


def test_gpt_goes_on_from_the_last_half(trained):
    """Greedy search step by step: within the block from all there is, then from the last half and what follows it."""
    model, vocabulary = trained("gpt")
    tokens = vocabulary.encode("the ")
    got = list(continue_text(model, tokens, 12, Sampling(temperature=0.0)))
    seen = tokens
    for token in got:
        if len(seen) > 8:
            seen = seen[-4:]
        assert model(seen[None])[0, -1].argmax() == token
        seen = torch.cat([seen, torch.tensor([token])])
    assert kept_of(model.config.position) == 4


def test_gpt_on_torchs_layers_is_the_same_function(text):
    model = build(Shape("gpt", **TINY), text.vocabulary, 0)
    tokens = text.train[:32].view(4, 8)
    exact = build(Shape("gpt", **TINY), text.vocabulary, 0).double()(tokens)
    theirs = OnTorch(model)
    assert_parity(theirs(tokens), exact, model(tokens), "logits")
    assert count_parameters(theirs) == count_parameters(model)


def test_timing_leaves_models_as_they_were(text):
    model = build(Shape("gpt", **TINY), text.vocabulary, 0).eval()
    theirs = OnTorch(model)
    before = [p.clone() for p in model.parameters()]
    step = time_beside(model, theirs, lambda model: loss_of(model, text.train[:9][None], amp=False))
    assert step.fastattn > 0 and step.torch > 0 and str(step).endswith("times as fast")
    assert not model.training and theirs.training
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# -------------------------------------------------------------------------------------------------- the program

OPTIONS = ["--block", "8", "--layers", "1", "--heads", "2", "--width", "16", "--device", "cpu"]


def test_program_from_a_text_to_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, output = tmp_path / "own.txt", tmp_path / "output"
    path.write_text(20 * PANGRAM, encoding="utf-8")
    training = ["--text", str(path), "--output", str(output), "--steps", "30", "--evaluate-every", "10", *OPTIONS]
    assert cli.main([*training, "--prompt", "the ", "--length", "20"]) == 0
    printed = capsys.readouterr()
    assert sorted(file.name for file in output.iterdir()) == ["gpt.pt", "loss.png", "metrics.json", "modern.pt"]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "gpt has positions for 8 characters" in printed.err and "modern has" not in printed.err
    assert "30/30" in printed.err  # the progress

    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == {"schema", "text", "recipe", "environment", "models"}
    assert metrics["text"] == {
        "source": str(path),
        "characters": {"train": 810, "validation": 90},
        "vocabulary": 29,
    }
    assert metrics["recipe"]["steps"] == 30 and metrics["recipe"]["seed"] == 1337
    for kind, model in zip(KINDS, metrics["models"], strict=True):
        assert model["shape"] == asdict(Shape(kind, **TINY))
        assert [row["step"] for row in model["evaluations"]] == [10, 20, 30]
        losses = [row["validation_loss"] for row in model["evaluations"]]
        assert losses[-1] < losses[0] < math.log(29) + 0.2
        assert model["validation_loss"] == min(losses)
        assert f"{model['parameters']:,}" in printed.out
    times, nothing = (model.pop("step_ms") for model in metrics["models"])
    assert nothing is None and times["fastattn"] > 0 and times["torch"] > 0
    assert f"gpt: a training step takes {times['fastattn']:.2f} ms with fastattn" in printed.out

    # Samples alone: those that followed the training.
    first = printed.out.split("--- modern\n")[1]
    sampling = ["--output", str(output), "--sample", "--model", "modern", "--prompt", "the ", "--length", "20"]
    assert cli.main(sampling) == 0
    assert capsys.readouterr().out == f"\n--- modern\n{first}"
    assert first.startswith("the ") and len(first) == len("the ") + 20 + 1

    # Resuming a run that has ended changes nothing.
    assert cli.main([*training, "--prompt", "the ", "--length", "20", "--resume"]) == 0
    again = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    for model in again["models"]:
        del model["step_ms"]
    assert again == metrics


def test_program_with_mixed_precision(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, output = tmp_path / "own.txt", tmp_path / "output"
    path.write_text(20 * PANGRAM, encoding="utf-8")
    assert cli.main(["--text", str(path), "--output", str(output), "--steps", "5", "--amp", *OPTIONS]) == 0
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["recipe"]["amp"] is True
    for model in metrics["models"]:
        assert math.isfinite(model["validation_loss"])


def test_program_names_what_it_cannot_use(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, output = tmp_path / "own.txt", tmp_path / "output"
    path.write_text(20 * PANGRAM, encoding="utf-8")
    start = ["--text", str(path), "--output", str(output), "--steps", "1", *OPTIONS]
    assert cli.main([*start, "--prompt", "50 £"]) == 2
    assert "got '0', '5', '£'" in capsys.readouterr().err
    assert cli.main([*start, "--block", "90"]) == 2
    assert "too short" in capsys.readouterr().err
    assert cli.main(["--text", str(tmp_path / "none.txt")]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert cli.main(["--sample", "--output", str(output)]) == 2
    assert "train --model gpt first" in capsys.readouterr().err
    assert not output.exists()  # nothing of this was trained
    for wrong in (["--heads", "3"], ["--top-p", "2"], ["--prompt", ""], ["--lr", "0"], ["--steps", "0"]):
        with pytest.raises(SystemExit):
            cli.parse_arguments(wrong)
        assert wrong[0].lstrip("-").replace("-", "_").split("_")[-1] in capsys.readouterr().err

"""The program: it trains, tests, draws and prints results, or converts what the user types."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastattn
from examples.beside import Beside, time_beside
from examples.common import (
    CheckpointError,
    Progress,
    add_common_arguments,
    check_device,
    count_parameters,
    environment,
    load_checkpoint,
    positive,
    run_program,
    write_metrics,
)
from examples.dates import data, evaluate, plots
from examples.dates.on_torch import OnTorch
from examples.dates.train import CONFIG, History, Recipe, cross_entropy, fit, make_model
from fastattn.nn import EncoderDecoder

SCHEMA = 1  # of metrics.json
TEST_DATES = 500
DEFAULT_OUTPUT = Path(__file__).parent / "output"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0, or 2 if a checkpoint cannot be used."""
    args = parse_arguments(argv)
    return run_program(lambda: (converse if args.interactive else run)(args), goes_on_from="validation")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.dates",
        description="An encoder-decoder on fastattn that turns written dates into ISO dates, trained from nothing.",
    )
    recipe = Recipe()
    parser.add_argument("--interactive", action="store_true", help="convert what you type, with the trained model")
    add_common_arguments(parser, DEFAULT_OUTPUT)
    training = parser.add_argument_group("training")
    for name, unit in (("steps", "updates of the weights"), ("batch-size", "dates per update")):
        default = getattr(recipe, name.replace("-", "_"))
        training.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"{unit}: %(default)s")
    training.add_argument("--accumulate", type=positive, default=1, metavar="N", help="compute a batch in N parts")
    training.add_argument("--amp", action="store_true", help="mixed precision: forward in bfloat16")
    training.add_argument("--compile", action="store_true", help="torch.compile the training step's model")
    training.add_argument("--seed", type=int, default=recipe.seed, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)

    if args.batch_size % args.accumulate:
        parser.error(f"--accumulate: expected a divisor of --batch-size {args.batch_size}, got {args.accumulate}")
    check_device(parser, args)
    return args


# --------------------------------------------------------------------------------------------- train and test


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    model = make_model(args.seed, args.device)
    parameters = count_parameters(model)
    print(f"fastattn {fastattn.__version__}, PyTorch {torch.__version__}, device: {args.device}")
    print(
        f"{parameters:,} parameters; {len(data.DAYS['train']):,} dates to learn from, in {len(data.FORMATS)} formats:"
    )
    print("  " + " | ".join(data.FORMATS))

    recipe = Recipe(
        steps=args.steps, batch_size=args.batch_size, accumulate=args.accumulate, amp=args.amp, seed=args.seed
    )
    progress = Progress(recipe.steps)
    history = fit(
        model, recipe, args.output / "checkpoint.pt", args.resume, args.compile,
        on_step=lambda h: progress.show(len(h.loss), f"{len(h.loss)}/{recipe.steps} steps  loss {h.loss[-1]:.4f}"),
    )  # fmt: skip
    progress.close()

    written = data.examples("test", TEST_DATES, args.seed)
    score = evaluate.score(model, written)
    decoding = evaluate.compare_decoding(model, written)
    step = time_step(model, recipe, args.device)
    print(results_text(score, decoding))
    print(
        f"\n== Beside torch.nn's Transformer layers with {parameters:,} parameters too, LayerNorm, ReLU and sinusoids,"
    )
    print(f"  since they have no RMSNorm, SwiGLU and RoPE; on the same dates {step}")
    files = draw(args.output, model, history, written)

    seconds = time.perf_counter() - start
    metrics = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "environment": environment(args.device) | {"threads": torch.get_num_threads()},
        "parameters": parameters,
        "recipe": asdict(recipe),
        "training": asdict(history),
        "test": {"dates": len(written), "accuracy": score.accuracy} | asdict(score),
        "decoding": decoding,
        "step_ms": asdict(step),
        "seconds": seconds,
    }
    write_metrics(args.output / "metrics.json", SCHEMA, metrics)
    print(f"\n== Done in {seconds:.0f} s. Files:")
    for path in [args.output / "metrics.json", *files, args.output / "checkpoint.pt"]:
        print(f"  {path}")
    print("Try next: the same command with --interactive")


def time_step(model: EncoderDecoder, recipe: Recipe, device: str) -> Beside:
    """Time a training step, and one with torch.nn's layers and equally many parameters."""
    theirs = OnTorch(model).to(device)
    source, lengths, target = data.batch(data.examples("train", recipe.batch_size, f"{recipe.seed}"), device)

    def loss(model: nn.Module) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.amp):
            return cross_entropy(model(source, target[:, :-1], source_lengths=lengths), target)

    return time_beside(model, theirs, loss)


def results_text(score: evaluate.Score, decoding: dict[str, Any]) -> str:
    """Exact match by format, and the effect of the cache."""
    right, count = sum(score.right.values()), sum(score.count.values())
    lines = [f"\n== Exact match on {count} dates that training never saw: {right} right, {score.accuracy:.1%}"]
    lines += [f"  {name:<24}{score.right[name]:>4} of {score.count[name]}" for name in score.count]
    lines += [f"  wrong: {m['source']!r} gave {m['got']}, not {m['expected']}" for m in score.mistakes[:5]]
    if len(score.mistakes) > 5:
        lines.append(f"  and {len(score.mistakes) - 5} more, in metrics.json")
    lines.append("\n== Decoding")
    verdict = "equals" if decoding["same_tokens"] else "DIFFERS FROM"
    lines.append(
        f"  cached decoding {verdict} teacher forcing: {decoding['tokens']:,} characters, logits no further apart than "
        f"{decoding['difference']:.1e} (the largest is {decoding['largest']:.1f})"
    )
    for size, seconds in decoding["seconds"].items():
        fast, slow = seconds["with_cache"], seconds["without_cache"]
        what = "one date" if size == "1" else f"{size} dates at once"
        both = f"{1000 * fast:.0f} ms with the cache, {1000 * slow:.0f} ms without it"
        lines.append(f"  {what}: {both}, {slow / fast:.1f} times as fast")
    return "\n".join(lines)


def draw(folder: Path, model: EncoderDecoder, history: History, written: Sequence[data.Written]) -> list[Path]:
    """Draw the training, and the attention to the longest of the test dates."""
    source = max((text for text, _ in written), key=len)
    answer = evaluate.convert(model, [source])[0].text
    weights, _, _ = evaluate.cross_attention(model, source, answer)
    return [
        plots.plot_training(history, folder / "training.png"),
        plots.plot_attention(weights.cpu().numpy(), source, answer, folder / "attention.png"),
    ]


# ------------------------------------------------------------------------------------------------ interactive


def converse(args: argparse.Namespace) -> None:
    """Read dates until the input ends."""
    path = args.output / "checkpoint.pt"
    if not path.exists():
        raise CheckpointError(f"expected a checkpoint at {path}, found none: run python -m examples.dates first")
    model = make_model(args.seed, args.device)
    load_checkpoint(path, model, {"config": asdict(CONFIG)})
    print("Dates from 1969 to 2068, written like one of these; an empty line ends:")
    print("  " + " | ".join(data.FORMATS))
    while True:
        try:
            text = input("date> ").strip()
        except EOFError:
            print()
            return
        if not text:
            return
        try:
            answer = evaluate.convert(model, [text])[0]
        except data.TextError as error:
            print(f"  cannot read this: {error}")
            continue
        note = "" if _is_date(answer.text) else "; this is no date"
        print(f"  {answer.text}  (probability {answer.probability:.3f}{note})")


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True

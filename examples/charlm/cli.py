"""The program: trains the requested models, or samples from trained ones.

It runs in one process, or in several that `torchrun` has started: `--parallel` says what they share.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import fastattn
import fastattn.distributed as fd
from examples.beside import time_beside
from examples.charlm.data import ALICE, DataError, Text, windows
from examples.charlm.models import KINDS, Kind, Shape
from examples.charlm.on_torch import OnTorch
from examples.charlm.parallel import Ranks, Sizes
from examples.charlm.report import Result, metrics, table
from examples.charlm.sample import continue_text, kept_of, load
from examples.charlm.train import ALONE, History, Recipe, build, fit, loss_of
from examples.common import (
    Progress,
    add_common_arguments,
    check_device,
    count_parameters,
    positive,
    run_program,
    write_metrics,
)
from fastattn import Sampling
from fastattn.nn import Learned

SCHEMA = 1  # of metrics.json
DEFAULT_OUTPUT = Path(__file__).parent / "output"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0, 1 if another process failed, 2 if the input cannot be used."""
    args = parse_arguments(argv)
    try:
        return run_program(lambda: run(args), goes_on_from="step" if args.parallel else "evaluation")
    except fd.RankFailed as error:
        print(f"error: {error}; the same command with --resume goes on from the last evaluation", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> None:
    """Train unless only samples are wanted, then sample."""
    first = True
    if args.parallel and not args.sample:
        with fd.job(asdict(args.parallel), device=args.device, timeout=args.timeout) as job:
            first = job.first
            train(args, Ranks(job))
    elif not args.sample:
        train(args, ALONE)
    if first:
        for kind in args.shapes:
            print_sample(args, kind)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.charlm",
        description="A character language model on fastattn.nn.CausalLM. Without arguments: nanoGPT's architecture and "
        "today's, trained alike on Alice in Wonderland, with nanoGPT's settings for a CPU.",
    )
    parser.add_argument("--text", type=Path, default=ALICE, metavar="PATH", help="what to learn, in UTF-8")
    parser.add_argument(
        "--model", nargs="+", choices=KINDS, default=list(KINDS),
        help="gpt: LayerNorm, GELU, learned positions; modern: RMSNorm, SwiGLU, RoPE, query and key norm "
        "(default: both, one after the other)",
    )  # fmt: skip
    add_common_arguments(parser, DEFAULT_OUTPUT)

    size, training, samples = map(parser.add_argument_group, ("size", "training", "samples"))
    shape, recipe = Shape("gpt"), Recipe()
    numbers: list[tuple[argparse._ArgumentGroup, str, Callable[[str], float], float, str]] = [
        (size, "block", positive, shape.block, "characters that a model sees"),
        (size, "layers", positive, shape.layers, "blocks of attention and feed-forward network"),
        (size, "heads", positive, shape.heads, "attention heads"),
        (size, "width", positive, shape.width, "size of a hidden vector"),
        (size, "dropout", float, shape.dropout, "probability; a larger model on a small text needs some"),
        (training, "steps", positive, recipe.steps, "steps of the optimizer"),
        (training, "batch", positive, recipe.batch, "sequences per pass"),
        (training, "accumulate", positive, recipe.accumulate, "passes per step, whose gradients are averaged"),
        (training, "lr", float, recipe.learning_rate, "highest learning rate"),
        (training, "evaluate-every", positive, recipe.evaluate_every, "steps from one evaluation to the next"),
        (training, "seed", int, recipe.seed, "of weights, batches and samples"),
        (samples, "length", positive, 400, "characters"),
        (samples, "temperature", float, 0.8, "0: always the most probable character"),
    ]
    for group, name, kind, default, text in numbers:
        group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    several = parser.add_argument_group(
        "several processes", "torchrun --nproc-per-node 4 -m examples.charlm --parallel dp=2,tp=2: losses as on one. "
        "Ctrl-C stops all after the same step; --resume goes on, on any number of processes, also after one was "
        "killed",
    )  # fmt: skip
    several.add_argument(
        "--parallel", type=Sizes.parse, metavar="dp=N,cp=N,tp=N", help="how many processes share the sequences of a "
        "batch (dp), the characters of each (cp), the heads (tp); what is left out is 1",
    )  # fmt: skip
    several.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS",
        help="that a process waits for another one before it gives up (default: %(default)s)",
    )  # fmt: skip
    training.add_argument("--amp", action="store_true", help="compute in bfloat16 (autocast)")
    training.add_argument("--compile", action="store_true", help="compile the model (torch.compile)")
    samples.add_argument("--sample", action="store_true", help="no training: sample from checkpoints in that folder")
    samples.add_argument(
        "--prompt", default="\n", metavar="TEXT", help="what the sample continues (default: a new line)"
    )
    samples.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable characters")
    samples.add_argument("--top-p", type=float, metavar="P", help="draw among those with probability P together")
    args = parser.parse_args(argv)

    check_device(parser, args)
    try:
        args.sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        args.shapes = {
            kind: Shape(kind, args.block, args.layers, args.heads, args.width, args.dropout) for kind in args.model
        }
        for made in args.shapes.values():
            made.config(vocab_size=1)
    except ValueError as error:
        parser.error(str(error))
    started = int(os.environ.get("WORLD_SIZE", 1))
    wanted = 1 if args.parallel is None else math.prod(asdict(args.parallel).values())
    if started != wanted:
        parser.error(f"--parallel: expected sizes whose product is {started}, the number of processes, got {wanted}; "
                     f"torchrun --nproc-per-node {wanted} starts as many")  # fmt: skip
    if args.parallel and args.heads % args.parallel.tp:
        parser.error(f"--heads: expected a multiple of tp={args.parallel.tp}, got {args.heads}")
    if not args.prompt:
        parser.error("--prompt: expected at least one character")
    if not args.lr > 0:
        parser.error(f"--lr: expected a positive number, got {args.lr}")
    return args


def train(args: argparse.Namespace, ranks: Ranks) -> None:
    """Train the models one after the other, and print their results."""
    if ranks.first:
        import examples.charlm.plots  # noqa: F401  needs matplotlib: now, not after the training

    text = Text.read(args.text)
    if len(text.validation) <= args.block:
        raise DataError(f"{args.text} is too short: its last tenth has {len(text.validation)} of more than {args.block}"
                        " characters that --block needs")  # fmt: skip
    text.vocabulary.encode(args.prompt)  # now, not after the training
    recipe = Recipe(
        steps=args.steps, batch=args.batch, accumulate=args.accumulate, learning_rate=args.lr,
        evaluate_every=args.evaluate_every, seed=args.seed, amp=args.amp,
    )  # fmt: skip
    device = f"{args.device} ({torch.cuda.get_device_name()})" if args.device == "cuda" else args.device
    if ranks.first:
        several = f", {ranks.count} processes" if ranks.count > 1 else ""
        print(f"fastattn {fastattn.__version__}, PyTorch {torch.__version__}, device: {device}{several}")
        print(f"{args.text}: {len(text.train):,} characters to learn, {len(text.validation):,} to evaluate on, "
              f"{len(text.vocabulary)} different ones")  # fmt: skip
    results = []
    for kind, shape in args.shapes.items():
        model = build(shape, text.vocabulary, recipe.seed).to(args.device)
        progress = Progress(recipe.steps)

        def show(done: int, history: History, kind: str = kind, progress: Progress = progress) -> None:
            loss = f", validation loss {history.validation[-1]:.4f}" if history.validation else ""
            progress.show(done, f"{kind} {done}/{recipe.steps}{loss}")

        history = fit(
            model, text, shape, recipe, args.output / f"{kind}.pt",
            resume=args.resume, compiled=args.compile, on_step=show if ranks.first else lambda done, history: None,
            ranks=ranks,
        )  # fmt: skip
        if ranks.first:
            progress.close()
        step = None
        if kind == "gpt" and ranks.count == 1:
            batch = windows(text.train, shape.block)[: recipe.batch].to(args.device)
            step = time_beside(model, OnTorch(model), lambda model, batch=batch: loss_of(model, batch, recipe.amp))
        results.append(Result(shape, count_parameters(model), history, step))
    if ranks.first:
        report(args, results, recipe, text)


def report(args: argparse.Namespace, results: list[Result], recipe: Recipe, text: Text) -> None:
    """Print the table, write the figure and metrics.json."""
    from examples.charlm.plots import plot_losses

    print("\n" + table(results))
    plot_losses(results, args.output / "loss.png")
    write_metrics(args.output / "metrics.json", SCHEMA, metrics(results, recipe, text, str(args.text), args.device))
    print(f"\nwritten to {args.output}: loss.png, metrics.json, " + ", ".join(f"{kind}.pt" for kind in args.shapes))


def print_sample(args: argparse.Namespace, kind: Kind) -> None:
    """Print each character when it is drawn."""
    model, vocabulary = load(args.output / f"{kind}.pt", args.device)
    prompt = vocabulary.encode(args.prompt).to(args.device)
    position = model.config.position
    if isinstance(position, Learned) and len(prompt) + args.length - 1 > position.max_len:
        print(f"note: {kind} has positions for {position.max_len} characters; whenever they are used up, it goes on "
              f"from the last {kept_of(position)}", file=sys.stderr)  # fmt: skip
    print(f"\n--- {kind}")
    print(args.prompt, end="")
    torch.manual_seed(args.seed)
    for token in continue_text(model, prompt, args.length, args.sampling):
        print(vocabulary.characters[token], end="", flush=True)
    print()

"""Every attention model of the installed transformers, small and random, on fastattn against its own eager code.

    python -m benchmarks.tools.huggingface_sweep                    # all, and the table is stored
    python -m benchmarks.tools.huggingface_sweep llama bert         # some, printed
    python -m benchmarks.tools.huggingface_sweep --store llama      # and put into the stored table
    python -m benchmarks.tools.huggingface_sweep --store not-built  # again what was not built

Some models need timm, torchvision or scipy. The stored table was made with these; without them such a model is not
built, and `examine` says so.

Each is computed in float64, in which two ways to the same result agree to rounding, so a difference is one of meaning.
Inputs are unpadded, padded on the right and on the left. A model is compared in evaluation, and in training with its
gradients. In padded inputs only the tokens are compared, not the padding.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.models import Float64

from .huggingface_inputs import LENGTH, LENGTHS, PADDINGS, inputs, valid
from .huggingface_models import WAYS, CannotBuild, architectures, build, one_line

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parents[1] / "results" / "huggingface.json"


def outputs(model: nn.Module, given: dict[str, Any], padding: str) -> dict[str, Tensor]:
    """The model's outputs at tokens, by name; in training also their gradient in one vector."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    result = model(**given)
    config: Any = model.config
    found = {}
    for name, x in _named(result):
        if not x.is_floating_point() or str(name).endswith("attentions"):  # weights, which only eager code gives
            continue
        if padding == "none":
            found[str(name)] = x
        elif x.shape[:2] == (len(LENGTHS), LENGTH) and "encoder" not in str(name):
            whole = "decoder_input_ids" in given and config.is_encoder_decoder  # nothing pads the decoder
            found[str(name)] = x if whole else x[valid(padding)]
    if model.training and found:
        total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in found.values())
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found["gradients"] = torch.cat(gradients)
    return {name: x.detach() for name, x in found.items()}


def _named(result: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, x in result.items() if hasattr(result, "items") else enumerate(result):
        if isinstance(x, Tensor):
            yield f"{prefix}{name}", x
        elif hasattr(x, "items"):
            yield from _named(x, f"{prefix}{name}.")


def compare(model: nn.Module, other: str, padding: str, training: bool) -> str | None:
    """None if both agree, otherwise what differs and by how much. An error of the other is raised."""
    model = on(model, "eager").train(training)
    with Float64(), _without_grad(not training):
        expected = given = None
        problem = ""
        for given in inputs(model, padding):
            try:
                expected = outputs(model, given, padding)
                break
            except Exception as error:
                problem = problem or one_line(error)
        if not expected or given is None:
            raise CannotBuild(problem or "it returns no tensor to compare")
        again = outputs(model, given, padding)
        actual = outputs(on(model, other).train(training), given, padding)
    for name, x in expected.items():
        if x.isnan().any():
            raise CannotBuild(f"its eager code gives NaN in {name}")
        if not torch.equal(x, again[name]) and not torch.allclose(x, again[name]):
            raise CannotBuild("its eager code gives another result the second time")
        y = actual[name]
        scale = x.abs().max().item() if x.numel() else 0.0
        worst = (x - y).abs().max().item() if x.numel() else 0.0
        # Float64 rounds at 2e-16, and at float32's eps where a model makes some number in float32 either way. A wrong
        # mask moves results by a thousandth and more.
        if not worst <= torch.finfo(torch.float32).eps * max(scale, 1e-3):
            return f"{name} differs by {worst / max(scale, 1e-30):.1e} of its largest value"
    return None


@contextlib.contextmanager
def _without_grad(off: bool) -> Iterator[None]:
    with torch.set_grad_enabled(not off):
        yield


def on(model: nn.Module, name: str) -> nn.Module:
    """The model with this attention: switched, or made again if transformers does not switch it."""
    change: Any = model
    if name == "sdpa" and not change._supports_sdpa:  # its parts may
        asked = {"": "eager"}
        for part in change.config.sub_configs:
            with contextlib.suppress(ValueError, KeyError):
                change.set_attn_implementation(asked | {part: name})
                asked[part] = name
        return change
    change.set_attn_implementation(name)
    if change.config._attn_implementation == name:
        return change
    config = copy.deepcopy(change.config)
    made = type(change)._from_config(config, attn_implementation=name, experts_implementation="eager").double()
    made.load_state_dict(change.state_dict())
    return made


def reaches(model: nn.Module) -> bool:
    """Whether any layer calls the registered function."""
    from transformers import AttentionInterface

    from fastattn.integrations import huggingface

    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return huggingface.attention_forward(*args, **kwargs)

    AttentionInterface.register(huggingface.NAME, counted)
    try:
        with Float64(), torch.no_grad():
            model = on(model, huggingface.NAME).eval()
            for given in inputs(model, "none"):
                try:
                    outputs(model, given, "none")
                    break
                except Exception as error:
                    one_line(error)
    finally:
        AttentionInterface.register(huggingface.NAME, huggingface.attention_forward)
    return bool(calls)


def examine(name: str, model: nn.Module | None = None) -> dict[str, str]:
    """``result``: equal, as sdpa, own attention, refused, differs or not built; ``reason`` where there is one."""
    from fastattn.integrations import huggingface

    huggingface.register()
    if model is not None:
        return _examine(name, model)
    reasons: dict[str, None] = {}
    for way in WAYS:
        try:
            return _examine(name, build(name, *way))
        except CannotBuild as error:
            reasons[str(error)] = None
    return {"architecture": name, "result": "not built", "reason": next(iter(reasons))}


def _examine(name: str, model: nn.Module) -> dict[str, str]:
    """As `examine`, of one way to build it."""
    from fastattn.integrations import huggingface

    paddings = PADDINGS if "input_ids" in dict(next(inputs(model, "none"))) else ("none",)
    for padding in paddings:
        for training in (False, True):
            how = f"{'training' if training else 'evaluation'}, padding {padding}"
            try:
                found = compare(model, huggingface.NAME, padding, training)
            except CannotBuild as error:
                if padding == "none" and not training:
                    raise
                return {"architecture": name, "result": "equal", "reason": f"not {how}: {error}"}
            except Exception as error:
                return {"architecture": name, "result": "refused", "reason": f"{how}: {one_line(error)}"}
            if found is None:
                continue
            try:
                same = compare(model, "sdpa", padding, training)
            except Exception:
                same = None
            return {
                "architecture": name,
                "result": "as sdpa" if same == found else "differs",
                "reason": f"{how}: {found}",
            }
    if not reaches(model):
        return {"architecture": name, "result": "own attention", "reason": "no layer calls the interface here"}
    return {"architecture": name, "result": "equal", "reason": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; default all")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th from the I-th, printed as JSON lines")
    parser.add_argument("--store", action="store_true", help="put the rows of the names into the stored table")
    options = parser.parse_args()
    quiet()
    first, step = map(int, options.part.split("/"))
    names = options.names or architectures()
    if names == ["not-built"]:
        names = [row["architecture"] for row in stored() if row["result"] == "not built"]
    rows = []
    for name in names[first::step]:
        rows.append(examine(name))
        print(json.dumps(rows[-1]), flush=True)
    if not options.names and step == 1:
        store(rows)
    elif options.store:
        store(list({row["architecture"]: row for row in [*stored(), *rows]}.values()))


def quiet() -> None:
    """Turn off advice by transformers while hundreds of models are made."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def stored() -> list[dict[str, str]]:
    """The table of the last full run."""
    return json.loads(RESULTS.read_text())["rows"]


def store(rows: list[dict[str, str]]) -> None:
    import transformers

    data = {"transformers": transformers.__version__, "rows": sorted(rows, key=lambda row: row["architecture"])}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

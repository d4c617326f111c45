"""Copy weights between other libraries and our models. One table of names serves both directions; here torch.nn's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.config import TransformerConfig
from fastattn.nn.model import EncoderDecoder
from fastattn.nn.position import Learned, Sinusoidal
from fastattn.nn.stack import Decoder, Encoder
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = ["Link", "build", "from_theirs", "from_torch", "load_torch_state_dict", "to_theirs", "torch_state_dict"]

Model = TypeVar("Model", bound=nn.Module)


_LEAVES = ("weight", "bias", "")


class Link(NamedTuple):
    """A tensor of another library, and the tensor of ours that equals it, or several that equal it when stacked along
    dimension 0.

    A name that ends before "weight" or "bias" stands for both.

    Attributes:
        transposed: theirs is (in, out), ours is (out, in).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def below(self, theirs: str, ours: str) -> Link:
        """The same link with a prefix on each side."""
        return Link(theirs + self.theirs, tuple(ours + name for name in self.ours), self.transposed)


def from_theirs(links: Iterable[Link], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Copies of `tensors` under our names, with their own dtypes and devices.

    Raises:
        ValueError: a tensor is missing, left over, without data, or of another shape than in `model`; the text names
            all of them.
    """
    own = model.state_dict()
    found = _tensor_links(links, own)
    missing = [link.theirs for link in found if link.theirs not in tensors]
    unexpected = sorted(tensors.keys() - {link.theirs for link in found})
    problems = [f"{what} {', '.join(names)}" for what, names in (("no", missing), ("also", unexpected)) if names]
    copies = {}
    for theirs, ours, transposed in found:
        if theirs not in tensors:
            continue
        tensor = tensors[theirs].detach()
        sizes = [own[name].shape[0] for name in ours]
        shape = (sum(sizes), *own[ours[0]].shape[1:])
        expected = shape[::-1] if transposed else shape
        if tuple(tensor.shape) != expected:
            problems.append(f"{theirs} of shape {tuple(tensor.shape)}, not {expected}")
        elif tensor.is_meta:
            problems.append(f"{theirs} on the meta device, without data")
        else:
            parts = (tensor.t() if transposed else tensor).split(sizes)
            copies |= {n: x.clone(memory_format=torch.contiguous_format) for n, x in zip(ours, parts, strict=True)}
    if problems:
        raise ValueError(f"weights: expected exactly those of the model, got {'; '.join(problems)}")
    return copies


def to_theirs(links: Iterable[Link], model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors of `model` under their names, with our dtypes and devices."""
    own = model.state_dict()
    copies = {}
    for theirs, ours, transposed in _tensor_links(links, own):
        stacked = torch.cat([own[name] for name in ours])
        copies[theirs] = stacked.t().contiguous() if transposed else stacked
    return copies


def build(make: Callable[[], Model], links: Callable[[Model], list[Link]], tensors: Mapping[str, Tensor]) -> Model:
    """A model whose parameters are copies of `tensors`, with their dtypes and devices; it draws no random weights."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(from_theirs(links(model), tensors, model), assign=True)
    return model


def _tensor_links(links: Iterable[Link], own: Mapping[str, Tensor]) -> list[Link]:
    """A link for each tensor of this model; tensors that it lacks, such as biases, have none."""
    links = [Link(t + leaf, tuple(o + leaf for o in ours), flip) for t, ours, flip in links for leaf in _LEAVES]
    return [link for link in links if link.ours[0] in own]


# ---- torch.nn ----

_LAYER = (
    Link("self_attn.in_proj_", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")),
    Link("self_attn.out_proj.", ("self_attn.out_proj.",)),
    Link("linear1.", ("feed_forward.up_proj.",)),
    Link("linear2.", ("feed_forward.down_proj.",)),
    Link("norm1.", ("self_norm.",)),
)
_ENCODER_LAYER = (*_LAYER, Link("norm2.", ("feed_forward_norm.",)))
_DECODER_LAYER = (
    *_LAYER,
    Link("multihead_attn.in_proj_", ("cross_attn.q_proj.", "cross_attn.k_proj.", "cross_attn.v_proj.")),
    Link("multihead_attn.out_proj.", ("cross_attn.out_proj.",)),
    Link("norm2.", ("cross_norm.",)),
    Link("norm3.", ("feed_forward_norm.",)),
)

_ENCODERS = (nn.TransformerEncoder, TransformerEncoder)
_DECODERS = (nn.TransformerDecoder, TransformerDecoder)
_LAYER_CLASSES = {
    **dict.fromkeys(_ENCODERS, (nn.TransformerEncoderLayer, TransformerEncoderLayer)),
    **dict.fromkeys(_DECODERS, (nn.TransformerDecoderLayer, TransformerDecoderLayer)),
}
_PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "self_attn": (nn.MultiheadAttention, MultiheadAttention),
    "multihead_attn": (nn.MultiheadAttention, MultiheadAttention),
    **dict.fromkeys(("linear1", "linear2"), (nn.Linear,)),
    **dict.fromkeys(("norm1", "norm2", "norm3"), (nn.LayerNorm,)),
    **dict.fromkeys(("dropout", "dropout1", "dropout2", "dropout3"), (nn.Dropout,)),
}
_ACTIVATIONS = {"relu": (F.relu, nn.ReLU), "gelu": (F.gelu, nn.GELU), "silu": (F.silu, nn.SiLU)}


@overload
def from_torch(module: nn.TransformerEncoder) -> Encoder: ...
@overload
def from_torch(module: nn.TransformerDecoder) -> Decoder: ...
@overload
def from_torch(module: nn.Transformer) -> tuple[Encoder, Decoder]: ...
def from_torch(module: nn.Module) -> Encoder | Decoder | tuple[Encoder, Decoder]:
    """A stack with the configuration of a torch.nn stack and copies of its weights; a Transformer gives both stacks.

    The outputs equal torch.nn's. The interface differs: input is batch first, and a decoder is always causal. In
    training, torch.nn applies dropout inside the feed-forward network, and fastattn to the input of the first layer.
    The other places and the probability are the same.

    Args:
        module: `torch.nn.TransformerEncoder`, `TransformerDecoder` or `Transformer`, or the class of that name in
            `fastattn.nn`.

    Returns:
        The stack, with the dtype, device and mode of `module`.

    Raises:
        TypeError: `module` or a module inside it has another class; even a subclass may compute something else.
        ValueError: `TransformerConfig` cannot express a setting; the text gives its name in `module`.
    """
    _check_class(module, (nn.Transformer, Transformer, *_ENCODERS, *_DECODERS), "module")
    if isinstance(module, nn.Transformer):
        return from_torch(module.encoder), from_torch(module.decoder)
    config = _config(module)
    stack = build(
        lambda: Encoder(config) if type(module) in _ENCODERS else Decoder(config, cross=True), _links,
        module.state_dict(),
    )  # fmt: skip
    return stack.train(module.training)


def torch_state_dict(model: Encoder | Decoder | EncoderDecoder) -> dict[str, Tensor]:
    """Copies of the weights under torch.nn's names, for `load_state_dict` of a module of the same sizes.

    Args:
        model: an `Encoder`, or a `Decoder` without cross-attention, for `torch.nn.TransformerEncoder`; a `Decoder` with
            cross-attention for `torch.nn.TransformerDecoder`; an `EncoderDecoder` for `torch.nn.Transformer`. torch.nn
            has no embeddings, positions and head, so the result leaves them out.

    Raises:
        ValueError: the model has something that torch.nn's layers lack; the text names it.
    """
    return to_theirs(_links(model), model)


def load_torch_state_dict(model: Encoder | Decoder | EncoderDecoder, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of a torch.nn module into `model`: the inverse of `torch_state_dict`.

    `model` keeps its dtype and device. Embeddings, positions and head, which torch.nn lacks, stay as they are.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, or `model` has something that torch.nn's layers
            lack. The text names all of them, and `model` is unchanged.
    """
    links = _links(model)
    model.load_state_dict(model.state_dict() | from_theirs(links, state_dict, model))


def _links(model: nn.Module) -> list[Link]:
    if isinstance(model, EncoderDecoder):
        stacks = {"encoder.": model.encoder, "decoder.": model.decoder}
        return [link.below(prefix, prefix) for prefix, stack in stacks.items() for link in _links(stack)]
    if not isinstance(model, (Encoder, Decoder)):
        raise TypeError(f"model: expected Encoder, Decoder or EncoderDecoder, got {type(model).__qualname__}")
    _check_in_torch(model.config)
    layer = _DECODER_LAYER if isinstance(model, Decoder) and model.cross else _ENCODER_LAYER
    links = [link.below(f"layers.{i}.", f"blocks.{i}.") for i in range(model.config.num_layers) for link in layer]
    return [*links, Link("norm.", ("norm.",))]


def _check_in_torch(config: TransformerConfig) -> None:
    """Refuse settings that torch.nn's layers lack; names and shapes alone do not always show them."""
    if config.gated:
        raise ValueError(f"activation: expected one without a gate for torch.nn, got {config.activation!r}")
    if not isinstance(config.position, (Learned, Sinusoidal, type(None))):
        kind = type(config.position).__name__
        raise ValueError(f"position: expected Learned, Sinusoidal or None for torch.nn, got {kind}")
    wanted = {
        "norm": (config.norm, "layer"),
        "num_kv_heads": (config.kv_heads, config.num_heads),
        "head_dim": (config.dim_per_head * config.num_heads, config.d_model),
        "qk_norm": (config.qk_norm, False),
        "window": (config.window, None),
        "softcap": (config.softcap, None),
        "sinks": (config.sinks, False),
    }
    for name, (value, expected) in wanted.items():
        if value != expected:
            times = " * num_heads" if name == "head_dim" else ""
            raise ValueError(f"{name}{times}: expected {expected!r} for torch.nn, got {value!r}")


def _config(stack: Any) -> TransformerConfig:
    """The configuration of a torch.nn stack, whose layers must be alike."""
    if not len(stack.layers):
        raise ValueError("layers: expected at least one, got none")
    first, *others = (
        _read_layer(layer, _LAYER_CLASSES[type(stack)], f"layers.{i}") for i, layer in enumerate(stack.layers)
    )
    for i, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first[name]:
                raise ValueError(f"layers.{i}: expected {name} == {first[name]!r} as in layers.0, got {value!r}")
    if stack.norm is not None:
        _check_class(stack.norm, (nn.LayerNorm,), "norm")
        if stack.norm.eps != first["norm_eps"]:
            raise ValueError(f"norm.eps: expected {first['norm_eps']} as in the layers, got {stack.norm.eps}")
    return TransformerConfig(
        num_layers=len(stack.layers), norm="layer", final_norm=stack.norm is not None, position=None, **first
    )


def _read_layer(layer: Any, classes: tuple[type[nn.Module], ...], where: str) -> dict[str, Any]:
    """The arguments of `TransformerConfig` that a layer decides; ValueError if it has settings beyond them."""
    _check_class(layer, classes, where)
    parts = {name: part for name, part in layer.named_children() if name in _PARTS}
    for name, part in parts.items():
        _check_class(part, _PARTS[name], f"{where}.{name}")
    attentions = {f"{where}.{name}": part for name, part in parts.items() if name.endswith("attn")}
    for name, attention in attentions.items():
        for what, extra in (
            ("kdim == vdim == embed_dim", attention.in_proj_weight is None),
            ("add_bias_kv == False", attention.bias_k is not None),
            ("add_zero_attn == False", attention.add_zero_attn),
        ):
            if extra:
                raise ValueError(f"{name}: expected {what}, which is all that fastattn.nn.Attention has")
    probabilities = {f"{where}.{name}": part.p for name, part in parts.items() if name.startswith("dropout")}
    probabilities |= {name: attention.dropout for name, attention in attentions.items()}
    epsilons = {f"{where}.{name}": part.eps for name, part in parts.items() if name.startswith("norm")}
    return {
        "d_model": layer.linear1.in_features,
        "num_heads": _one_value("num_heads", {name: part.num_heads for name, part in attentions.items()}),
        "dim_feedforward": layer.linear1.out_features,
        "activation": _activation(layer.activation, f"{where}.activation"),
        "norm_first": layer.norm_first,
        "norm_eps": _one_value("eps", epsilons),
        "bias": layer.linear1.bias is not None,
        "dropout": _one_value("dropout", probabilities),
    }


def _activation(given: Any, where: str) -> str:
    if type(given) is nn.GELU and given.approximate == "tanh":
        return "gelu_tanh"
    for name, known in _ACTIVATIONS.items():
        if given is known[0] or type(given) is known[1]:
            return name
    raise ValueError(
        f"{where}: expected relu, gelu or silu of torch.nn.functional or their modules, got "
        f"{getattr(given, '__qualname__', None) or type(given).__qualname__}"
    )


def _one_value(what: str, values: dict[str, Any]) -> Any:
    (first_name, first), *others = values.items()
    for name, value in others:
        if value != first:
            raise ValueError(f"{name}: expected {what} == {first} as in {first_name}, got {value}")
    return first


def _check_class(module: nn.Module, classes: tuple[type[nn.Module], ...], where: str) -> None:
    """Accept torch.nn's and fastattn's own classes only: others may compute something else than our models."""
    if type(module) not in classes:
        names = " or ".join(dict.fromkeys(cls.__name__ for cls in classes))
        raise TypeError(f"{where}: expected {names}, not a subclass, got {type(module).__qualname__}")
    if "forward" in vars(module):
        raise TypeError(f"{where}: expected the forward of its class, got another one on the instance")

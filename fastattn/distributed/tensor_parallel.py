"""Divide a model's heads and hidden units among ranks with PyTorch's own `parallelize_module`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from fastattn.functional.dropout import dropout
from fastattn.nn import Attention, Block, Decoder, Encoder, FeedForward, MultiheadAttention

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_STACKS = (Encoder, Decoder, nn.TransformerEncoder, nn.TransformerDecoder)


def tensor_parallel_plan(
    model: nn.Module, ranks: int, *, vocabulary: bool = False, sequence: bool = False
) -> dict[str, ParallelStyle]:
    """The plan with which `torch.distributed.tensor.parallel.parallelize_module` divides a model of `fastattn.nn`.

    Each rank has some of the heads and some of the hidden units, and a KV cache of its heads. The input and the output
    of every layer are whole on every rank, as are embeddings and norms. For training and `fastattn.generate`::

        parallelize_module(model, mesh["tp"], tensor_parallel_plan(model, mesh["tp"].size()))

    The plan divides the drop-ins for torch.nn in the same way. A packed projection becomes three: ``q_proj_weight``,
    ``k_proj_weight`` and ``v_proj_weight``, torch.nn's names for projections of different sizes. Load a checkpoint with
    packed projections first.

    Dropout is the same as on one process if the generators of all ranks are in the same state.

    Args:
        model: a `fastattn.nn.CausalLM`, `EncoderDecoder`, `Encoder`, `Decoder`, `Block`, `MultiheadAttention` or
            ``Transformer...``, or a module that holds one.
        ranks: of the mesh dimension.
        vocabulary: divide the output layer too, `model.head`. Logits are then a DTensor that is divided along the
            vocabulary, and no rank ever holds all of them. Compute loss and backward pass inside
            `torch.distributed.tensor.parallel.loss_parallel()`. For training only.
        sequence: also divide the sequence between attention and feed-forward. Norms, residual sums and dropout, and the
            tensors that the backward pass keeps of them, then cover this rank's elements only. Ranks gather elements
            before attention and before feed-forward and scatter sums after them; the number of bytes sent stays the
            same. The drop-ins' ``step`` then raises.

    Returns:
        Name of each layer -> its style.

    Raises:
        TypeError: ``vocabulary`` without a linear ``head``, or torch.nn layers that `fastattn.convert` has not swapped.
        ValueError: the model has nothing to divide; heads, hidden units or the vocabulary are not multiples of
            ``ranks``; the output layer is tied to an embedding, which is whole.

    Source: Shoeybi et al., Megatron-LM, 2019 (arXiv:1909.08053); ``sequence``: Korthikanti et al., 2022
    (arXiv:2205.05198).
    """
    divided = _Plan(model, ranks, sequence)
    for name, module in model.named_modules():
        divided.add(name, module)
    plan = divided.styles
    if not plan:
        raise ValueError(
            "model: expected one with fastattn.nn.Attention, FeedForward or MultiheadAttention, got "
            f"{type(model).__name__}"
        )
    if sequence:
        for first, last in _stacks(model):
            divided.shard_between(first, last)
    if vocabulary:
        _check_head(model, ranks)
        plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return plan


class _Plan:
    """A plan under construction."""

    def __init__(self, model: nn.Module, ranks: int, sequence: bool) -> None:
        self.styles: dict[str, ParallelStyle] = {}
        self._model, self._ranks, self._sequence = model, ranks, sequence
        self._on_shards: dict[nn.Module, int] = {}  # parts of layers -> dimension of the sequence

    def add(self, name: str, module: nn.Module) -> None:
        """Add a module to the plan; a layer comes before its parts."""
        prefix = f"{name}." if name else ""
        if isinstance(module, Attention):
            self._divides(f"{prefix}num_heads", module.num_heads)
            self._divides(f"{prefix}num_kv_heads", module.num_kv_heads)
            self.styles[name] = _Heads()
            self._project(prefix, module, ("q_proj", "k_proj", "v_proj"), "out_proj")
        elif isinstance(module, FeedForward):
            self._divides(f"{prefix}up_proj.out_features", module.up_proj.out_features)
            self.styles[name] = _Gathered()
            columns = ("up_proj",) if module.gate_proj is None else ("gate_proj", "up_proj")
            self._project(prefix, module, columns, "down_proj")
        elif isinstance(module, nn.MultiheadAttention):
            if not isinstance(module, MultiheadAttention):
                raise TypeError(
                    f"{name or 'model'}: expected a fastattn.nn.MultiheadAttention, got torch.nn's; fastattn.convert "
                    "swaps it"
                )
            self._divides(f"{prefix}num_heads", module.num_heads)
            self.styles[name] = _PackedHeads(on_shards=module in self._on_shards)
            self._project(prefix, module, (), "out_proj")
        elif isinstance(module, _LAYERS):
            self._divides(f"{prefix}linear1.out_features", module.linear1.out_features)
            dim = self._layer(prefix, module, ("norm1", "norm2", "norm3"), ("dropout1", "dropout2", "dropout3"))
            self.styles[f"{prefix}dropout"] = _Dropout()
            self._project(prefix, module, (), "linear2")
            self.styles[f"{prefix}linear1"] = ColwiseParallel(input_layouts=None if dim is None else Shard(dim))
        elif isinstance(module, Block):
            self._layer(prefix, module, ("self_norm", "cross_norm", "feed_forward_norm"), ("dropout",))

    def _layer(self, prefix: str, module: nn.Module, norms: tuple[str, ...], dropouts: tuple[str, ...]) -> int | None:
        """Divide the sequence between the parts of a layer; return the dimension along which."""
        if not self._sequence:
            return None
        dim = _sequence_dim(module)
        self._on_shards |= dict.fromkeys((module, *module.children()), dim)
        for names, style in ((norms, _OnShards), (dropouts, _Dropout)):
            for part in names:
                if getattr(module, part, None) is not None:
                    self.styles[prefix + part] = style()
        return dim

    def _project(self, prefix: str, module: nn.Module, columns: tuple[str, ...], row: str) -> None:
        self.styles |= {prefix + column: ColwiseParallel() for column in columns}
        dim = self._on_shards.get(module)
        self.styles[prefix + row] = (
            RowwiseParallel() if dim is None else RowwiseParallel(output_layouts=Shard(dim), use_local_output=False)
        )

    def shard_between(self, first: str, last: str) -> None:
        """Divide the sequence between the two; it is whole before the first and after the last."""
        dim = _sequence_dim(self._model.get_submodule(first))
        self.styles[first] = _OnShards(enters=dim, leaves=first == last)
        if first != last:
            self.styles[last] = _OnShards(leaves=True)

    def _divides(self, name: str, count: int) -> None:
        _divides(name, count, self._ranks)


def _stacks(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(first, last) module of each stack of layers; a layer outside any stack counts as both."""
    seen: set[nn.Module] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, _STACKS):
            layers = "blocks" if isinstance(module, (Encoder, Decoder)) else "layers"
            count = len(module.get_submodule(layers))  # pyright: ignore[reportArgumentType]
            seen.update(module.modules())
            if count:
                last = f"{prefix}{layers}.{count - 1}" if module.norm is None else f"{prefix}norm"
                yield f"{prefix}{layers}.0", last
        elif isinstance(module, (Block, *_LAYERS)) and module not in seen:
            yield name, name


def _sequence_dim(layer: nn.Module) -> int:
    """The dimension of sequence elements in a layer's input, with and without a batch."""
    attention = getattr(layer, "self_attn", None)
    return 0 if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first else -2


def _divides(name: str, count: int, ranks: int) -> None:
    if count % ranks:
        raise ValueError(f"{name}: expected a multiple of {ranks} ranks, got {count}")


def _check_head(model: nn.Module, ranks: int) -> None:
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"model.head: expected a torch.nn.Linear with vocabulary=True, got {type(head).__name__}")
    _divides("head.out_features", head.out_features, ranks)
    if any(isinstance(part, nn.Embedding) and part.weight is head.weight for part in model.modules()):
        raise ValueError("model.head.weight: expected one that is not tied to an embedding with vocabulary=True")


class _Style(ParallelStyle):
    """The common part of the styles below."""

    def _place(self, module: nn.Module, name: str, parameter: Tensor | None, mesh: DeviceMesh, at: Placement) -> None:
        """Replace a module's parameter by one that is divided, or the same on every rank."""
        if parameter is None:
            return
        with torch.no_grad():
            placed = distribute_tensor(parameter, mesh, [at], src_data_rank=self.src_data_rank)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _gathered(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """The whole of x. Every rank adds a part of its gradient, which this sums once, not once per projection of x."""
    if isinstance(x, DTensor):
        return x.redistribute(mesh, [Replicate()])
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False)


class _Gathered(_Style):
    """A module whose projections take the whole of its inputs ``x`` and ``memory``."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
            if options.get("memory") is not None:
                options = {**options, "memory": _gathered(options["memory"], device_mesh)}
            return tuple(_gathered(x, device_mesh) if isinstance(x, Tensor) else x for x in args), options

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class _Heads(_Gathered):
    """Divide the heads of an `Attention` with their sinks and slopes; all heads share the norms."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Attention)
        ranks = device_mesh.size()
        module.num_heads //= ranks
        module.num_kv_heads //= ranks
        module.first_head = device_mesh.get_local_rank() * module.num_heads
        for name in ("sinks", "alibi_slopes"):
            self._place(module, name, getattr(module, name), device_mesh, Shard(0))
        for norm in (module.q_norm, module.k_norm):
            if norm is not None:
                self._place(norm, "weight", norm.weight, device_mesh, Replicate())
        return super()._apply(module, device_mesh)


class _PackedHeads(_Style):
    """Divide the heads of a `MultiheadAttention`. Its packed projection has all queries, then all keys, then all
    values."""

    def __init__(self, *, on_shards: bool) -> None:
        super().__init__()
        self._on_shards = on_shards

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, MultiheadAttention)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = tuple(getattr(module, name) for name in names)
        if (packed := module.in_proj_weight) is not None:
            weights = tuple(nn.Parameter(x, packed.requires_grad) for x in packed.detach().chunk(3))
            module.register_parameter("in_proj_weight", None)
            module._qkv_same_embed_dim = False
        for name, weight in zip(names, weights, strict=True):
            self._place(module, name, weight, device_mesh, Shard(0))
        self._place(module, "in_proj_bias", module.in_proj_bias, device_mesh, Replicate())
        for name in ("bias_k", "bias_v"):
            self._place(module, name, getattr(module, name), device_mesh, Shard(2))
        count = module.num_heads // device_mesh.size()
        first = device_mesh.get_local_rank() * count
        module.own_heads = slice(first, first + count)
        module.on_shards = self._on_shards

        def enter(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
            found: dict[int, Tensor] = {}  # the layer tests which of its inputs are the same

            def own(x: Any) -> Any:
                if (
                    not isinstance(x, Tensor)
                    or not x.is_floating_point()
                    or (type(x) is Tensor and not x.requires_grad)
                ):
                    return x
                if x.is_nested:
                    raise TypeError("MultiheadAttention: expected dense tensors under a plan, got a nested tensor")
                if id(x) not in found:
                    found[id(x)] = _gathered(x, device_mesh).to_local(grad_placements=[Partial()])
                return found[id(x)]

            return tuple(own(x) for x in args), {name: own(x) for name, x in options.items()}

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class _OnShards(_Style):
    """A module between attention and feed-forward, whose input is divided along the sequence.

    Args:
        enters: the dimension along which this module divides its input; None: the input is already divided.
        leaves: whether its output is whole again.
    """

    def __init__(self, *, enters: int | None = None, leaves: bool = False) -> None:
        super().__init__()
        self._enters, self._leaves = enters, leaves

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            self._place(module, name, parameter, device_mesh, Replicate())
        if (dim := self._enters) is not None:

            def enter(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
                def divided(x: Tensor) -> Tensor:
                    return _gathered(x, device_mesh).redistribute(device_mesh, [Shard(dim % x.ndim)])

                if args:
                    first, *others = args
                    return (divided(first), *others), options
                name = next(iter(options))
                return args, {**options, name: divided(options[name])}

            module.register_forward_pre_hook(enter, with_kwargs=True)
        if self._leaves:

            def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                return _gathered(out, device_mesh).to_local()

            module.register_forward_hook(leave)
        return module


class _Dropout(_Style):
    """Dropout of a tensor that is divided by units or along the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is nn.Dropout:
            module.__class__ = _DividedDropout
            assert isinstance(module, _DividedDropout)
            module.mesh = device_mesh
        return module


class _DividedDropout(nn.Dropout):
    """Drop the same elements of this rank's part as `torch.nn.Dropout` drops in the whole, by drawing for the whole.

    The part is a DTensor, or a slice of the last dimension.
    """

    mesh: DeviceMesh

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        if isinstance(input, DTensor):
            keep = DTensor.from_local(self._drawn(input, input.shape), self.mesh, [Replicate()])
            return input * keep.redistribute(self.mesh, input.placements)
        ranks = self.mesh.size()
        keep = self._drawn(input, (*input.shape[:-1], ranks * input.shape[-1]))
        return input * keep.chunk(ranks, -1)[self.mesh.get_local_rank()]

    def _drawn(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return dropout(torch.ones(shape, dtype=like.dtype, device=like.device), self.p)

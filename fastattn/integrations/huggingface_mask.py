"""Masks of transformers as descriptions instead of matrices, so that attention skips forbidden tiles."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_map

from fastattn.block_mask import BLOCK, BlockMask
from fastattn.functional import divided

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch entry, head, query, key), each an index tensor -> a bool tensor of their broadcast shape."""

_aten = torch.ops.aten
_ADDITIONS = (_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor)


class PatternMask(Tensor):
    """A mask, bool (B, 1, Lq, Lk), that stores none of its elements; True takes part.

    For layers that pass it on unchanged, `operands` gives equivalent arguments of `fastattn.attention`, made once for
    all layers. Any operation on it uses the dense mask, so code may slice, join or combine it like any other.
    """

    _predicate: Predicate
    _plain: dict[str, Any] | None
    _made: dict[Any, Any]

    @staticmethod
    def __new__(
        cls: "type[PatternMask]",
        shape: tuple[int, int, int, int],
        device: torch.device,
        predicate: Predicate,
        plain: dict[str, Any] | None,
    ) -> "PatternMask":
        """``plain``: the arguments of `fastattn.attention` that express the whole mask, if any do."""
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._predicate, mask._plain, mask._made = predicate, plain, {}
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (_aten.alias.default, _aten.detach.default):
            return args[0]._same()
        if func is _aten.slice.Tensor and _is_whole(*args):
            return args[0]._same()
        if func in _ADDITIONS and any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
            raise ValueError(  # not a TypeError: in `+` Python replaces it by its own
                "attention_mask: expected a layer that calls transformers' attention interface, got one that adds "
                "the boolean mask to its own scores; use attn_implementation='eager' for this model"
            )

        def dense(x: Any) -> Any:
            if not isinstance(x, PatternMask):
                return x
            with enable_reentrant_dispatch():  # vmap, which a predicate may use, does not work in a dispatch
                return x.dense()

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PatternMask(shape={tuple(self.shape)}, device={self.device})"

    def _same(self) -> "PatternMask":
        """Another tensor for the same mask, which shares all results made for it."""
        shape: Any = tuple(self.shape)
        twin = PatternMask(shape, self.device, self._predicate, self._plain)
        twin._made = self._made
        return twin

    def _make(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""

        def make() -> Tensor:
            indices = [
                torch.arange(n, device=self.device).view([-1 if d == dim else 1 for d in range(4)])
                for dim, n in enumerate(self.shape)
            ]
            return self._predicate(*indices).expand(self.shape).contiguous()

        return self._make("dense", make)

    def operands(self) -> dict[str, Any]:
        """The arguments of `fastattn.attention` that express the mask."""
        if self._plain is not None and not ("kv_start" in self._plain and divided.current()):
            return self._plain
        divided.refuse("attention_mask", "padding, or another pattern than causal order and a window")
        if self.shape[2] <= BLOCK:  # one row of tiles: a block mask would save nothing
            return {"mask": self.dense()}
        shape: Any = tuple(self.shape)
        return {
            "block_mask": self._make("block", lambda: BlockMask.from_predicate(self._predicate, shape, self.device))
        }

    def within(self, query_ends: Tensor, key_ends: Tensor) -> "PatternMask":
        """The mask that also forbids pairs across packed sequences, which end there. The same tensors again give the
        same mask."""

        def make() -> tuple["PatternMask", tuple[Tensor, Tensor]]:
            rows, columns = (
                documents_of(ends, self.shape[dim], self.device) for dim, ends in ((2, query_ends), (3, key_ends))
            )

            def both(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return self._predicate(b, h, i, j) & (rows[i] == columns[j])

            shape: Any = tuple(self.shape)
            return PatternMask(shape, self.device, both, None), (query_ends, key_ends)

        # what is made keeps the tensors alive, so no other tensor can get their ids
        return self._make(("within", id(query_ends), id(key_ends)), make)[0]


def documents_of(ends: Tensor, length: int, device: torch.device) -> Tensor:
    """(length,): the number of the packed sequence of each place; ``ends`` (sequences + 1,) begins with 0."""
    return torch.searchsorted(ends.to(device, torch.int64), torch.arange(length, device=device), right=True)


def _is_whole(mask: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return not start and step == 1 and (end is None or end >= mask.shape[dim])


def pattern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Predicate,
    padding: Tensor | None,
    device: torch.device | str,
) -> PatternMask:
    """The mask for transformers' arguments.

    Args:
        batch_size, q_length, kv_length: B, Lq, Lk.
        q_offset, kv_offset: absolute positions of query 0 and of key 0.
        mask_function: transformers' pattern, of absolute positions.
        padding: bool (B, seen), True where there is a token. Keys after its end are forbidden.
        device: of the mask.
    """
    if padding is not None:
        from transformers.masking_utils import prepare_padding_mask

        padding = prepare_padding_mask(padding, kv_length, kv_offset)
        assert padding is not None
        if bool(padding[:, kv_offset : kv_offset + kv_length].all()):
            padding = None

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = mask_function(b, h, i + q_offset, j + kv_offset)
        return allowed if padding is None else allowed & padding[b, j + kv_offset]

    plain = _plain(mask_function)
    if plain is not None:
        plain["q_offset"] = q_offset - kv_offset
        if padding is not None:
            starts = _left_padding(padding[:, kv_offset : min(kv_offset + kv_length, q_offset + q_length)])
            plain = None if starts is None else plain | {"kv_start": starts}
    shape = (batch_size, 1, q_length, kv_length)
    return PatternMask(shape, torch.device(device), predicate, plain)


def of_tensors(mask_function: Callable[..., Any]) -> Predicate:
    """The predicate that asks a function of single indices, by `torch.vmap`, as transformers does."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    over_all: Any = mask_function
    for dim in (3, 2, 1, 0):
        over_all = torch.vmap(over_all, tuple(0 if place == dim else None for place in range(4)))

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        with TransformGetItemToIndex():  # a tensor may be indexed by a single index, which vmap alone refuses
            return over_all(*(index.flatten() for index in (b, h, i, j)))

    return predicate


def _left_padding(tokens: Tensor) -> Tensor | None:
    """The start of each row's tokens in a bool (B, L), if padding stands only before them; else None."""
    starts = tokens.shape[1] - tokens.sum(1)
    whole = torch.equal(tokens, torch.arange(tokens.shape[1], device=tokens.device) >= starts[:, None])
    return starts if whole else None


def without_packing(mask_function: Predicate) -> Predicate:
    """Remove the pattern that transformers derives from jumps in ``position_ids``: where shards meet, they are no
    packing."""
    from transformers import masking_utils as own

    parts = _enclosed(mask_function, own.and_masks()).get("mask_functions", ())
    if len(parts) != 2:
        return mask_function
    remap: Any = own.remap_positions_for_packed_sequence
    return _enclosed(parts[1], remap(None, None)).get("mask_function", mask_function)


def _plain(mask_function: Predicate) -> dict[str, Any] | None:
    """``causal`` and ``window`` for transformers' own causal patterns; None for any other."""
    from transformers import masking_utils as own

    if mask_function is own.causal_mask_function:
        return {"causal": True}
    parts = _enclosed(mask_function, own.and_masks()).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is own.causal_mask_function:
        size = _enclosed(parts[0], own.sliding_window_overlay(1)).get("sliding_window")
        if isinstance(size, int):
            return {"causal": True, "window": (size - 1, 0)}
    return None


def _enclosed(function: Any, like: Any) -> dict[str, Any]:
    """The variables that ``function`` captures, if it comes from the same ``def`` as ``like``."""
    code = getattr(function, "__code__", None)
    if code is None or code is not like.__code__:
        return {}
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def hands_masks_on(config: Any) -> bool:
    """Whether the models of this configuration declare that their attention takes a mask function's masks unchanged.

    Among those that do not, some add the mask to their scores themselves.
    """
    kind = type(config)
    if kind not in _declared:
        _declared[kind] = _hands_masks_on(kind)
    return _declared[kind]


_declared: dict[type, bool] = {}  # no functools.cache: torch.compile looks through it


def _hands_masks_on(kind: type) -> bool:
    from transformers import PreTrainedModel

    name = kind.__module__.replace(".configuration_", ".modeling_")
    module = sys.modules.get(name)
    if module is None:
        try:
            module = importlib.import_module(name)
        except ImportError:
            return False  # a configuration from elsewhere declares nothing
    models = [
        x
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, PreTrainedModel) and x.__module__ == name
    ]
    models = [x for x in models if x.config_class is kind] or models
    return bool(models) and all(x._supports_sdpa or x._supports_flex_attn for x in models)

"""Every argument of every public function, given what it cannot be: an error that names it, and what was expected."""

import inspect
import re

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import fastattn

NAN, INF = float("nan"), float("inf")
B, HQ, HK, LQ, LK, D = 2, 4, 2, 6, 10, 8


def normal(*shape):
    return torch.randn(*shape)


def q_k_v():
    return {"q": normal(B, HQ, LQ, D), "k": normal(B, HK, LK, D), "v": normal(B, HK, LK, D)}


def packed():
    return {"q": normal(LQ, HQ, D), "k": normal(LK, HK, D), "v": normal(LK, HK, D)}


STARTS = torch.tensor([0, 4, 6], dtype=torch.int32)
# A call that works, per function; the table below changes one argument of it.
CALLS = {
    "attention": q_k_v,
    "explain": q_k_v,
    "scaled_dot_product_attention": lambda: {
        "query": normal(B, HQ, LQ, D), "key": normal(B, HQ, LK, D), "value": normal(B, HQ, LK, D),
    },
    "attention_varlen": lambda: {
        **packed(), "cu_seqlens_q": STARTS, "cu_seqlens_k": torch.tensor([0, 9, 10], dtype=torch.int32),
    },
    "attention_with_kvcache": lambda: {
        "q": normal(B, HQ, 1, D), "k_cache": normal(B, 32, HK, D), "v_cache": normal(B, 32, HK, D),
        "k": normal(B, HK, 1, D), "v": normal(B, HK, 1, D), "cache_lens": torch.tensor([3, 0]),
    },
    "merge": lambda: {
        "out1": normal(B, HQ, LQ, D), "lse1": normal(B, HQ, LQ),
        "out2": normal(B, HQ, LQ, D), "lse2": normal(B, HQ, LQ),
    },
    "convert": lambda: {"model": torch.nn.Linear(2, 2)},
    "revert": lambda: {"model": torch.nn.Linear(2, 2)},
    "BlockMask.from_mask": lambda: {"mask": torch.ones(LQ, LK, dtype=torch.bool)[None, None]},
    "BlockMask.from_documents": lambda: {"documents": torch.arange(LQ) // 2},
    "BlockMask.from_flex": lambda: {
        "block_mask": create_block_mask(lambda b, h, i, j: j <= i, None, None, LQ, LK, "cpu")
    },
    "BlockMask.from_predicate": lambda: {"predicate": lambda b, h, i, j: j <= i, "shape": (1, 1, LQ, LK)},
}  # fmt: skip

BOOLEAN = torch.ones(LQ, LK, dtype=torch.bool)
# What `attention` and its relatives share.
FLAG = [1, "yes", None]
NUMBER = ["1", normal(1)]
KV_START = [3, [0, 0], torch.zeros(B), torch.zeros(B + 1, dtype=torch.int64), torch.full((B,), 99)]
WINDOW = [3, (1,), (1, 2, 3), ("a", None), (1.5, None), (True, None)]
SOFTCAP = [*NUMBER, 0.0, -1.0, NAN, INF, True]
HEADS = [normal(HQ + 1), normal(B + 1, HQ), torch.ones(HQ, dtype=torch.int32), torch.randn(HQ, device="meta"), 0.5]
PROBABILITY = ["0.1", -0.1, 1.1, NAN]
BACKEND = ["cudnn", 3]
SHARED = {
    "causal": FLAG,
    "q_offset": [1.5, "end", torch.zeros(B), torch.zeros(B + 1, dtype=torch.int64), True],
    "window": WINDOW,
    "kv_start": KV_START,
    "alibi_slopes": HEADS,
    "softcap": SOFTCAP,
    "sinks": HEADS,
    "scale": NUMBER,
    "dropout_p": PROBABILITY,
    "return_lse": FLAG,
    "backend": BACKEND,
}


def tensors(shape, *others):
    """What no query, key or value of `shape` may be."""
    wrong_dtype = torch.ones(shape, dtype=torch.int32)
    return [None, [[1.0]], normal(*shape)[0], wrong_dtype, normal(*shape).to_sparse(), *others]


DENSE = {
    "q": tensors((B, HQ, LQ, D), normal(B, HQ + 1, LQ, D), normal(B, HQ, LQ, 0)),
    "k": tensors((B, HK, LK, D), normal(B + 1, HK, LK, D), normal(B, HK, LK, D + 1), normal(B, HK, LK, D).double()),
    "v": tensors((B, HK, LK, D), normal(B, HK, LK + 1, D), normal(B, HK + 1, LK, D), normal(B, HK, LK, D).to("meta")),
    **SHARED,
    "mask": [BOOLEAN.float(), BOOLEAN[:-1], BOOLEAN[None, None, None], "causal", BOOLEAN.to("meta")],
    "block_mask": [BOOLEAN, fastattn.BlockMask.from_mask(BOOLEAN[None, None, 1:])],
    "bias": [BOOLEAN, normal(LQ + 1, LK), normal(1, 1, 1, LQ, LK), 1.0, normal(LQ, LK).to("meta")],
}
WRONG = {
    "attention": DENSE,
    "explain": DENSE,
    "scaled_dot_product_attention": {
        "query": [None, [[1.0]], normal(D), normal(B, HQ, LQ, D).int(), normal(B, HQ, LQ, D).to_sparse()],
        "key": [None, normal(D), normal(B, HQ, LK, D + 1), normal(B, HQ, LK, D).half()],
        "value": [None, normal(D), normal(B, HQ, LK + 1, D), normal(B, HQ, LK, D).half()],
        "attn_mask": [BOOLEAN.int(), BOOLEAN[:-1], "causal"],
        "dropout_p": PROBABILITY,
        "is_causal": FLAG,
        "scale": NUMBER,
        "enable_gqa": FLAG,
    },
    "attention_varlen": {
        "q": tensors((LQ, HQ, D), normal(LQ, HQ + 1, D)),
        "k": tensors((LK, HK, D), normal(LK, HK, D + 1)),
        "v": tensors((LK, HK, D), normal(LK + 1, HK, D)),
        "cu_seqlens_q": [None, [0, 4, 6], STARTS.float(), STARTS[None], STARTS[:0], STARTS.to("meta")],
        "cu_seqlens_k": [[0, 9, 10], STARTS.float(), STARTS[:-1], STARTS.to("meta")],
        "seqused_k": [[9, 1], STARTS[:2].float(), STARTS, STARTS[:2].to("meta"), torch.tensor([10, 1]),
                      torch.tensor([9, -1])],
        "max_seqlen_q": ["6"],
        "max_seqlen_k": ["6"],
        **SHARED,
    },
    "attention_with_kvcache": {
        "q": tensors((B, HQ, 1, D), normal(B, HQ, 0, D), normal(B, HQ + 1, 1, D)),
        "k_cache": tensors((B, 32, HK, D), normal(B + 1, 32, HK, D), normal(B, 32, HK, D).half()),
        "v_cache": tensors((B, 32, HK, D), normal(B, 31, HK, D)),
        "k": [[[1.0]], normal(B, HK, 1, D + 1), normal(B, HK + 1, 1, D), normal(B, HK, 1, D).half(), None],
        "v": [[[1.0]], normal(B, HK, 2, D), normal(B, HK, 1, D).half(), None],
        "cache_lens": [None, "3", 1.5, True, -1, 32, torch.zeros(B), torch.tensor([3]), torch.tensor([32, 0])],
        "block_table": [[[0]], torch.zeros(B, 2), torch.zeros(B + 1, 2, dtype=torch.int32),
                        torch.full((B, 2), 7, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)],
        "cu_seqlens_q": [[0, 1, 2], STARTS, STARTS.float()],
        "batch_invariant": FLAG,
        "causal": FLAG,
        "window": WINDOW,
        "kv_start": KV_START,
        "mask": [BOOLEAN[:1].float(), BOOLEAN[:2], BOOLEAN[None, None, None], "causal", BOOLEAN[:1].to("meta")],
        "bias": [BOOLEAN[:1], normal(LQ, LK), 1.0, normal(1, LK).to("meta"), BOOLEAN.float().to_sparse()],
        "mask_start": [3, torch.tensor([3, 4]), "3"],
        "softcap": SOFTCAP,
        "alibi_slopes": HEADS,
        "sinks": HEADS,
        "scale": NUMBER,
        "rotary_cos": [normal(32, D // 2), "cos"],
        "rotary_sin": [normal(32, D // 2), 0.5],
        "rotary_interleaved": FLAG,
        "k_scale": [1.0, torch.ones(()), torch.ones(HK)],
        "v_scale": [1.0, torch.ones(()), torch.ones(HK)],
        "return_lse": FLAG,
        "num_splits": ["2", 0, 1025, 1.5, True],
        "backend": BACKEND,
    },
    "merge": {
        "out1": [None, torch.ones(B, HQ, LQ, D, dtype=torch.int32)],
        "lse1": [None, normal(B, HQ, LQ + 1), torch.randn(B, HQ, LQ, device="meta")],
        "out2": [None, normal(B, HQ, LQ, D + 1), torch.randn(B, HQ, LQ, D, device="meta")],
        "lse2": [None, normal(B, HQ, LQ, 1), torch.ones(B, HQ, LQ, dtype=torch.int64)],
    },
    "convert": {"model": [None, torch.nn.Linear, "model"], "filter_fn": [True, "attn"]},
    "revert": {"model": [None, torch.nn.Linear]},
    "BlockMask.from_mask": {"mask": [None, BOOLEAN.float()[None, None], BOOLEAN[0], [[True]]]},
    "BlockMask.from_documents": {
        "documents": [None, torch.zeros(LQ), torch.zeros(1, 1, LQ, dtype=torch.int64), [0, 0]],
        "key_documents": [torch.zeros(LQ), torch.zeros(2, LQ, dtype=torch.int64), [0]],
        "causal": FLAG,
    },
    "BlockMask.from_flex": {"block_mask": [None, BOOLEAN, fastattn.BlockMask.from_mask(BOOLEAN)]},
    "BlockMask.from_predicate": {
        "predicate": [None, BOOLEAN, lambda b, h, i, j: 1, lambda b, h, i, j: i + j, lambda b, h, i, j: BOOLEAN[:-1]],
        "shape": [None, (LQ, LK), (1, 1, -1, LK), (1, 1, 1.5, LK)],
        "device": [3.5],
    },
}  # fmt: skip


def function_named(name):
    function = fastattn
    for part in name.split("."):
        function = getattr(function, part)
    return function


def described(value):
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device} {value.layout}"
    return "a function" if inspect.isfunction(value) else repr(value)[:30]


# Public functions whose errors have tables of their own, beside their tests, or that take no arguments.
ELSEWHERE = {"activate", "deactivate", "decompositions", "explain_varlen", "explain_with_kvcache", "generate", "stream"}


def test_every_public_function_and_argument_is_in_the_table():
    classes = {f"BlockMask.from_{name}" for name in ("mask", "documents", "flex", "predicate")}
    functions = {name for name in fastattn.__all__ if inspect.isfunction(getattr(fastattn, name))}
    assert functions - ELSEWHERE | classes == CALLS.keys() == WRONG.keys()
    for name in CALLS:
        parameters = inspect.signature(function_named(name)).parameters.values()
        assert {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} == WRONG[name].keys(), name


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_work(name):
    function_named(name)(**CALLS[name]())


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        pytest.param(name, argument, value, id=f"{name}-{argument}-{described(value)}")
        for name, arguments in WRONG.items()
        for argument, values in arguments.items()
        for value in values
    ],
)
def test_refused(name, argument, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        function_named(name)(**{**CALLS[name](), argument: value})
    message = str(caught.value)
    assert re.search(rf"\b{argument}\b", message), message
    assert re.search(r"expected|unknown|cannot serve", message) and "got" in message, message

"""torch.export of every public function and layer, one program for all batch sizes and lengths; and traces of calls."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn import attention, attention_varlen, attention_with_kvcache, scaled_dot_product_attention
from fastattn.testing import assert_parity
from tests.support.attention_cases import make_mask
from tests.support.modules import Call

ANY = Dim.DYNAMIC
LENGTHS = [(3, 7, 11), (2, 9, 20), (5, 6, 6), (2, 13, 4)]  # (B, Lq, Lk): the first is exported


def check(module, make, dynamic, strict=False):
    """The program exported for the first of `LENGTHS` computes what eager code does for all, to the bit."""
    program = export(module, make(*LENGTHS[0]), dynamic_shapes=dynamic, strict=strict).module()
    for sizes in LENGTHS:
        args = make(*sizes)
        results = []
        for run in (program, module):
            torch.manual_seed(0)
            inputs = torch.utils._pytree.tree_map(torch.clone, args)
            results.append(torch.utils._pytree.tree_leaves((run(*inputs), inputs)))  # a cache is written to
        for ours, expected in zip(*results, strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                assert torch.equal(ours, expected)


def qkv(batch, q_len, kv_len, kv_heads=2):
    return (torch.randn(batch, 4, q_len, 16), *torch.randn(2, batch, kv_heads, kv_len, 16))


QKV = ({0: ANY, 2: ANY}, {0: ANY, 2: ANY}, {0: ANY, 2: ANY})

# Which backend serves a call must not depend on the lengths, where the results are to be equal to the bit.
CALLS = {
    "plain": lambda q, k, v: attention(q, k, v),
    "causal, top-left": lambda q, k, v: attention(q, k, v, causal=True, q_offset=0),
    "causal, bottom-right": lambda q, k, v: attention(q, k, v, causal=True, backend="reference"),
    "window": lambda q, k, v: attention(q, k, v, window=(3, 2), backend="reference"),
    "wide window": lambda q, k, v: attention(q, k, v, window=(8, None), causal=True, backend="reference"),
    "dropout": lambda q, k, v: attention(q, k, v, dropout_p=0.3),
    "lse, softcap": lambda q, k, v: attention(q, k, v, softcap=3.0, return_lse=True),
    "slopes, sinks": lambda q, k, v: attention(q, k, v, alibi_slopes=torch.ones(4), sinks=torch.zeros(4)),
    "triton": lambda q, k, v: attention(q, k, v, causal=True, backend="triton"),
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "sdpa, causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "sdpa, other ranks": lambda q, k, v: scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),
}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("call", CALLS)
def test_attention(call, strict):
    check(Call(CALLS[call]), qkv, (QKV,), strict)


def test_a_backend_chosen_when_exported_serves_every_length():
    """What serves some lengths only is not built in: PyTorch's kernel, when the scores happen to be square or small."""

    def call(q, k, v, mask, backend=None):
        first = attention(q, k, v, causal=True, backend=backend)
        return first + attention(q, k, v, mask=mask[:, :1], bias=mask[:1].float(), backend=backend)

    def make(batch, q_len, kv_len):
        return *qkv(batch, q_len, kv_len), make_mask("cpu", (batch, 4, 1, kv_len))

    program = export(Call(call), make(*LENGTHS[2]), dynamic_shapes=((*QKV, {0: ANY, 3: ANY}),)).module()
    for sizes in LENGTHS:
        args = make(*sizes)
        exact = call(*(x.double() if x.is_floating_point() else x for x in args))
        assert_parity(program(*args), exact, call(*args, backend="reference"))


def test_mask_and_bias():
    def make(batch, q_len, kv_len):
        return *qkv(batch, q_len, kv_len), make_mask("cpu", (batch, 1, 1, kv_len)), torch.randn(4, q_len, kv_len)

    options = {"causal": True, "backend": "reference"}
    module = Call(lambda q, k, v, mask, bias: attention(q, k, v, mask=mask, bias=bias, **options))
    check(module, make, ((*QKV, {0: ANY, 3: ANY}, {1: ANY, 2: ANY}),))


def test_block_mask():
    """Which has its lengths: the batch is free."""
    block_mask = fastattn.BlockMask.from_documents(torch.arange(40) // 9, causal=True)
    module = Call(lambda q, k, v: attention(q, k, v, block_mask=block_mask))
    check(module, lambda batch, *_: qkv(batch, 40, 40), (({0: ANY}, {0: ANY}, {0: ANY}),))


def test_packed_sequences():
    def make(sequences, q_len, kv_len):
        starts_q, starts_k = (torch.arange(sequences + 1) * length for length in (q_len, kv_len))
        total_q, total_k = sequences * q_len, sequences * kv_len
        return torch.randn(total_q, 4, 16), *torch.randn(2, total_k, 2, 16), starts_q, starts_k

    module = Call(lambda q, k, v, *starts: attention_varlen(q, k, v, *starts, causal=True, window=(4, None)))
    check(module, make, (({0: ANY},) * 5,))


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_kv_cache(paged):
    def make(batch, new, room):
        q, k, v = torch.randn(batch, 4, new, 16), *torch.randn(2, batch, 2, new, 16)
        lens = torch.arange(batch)  # not all the same, which another backend serves
        if not paged:
            return q, *torch.randn(2, batch, 20 + room, 2, 16), k, v, lens
        table = torch.randperm(batch * room).view(batch, room).int()
        return q, *torch.randn(2, batch * room, 16, 2, 16), k, v, lens, table

    def step(q, k_cache, v_cache, k, v, lens, table=None):
        return attention_with_kvcache(q, k_cache, v_cache, k, v, cache_lens=lens, block_table=table, window=(9, None))

    cache = {0: ANY} if paged else {0: ANY, 1: ANY}
    dynamic = ({0: ANY, 2: ANY}, cache, cache, {0: ANY, 2: ANY}, {0: ANY, 2: ANY}, {0: ANY})
    check(Call(step), make, ((*dynamic, {0: ANY, 1: ANY}) if paged else dynamic,))


# Fake tensors, whose values cannot be looked at although they say that they are on the CPU


def packed_call(x, starts):
    return attention_varlen(x, x, x, starts, causal=True)


def cache_call(q, k_cache, v_cache, lens):
    return attention_with_kvcache(q, k_cache, v_cache, q, q, cache_lens=lens), k_cache, v_cache


def paged_call(q, k_cache, v_cache, lens, table):
    return attention_with_kvcache(q, k_cache, v_cache, q, q, cache_lens=lens, block_table=table), k_cache, v_cache


STARTS, LENS = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([3, 5])
TABLE = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
TRACED = {
    "packed": (packed_call, lambda: (torch.randn(8, 2, 16), STARTS)),
    "contiguous cache": (cache_call, lambda: (torch.randn(2, 2, 1, 16), *torch.randn(2, 2, 16, 2, 16), LENS)),
    "paged cache": (paged_call, lambda: (torch.randn(2, 2, 1, 16), *torch.randn(2, 6, 8, 2, 16), LENS, TABLE)),
}


@pytest.mark.parametrize("name", TRACED)
def test_fake_tensors(name):
    function, make = TRACED[name]
    args = make()
    with FakeTensorMode() as mode:
        fake = function(*map(mode.from_tensor, args))
    for ours, expected in zip(*map(torch.utils._pytree.tree_leaves, (fake, function(*args))), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", TRACED)
def test_make_fx(name, mode):
    """The graph computes what the call does, in the cache too."""
    function, make = TRACED[name]
    args = make()

    def copies():
        return [x.clone() for x in args]

    graph = make_fx(function, tracing_mode=mode)(*copies())
    for ours, expected in zip(*(torch.utils._pytree.tree_leaves(f(*copies())) for f in (graph, function)), strict=True):
        assert torch.equal(ours, expected)


# Layers


class Layer(nn.Module):
    """A layer, and how it is called."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *args):
        return self.call(self.layer, *args)


def tokens(batch, length):
    return torch.randn(batch, length, 32)


def triangle(length):
    return nn.Transformer.generate_square_subsequent_mask(length)


def padding(batch, length):
    return torch.arange(length) >= torch.randint(1, length + 1, (batch, 1))


def encoder_inputs(batch, q_len, _):
    return tokens(batch, q_len), padding(batch, q_len)


def decoder_inputs(batch, q_len, kv_len):
    return tokens(batch, q_len), tokens(batch, kv_len), triangle(q_len), padding(batch, kv_len)


def pair(batch, q_len, kv_len):
    return tokens(batch, q_len), tokens(batch, kv_len)


SIZES = {"batch_first": True, "dropout": 0.1}
X, SQUARE = {0: ANY, 1: ANY}, {0: ANY, 1: ANY}
LAYERS = {
    "MultiheadAttention": (
        lambda: fastattn.nn.MultiheadAttention(32, 4, **SIZES),
        lambda m, x, y: m(x, y, y, need_weights=False)[0], pair, (X, X),
    ),
    "MultiheadAttention, weights": (
        lambda: fastattn.nn.MultiheadAttention(32, 4, **SIZES), lambda m, x, y: m(x, y, y), pair, (X, X),
    ),
    "TransformerEncoderLayer": (
        lambda: fastattn.nn.TransformerEncoderLayer(32, 4, 48, **SIZES),
        lambda m, x, pad: m(x, src_key_padding_mask=pad), encoder_inputs, (X, X),
    ),
    "TransformerEncoder": (
        lambda: fastattn.nn.TransformerEncoder(fastattn.nn.TransformerEncoderLayer(32, 4, 48, **SIZES), 2),
        lambda m, x, mask: m(x, mask, is_causal=True),
        lambda batch, length, _: (tokens(batch, length), triangle(length)), (X, SQUARE),
    ),
    "TransformerDecoderLayer": (
        lambda: fastattn.nn.TransformerDecoderLayer(32, 4, 48, **SIZES),
        lambda m, x, y, mask, pad: m(x, y, tgt_mask=mask, memory_key_padding_mask=pad.float()),
        decoder_inputs, (X, X, SQUARE, X),
    ),
    "TransformerDecoder": (
        lambda: fastattn.nn.TransformerDecoder(fastattn.nn.TransformerDecoderLayer(32, 4, 48, **SIZES), 2),
        lambda m, x, y, mask, pad: m(x, y, mask, memory_key_padding_mask=pad.float(), tgt_is_causal=False),
        decoder_inputs, (X, X, SQUARE, X),
    ),
    "Transformer": (
        lambda: fastattn.nn.Transformer(32, 4, 1, 1, 48, **SIZES),
        lambda m, x, y, mask: m(x, y, tgt_mask=mask, tgt_is_causal=True),
        lambda *sizes: (*pair(*sizes), triangle(sizes[2])), (X, X, SQUARE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, training):
    make, call, inputs, dynamic = LAYERS[name]
    check(Layer(make().train(training), call), inputs, (dynamic,))

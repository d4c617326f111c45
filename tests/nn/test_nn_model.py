"""Encoder, Decoder, CausalLM and EncoderDecoder, in every pair of options."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fastattn
import fastattn.nn as fnn
from fastattn.testing import assert_parity

V, N, L = 17, 3, 12  # vocabulary, batch, length
SMALL = {"d_model": 32, "num_layers": 2, "num_heads": 4}
OPTIONS = {
    "grouped": {"num_kv_heads": 2},
    "head_dim": {"head_dim": 6},
    "alibi": {"position": fnn.ALiBi()},
    "learned slopes": {"position": fnn.ALiBi(learned=True)},
    "learned": {"position": fnn.Learned(64)},
    "sinusoidal": {"position": fnn.Sinusoidal(64)},
    "no position": {"position": None},
    "scaled rope": {"position": fnn.RoPE(theta=100.0, scaling=fnn.LinearScaling(2.0))},
    "qk_norm": {"qk_norm": True},
    "window": {"window": (4, 0)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "layer norm": {"norm": "layer", "bias": True},
    "post norm": {"norm_first": False, "final_norm": False},
    "gelu": {"activation": "gelu_tanh"},
}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations_with_replacement(OPTIONS, 2)
    if a == b or not OPTIONS[a].keys() & OPTIONS[b].keys()
]
CACHES = {
    "static": (fnn.KVCache, {}),
    "dynamic": (fnn.DynamicCache, {}),
    "paged": (fnn.PagedCache, {}),
    "sliding": (fnn.SlidingWindowCache, {"window": 4, "chunk": 5}),
}


@pytest.fixture(autouse=True)
def _on_device(device):
    """Models and inputs are made on the GPU where there is one."""
    if device == "cpu":
        yield
    else:
        with torch.device(device):
            yield


def make_lm(**options):
    """A small CausalLM in evaluation mode, its parameters large enough that every option matters."""
    model = fnn.CausalLM(fnn.CausalLMConfig(vocab_size=V, **SMALL | {"init_std": 0.3} | options)).eval()
    with torch.no_grad():
        for block in model.decoder.blocks:
            if block.self_attn.sinks is not None:
                block.self_attn.sinks.normal_()
    return model


def make_seq2seq(cross_options=None, **options):
    config = fnn.TransformerConfig(**SMALL | {"init_std": 0.3} | options)
    return fnn.EncoderDecoder(
        fnn.EncoderDecoderConfig(encoder=config, decoder=config, source_vocab_size=V, **cross_options or {})
    ).eval()


def in_float64(model, *args, **kwargs):
    """What the model gives in float64."""
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return twin(*args, **kwargs)


def decoded(step, tokens, cache, first):
    """Logits at every position, decoded by a step of `first` tokens and then token by token."""
    parts = [tokens[:, :first], *tokens[:, first:].split(1, dim=1)]
    return torch.cat([step(part, cache=cache) for part in parts], dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name.replace(" ", "-"))
def test_cached_decoding_is_the_full_forward_for_every_pair_of_options(first, second):
    """Each option with every kind of cache: pairs take them by turns, an option by itself takes them all."""
    options = OPTIONS[first] | OPTIONS[second]
    batch = 16  # the largest error of a few sequences is mostly chance
    model, tokens = make_lm(**options), torch.randint(V, (batch, L))
    exact = in_float64(model, tokens)
    # Two ways without a cache, since one may be exact by luck: all at once, and each token as the last of its prefix.
    full = [model(tokens), torch.stack([model(tokens[:, : n + 1])[:, n] for n in range(L)], dim=1)]
    names = [name for name in CACHES if name != "sliding" or "window" in options]
    for name in names if first == second else [names[PAIRS.index((first, second)) % len(names)]]:
        kind, arguments = CACHES[name]
        capacity = 2 if name == "dynamic" else L
        cache = model.make_cache(batch, capacity, kind, **arguments)
        assert_parity(decoded(model, tokens, cache, 4), exact, full, name=name)
        assert cache.lens.tolist() == [L] * batch


@torch.no_grad()
@pytest.mark.parametrize("first", OPTIONS, ids=lambda name: name.replace(" ", "-"))
def test_cached_decoding_of_an_encoder_decoder(first):
    model = make_seq2seq(**OPTIONS[first])
    source, target, lengths = torch.randint(V, (N, 9)), torch.randint(V, (N, L)), torch.tensor([9, 4, 0])
    full = model(source, target, source_lengths=lengths)
    exact = in_float64(model, source, target, source_lengths=lengths)
    memory = model.encode(source, lengths=lengths)
    cache = model.make_cache(N, L, memory=memory, memory_lengths=lengths)
    assert_parity(decoded(model.decode, target, cache, 3), exact, full)


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
def test_prompts_of_different_length_decode_as_alone(kind):
    window = (4, 0) if kind == "sliding" else None
    model, tokens, lengths = make_lm(window=window), torch.randint(V, (N, L)), torch.tensor([1, 8, 5])
    cache_type, arguments = CACHES[kind]
    cache = model.make_cache(N, L + 4, cache_type, **arguments)
    exact, eager = in_float64(model, tokens), model(tokens)
    rows = torch.arange(N)
    logits = [model.prefill(tokens[:, :8], cache, lengths)]
    wanted = [lengths - 1]
    for _ in range(4):
        at = cache.lens.long()
        wanted.append(at.clone())
        logits.append(model(tokens.gather(1, at[:, None]), cache=cache)[:, 0])
    at = torch.stack(wanted)
    assert_parity(torch.stack(logits), exact[rows, at], eager[rows, at])


@pytest.mark.parametrize("position", [None, fnn.RoPE(), fnn.ALiBi(learned=True), fnn.Learned(64)], ids=str)
def test_packed_equals_padded(position):
    """Logits and gradients of every parameter, of a sequence-to-sequence model with an empty source in the batch."""
    model = make_seq2seq(position=position)
    source_lengths, lengths = torch.tensor([9, 0, 4]), torch.tensor([5, 12, 1])
    source, target = torch.randint(V, (N, 9)), torch.randint(V, (N, L))
    real_source = torch.arange(9) < source_lengths[:, None]
    real = torch.arange(L) < lengths[:, None]
    starts, starts_source = (nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths, source_lengths))
    weights = torch.randn(int(lengths.sum()), V)

    def run(model, way, dtype):
        model = model.to(dtype)
        model.zero_grad()
        if way == "packed":
            out = model(source[real_source], target[real], cu_seqlens=starts, cu_seqlens_source=starts_source)
        elif way == "one by one":
            parts = zip(source, target, source_lengths, lengths, strict=True)
            out = torch.cat([model(s[None], t[None, :n], source_lengths=m[None])[0] for s, t, m, n in parts])
        else:
            out = model(source, target, source_lengths=source_lengths)[real]
        (out * weights.to(dtype)).sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    # Two ways without packing, since one may be exact by luck.
    packed, padded, single = (run(model, way, torch.float32) for way in ("packed", "padded", "one by one"))
    exact = run(model, "padded", torch.float64)
    assert_parity(packed[0], exact[0], [padded[0], single[0]], name="logits")
    # All gradients as one tensor, each in units of its largest element: of a few numbers the largest error is chance.
    sizes = [e.abs().max() for e in exact[1:]]
    packed, exact, padded, single = (
        torch.cat([(g / size).flatten().to(g.dtype) for g, size in zip(result[1:], sizes, strict=True)])
        for result in (packed, exact, padded, single)
    )
    assert_parity(packed, exact, [padded, single], name="gradients")


def test_padding_of_the_source_is_never_seen():
    """Whatever stands at padded keys of cross-attention and of the encoder, outputs and gradients stay the same."""
    model = make_seq2seq()
    lengths, target = torch.tensor([9, 4, 0]), torch.randint(V, (N, L))
    source = torch.randint(V, (N, 9))
    padding = torch.arange(9) >= lengths[:, None]
    other = torch.where(padding, (source + 5) % V, source)
    results = []
    for tokens, described in ((source, True), (other, True), (other, False)):
        model.zero_grad()
        options = {"source_lengths": lengths} if described else {"source_mask": ~padding}
        out = model(tokens, target, **options)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for name, p in model.named_parameters() if "embedding" not in name)])
    for other_result in results[1:]:
        for a, b in zip(results[0], other_result, strict=True):
            assert torch.equal(a, b)
    assert all(x.isfinite().all() for x in results[0])  # the third source is nothing but padding


def test_a_decoder_does_not_see_the_future():
    decoder = fnn.Decoder(fnn.TransformerConfig(**SMALL, init_std=0.3))
    x = torch.randn(1, L, 32, requires_grad=True)
    decoder(x)[0, 5].sum().backward()
    assert (x.grad[0, 6:] == 0).all()
    assert (x.grad[0, :6].abs().sum(-1) > 0).all()
    x.grad = None
    fnn.Encoder(fnn.TransformerConfig(**SMALL, init_std=0.3))(x)[0, 5].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


def test_a_window_limits_what_is_seen():
    decoder = fnn.Decoder(fnn.TransformerConfig(**SMALL | {"num_layers": 1}, window=(3, 0), init_std=0.3))
    x = torch.randn(1, L, 32, requires_grad=True)
    decoder(x)[0, 8].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_initial_weights():
    config = fnn.CausalLMConfig(
        vocab_size=500, d_model=128, num_layers=8, bias=True, norm="layer", tie_embeddings=False
    )
    model = fnn.CausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "out_proj" in name or "down_proj" in name else 0.02
            spread = std / math.sqrt(2 * parameter.numel())  # of an estimated standard deviation
            assert abs(float(parameter.detach().std()) - std) < 5 * spread, name


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_number_of_parameters():
    assert count(make_lm()) == 17 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 88 + 2 * 32) + 32  # tied; 88 = 8/3 * 32, up to 8
    assert count(make_lm(tie_embeddings=False)) == count(make_lm()) + 17 * 32
    assert count(make_lm(num_kv_heads=1)) == count(make_lm()) - 2 * 2 * 32 * 24
    assert count(make_lm(activation="gelu")) == 17 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 128 + 2 * 32) + 32


def test_embeddings_are_tied_and_shared_on_request():
    model = make_lm()
    assert model.head.weight is model.embedding.weight
    assert make_lm(tie_embeddings=False).head.weight is not model.embedding.weight
    model = make_seq2seq()
    assert model.head.weight is model.target_embedding.weight is model.source_embedding.weight
    model = make_seq2seq({"target_vocab_size": 9, "tie_embeddings": False})
    assert model.target_embedding is not model.source_embedding
    assert model(torch.randint(V, (1, 3)), torch.randint(9, (1, 2))).shape == (1, 2, 9)


def test_embeddings_are_scaled_on_request():
    model, tokens = make_lm(), torch.randint(V, (N, L))
    scaled = make_lm(scale_embeddings=True)
    scaled.load_state_dict(model.state_dict())
    model.embedding.weight.data *= math.sqrt(32)
    assert torch.equal(scaled.hidden(tokens), model.hidden(tokens))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing(dropout):
    plain = make_lm(dropout=dropout).train()
    saving = make_lm(dropout=dropout, checkpoint=True).train()
    saving.load_state_dict(plain.state_dict())
    tokens, gradients = torch.randint(V, (N, L)), []
    for model in (plain, saving):
        torch.manual_seed(5)
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_keeps_less():
    def kept(model):
        sizes = {}
        pack = lambda x: sizes.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(torch.randint(V, (N, L)))
        return sum(sizes.values())

    assert kept(make_lm(checkpoint=True, num_layers=4).train()) < 0.5 * kept(make_lm(num_layers=4).train())


def test_dropout_drops_in_training_only():
    model, tokens = make_lm(dropout=0.5), torch.randint(V, (N, L))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


TOGETHER = [
    ("grouped", "alibi", "qk_norm"), ("learned slopes", "layer norm"), ("head_dim", "learned", "window"),
    ("sinusoidal", "softcap"), ("no position", "sinks", "post norm"), ("scaled rope", "gelu"),
]  # fmt: skip
assert sorted(itertools.chain(*TOGETHER)) == sorted(OPTIONS)


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: "-".join(names).replace(" ", "-"))
def test_training_compiles_in_one_graph_for_all_lengths(names):
    """Each option in one of the models, the first of which has more than one layer."""
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    model = make_lm(num_layers=2 if names == TOGETHER[0] else 1, **options)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (L, 7, 9, 20):
        tokens = torch.randint(V, (N, length))
        assert_parity(compiled(tokens), in_float64(model, tokens), model(tokens))
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "paged", "sliding"])
def test_a_compiled_step_is_compiled_twice_at_most(kind):
    """Once with the first length as a constant, and once for all lengths."""
    layers = 2 if kind == "static" else 1
    model = make_lm(num_layers=layers, window=(4, 0) if kind == "sliding" else None)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model, backend=counter, fullgraph=True)
    cache_type, arguments = CACHES[kind]
    tokens = torch.randint(V, (N, 20))
    full, exact = model(tokens), in_float64(model, tokens)
    cache = model.make_cache(N, 20, cache_type, **arguments)
    model.prefill(tokens[:, :4], cache)
    steps = []
    for i in range(4, 20):
        cache.reserve(1)
        steps.append(step(tokens[:, i : i + 1], cache=cache))
    assert_parity(torch.cat(steps, 1), exact[:, 4:], full[:, 4:])  # of one position the peer may be exact by luck
    assert counter.frame_count <= 2


@torch.no_grad()
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision_and_autocast(qk_norm):
    model, tokens = make_lm(qk_norm=qk_norm), torch.randint(V, (N, L))
    exact = in_float64(model, tokens)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        full = model(tokens)
        cache = model.make_cache(N, L)
        assert cache.k[0].dtype == torch.bfloat16
        assert_parity(decoded(model, tokens, cache, 4), exact, full)
    half = make_lm(qk_norm=qk_norm).bfloat16()
    half.load_state_dict(model.state_dict())
    assert half(tokens).dtype == torch.bfloat16
    exact = in_float64(half, tokens)
    assert_parity(decoded(half, tokens, half.make_cache(N, L), 4), exact, half(tokens))


def test_a_config_survives_a_round_trip():
    config = fnn.CausalLMConfig(vocab_size=V, position=fnn.RoPE(scaling=fnn.Llama3Scaling()), window=(3, 0))
    assert dataclasses.replace(config) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3
    model = make_lm()
    again = fnn.CausalLM(model.config)
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(V, (N, L))
    assert torch.equal(again.eval()(tokens), model(tokens))


def test_gradients_reach_every_parameter():
    model = make_lm(position=fnn.ALiBi(learned=True), sinks=True, qk_norm=True, norm="layer", bias=True)
    model(torch.randint(V, (N, L))).square().sum().backward()
    # A bias of the keys moves all scores of a row alike, but for the norm behind it.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_layers_stand_alone():
    """Attention, cross-attention and a block without a stack give what they give within one."""
    config = fnn.TransformerConfig(**SMALL, init_std=0.3)
    x, memory = torch.randn(N, L, 32), torch.randn(N, 5, 32)
    attn = fnn.Attention(config)
    q, k, v = (proj(x).unflatten(-1, (4, 8)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    angle = torch.arange(L)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # RoPE is a product of complex numbers

    def turned(t):
        z = torch.complex(t[..., :4], t[..., 4:]) * turn
        return torch.cat([z.real, z.imag], -1)

    heads = [t.transpose(1, 2) for t in (turned(q), turned(k), v)]
    eager = nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
    expected = fastattn.attention(*(t.double() for t in heads), causal=True, backend="reference")
    exact = expected.transpose(1, 2).flatten(-2) @ attn.out_proj.weight.double().T
    assert_parity(attn(x, causal=True), exact, attn.out_proj(eager))
    cross = fnn.Attention(config, cross=True)
    assert cross(x, memory).shape == x.shape
    assert fnn.Block(config, cross=True)(x, memory, causal=True).shape == x.shape


NAN, INF = float("nan"), float("inf")
BAD_SETTINGS = {
    fnn.TransformerConfig: {
        "d_model": [30, 0, 32.0, True],
        "num_layers": [1.5, 0],
        "num_heads": [0, "4"],
        "num_kv_heads": [3, 0, 8],
        "head_dim": [7, 0, 8.0],
        "dim_feedforward": [-1, 1.5],
        "activation": ["tanh", None],
        "norm": ["batch", True],
        "norm_first": [1, None],
        "final_norm": [1, "yes"],
        "norm_eps": [0.0, -1.0, NAN, "1"],
        "bias": ["no", 0],
        "position": [fnn.RoPE, "rope"],
        "qk_norm": [1],
        "window": [5, (1,), (1.5, None), [3, 0], (-1, 0), (-5, 2)],
        "softcap": [0.0, -1.0, INF, "5"],
        "sinks": [1],
        "dropout": [1.0, -0.1, NAN, None],
        "init_std": [0.0, "a"],
        "checkpoint": ["full"],
    },
    fnn.CausalLMConfig: {"vocab_size": [0, 1.5], "tie_embeddings": [1], "scale_embeddings": [None]},
    fnn.EncoderDecoderConfig: {
        "encoder": [None, fnn.TransformerConfig],
        "decoder": [fnn.CausalLM],
        "source_vocab_size": [0, 1.5],
        "target_vocab_size": [0, "9"],
        "tie_embeddings": [1],
        "scale_embeddings": ["sqrt"],
    },
    fnn.RoPE: {"theta": [0.0, 1.0, -1, INF, "10000"], "scaling": [2.0, fnn.Llama3Scaling]},
    fnn.LinearScaling: {"factor": [0, -1.0, INF]},
    fnn.Llama3Scaling: {"factor": [0], "original_max_len": [0, 8192.0], "low": [0.0], "high": [1.0, 0.5]},
    fnn.YarnScaling: {
        "factor": [0], "original_max_len": [0, 1.5], "slow": [0.0], "fast": [1.0, NAN], "attention_factor": [0.0],
    },
    fnn.ALiBi: {"learned": [1]},
    fnn.Learned: {"max_len": [0, 1.5]},
    fnn.Sinusoidal: {"max_len": [0, None]},
}  # fmt: skip
STACK = fnn.TransformerConfig(d_model=32, num_heads=4)
GOOD_SETTINGS = {
    fnn.TransformerConfig: {"d_model": 32, "num_heads": 4},
    fnn.CausalLMConfig: {"d_model": 32, "num_heads": 4, "vocab_size": V},
    fnn.EncoderDecoderConfig: {"encoder": STACK, "decoder": STACK, "source_vocab_size": V},
    fnn.LinearScaling: {"factor": 2.0},
    fnn.YarnScaling: {"factor": 2.0, "original_max_len": 64},
    fnn.Learned: {"max_len": 64},
}


@pytest.mark.parametrize("kind", BAD_SETTINGS, ids=lambda kind: kind.__name__)
def test_bad_settings_are_refused(kind):
    inherited = {field.name for field in dataclasses.fields(fnn.TransformerConfig)} - {"vocab_size"}
    own = {field.name for field in dataclasses.fields(kind)} - (inherited if kind is fnn.CausalLMConfig else set())
    assert own == BAD_SETTINGS[kind].keys()
    good = GOOD_SETTINGS.get(kind, {})
    kind(**good)
    for name, values in BAD_SETTINGS[kind].items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"{name}: expected .*got"):
                kind(**good | {name: value})


def test_encoder_and_decoder_have_one_width():
    small, large = fnn.TransformerConfig(d_model=32), fnn.TransformerConfig(d_model=64)
    with pytest.raises(ValueError, match=r"decoder\.d_model: expected encoder\.d_model == 32, got 64"):
        fnn.EncoderDecoderConfig(encoder=small, decoder=large, source_vocab_size=V)


def bad_calls():
    lm, pair = make_lm(position=fnn.Learned(16)), make_seq2seq()
    x, tokens = torch.randn(N, L, 32), torch.randint(V, (N, L))
    encoder, decoder = pair.encoder, pair.decoder
    starts = torch.tensor([0, L], dtype=torch.int32)
    full, lens = torch.ones(N, L, dtype=torch.bool), torch.full((N,), L)
    training = make_lm(dropout=0.1).train()
    turning = make_lm(position=fnn.RoPE()).decoder.blocks[0].self_attn
    angles = fnn.RoPE().tables(torch.arange(L)[None], turning.head_dim)[0]
    return {
        "x.shape": (lambda: encoder(x[0]), ValueError),
        "x.shape, packed": (lambda: encoder(x, cu_seqlens=starts), ValueError),
        "x: expected at most max_len": (lambda: lm(torch.zeros(1, 17, dtype=torch.long)), ValueError),
        "x: expected at most max_len == 16 positions, got 17": (
            lambda: lm(torch.zeros(20, dtype=torch.long), cu_seqlens=torch.tensor([0, 3, 20], dtype=torch.int32)),
            ValueError,
        ),
        "lengths.shape": (lambda: encoder(x, lengths=lens[:2]), ValueError),
        "lengths.dtype": (lambda: encoder(x, lengths=lens.float()), TypeError),
        "lengths: expected 0 to": (lambda: encoder(x, lengths=lens + 1), ValueError),
        "lengths: expected 0 to 12, got": (lambda: encoder(x, lengths=-lens), ValueError),
        "lengths.device": (lambda: encoder(x, lengths=lens.to("meta")), ValueError),
        "memory_lengths: expected 0 to": (lambda: decoder(x, x, memory_lengths=lens + 1), ValueError),
        "memory_lengths.dtype": (lambda: decoder.make_cache(N, L, memory=x, memory_lengths=lens.bool()), TypeError),
        "source_lengths: expected 0 to": (lambda: pair(tokens, tokens, source_lengths=lens + 1), ValueError),
        "lengths: expected 1 to": (lambda: lm.prefill(tokens, lm.make_cache(N, L), lens - L), ValueError),
        "cache: expected KVCache": (lambda: lm(tokens, cache={}), TypeError),
        "cache: expected one of": (lambda: lm(tokens, cache=fnn.KVCache(1, N, L, 2, 8)), ValueError),
        "cache.batch": (lambda: lm(tokens, cache=lm.make_cache(N + 1, L)), ValueError),
        "cache: expected dtype": (lambda: lm(tokens, cache=lm.make_cache(N, L, dtype=torch.float16)), TypeError),
        "dtype: expected one of": (lambda: lm.make_cache(N, L, dtype=torch.int32), TypeError),
        "kind: expected KVCache, a subclass": (lambda: lm.make_cache(N, L, {}), TypeError),
        "kind: expected .* got the class dict": (lambda: lm.make_cache(N, L, dict), TypeError),
        "rotary: expected None": (lambda: lm.decoder.blocks[0].self_attn(x, rotary=(x, x)), ValueError),
        "rotary: expected tables": (lambda: turning(x, rotary=(angles[:, 1:], angles[:, 1:])), ValueError),
        "rotary: expected two": (lambda: turning(x, rotary=angles), TypeError),
        "lengths: expected a Tensor": (lambda: encoder(x, lengths=[L] * N), TypeError),
        "mask.dtype": (lambda: encoder(x, mask=full.float()), TypeError),
        "mask.shape": (lambda: encoder(x, mask=full[:, 1:]), ValueError),
        "mask: expected one description": (lambda: encoder(x, mask=full, lengths=lens), ValueError),
        "cu_seqlens: expected one description": (lambda: encoder(x, mask=full, cu_seqlens=starts), ValueError),
        "memory_mask.dtype": (lambda: decoder(x, x, memory_mask=full.int()), TypeError),
        "memory: expected one": (lambda: decoder(x), ValueError),
        "memory: expected None": (lambda: lm.decoder(x, x), ValueError),
        "memory: expected a Tensor": (lambda: decoder.make_cache(N, L), ValueError),
        "lengths: expected None": (lambda: lm(tokens, lengths=lens), ValueError),
        "cu_seqlens: expected None": (
            lambda: lm.decoder(x, cu_seqlens=starts, cache=lm.make_cache(N, L)),
            ValueError,
        ),
        "memory: expected None for self": (lambda: lm.decoder.blocks[0].self_attn(x, x), ValueError),
        "mask: expected None": (
            lambda: lm.decoder.blocks[0].self_attn(x[0], mask=full, cu_seqlens=starts),
            ValueError,
        ),
        "mask: expected None with packed input and with a cache": (
            lambda: lm.decoder.blocks[0].self_attn(x, mask=full[:, None, None], cache=lm.make_cache(N, L)),
            ValueError,
        ),
        "cu_seqlens_k: expected None without": (lambda: decoder(x, x[0], cu_seqlens_k=starts), ValueError),
        "tokens.dtype": (lambda: lm(tokens.float()), TypeError),
        "tokens.shape": (lambda: lm.prefill(tokens[:, :0], lm.make_cache(N, L)), ValueError),
        "cache: expected room": (lambda: lm(tokens, cache=lm.make_cache(N, L - 1)), ValueError),
        "cache: expected evaluation mode": (lambda: training(tokens, cache=training.make_cache(N, L)), RuntimeError),
        "cache: expected at most chunk": (
            lambda: lm(tokens, cache=lm.make_cache(N, L, fnn.SlidingWindowCache, window=4, chunk=5)),
            ValueError,
        ),
        "window: expected at most": (
            lambda: lm(tokens, cache=lm.make_cache(N, L, fnn.SlidingWindowCache, window=4)),
            ValueError,
        ),
        "capacity: expected at least 1": (lambda: lm.make_cache(N, 0), ValueError),
        "batch: expected an int": (lambda: lm.make_cache(1.0, L), TypeError),
        "window: expected one": (lambda: lm.make_cache(N, L, fnn.SlidingWindowCache), ValueError),
        "window: expected an int": (lambda: lm.make_cache(N, L, fnn.SlidingWindowCache, window=(4, 0)), TypeError),
        "chunk: expected at least 1": (
            lambda: lm.make_cache(N, L, fnn.SlidingWindowCache, window=4, chunk=0),
            ValueError,
        ),
        "page_size: expected at least 1": (lambda: lm.make_cache(N, L, fnn.PagedCache, page_size=0), ValueError),
        "num_pages: expected at least 1": (lambda: lm.make_cache(N, L, fnn.PagedCache, num_pages=0), ValueError),
        "config: expected CausalLMConfig": (lambda: fnn.CausalLM(STACK), TypeError),
        "config: expected EncoderDecoderConfig": (lambda: fnn.EncoderDecoder(STACK), TypeError),
        "config: expected TransformerConfig": (lambda: fnn.Decoder({"d_model": 32}), TypeError),
    }


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        (torch.tensor([1, 6, 2]), ValueError, r"lengths: expected 0 to 5, got \[1, 6, 2\]"),
        (torch.tensor([1, -1, 2]), ValueError, r"lengths: expected 0 to 5, got \[1, -1, 2\]"),
        (torch.tensor([1.0, 5.0, 2.0]), TypeError, r"lengths\.dtype: expected int32 or int64, got torch\.float32"),
        (torch.tensor([True, False, True]), TypeError, r"lengths\.dtype: expected int32 or int64, got torch\.bool"),
        (torch.tensor([1]), ValueError, r"lengths\.shape: expected \(3,\), got \(1,\)"),
        ([1, 2, 3], TypeError, "lengths: expected a Tensor or None, got list"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_lengths_of_a_step_leave_the_cache_as_it_was(lengths, error, text):
    lm, pair, tokens = make_lm(), make_seq2seq(), torch.randint(V, (N, 5))
    memory = torch.randn(N, L, 32)
    lengths = lengths.to(tokens.device) if isinstance(lengths, torch.Tensor) else lengths
    for cache, call in (
        (lm.make_cache(N, L), lambda cache: lm(tokens, cache=cache, lengths=lengths)),
        (pair.make_cache(N, L, memory=memory), lambda cache: pair(None, tokens, cache=cache, lengths=lengths)),
    ):
        with pytest.raises(error, match=text):
            call(cache)
        assert cache.length == 0 and not cache.lens.any()


@pytest.mark.parametrize("text", bad_calls())
def test_bad_calls_are_refused(text):
    call, error = bad_calls()[text]
    with pytest.raises(error, match=text.split(",")[0]) as caught:
        call()
    assert "expected" in str(caught.value)
    assert any(word in str(caught.value) for word in ("got", "since"))

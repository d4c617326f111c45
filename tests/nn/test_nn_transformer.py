"""fastattn.nn's Transformer layers against torch.nn's."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn.nn as fnn
from fastattn.testing import assert_parity
from tests.support.layer_checks import (
    DRAWS,
    INF,
    Calls,
    Pool,
    assert_same_as_torch,
    assert_same_error,
    assert_same_signature,
    cast,
    causal,
    fast_path_off,
    padding,
    run,
    to_float,
)

N, H, T, S, E = 3, 2, 9, 14, 16  # batch, heads, target length, source length, embedding
CLASSES = [
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
]
quiet = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)
pytestmark = quiet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(module, name, **kwargs):
    """A small layer or stack of class `name` from `module` (torch.nn or fastattn.nn).

    GELU, because the gradient of ReLU jumps: next to the jump, rounding decides, and no tolerance can hold.
    """
    options = {"dim_feedforward": 16, "dropout": 0.0, "activation": F.gelu} | kwargs
    if name == "Transformer":
        return module.Transformer(E, H, 1, 1, **options)
    layer = getattr(module, name.removesuffix("Layer") + "Layer")(E, H, **options)
    return layer if name.endswith("Layer") else getattr(module, name)(layer, 2, nn.LayerNorm(E))


def pair(name, **kwargs):
    """Our layer and torch.nn's, without zeros in the biases, which would hide a mistake."""
    theirs = build(nn, name, **kwargs)
    for p in theirs.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=float(p[0] == 1), std=0.2)
    return build(fnn, name, **kwargs), theirs


def inputs(name, batch_first=False, batched=True):
    """Arguments of forward: (source), (target, memory) or (source, target)."""
    source, target = torch.randn(N, S, E), torch.randn(N, T, E)
    if not batched:
        source, target = source[0], target[0]
    elif not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    if "Encoder" in name:
        return [source]
    return [target, source] if "Decoder" in name else [source, target]


def some_mask(queries, keys, seed):
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[:, 0] = False
    return mask


SOURCE_MASK, TARGET_MASK, MEMORY_MASK = some_mask(S, S, 1), some_mask(T, T, 2), some_mask(T, S, 3)
SOURCE_PADDING, TARGET_PADDING = padding([S, 1, 4], S), padding([2, T, 1], T)


def masks(name, kind):
    """Masks of every argument that takes one, in kind: "bool", "float", "float + bool", "causal" ... ; see KINDS."""
    encoder, decoder = "Encoder" in name, "Decoder" in name
    source_name = {"TransformerEncoder": "mask"}.get(name, "src_mask")
    attn = {source_name: SOURCE_MASK, "tgt_mask": TARGET_MASK, "memory_mask": MEMORY_MASK}
    pads = {
        "src_key_padding_mask": SOURCE_PADDING,
        "tgt_key_padding_mask": TARGET_PADDING,
        "memory_key_padding_mask": SOURCE_PADDING,
    }
    if kind == "none":
        return {}
    if kind == "3-D":
        attn = {k: m.expand(N * H, *m.shape) for k, m in attn.items()}
        chosen = attn
    elif kind.startswith("causal"):
        attn = {source_name: causal(S), "tgt_mask": causal(T)}
        chosen = attn | (pads if "padding" in kind else {})
        if "bool" in kind:
            chosen = {k: m == -INF if m.is_floating_point() else m for k, m in chosen.items()}
    else:
        attn_kind, _, pad_kind = kind.partition(" + ")
        chosen = {}
        if attn_kind:
            chosen |= attn if attn_kind == "bool" else {k: to_float(m) for k, m in attn.items()}
        if pad_kind:
            chosen |= pads if pad_kind == "bool" else {k: to_float(m) for k, m in pads.items()}
    if encoder:
        return {k: m for k, m in chosen.items() if k in (source_name, "src_key_padding_mask")}
    if decoder:
        return {k: m for k, m in chosen.items() if k not in (source_name, "src_key_padding_mask")}
    return chosen


KINDS = [
    "none", "bool", "float", "3-D", " + bool", " + float", "bool + bool", "float + float", "bool + float",
    "float + bool", "causal", "causal padding", "causal bool padding",
]  # fmt: skip


# --- the result -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["TransformerDecoderLayer", "TransformerDecoder", "Transformer"])
def test_cross_attention_with_padded_keys(name, training):
    """THE HEADLINE TEST, for whole decoders: memories of different lengths, padded, in one batch.

    The truth is each sequence alone, cut to its length: same outputs, same gradients; what stands in the padding must
    not matter.
    """
    ours = build(fnn, name, batch_first=True).train(training)
    exact = copy.deepcopy(ours).double()
    lengths = [S, 1, 4]
    key_padding_mask = padding(lengths, S)
    target, source = torch.randn(N, T, E), torch.randn(N, S, E)

    def call(layer, target, source, kpm):
        target, source = target.clone().requires_grad_(), source.clone().requires_grad_()
        if name == "Transformer":
            out = layer(source, target, src_key_padding_mask=kpm, memory_key_padding_mask=kpm)
        else:
            out = layer(target, source, memory_key_padding_mask=kpm)
        return out.detach(), *torch.autograd.grad((out * target.detach().sin()).sum(), [target, source])

    out, dtarget, dsource = call(ours, target, source, key_padding_mask)
    assert (dsource[key_padding_mask] == 0).all()
    pool = Pool()
    for n, length in enumerate(lengths):
        alone = target[n : n + 1], source[n : n + 1, :length]
        actual = out[n : n + 1], dtarget[n : n + 1], dsource[n : n + 1, :length]
        expected, eager = call(exact, *cast(alone, torch.float64), None), call(ours, *alone, None)
        for what, *results in zip(("output", "gradient of target", "of source"), actual, expected, eager, strict=True):
            pool.add(what, *results)
    pool.check()
    junk = source.masked_fill(key_padding_mask[..., None], 1e4)
    assert torch.equal(call(ours, target, junk, key_padding_mask)[0], out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_masks(name, kind):
    ours, theirs = pair(name, batch_first=True)
    assert_same_as_torch(ours, theirs, inputs(name, batch_first=True), masks(name, kind))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_dtypes(name, dtype):
    ours, theirs = pair(name)
    assert_same_as_torch(ours, theirs, inputs(name), masks(name, "bool + bool"), dtype)


OPTIONS = [
    {"batch_first": False},
    {"norm_first": True},
    {"norm_first": True, "batch_first": True, "bias": False},
    {"activation": nn.SiLU()},
    {"activation": torch.tanh, "layer_norm_eps": 1e-3},
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("name", CLASSES)
def test_options(name, number):
    """Each with every class, in training and in evaluation by turns."""
    options = OPTIONS[number]
    ours, theirs = pair(name, **options)
    for layer in (ours, theirs):
        layer.train((number + [*CLASSES].index(name)) % 2 == 0)
    args = inputs(name, options.get("batch_first", False))
    assert_same_as_torch(ours, theirs, args, masks(name, "causal padding"))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_unbatched(name, batch_first):
    ours, theirs = pair(name, batch_first=batch_first)
    args = inputs(name, batched=False)
    assert_same_as_torch(ours, theirs, args)
    kwargs = {k: m[2] if "padding" in k else m for k, m in masks(name, "bool + bool").items()}
    assert_same_as_torch(ours, theirs, args, kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_fully_padded_sequence_is_finite(name, training):
    ours = build(fnn, name, batch_first=True).train(training)
    args = inputs(name, batch_first=True)
    source, target = padding([S, 0, 4], S), padding([T, 0, T], T)
    kwargs = {"src_key_padding_mask": source}
    if "Encoder" not in name:
        kwargs |= {"tgt_key_padding_mask": target, "memory_key_padding_mask": source}
    if "Decoder" in name:
        del kwargs["src_key_padding_mask"]
    assert all(x.isfinite().all() for x in run(ours, args, kwargs).values())
    with torch.no_grad():
        assert ours(*args, **kwargs).isfinite().all()


# --- one path in training and evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["none", " + bool", "bool"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_attention_runs_the_operator(name, kind, training, grad, monkeypatch):
    calls = Calls(monkeypatch)
    layer = build(fnn, name, batch_first=True).train(training)
    with torch.set_grad_enabled(grad):
        layer(*inputs(name, batch_first=True), **masks(name, kind))
    expected = {"EncoderLayer": 1, "DecoderLayer": 2, "Encoder": 2, "Decoder": 4, "": 3}
    assert len(calls) == expected[name.removeprefix("Transformer")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_overridden_blocks_are_called(name, training):
    seen = []

    class Mine(getattr(fnn, name)):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
            seen.append("sa")
            return super()._sa_block(x, attn_mask, key_padding_mask, is_causal=is_causal)

        def _mha_block(self, x, mem, attn_mask, key_padding_mask, is_causal=False):
            seen.append("mha")
            return super()._mha_block(x, mem, attn_mask, key_padding_mask, is_causal)

        def _ff_block(self, x):
            seen.append("ff")
            return super()._ff_block(x)

    layer = Mine(E, H, 16, batch_first=True).train(training)
    with torch.no_grad():
        layer(*inputs(name, batch_first=True))
    assert seen == (["sa", "ff"] if "Encoder" in name else ["sa", "mha", "ff"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_hooks_run(name, training):
    layer = build(fnn, name, batch_first=True).train(training)
    seen = []
    for module_name, module in layer.named_modules():
        module.register_forward_hook(lambda module, args, output, n=module_name: seen.append(n))
    with torch.no_grad():
        layer(*inputs(name, batch_first=True))
    containers = {n for n, m in layer.named_modules() if isinstance(m, nn.ModuleList)}
    assert set(seen) == {n for n, _ in layer.named_modules()} - containers


def test_dropout_only_in_training():
    layer = build(fnn, "Transformer", dropout=0.5)
    args = inputs("Transformer")
    assert not torch.equal(layer(*args), layer(*args))
    layer.eval()
    assert torch.equal(layer(*args), layer(*args))


# --- causal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_causal_masks_are_detected(name, kind, batch_first, monkeypatch):
    calls = Calls(monkeypatch)
    stack = build(fnn, name, batch_first=batch_first)
    args = inputs(name, batch_first)
    length = S if name == "TransformerEncoder" else T
    mask_arg = "mask" if name == "TransformerEncoder" else "tgt_mask"
    hint_arg = "is_causal" if name == "TransformerEncoder" else "tgt_is_causal"
    mask = causal(length) if kind == "float" else causal(length) == -INF
    other = mask.clone()
    other[-1, 0] = mask[0, 1]

    def flags(mask, **kwargs):
        calls.kwargs.clear()
        stack(*args, **{mask_arg: mask}, **kwargs)
        return [c["causal"] for c in calls.kwargs if name == "TransformerEncoder" or c["causal"]]

    assert flags(mask) == [True, True]
    assert True not in flags(other)
    assert True not in flags(mask.expand(N * H, -1, -1))
    assert True not in flags(mask, **{hint_arg: False})
    assert flags(mask, **{hint_arg: True}) == [True, True]


def test_a_causal_mask_of_another_length_is_an_error_as_in_torch():
    ours, theirs = pair("TransformerEncoder")
    (x,) = inputs("TransformerEncoder")
    assert_same_error(lambda: ours(x, mask=causal(S + 1)), lambda: theirs(x, mask=causal(S + 1)))


# --- the contract of torch.nn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_signatures(name):
    ours, theirs = getattr(fnn, name), getattr(nn, name)
    assert_same_signature(ours, theirs)
    assert_same_signature(ours.forward, theirs.forward)
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "norm_first": True}, {"dtype": torch.float64, "device": "cpu", "activation": "relu"}],
)
@pytest.mark.parametrize("name", CLASSES)
def test_same_seed_same_weights_and_strict_state_dict_both_ways(name, options):
    torch.manual_seed(7)
    ours = build(fnn, name, **options)
    after_ours = torch.rand(1)
    torch.manual_seed(7)
    theirs = build(nn, name, **options)
    assert torch.equal(torch.rand(1), after_ours)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(build(nn, name, **options).state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_defaults_are_those_of_torch():
    ours, theirs = fnn.TransformerEncoderLayer(E, H), nn.TransformerEncoderLayer(E, H)
    for attribute in ("norm_first", "activation"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.self_attn.batch_first is False
    assert ours.dropout.p == ours.self_attn.dropout == 0.1
    assert ours.linear1.out_features == 2048


BAD_CALLS = {
    "integer mask": ("TransformerEncoder", lambda m, s, t: m(s, mask=SOURCE_MASK.int())),
    "integer padding": ("TransformerEncoder", lambda m, s, t: m(s, src_key_padding_mask=SOURCE_PADDING.int())),
    "integer mask, layer": ("TransformerEncoderLayer", lambda m, s, t: m(s, src_mask=SOURCE_MASK.int())),
    "integer padding, layer": (
        "TransformerEncoderLayer",
        lambda m, s, t: m(s, src_key_padding_mask=SOURCE_PADDING.int()),
    ),
    "integer mask, decoder": ("TransformerDecoder", lambda m, s, t: m(t, s, memory_mask=MEMORY_MASK.int())),
    "hint without mask": ("TransformerEncoderLayer", lambda m, s, t: m(s, is_causal=True)),
    "hint without mask, decoder": ("TransformerDecoder", lambda m, s, t: m(t, s, memory_is_causal=True)),
    "mask size": ("TransformerDecoderLayer", lambda m, s, t: m(t, s, memory_mask=TARGET_MASK)),
    "padding size": ("TransformerDecoderLayer", lambda m, s, t: m(t, s, memory_key_padding_mask=TARGET_PADDING)),
    "batch sizes": ("Transformer", lambda m, s, t: m(s, t[:, 1:])),
    "features": ("Transformer", lambda m, s, t: m(s[..., 1:], t)),
    "feature size": ("TransformerEncoderLayer", lambda m, s, t: m(s[..., 1:])),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_those_of_torch(call):
    name, f = BAD_CALLS[call]
    ours, theirs = pair(name)
    source, target = torch.randn(S, N, E), torch.randn(T, N, E)
    assert_same_error(lambda: f(ours, source, target), lambda: f(theirs, source, target))


@pytest.mark.parametrize("name", CLASSES)
def test_constructor_errors_are_those_of_torch(name):
    assert_same_error(lambda: build(fnn, name, activation="tanh"), lambda: build(nn, name, activation="tanh"))
    assert_same_error(lambda: build(fnn, name, bogus=1), lambda: build(nn, name, bogus=1))


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
def test_nested_tensor_option_gives_no_advice(enable_nested_tensor):
    layer = build(fnn, "TransformerEncoderLayer", batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = fnn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor, mask_check=False)
        fnn.TransformerEncoder(build(fnn, "TransformerEncoderLayer", norm_first=True), 2)  # torch.nn warns
        fnn.Transformer(E, H, 1, 1, 16)  # torch.nn warns
    assert encoder.enable_nested_tensor is enable_nested_tensor


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerEncoder"])
def test_nested_tensors_are_refused(name):
    jagged = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match="got a nested tensor"):
        build(fnn, name, batch_first=True)(jagged)


def test_custom_encoder_and_decoder_are_used_as_they_are():
    encoder, decoder = build(nn, "TransformerEncoder"), build(nn, "TransformerDecoder")
    model = fnn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert model(*inputs("Transformer")).shape == (T, N, E)


def test_generate_square_subsequent_mask():
    assert torch.equal(fnn.Transformer.generate_square_subsequent_mask(4), causal(4))


# --- living in a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", CLASSES)
def test_copies(name, copier):
    layer = build(fnn, name)
    twin = copier(layer)
    args = inputs(name)
    assert [type(m) for m in twin.modules()] == [type(m) for m in layer.modules()]
    assert torch.equal(layer(*args), twin(*args))


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_autocast(name):
    ours, theirs = pair(name)
    ours.load_state_dict(theirs.state_dict())
    exact, pool = copy.deepcopy(theirs).double(), Pool()
    kwargs = masks(name, "bool + bool")
    for _ in range(4 * DRAWS):
        args = inputs(name)
        expected = exact(*cast(args, torch.float64), **kwargs)
        with torch.autocast("cpu", torch.bfloat16):
            out, eager = ours(*args, **kwargs), theirs(*args, **kwargs)
        assert out.dtype == eager.dtype
        pool.add("output", out, expected, eager)
    pool.check()
    out.float().sum().backward()  # pyright: ignore[reportPossiblyUnboundVariable]
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("name", ["TransformerEncoder", "Transformer"])
def test_compiles_without_graph_breaks(name):
    torch.compiler.reset()
    ours = build(fnn, name, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    args, kwargs = inputs(name, batch_first=True), masks(name, "causal padding")
    if name == "Transformer":
        kwargs["tgt_is_causal"] = True  # one stack told, the other not
    exact, eager = run(copy.deepcopy(ours).double(), *cast((args, kwargs), torch.float64)), run(ours, args, kwargs)
    for (what, a), b, c in zip(run(compiled, args, kwargs).items(), exact.values(), eager.values(), strict=True):
        assert_parity(a, b, c, what, intermediate=b)


def test_training_step_has_the_losses_of_torch():
    """Ten steps from the same weights."""
    torch.manual_seed(1)
    theirs = build(nn, "Transformer", batch_first=True)
    ours = build(fnn, "Transformer", batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    args = inputs("Transformer", batch_first=True)
    losses = []
    for model, dtype in ((ours, torch.float32), (copy.deepcopy(theirs), torch.float64), (theirs, torch.float32)):
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        history = []
        for _ in range(10):
            out = model(*(x.to(dtype) for x in args), tgt_mask=causal(T, dtype), tgt_is_causal=True)
            loss = F.mse_loss(out, args[1].to(dtype).flip(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    assert losses[0][-1] < losses[0][0]
    assert_parity(losses[0], losses[1], losses[2], "losses")


# --- the samples in the torch wheel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [n for n in CLASSES if n != "TransformerDecoder"])  # it has no samples
def test_samples_of_torch(name, training):
    modules = pytest.importorskip(
        "torch.testing._internal.common_modules",
        reason="torch's samples need the package expecttest",
        exc_type=ImportError,
    )
    (info,) = [m for m in modules.module_db if m.module_cls is getattr(nn, name)]
    samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=training)
    assert len(samples) >= 32
    pool = Pool()
    for sample in samples:
        construct, forward = sample.constructor_input, sample.forward_input
        ours = getattr(fnn, name)(*construct.args, **construct.kwargs).train(training)
        theirs = getattr(nn, name)(*construct.args, **construct.kwargs).train(training)
        ours.load_state_dict(theirs.state_dict())
        exact = copy.deepcopy(theirs).double()
        with fast_path_off():
            actual, eager = ours(*forward.args, **forward.kwargs), theirs(*forward.args, **forward.kwargs)
            expected = exact(*cast(forward.args, torch.float64), **forward.kwargs)
        pool.add("output", actual, expected, eager)
        if sample.reference_fn is not None:  # with a batch dimension, or in evaluation
            pool.add("reference", sample.reference_fn(ours, *forward.args, **forward.kwargs), expected, eager)
    pool.check()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
@torch.no_grad()
def test_steps_over_a_cache_are_the_full_forward(name, norm_first, batch_first):
    """At every position, with padded sources of which one is nothing but padding, after a prompt of three."""
    stack = build(fnn, name, norm_first=norm_first, batch_first=batch_first).eval()
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    source_padding = torch.arange(S) >= torch.tensor([S, 5, 0])[:, None]
    pool = Pool()
    for _ in range(DRAWS):
        x, memory = torch.randn(N, T, E), torch.randn(N, S, E)
        inputs, options = [x], {"mask": mask, "is_causal": True}
        if name == "TransformerDecoder":
            inputs.append(memory)
            options = {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": source_padding}
            cache = stack.make_cache(order(memory), T, memory_key_padding_mask=source_padding)
        else:
            cache = stack.make_cache(N, T)
        full = stack(*map(order, inputs), **options)
        steps = [x[:, :3], *x[:, 3:].split(1, dim=1)]
        stepped = torch.cat([order(stack.step(order(part), cache)) for part in steps], dim=1)
        with fast_path_off():
            twin = cast_stack(stack)
            exact = twin(*(order(y.double()) for y in inputs), **cast(options, torch.float64))
        pool.add("output", stepped, order(exact), order(full))
    pool.check()


def cast_stack(stack):
    return copy.deepcopy(stack).double()


def test_steps_over_a_cache_refuse_what_they_cannot_do():
    decoder, encoder = build(fnn, "TransformerDecoder").eval(), build(fnn, "TransformerEncoder").eval()
    memory = torch.randn(S, N, E)
    with pytest.raises(ValueError, match=r"cache: expected one from TransformerDecoder\.make_cache"):
        decoder.step(torch.randn(1, N, E), encoder.make_cache(N, T))
    with pytest.raises(ValueError, match="cache: expected room for 3 more tokens, got 0 of 2"):
        decoder.step(torch.randn(3, N, E), decoder.make_cache(memory, 2))
    for lengths, error, text in (
        (torch.tensor([1, 3, 4]), ValueError, r"lengths: expected 0 to 3, got \[1, 3, 4\]"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, r"lengths\.dtype: expected int32 or int64, got torch\.float32"),
        (torch.tensor([1, 2]), ValueError, r"lengths\.shape: expected \(3,\), got \(2,\)"),
        ([1, 2, 3], TypeError, "lengths: expected a Tensor or None, got list"),
    ):
        for stack, cache in ((encoder, encoder.make_cache(N, T)), (decoder, decoder.make_cache(memory, T))):
            with pytest.raises(error, match=text):
                stack.step(torch.randn(3, N, E), cache, lengths)
            assert cache.length == 0 and not cache.lens.any()
    with pytest.raises(ValueError, match=r"cache\.batch: expected 3 as the input has, got 4"):
        encoder.step(torch.randn(1, N, E), encoder.make_cache(N + 1, T))
    with pytest.raises(ValueError, match="cache: expected one of 2 layers, as the model has, got 1"):
        encoder.step(torch.randn(1, N, E), fnn.KVCache(1, N, T, H, E // H))
    with pytest.raises(ValueError, match=r"memory: expected 3 dimensions, got shape \(3, 16\)"):
        decoder.make_cache(memory[0], T)
    with pytest.raises(TypeError, match=r"memory_key_padding_mask.dtype: expected bool, got torch.float32"):
        decoder.make_cache(memory, T, memory_key_padding_mask=torch.zeros(N, S))
    with pytest.raises(ValueError, match=r"memory_key_padding_mask.shape: expected \(3, 14\), got \(14, 3\)"):
        decoder.make_cache(memory, T, memory_key_padding_mask=torch.zeros(S, N, dtype=torch.bool))

    class Own(fnn.TransformerDecoderLayer):
        def _sa_block(self, *args, **kwargs):
            return super()._sa_block(*args, **kwargs)

    with pytest.raises(TypeError, match="expected every layer to be a TransformerDecoderLayer, layer 0 overrides _sa"):
        fnn.TransformerDecoder(Own(E, H), 1).make_cache(memory, T)
    theirs = fnn.TransformerDecoder(nn.TransformerDecoderLayer(E, H), 1)
    with pytest.raises(TypeError, match="expected every layer to be a TransformerDecoderLayer, layer 0 is a"):
        theirs.make_cache(memory, T)
    training = build(fnn, "TransformerEncoder", dropout=0.1).train()
    with pytest.raises(RuntimeError, match="step: expected evaluation mode"):
        training.step(torch.randn(1, N, E), training.make_cache(N, T))
    with pytest.raises(ValueError, match="step: expected 3 dimensions"):
        encoder.step(torch.randn(N, E), encoder.make_cache(N, T))

"""Weights of torch.nn's Transformers in ours and back: the same results, the same bits, and nothing by guess."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn.nn as fnn
from fastattn.nn import Decoder, Encoder, EncoderDecoder, EncoderDecoderConfig, TransformerConfig
from tests.support.layer_checks import Pool, fast_path_off, padding

E, HEADS, HIDDEN = 16, 4, 24
LENGTHS, SOURCE, TARGET = (7, 5, 2), 7, 6
OPTIONS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-3},
    "no bias": {"bias": False, "activation": nn.GELU("tanh")},
    "silu": {"norm_first": True, "bias": False, "activation": F.silu},
}


def made(kind, package=nn, final_norm=True, num_layers=2, **options):
    """A module of torch.nn, or its drop-in, with weights that all matter."""
    options = {"dim_feedforward": HIDDEN, "batch_first": True, **options}
    if kind == "Transformer":
        module = package.Transformer(E, HEADS, num_layers, num_layers, **options)
    else:
        layer = getattr(package, f"{kind}Layer")(E, HEADS, **options)
        norm = nn.LayerNorm(E, options.get("layer_norm_eps", 1e-5), bias=options.get("bias", True))
        module = getattr(package, kind)(layer, num_layers, norm if final_norm else None)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def theirs(module, source, target):
    """The output of torch.nn's module, where it counts; source is padded behind LENGTHS."""
    ignored = padding(LENGTHS, SOURCE)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET, dtype=source.dtype)
    if isinstance(module, nn.TransformerEncoder):
        return module(source, src_key_padding_mask=ignored)[~ignored]
    inputs = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": ignored}
    if isinstance(module, nn.TransformerDecoder):
        return module(target, source, **inputs)
    return module(source, target, src_key_padding_mask=ignored, **inputs)


def ours(stacks, source, target):
    lengths = torch.tensor(LENGTHS)
    if isinstance(stacks, Encoder):
        return stacks(source, lengths=lengths)[~padding(LENGTHS, SOURCE)]
    if isinstance(stacks, Decoder):
        return stacks(target, source, memory_lengths=lengths)
    encoder, decoder = stacks
    return decoder(target, encoder(source, lengths=lengths), memory_lengths=lengths)


def state_dict(stacks):
    """In torch.nn's names, also of what a Transformer became."""
    if not isinstance(stacks, tuple):
        return fnn.torch_state_dict(stacks)
    names = zip(("encoder.", "decoder."), stacks, strict=True)
    return {prefix + name: x for prefix, stack in names for name, x in fnn.torch_state_dict(stack).items()}


def with_gradients(run, models, source, target):
    """The output, and the gradients of its sum of squares by the names of torch.nn."""
    output = run(models, source, target)
    output.square().sum().backward()
    gradients = copy.deepcopy(models)
    pairs = zip(*(m if isinstance(m, tuple) else (m,) for m in (models, gradients)), strict=True)
    for model, holder in pairs:
        for parameter, place in zip(model.parameters(), holder.parameters(), strict=True):
            place.data = parameter.grad
    return {"output": output.detach()} | (state_dict(gradients) if run is ours else gradients.state_dict())


def flat(results, order):
    return torch.cat([results[name].flatten() for name in order])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["TransformerEncoder", "TransformerDecoder", "Transformer"])
def test_results_of_torch(kind, options):
    module = made(kind, **OPTIONS[options])
    pool = Pool()
    for _ in range(3):
        inputs = torch.randn(len(LENGTHS), SOURCE, E), torch.randn(len(LENGTHS), TARGET, E)
        with fast_path_off():
            expected = with_gradients(theirs, copy.deepcopy(module).double(), *(x.double() for x in inputs))
            eager = with_gradients(theirs, copy.deepcopy(module), *inputs)
        actual = with_gradients(ours, fnn.from_torch(module), *inputs)
        assert actual.keys() == expected.keys()
        # All gradients in one: a rounding reaches every parameter, and the share of one with few elements is luck.
        pool.add("output", *(found.pop("output") for found in (actual, expected, eager)))
        pool.add("gradients", *(flat(found, expected) for found in (actual, expected, eager)))
    pool.check()


@pytest.mark.parametrize("package", [nn, fnn], ids=["torch.nn", "fastattn.nn"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["TransformerEncoder", "TransformerDecoder", "Transformer"])
def test_round_trip_is_exact(kind, options, package):
    module = made(kind, package, **OPTIONS[options])
    back, own = state_dict(fnn.from_torch(module)), module.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


def test_without_final_norm():
    module = made("TransformerEncoder", final_norm=False, norm_first=True)
    stack = fnn.from_torch(module)
    assert stack.norm is None and stack.config.final_norm is False
    assert fnn.torch_state_dict(stack).keys() == module.state_dict().keys()


def test_dtype_and_mode_are_kept_and_memory_is_not_shared():
    module = made("TransformerEncoder", dropout=0.25).to(torch.bfloat16).train()
    state = torch.get_rng_state()
    stack = fnn.from_torch(module)
    assert torch.equal(torch.get_rng_state(), state), "weights were drawn at random"
    assert stack.training and not fnn.from_torch(module.eval()).training
    assert {p.dtype for p in stack.parameters()} == {torch.bfloat16}
    assert stack.config.dropout == 0.25
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
        for x in fnn.torch_state_dict(stack).values():
            x.fill_(1.0)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert all(not p.any() for p in stack.parameters())


@pytest.mark.parametrize("position", [None, fnn.Sinusoidal(32), fnn.Learned(32)], ids=["none", "sinusoidal", "learned"])
def test_encoder_decoder(position):
    """Both stacks come from a torch.nn.Transformer; what it does not have stays as it is."""
    module = made("Transformer")
    stacks = [dataclasses.replace(stack.config, position=position) for stack in fnn.from_torch(module)]
    config = EncoderDecoderConfig(encoder=stacks[0], decoder=stacks[1], source_vocab_size=9, target_vocab_size=11)
    model = EncoderDecoder(config).eval()
    before = copy.deepcopy(model.state_dict())
    fnn.load_torch_state_dict(model, module.state_dict())
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    kept = {"source_embedding.weight", "target_embedding.weight", "head.weight"}
    if isinstance(position, fnn.Learned):
        kept |= {"encoder.position.table", "decoder.position.table"}
    assert changed == model.state_dict().keys() - kept
    back = fnn.torch_state_dict(model)
    assert back.keys() == module.state_dict().keys()
    assert all(torch.equal(x, back[name]) for name, x in module.state_dict().items())


def test_causal_encoder_is_a_decoder():
    """Language models on torch.nn are encoders with a causal mask: `Decoder` without cross-attention."""
    module = made("TransformerEncoder", norm_first=True)
    decoder = Decoder(fnn.from_torch(module).config).eval()
    fnn.load_torch_state_dict(decoder, module.state_dict())
    pool = Pool()
    for _ in range(3):
        x = torch.randn(2, TARGET, E)
        with fast_path_off(), torch.no_grad():
            mask = nn.Transformer.generate_square_subsequent_mask(TARGET)
            expected = copy.deepcopy(module).double()(x.double(), mask.double())
            pool.add("output", decoder(x), expected, module(x, mask))
    pool.check()
    assert fnn.torch_state_dict(decoder).keys() == module.state_dict().keys()


def test_weights_that_do_not_fit_are_named():
    module = made("TransformerEncoder")
    stack = fnn.from_torch(module)
    weights = module.state_dict()
    weights["layers.1.linear1.weight"] = torch.zeros(HIDDEN + 1, E)
    weights["extra.weight"] = torch.zeros(1)
    del weights["norm.bias"], weights["layers.0.self_attn.in_proj_weight"]
    before = copy.deepcopy(stack.state_dict())
    with pytest.raises(ValueError) as error:
        fnn.load_torch_state_dict(stack, weights)
    assert str(error.value) == (
        "weights: expected exactly those of the model, got no layers.0.self_attn.in_proj_weight, norm.bias; "
        "also extra.weight; layers.1.linear1.weight of shape (25, 16), not (24, 16)"
    )
    assert all(torch.equal(x, before[name]) for name, x in stack.state_dict().items())


def test_weights_without_data():
    with pytest.raises(ValueError, match=r"norm\.bias on the meta device, without data"):
        fnn.from_torch(made("TransformerEncoder").to("meta"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm": "rms"}, "norm: expected 'layer' for torch.nn, got 'rms'"),
        ({"activation": "swiglu"}, "activation: expected one without a gate for torch.nn, got 'swiglu'"),
        ({"position": fnn.RoPE()}, "position: expected Learned, Sinusoidal or None for torch.nn, got RoPE"),
        ({"position": fnn.ALiBi()}, "position: expected Learned, Sinusoidal or None for torch.nn, got ALiBi"),
        ({"num_kv_heads": 2}, "num_kv_heads: expected 4 for torch.nn, got 2"),
        ({"head_dim": 8}, r"head_dim \* num_heads: expected 16 for torch.nn, got 32"),
        ({"qk_norm": True}, "qk_norm: expected False for torch.nn, got True"),
        ({"window": (3, 0)}, r"window: expected None for torch.nn, got \(3, 0\)"),
        ({"softcap": 2.0}, "softcap: expected None for torch.nn, got 2.0"),
        ({"sinks": True}, "sinks: expected False for torch.nn, got True"),
    ],
)
def test_what_torch_does_not_have(changes, message):
    options = {"norm": "layer", "activation": "relu", "position": None, **changes}
    stack = Encoder(TransformerConfig(d_model=E, num_layers=1, num_heads=HEADS, **options))
    with pytest.raises(ValueError, match=message):
        fnn.torch_state_dict(stack)
    with pytest.raises(ValueError, match=message):
        fnn.load_torch_state_dict(stack, {})


class Doubled(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def replaced(path, value, kind="TransformerDecoder"):
    """A stack with something else at a path inside it."""
    module = made(kind)
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
    return module


def attention(**options):
    return nn.MultiheadAttention(E, HEADS, 0.1, batch_first=True, **options)


@pytest.mark.parametrize(
    "module, error, message",
    [
        (lambda: nn.Linear(2, 2), TypeError, "module: expected Transformer or .*, not a subclass, got Linear"),
        (lambda: nn.TransformerEncoder(Doubled(E, HEADS), 1), TypeError, r"layers\.0: expected .*, got Doubled"),
        (
            lambda: replaced("layers.1.forward", lambda x: x),
            TypeError,
            r"layers\.1: expected the forward of its class",
        ),
        (lambda: replaced("norm", nn.RMSNorm(E)), TypeError, "norm: expected LayerNorm, .* got RMSNorm"),
        (lambda: replaced("layers.0.norm2", nn.Identity()), TypeError, r"layers\.0\.norm2: expected LayerNorm"),
        (lambda: replaced("layers", nn.ModuleList()), ValueError, "layers: expected at least one, got none"),
        (lambda: replaced("norm.eps", 1e-3), ValueError, r"norm\.eps: expected 1e-05 as in the layers, got 0\.001"),
        (
            lambda: replaced("layers.1.norm3.eps", 1e-3),
            ValueError,
            r"layers\.1\.norm3: expected eps == 1e-05 as in layers\.1\.norm1, got 0\.001",
        ),
        (
            lambda: replaced("layers.1.activation", F.gelu),
            ValueError,
            r"layers\.1: expected activation == 'relu' as in layers\.0, got 'gelu'",
        ),
        (
            lambda: replaced("layers.1.activation", torch.tanh),
            ValueError,
            r"layers\.1\.activation: expected relu, gelu or silu .*, got .*tanh",
        ),
        (
            lambda: replaced("layers.0.dropout2.p", 0.5),
            ValueError,
            r"layers\.0\.dropout2: expected dropout == 0\.1 as in layers\.0\.dropout, got 0\.5",
        ),
        (
            lambda: replaced("layers.0.multihead_attn", attention(kdim=8)),
            ValueError,
            r"layers\.0\.multihead_attn: expected kdim == vdim == embed_dim",
        ),
        (
            lambda: replaced("layers.0.self_attn", attention(add_bias_kv=True)),
            ValueError,
            r"layers\.0\.self_attn: expected add_bias_kv == False",
        ),
        (
            lambda: replaced("layers.0.self_attn", attention(add_zero_attn=True)),
            ValueError,
            r"layers\.0\.self_attn: expected add_zero_attn == False",
        ),
        (
            lambda: replaced("layers.0.linear2", nn.Linear(HIDDEN, E, bias=False)),
            ValueError,
            r"got no layers\.0\.linear2\.bias",
        ),
    ],
)
def test_modules_that_are_refused(module, error, message):
    with pytest.raises(error, match=message):
        fnn.from_torch(module())


def test_models_that_are_refused():
    for call in (fnn.torch_state_dict, lambda model: fnn.load_torch_state_dict(model, {})):
        with pytest.raises(TypeError, match="model: expected Encoder, Decoder or EncoderDecoder, got Linear"):
            call(nn.Linear(2, 2))

"""Models of Hugging Face transformers as `CausalLM`: their logits and gradients, their bits back, and no guess."""

import copy
import dataclasses
import functools
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

from benchmarks.harness.models import Float64  # noqa: E402
from fastattn.integrations import huggingface_weights  # noqa: E402
from fastattn.nn import CausalLM, SlidingWindowCache  # noqa: E402
from fastattn.testing import assert_parity  # noqa: E402

VOCAB, LENGTH, WINDOW = 99, 12, 4
LENGTHS = (12, 9, 5)  # of the sequences of a batch; the window is shorter than each
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
DEFAULT = {"rope_type": "default", "rope_theta": 1e3}
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama all heads": ("Llama", {"num_key_value_heads": 4, "rope_parameters": DEFAULT}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("Llama", {"head_dim": 16, "hidden_act": "gelu"}),
    "llama linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral full": ("Mistral", {"sliding_window": None}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 window": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "gpt2": ("GPT2", {}),
    "gpt2 untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"}),
}


def made(kind, **options):
    """A tiny model with weights that all matter, on transformers' own eager attention."""
    config = getattr(transformers, f"{kind}Config")(**{**(GPT2_SIZES if kind == "GPT2" else SIZES), **options})
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@functools.cache
def built(name):
    kind, options = MODELS[name]
    return made(kind, **options)


def batch(padded):
    """Tokens, the arguments that tell either model about padding, and which logits count."""
    tokens = torch.randint(VOCAB, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(1))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        valid = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    return tokens, {"attention_mask": valid.long()} if padded else {}, valid


def in_double(model):
    """The model in float64, tables of rotations included: call it in `Float64`."""
    with Float64():
        exact = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").double().eval()
    exact.load_state_dict(model.state_dict())
    return exact


def with_gradients(model, logits, tokens, valid, padding):
    """Logits where they count, and the gradients of their sum of squares, in transformers' order and in one vector."""
    ours = isinstance(model, CausalLM)
    out = (model(tokens) if ours else model(tokens, **padding, use_cache=False).logits)[valid]
    out.square().sum().backward()
    if ours:
        holder, gradients = copy.deepcopy(logits), copy.deepcopy(model)
        for parameter, place in zip(model.parameters(), gradients.parameters(), strict=True):
            place.data = parameter.grad
        huggingface_weights.export(gradients, holder)
        return out.detach(), torch.cat([p.detach().flatten() for p in holder.parameters()])
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, padded):
    """Causal order hides padding on the right, so ours needs no word of it."""
    model = built(name)
    tokens, padding, valid = batch(padded)
    with Float64():
        expected = with_gradients(in_double(model), None, tokens, valid, padding)
    eager = with_gradients(copy.deepcopy(model), None, tokens, valid, padding)
    actual = with_gradients(huggingface_weights.load(model), model, tokens, valid, padding)
    for what, ours, exact, plain in zip(("logits", "gradients"), actual, expected, eager, strict=True):
        assert_parity(ours, exact, plain, what, intermediate=exact.abs().max())


@pytest.mark.parametrize("name", ["llama", "llama yarn", "mistral", "qwen3", "gpt2"])
def test_cached_decoding(name):
    """A prompt padded on the right, then token by token: the logits of one pass over each sequence."""
    model = built(name)
    ours = huggingface_weights.load(model)
    tokens, _, _ = batch(False)
    prompts, steps = torch.tensor([6, 4, 1]), 5
    sliding = name == "mistral"
    options = {"kind": SlidingWindowCache, "window": WINDOW - 1, "chunk": 4} if sliding else {}
    cache = ours.make_cache(len(LENGTHS), LENGTH, **options)
    rows = torch.arange(len(LENGTHS))
    with torch.no_grad():
        got = [ours.prefill(tokens[:, :6], cache, lengths=prompts)]
        for step in range(steps):
            got.append(ours(tokens[rows, prompts + step][:, None], cache=cache)[:, 0])
        eager = model(tokens).logits
        with Float64():
            expected = in_double(model)(tokens).logits
    places = prompts[:, None] - 1 + torch.arange(steps + 1)
    actual, expected, eager = torch.stack(got, 1), expected[rows[:, None], places], eager[rows[:, None], places]
    assert_parity(actual, expected, eager, name, intermediate=expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name):
    model = built(name)
    target = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    huggingface_weights.export(huggingface_weights.load(model), target)
    back = target.state_dict()
    assert all(torch.equal(back[name], x) for name, x in model.state_dict().items())


def test_dtype_mode_and_ties_are_kept_and_memory_is_not_shared():
    model = copy.deepcopy(built("llama tied")).to(torch.bfloat16).train()
    state = torch.get_rng_state()
    ours = huggingface_weights.load(model)
    assert torch.equal(torch.get_rng_state(), state), "weights were drawn at random"
    assert ours.training and not huggingface_weights.load(model.eval()).training
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.head.weight is ours.embedding.weight
    untied = huggingface_weights.load(built("llama"))
    assert untied.head.weight is not untied.embedding.weight
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "qwen3"])
def test_checkpoint(name, tmp_path):
    model = built(name)
    model.save_pretrained(tmp_path)
    expected, got = huggingface_weights.load(model), huggingface_weights.load(tmp_path)
    assert got.config == expected.config
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in got.state_dict().items())
    half = huggingface_weights.load(str(tmp_path), dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_checkpoint_that_does_not_fit(change, tmp_path):
    from safetensors.torch import load_file, save_file

    built("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    else:
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    name = "layers.1.mlp.up_proj.weight" if change == "missing" else "layers.0.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=rf"expected the weights of LlamaForCausalLM, got {change}_keys .*{name}"):
        huggingface_weights.load(tmp_path)


@pytest.mark.parametrize(
    "config, error, message",
    [
        (lambda: transformers.Qwen2Config(), TypeError, "expected LlamaForCausalLM, .* got .*Qwen2ForCausalLM"),
        (lambda: transformers.T5Config(), TypeError, "expected LlamaForCausalLM, .* got .*T5Config"),
        (lambda: transformers.LlamaConfig(attention_bias=True), ValueError, "attention_bias: expected biases"),
    ],
)
def test_checkpoint_is_refused_before_its_weights_are_read(config, error, message, tmp_path):
    config().save_pretrained(tmp_path)  # no weights here: to read them would be another error
    with pytest.raises(error, match=message):
        huggingface_weights.load(tmp_path, dtype=torch.float16)


def test_weights_that_do_not_fit_are_named():
    model = copy.deepcopy(built("llama"))
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(32, 32, bias=True)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 47, bias=False)
    del model.model.norm
    with pytest.raises(ValueError) as error:
        huggingface_weights.load(model)
    assert str(error.value) == (
        "weights: expected exactly those of the model, got no model.norm.weight; "
        "also model.layers.1.self_attn.o_proj.bias; "
        "model.layers.0.mlp.up_proj.weight of shape (47, 32), not (48, 32)"
    )


def test_head_that_is_not_tied():
    model = copy.deepcopy(built("llama"))
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"lm_head\.weight: expected the embedding, as tie_word_embeddings says"):
        huggingface_weights.load(model)


# ---- rotations ----

ROPES = {
    "default": DEFAULT,
    "linear": LINEAR,
    "llama3": LLAMA3 | {"original_max_position_embeddings": 8192},
    "llama3 other band": LLAMA3 | {"original_max_position_embeddings": 2048, "low_freq_factor": 2.0, "factor": 3.0,
                                   "high_freq_factor": 9.0},
    "yarn": YARN | {"original_max_position_embeddings": 4096},
    "yarn theta": YARN | {"original_max_position_embeddings": 4096, "rope_theta": 1e6, "factor": 4.0},
    "yarn short": YARN,
    "yarn factor 1": YARN | {"factor": 1.0},
    "yarn betas": YARN | {"original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 3},
    "yarn attention_factor": YARN | {"attention_factor": 0.75},
    "yarn mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn mscale and attention_factor": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.5},
    "yarn mscale alone": YARN | {"mscale": 0.7},
    "yarn mscale factor 1": YARN | {"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_attention_factor(name, head_dim):
    """Against the functions by which transformers computes them; each frequency by its own size."""
    model = made("Llama", rope_parameters=dict(ROPES[name]), head_dim=head_dim, num_hidden_layers=1)
    rotary = type(model.model.rotary_emb)
    with Float64():
        exact = rotary(model.config)
    plain = rotary(model.config)
    assert exact.inv_freq.dtype == torch.float64
    cos, sin = huggingface_weights.load(model).config.position.tables(torch.tensor([1]), head_dim)
    cos, sin = cos[0].double(), sin[0].double()
    angle, magnitude = torch.atan2(sin, cos).float(), torch.hypot(sin, cos)
    one = torch.ones(head_dim // 2, dtype=torch.float64)
    assert_parity((angle / exact.inv_freq).float(), one, (plain.inv_freq / exact.inv_freq).float(), "frequency")
    assert_parity(magnitude.float(), one * exact.attention_scaling, (one * plain.attention_scaling).float(), "factor")


# ---- what is refused ----


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("Llama", {"hidden_act": "relu"}, "hidden_act: expected one of 'silu', 'gelu', got 'relu'"),
        ("Llama", {"attention_bias": True}, "attention_bias: expected biases everywhere or nowhere, got True"),
        ("Llama", {"mlp_bias": True}, "attention_bias: expected biases .*, got False, mlp_bias True"),
        ("Qwen3", {"attention_bias": True}, "attention_bias: expected biases everywhere or nowhere"),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout: expected 0.0 for CausalLM, got 0.1"),
        ("Llama", {"is_causal": False}, "is_causal: expected True"),
        ("Llama", {"rope_parameters": DEFAULT | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type.*'dynamic'"),
        (
            "Llama",
            {
                "rope_parameters": DEFAULT
                | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
                   "original_max_position_embeddings": 32}
            },
            "rope_type.*'longrope'",
        ),
        ("Llama", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor.*expected 1.0"),
        ("Llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate.*expected True, got False"),
        ("Llama", {"rope_parameters": LINEAR | {"beta_fast": 3}}, "expected factor for .*, got factor, beta_fast"),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
            "layer_types: expected one kind for all layers, got full_attention, sliding_attention",
        ),
        ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected False"),
        ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights: expected True"),
        ("GPT2", {"add_cross_attention": True}, "add_cross_attention: expected False"),
        ("GPT2", {"activation_function": "tanh"}, "activation_function: expected one of .*, got 'tanh'"),
        ("GPT2", {"attn_pdrop": 0.0}, "attn_pdrop: expected 0.1 for CausalLM, got 0.0"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=rf"config\..*{message}"):
        huggingface_weights.load(made(kind, **options))


def test_classes_that_are_refused():
    class Mine(transformers.LlamaForCausalLM):
        pass

    expected = "model: expected LlamaForCausalLM, .*GPT2LMHeadModel of transformers, not a subclass, got "
    for model, name in (
        (Mine(built("llama").config), "Mine"),
        (made("Qwen2"), "Qwen2ForCausalLM"),
        (built("llama").model, "LlamaModel"),
        (torch.nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(TypeError, match=f"{expected}.*{name}"):
            huggingface_weights.load(model)
    with pytest.raises(TypeError, match="options: expected none with an existing model, got dtype"):
        huggingface_weights.load(built("llama"), dtype=torch.float16)
    with pytest.raises(TypeError, match=r"model: expected fastattn\.nn\.CausalLM, got LlamaForCausalLM"):
        huggingface_weights.export(built("llama"), built("llama"))
    with pytest.raises(TypeError, match=f"{expected}.*LlamaModel"):
        huggingface_weights.export(huggingface_weights.load(built("llama")), built("llama").model)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("llama", {"rope_parameters": LINEAR}, "position"),
        ("llama", {"rms_norm_eps": 0.5}, "norm_eps == 1e-06, got 0.5"),
        ("llama", {"tie_word_embeddings": True}, "tie_embeddings == False, got True"),
        ("mistral", {"sliding_window": 9}, r"window == \(3, 0\), got \(8, 0\)"),
        ("gpt2", {"activation_function": "gelu"}, "activation == 'gelu_tanh', got 'gelu'"),
    ],
)
def test_export_into_a_model_that_computes_something_else(name, options, message):
    ours = huggingface_weights.load(built(name))
    with pytest.raises(ValueError, match=rf"hf_model\.config: expected what means .*{message}"):
        huggingface_weights.export(ours, made(MODELS[name][0], **options))


def test_export_of_a_model_made_here():
    """Not loaded: a config that says less, by its defaults, means the same."""
    model = built("llama all heads")
    config = huggingface_weights.load(model).config
    said_less = dataclasses.replace(config, num_kv_heads=None, head_dim=None, final_norm=True, dropout=0.1)
    ours = CausalLM(said_less).eval()
    target = copy.deepcopy(model)
    huggingface_weights.export(ours, target)
    tokens, _, _ = batch(False)
    with torch.no_grad(), Float64():
        expected = in_double(target)(tokens).logits
    with torch.no_grad():
        assert_parity(ours(tokens), expected, target(tokens).logits, intermediate=expected.abs().max())

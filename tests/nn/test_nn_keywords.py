"""Keywords that other packages use: every layer and config says what they are called here."""

import inspect
import re

import pytest
import torch
from torch import nn

import fastattn.nn as fnn

X = torch.zeros(2, 3, 8)
LAYER = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
ENCODER_LAYER, DECODER_LAYER = fnn.TransformerEncoderLayer(**LAYER), fnn.TransformerDecoderLayer(**LAYER)
CONFIG = fnn.TransformerConfig(d_model=8, num_heads=2, num_layers=1)

# What is called with which arguments.
CONSTRUCTORS = {
    "MultiheadAttention": (fnn.MultiheadAttention, {"embed_dim": 8, "num_heads": 2}),
    "TransformerEncoderLayer": (fnn.TransformerEncoderLayer, LAYER),
    "TransformerDecoderLayer": (fnn.TransformerDecoderLayer, LAYER),
    "TransformerEncoder": (fnn.TransformerEncoder, {"encoder_layer": ENCODER_LAYER, "num_layers": 1}),
    "TransformerDecoder": (fnn.TransformerDecoder, {"decoder_layer": DECODER_LAYER, "num_layers": 1}),
    "Transformer": (fnn.Transformer, {**LAYER, "num_encoder_layers": 1, "num_decoder_layers": 1}),
}
CONFIGS = {
    "TransformerConfig": (fnn.TransformerConfig, {}),
    "CausalLMConfig": (fnn.CausalLMConfig, {"vocab_size": 5}),
    "EncoderDecoderConfig": (
        fnn.EncoderDecoderConfig, {"encoder": CONFIG, "decoder": CONFIG, "source_vocab_size": 5},
    ),
}  # fmt: skip
INPUTS = {
    "MultiheadAttention": {"query": X, "key": X, "value": X},
    "TransformerEncoderLayer": {"src": X},
    "TransformerDecoderLayer": {"tgt": X, "memory": X},
    "TransformerEncoder": {"src": X},
    "TransformerDecoder": {"tgt": X, "memory": X},
    "Transformer": {"src": X, "tgt": X},
}
WORDS = ("softmax_scale", "attn_mask", "is_causal", "causal", "window_size", "return_attn_probs", "key_padding_mask")


def refused(call, arguments, word, owner):
    call(**arguments)
    with pytest.raises(TypeError) as error:
        call(**arguments, **{word: None})
    text = str(error.value)
    assert text.startswith(f"{owner}() got an unexpected keyword argument {word!r}; here it is "), text
    return text


@pytest.mark.parametrize("word", ["softmax_scale", "is_causal", "causal", "window_size", "return_attn_probs"])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name, word):
    refused(*CONSTRUCTORS[name], word, f"{name}.__init__")


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", INPUTS)
def test_forward(name, word):
    make, arguments = CONSTRUCTORS[name]
    layer = make(**arguments)
    if word not in inspect.signature(layer.forward).parameters:
        refused(layer, INPUTS[name], word, f"{name}.forward")


@pytest.mark.parametrize("word", ["softmax_scale", "is_causal", "window_size", "hidden_size", "rope_theta"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, word):
    refused(*CONFIGS[name], word, f"{name}.__init__")


@pytest.mark.parametrize("word", ["softmax_scale", "attn_mask", "is_causal", "window_size", "return_attn_probs"])
def test_todays_layers(word):
    for make, arguments in ((fnn.Attention, {"x": X}), (fnn.Encoder, {"x": X}), (fnn.Decoder, {"x": X})):
        refused(make(CONFIG), arguments, word, f"{make.__name__}.forward")


def test_a_word_of_nobody_is_refused_without_a_cure():
    with pytest.raises(TypeError, match=r"^MultiheadAttention\.__init__\(\) got .* 'nonsense'$"):
        fnn.MultiheadAttention(8, 2, nonsense=1)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_the_cures_exist(name):
    """What a layer's error names first is an argument of the layer, or named with its owner."""
    make, arguments = CONSTRUCTORS[name]
    for call, given, owner in (
        (make, arguments, f"{name}.__init__"), (make(**arguments), INPUTS[name], f"{name}.forward"),
    ):  # fmt: skip
        parameters = inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
        for word in ("x", "hidden_size", "n_heads", "dropout_p", "is_causal", "mask", "attention_mask"):
            if word in parameters:
                continue
            with pytest.raises(TypeError) as error:
                call(**given, **{word: None})
            _, _, cure = str(error.value).partition("; here it is ")
            assert str(error.value).startswith(owner)
            first = re.match(r"\w+", cure)
            assert not first or first[0] in parameters or " of " in cure, cure

"""Models of Hugging Face transformers with ``attn_implementation="fastattn"``: the results of their own eager code."""

import copy
import functools
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

import fastattn  # noqa: E402
from benchmarks.harness.models import Float64  # noqa: E402
from fastattn import BlockMask  # noqa: E402
from fastattn.integrations import huggingface, huggingface_eager  # noqa: E402
from fastattn.integrations.huggingface_mask import PatternMask  # noqa: E402
from fastattn.testing import assert_parity  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH, WINDOW = 99, 12, 4
LENGTHS = (12, 9, 5)  # of the sequences of a batch; the window is shorter than each
DECODERS = ("llama", "gpt2", "mistral", "gemma2", "gpt_oss", "llama4")
ENCODER_DECODERS = ("t5", "bart", "whisper")
MODELS = (*DECODERS, *ENCODER_DECODERS, "bert")


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()
    yield
    huggingface.unregister()


@functools.cache
def built(name):
    """A model of two layers with weights large enough that attention is far from uniform."""
    t = transformers
    decoder = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    encoder_decoder = {
        "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    }  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    make = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**decoder, sliding_window=WINDOW)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**decoder, sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=8)
        ),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(
                **decoder,
                sliding_window=WINDOW,
                num_local_experts=4,
                num_experts_per_tok=2,
                experts_implementation="eager",
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
        ),
        "llama4": lambda: t.Llama4ForCausalLM(  # a layer with chunks, one without
            t.Llama4TextConfig(
                **decoder,
                intermediate_size_mlp=48,
                num_local_experts=2,
                num_experts_per_tok=1,
                moe_layers=[],
                attention_chunk_size=WINDOW,
                no_rope_layers=[1, 0],
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            )
        ),
        "bert": lambda: t.BertForMaskedLM(
            t.BertConfig(
                vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **special)
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(**encoder_decoder, max_position_embeddings=64, forced_eos_token_id=None, **special)
        ),
        "whisper": lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **encoder_decoder, num_mel_bins=8, max_source_positions=LENGTH, max_target_positions=64, **special
            )
        ),
    }
    torch.manual_seed(0)
    model = make[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in parameter_name:
                parameter.normal_(std=1.0 if "sinks" in parameter_name else 0.2)
    return model


def model_with(name, implementation):
    model = built(name)
    model.set_attn_implementation(implementation)
    return model


def batch(name, padding):
    """Arguments of forward, and which positions of the logits count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(LENGTHS), LENGTH), generator=generator)
    lengths, positions = torch.tensor(LENGTHS)[:, None], torch.arange(LENGTH)
    valid = {
        "none": torch.ones_like(ids, dtype=torch.bool),
        "right": positions < lengths,
        "left": positions >= LENGTH - lengths,
    }[padding]
    mask = {} if padding == "none" else {"attention_mask": valid.long()}
    if name == "whisper":
        features = torch.randn(len(LENGTHS), 8, 2 * LENGTH, generator=generator)
        inputs = {"input_features": features, "decoder_input_ids": ids}
        return inputs | {f"decoder_{key}": value for key, value in mask.items()}, valid
    if name in ENCODER_DECODERS:
        return {"input_ids": ids, **mask, "decoder_input_ids": ids.flip(0)}, torch.ones_like(valid)
    return {"input_ids": ids, **mask}, valid


def run(model, inputs, valid):
    """Logits where they count, and the gradients of all parameters in one vector.

    In one, because a rounding in the logits reaches all of them: one parameter's share of it is a matter of luck.
    """
    dtype = next(model.parameters()).dtype
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    model.zero_grad(set_to_none=True)
    logits = model(**inputs, use_cache=False).logits[valid]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (logits * weights).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients)


def exact(name, inputs, valid):
    model = copy.deepcopy(model_with(name, "eager")).double()
    with Float64():
        return run(model, inputs, valid)


def check(name, inputs, valid):
    """Hold a model on fastattn to the tolerance rule: logits and the gradients of its parameters."""
    expected = exact(name, inputs, valid)
    eager = run(model_with(name, "eager"), inputs, valid)
    actual = run(model_with(name, "fastattn"), inputs, valid)
    for what, ours, value, plain in zip(("logits", "gradients"), actual, expected, eager, strict=True):
        assert_parity(ours, value, plain, what, intermediate=value.abs().max())


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, padding):
    check(name, *batch(name, padding))


def logits(name, implementation, inputs, **options):
    with torch.no_grad():
        return model_with(name, implementation)(**inputs, **options).logits


def assert_same(name, inputs, valid, **options):
    """Logits alone, by the rule."""
    model = copy.deepcopy(model_with(name, "eager")).double()
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    with Float64(), torch.no_grad():
        expected = model(**wide, **options).logits[valid]
    actual, eager = (logits(name, which, inputs, **options)[valid] for which in ("fastattn", "eager"))
    assert_parity(actual, expected, eager, name, intermediate=expected.abs().max())


def test_packed_sequences():
    """Two sequences in one row, told apart by position_ids: as if each stood alone."""
    ids, valid = batch("llama", "none")[0]["input_ids"], torch.ones(len(LENGTHS), LENGTH, dtype=torch.bool)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(len(LENGTHS), -1)
    check("llama", {"input_ids": ids, "position_ids": positions}, valid)
    packed = logits("llama", "fastattn", {"input_ids": ids, "position_ids": positions}, use_cache=False)
    alone = {"input_ids": ids[:, 5:]}
    expected, _ = exact("llama", alone, valid[:, 5:])
    eager = logits("llama", "eager", alone).flatten(0, 1)
    assert_parity(packed[:, 5:].flatten(0, 1), expected, eager, "packed", intermediate=expected.abs().max())


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_of_the_caller(kind):
    """A 4-D mask reaches attention as it is; a float one is added."""
    inputs, valid = batch("llama", "none")
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = torch.randn(len(LENGTHS), 1, LENGTH, LENGTH).masked_fill(~causal, torch.finfo(torch.float32).min)
    if kind == "float":
        return assert_same("llama", inputs | {"attention_mask": scores}, valid)
    mask = (scores > -1.0) | torch.eye(LENGTH, dtype=torch.bool)  # eager adds a mask; its float equal goes there
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours, eager = (logits("llama", "fastattn", inputs | {"attention_mask": m})[valid] for m in (mask, added))
    expected, _ = exact("llama", inputs | {"attention_mask": added}, valid)
    assert_parity(ours, expected, eager, intermediate=expected.abs().max())


def test_decoder_as_an_encoder():
    """`is_causal=False` switches a decoder to both sides, though its layers call themselves causal."""
    for padding in ("none", "right"):
        inputs, valid = batch("llama", padding)
        assert_same("llama", inputs, valid, is_causal=False, use_cache=False)
    model = built("llama")
    model.config.is_causal = False
    try:
        assert_same("llama", *batch("llama", "none"), use_cache=False)
    finally:
        del model.config.is_causal


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prefill_in_chunks(name, static):
    """Several queries behind a cache that already holds keys, and one query in an empty static cache."""
    ids = batch(name, "none")[0]["input_ids"]
    results = {}
    for implementation in ("eager", "fastattn"):
        model = model_with(name, implementation)
        cache = transformers.StaticCache(model.config, max_cache_len=20) if static else transformers.DynamicCache()
        chunks = [
            logits(name, implementation, {"input_ids": chunk}, past_key_values=cache)
            for chunk in ids.split([1, 2, 3, 6], dim=1)
        ]
        results[implementation] = torch.cat(chunks, 1)
    whole = logits(name, "eager", {"input_ids": ids})
    for actual in results.values():  # eager itself is one more witness that the chunks are right
        assert_parity(actual, whole.double(), results["eager"], name, intermediate=whole.abs().max())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generate(name, cache):
    """Greedy decoding, token for token, from prompts of unequal length."""
    inputs, _ = batch(name, "left" if name in DECODERS else "right")
    inputs = {key: x for key, x in inputs.items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options["no_repeat_ngram_size"] = 1  # a small random model would say one token for ever
    if cache == "static":
        options["cache_implementation"] = "static"
    eager, ours = (
        transformers.GenerationMixin.generate(model_with(name, implementation), **inputs, **options)
        for implementation in ("eager", "fastattn")
    )
    assert torch.equal(ours, eager)


# What makes a model special is dropped on the way: the comparison above must notice each.
BROKEN = [
    ("gpt_oss", "s_aux", "none"),
    ("gemma2", "softcap", "none"),
    ("t5", "position_bias", "none"),
    ("mistral", "attention_mask", "none"),
    ("llama", "attention_mask", "left"),
    ("bart", "attention_mask", "right"),
    ("bert", "is_causal", "none"),
]


@pytest.mark.parametrize(("name", "argument", "padding"), BROKEN, ids=["-".join(case) for case in BROKEN])
def test_a_wrong_integration_is_noticed(name, argument, padding):
    def without(module, query, key, value, attention_mask, **kwargs):
        kwargs |= {argument: None} if argument != "is_causal" else {argument: True}
        attention_mask = kwargs.pop("attention_mask", attention_mask)
        kwargs.pop("sliding_window", None)
        return huggingface.attention_forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("fastattn", without)
    try:
        with pytest.raises(AssertionError, match="logits: largest error"):
            check(name, *batch(name, padding))
    finally:
        transformers.AttentionInterface.register("fastattn", huggingface.attention_forward)


def test_window_without_a_mask():
    """Called with is_causal=True and no mask: the window still holds, for a prompt and for one new token."""
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 5)
    layer, options = torch.nn.Identity(), {"is_causal": True, "sliding_window": 3}
    out, weights = huggingface.attention_forward(layer, q, k, v, None, **options)
    expected = fastattn.attention(q, k, v, causal=True, window=(2, 0))
    assert weights is None and out.shape == (1, 9, 4, 5)
    assert torch.equal(out, expected.transpose(1, 2))
    out, _ = huggingface.attention_forward(layer, q[:, :, -1:], k, v, None, **options)
    last = fastattn.attention(q[:, :, -1:], k[:, :, -3:], v[:, :, -3:]).transpose(1, 2)
    assert_parity(out, last.double(), last)
    with pytest.raises(ValueError, match=r"attention_mask: expected a mask where sliding_window == 3.* got None"):
        huggingface.attention_forward(layer, q, k, v, None, sliding_window=3)
    out, _ = huggingface.attention_forward(layer, q, k, v, None, is_causal=False, sliding_window=3)
    assert torch.equal(out, fastattn.attention(q, k, v).transpose(1, 2))  # as in eager code


def diffusion():
    """A DiffusionGemma of one layer of each kind; every expert is chosen, so that rounding chooses none."""
    text = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_experts": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "top_k_experts": 2,
        "sliding_window": WINDOW, "moe_intermediate_size": 16, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = transformers.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=LENGTH)
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaModel._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_canvas_sees_all_of_itself_and_of_the_prompt(padding):
    """Layers with a window, but without a mask, that say `is_causal=False`: the decoder of DiffusionGemma."""
    inputs, valid = batch("llama", padding)
    inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    if padding == "left":
        inputs["decoder_attention_mask"] = torch.cat([valid, torch.ones_like(valid)], 1).long()
    model = diffusion()
    with torch.no_grad():
        with Float64():
            expected = copy.deepcopy(model).double()(**inputs).last_hidden_state
        eager = model(**inputs).last_hidden_state
        model.set_attn_implementation("fastattn")
        actual = model(**inputs).last_hidden_state
    assert_parity(actual, expected, eager, intermediate=expected.abs().max())


def test_what_a_layer_calls_itself_decides_nothing():
    """Without a mask and without a word of the caller nothing is forbidden, as in eager code."""
    q, layer = torch.randn(2, 2, 6, 8), torch.nn.Identity()
    expected = fastattn.attention(q, q, q).transpose(1, 2)
    for layer.is_causal in (True, False):
        assert torch.equal(huggingface.attention_forward(layer, q, q, q, None)[0], expected)
    causal = fastattn.attention(q, q, q, causal=True).transpose(1, 2)
    assert torch.equal(huggingface.attention_forward(layer, q, q, q, None, is_causal=True)[0], causal)


def test_dropout_only_while_training():
    q, layer = torch.randn(2, 2, 6, 8), torch.nn.Identity()
    plain, _ = huggingface.attention_forward(layer.eval(), q, q, q, None)
    evaluated, _ = huggingface.attention_forward(layer, q, q, q, None, dropout=0.5)
    torch.manual_seed(3)
    trained, _ = huggingface.attention_forward(layer.train(), q, q, q, None, dropout=0.5)
    torch.manual_seed(3)
    expected = fastattn.attention(q, q, q, dropout_p=0.5).transpose(1, 2)
    assert torch.equal(plain, evaluated) and torch.equal(trained, expected) and not torch.equal(plain, trained)


def test_learned_queries_are_shared_by_the_batch():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 6, 8)
    out, _ = huggingface.attention_forward(torch.nn.Identity(), q, k, k, None, is_causal=False)
    assert torch.equal(out, fastattn.attention(q.expand(4, -1, -1, -1), k, k).transpose(1, 2))


def described(**changes):
    """The mask of a causal layer with 200 tokens, by what transformers says about it."""
    own = transformers.masking_utils
    window, packed, blocks = (changes.pop(name, None) for name in ("window", "packed", "blocks"))
    pattern = own.causal_mask_function if window is None else own.sliding_window_causal_mask_function(window)
    if blocks is not None:
        pattern = own.or_masks(pattern, own.blockwise_overlay(blocks))
    if (size := changes.pop("chunk", None)) is not None:
        pattern = own.chunked_causal_mask_function(size, torch.tensor([0, 60]))
    if packed is not None:
        pattern = own.packed_sequence_compatibility_function(pattern, packed, own.find_packed_sequence_indices(packed))
    call = {"batch_size": 2, "q_length": 200, "kv_length": 200, "mask_function": pattern} | changes
    return huggingface.mask(**call), own.sdpa_mask(**call, allow_is_causal_skip=False)


PACKED = torch.cat([torch.arange(50), torch.arange(150)]).expand(2, -1)
PADDED = torch.arange(200) >= torch.tensor([[0], [60]])
IMAGES = torch.full((2, 200), -1)  # text; two images, and one
IMAGES[0, 20:70], IMAGES[0, 70:90], IMAGES[1, 100:180] = 0, 1, 0
PATTERNS = {
    "causal": ({}, {"causal", "q_offset"}),
    "window": ({"window": 9}, {"causal", "q_offset", "window"}),
    "behind a cache": ({"q_length": 150, "q_offset": 50, "window": 9}, {"causal", "q_offset", "window"}),
    "sliding cache": ({"q_offset": 30, "kv_offset": 20, "kv_length": 210}, {"causal", "q_offset"}),
    "static cache": ({"q_offset": torch.tensor(4), "kv_length": 260}, {"causal", "q_offset"}),
    "one query": ({"q_length": 1, "q_offset": torch.tensor(4)}, {"causal", "q_offset"}),
    "no padding": ({"attention_mask": torch.ones(2, 200, dtype=torch.bool)}, {"causal", "q_offset"}),
    "left padding": ({"attention_mask": PADDED}, {"causal", "q_offset", "kv_start"}),
    "left padding and a window": (
        {"attention_mask": PADDED, "window": 9},
        {"causal", "q_offset", "window", "kv_start"},
    ),
    "left padding in a sliding cache": (
        {"q_length": 3, "q_offset": 197, "kv_offset": 20, "kv_length": 180, "attention_mask": PADDED},
        {"causal", "q_offset", "kv_start"},
    ),
    "padding in the middle": ({"attention_mask": PADDED & (torch.arange(200) != 100)}, {"block_mask"}),
    "right padding": ({"attention_mask": PADDED.flip(1), "window": 9}, {"block_mask"}),
    "padding of a step": (
        {"q_length": 1, "q_offset": 199, "attention_mask": PADDED},
        {"causal", "q_offset", "kv_start"},
    ),
    "right padding of a step": ({"q_length": 1, "q_offset": 199, "attention_mask": PADDED.flip(1)}, {"mask"}),
    "padding shorter than a cache": ({"kv_length": 260, "attention_mask": PADDED}, {"causal", "q_offset", "kv_start"}),
    "packed": ({"packed": PACKED}, {"block_mask"}),
    "packed with a window": ({"packed": PACKED, "window": 9}, {"block_mask"}),
    "image blocks": ({"blocks": IMAGES}, {"block_mask"}),
    "image blocks, a window and padding": ({"blocks": IMAGES, "window": 9, "attention_mask": PADDED}, {"block_mask"}),
    "single indices": ({"blocks": IMAGES, "window": 9, "use_vmap": True}, {"block_mask"}),
    "single indices behind a cache": (
        {"blocks": IMAGES, "q_length": 150, "q_offset": 50, "attention_mask": PADDED, "use_vmap": True}, {"block_mask"}
    ),
    "chunks": ({"chunk": 50, "attention_mask": PADDED}, {"block_mask"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_mask_says_what_transformers_own_says(name):
    """In arguments of the operator, and as a matrix for whoever computes with it."""
    changes, arguments = PATTERNS[name]
    mask, expected = described(**changes)
    assert isinstance(mask, PatternMask) and mask.shape == expected.shape and mask.dtype == torch.bool
    operands = mask.operands()
    assert set(operands) == arguments and torch.equal(mask & True, expected)
    q, k = torch.randn(2, 1, expected.shape[2], 8), torch.randn(2, 1, expected.shape[3], 8)

    def result(mask, *qkv):
        return huggingface.attention_forward(torch.nn.Identity(), *qkv, mask)[0]

    assert_parity(result(mask, q, k, k), result(expected, *(x.double() for x in (q, k, k))), result(expected, q, k, k))
    if "block_mask" in operands:
        assert mask.operands()["block_mask"] is mask[:, :, :, :].operands()["block_mask"]  # shared by the layers


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


@functools.cache
def with_images(name):
    """A small Gemma 3, with a layer of each kind, or PaliGemma."""
    text = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "gemma3":
        text |= {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = transformers.PaliGemmaConfig(text_config=text | {"model_type": "gemma"}, vision_config=VISION)
        model = transformers.PaliGemmaForConditionalGeneration(config)
    return model.eval()


@pytest.mark.parametrize("padding", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_image_blocks_are_block_masks(name, padding, monkeypatch):
    """Tokens of an image see all of it, and PaliGemma's prompt all of itself, in every kind of layer."""
    masks = []

    def seen(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return huggingface.attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "fastattn", seen)
    model, ids = with_images(name), torch.randint(3, VOCAB, (2, 200))
    kinds = torch.zeros_like(ids)
    if name == "gemma3":
        kinds[0, 70:150], kinds[1, 80:100], kinds[1, 101:160] = 1, 1, 1
    else:
        kinds[:, 90:] = 1  # the answer, in causal order
    tokens = torch.arange(200) >= torch.tensor([[0], [60 * padding]])
    inputs = {"input_ids": ids, "token_type_ids": kinds, "attention_mask": tokens.long()}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        with Float64():
            exact = copy.deepcopy(model).double()(**inputs, use_cache=False).logits[tokens]
        results = []
        for implementation in ("eager", "fastattn"):
            model.set_attn_implementation(implementation)
            results.append(model(**inputs, use_cache=False).logits[tokens])
    assert_parity(results[1], exact, results[0], intermediate=exact.abs().max())
    assert len(masks) == 2 and all(set(mask.operands()) == {"block_mask"} for mask in masks)


def test_packed_sequences_are_prepared_once_for_all_layers(monkeypatch):
    """By `position_ids`, and by their ends too, as transformers' collator for flattened rows gives them."""
    made, make = [], BlockMask.from_predicate
    monkeypatch.setattr(BlockMask, "from_predicate", lambda *args: made.append(1) or make(*args))
    model = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        attn_implementation="fastattn",
    ))  # fmt: skip
    ids, positions = torch.randint(3, VOCAB, (1, 300)), torch.cat([torch.arange(130), torch.arange(170)])[None]
    ends = torch.tensor([0, 130, 300], dtype=torch.int32)
    ending = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 170, "max_length_k": 170}
    outputs = []
    for given in ({"position_ids": positions}, {"position_ids": positions, **ending}):
        outputs.append(model(ids, use_cache=False, **given).last_hidden_state)
        assert made == [1]
        made.clear()
    assert torch.equal(*outputs)


def test_mask_of_both_sides():
    """Nothing is left out but what forbids nothing."""
    both = functools.partial(
        described, mask_function=transformers.masking_utils.bidirectional_mask_function,
        allow_is_bidirectional_skip=True,
    )  # fmt: skip
    assert both()[0] is None and both(attention_mask=torch.ones(2, 200, dtype=torch.bool))[0] is None
    mask, expected = both(attention_mask=PADDED)
    assert torch.equal(mask.dense(), expected)


def test_mask_added_to_scores_is_an_error():
    mask, _ = described()
    with pytest.raises(ValueError, match="expected a layer that calls transformers' attention interface"):
        torch.add(torch.zeros(2, 1, 200, 200), mask)


def test_models_that_declare_nothing_get_their_eager_mask():
    config = transformers.GitConfig(num_hidden_layers=1)
    mask = huggingface.mask(2, 4, 4, config=config, dtype=torch.float64)
    assert mask.dtype == torch.float64 and mask.min() == torch.finfo(torch.float64).min
    assert isinstance(huggingface.mask(2, 4, 4, config=transformers.LlamaConfig()), PatternMask)


def test_packed_sequences_by_their_ends():
    """`cu_seq_lens_q` counts, whatever the mask says beside it."""
    q, layer = torch.randn(1, 2, 200, 8), torch.nn.Identity()
    ends = torch.tensor([0, 50, 200], dtype=torch.int32)
    documents = (torch.arange(200) >= 50).long()
    same, causal = documents[:, None] == documents, torch.ones(200, 200, dtype=torch.bool).tril()
    mask = huggingface.mask(1, 200, 200)
    added = torch.zeros(1, 1, 200, 200).masked_fill(~causal, -torch.inf)
    for given, options, allowed in (
        (None, {}, same), (None, {"is_causal": True}, same & causal), (mask, {}, same & causal),
        (mask.dense(), {}, same & causal), (added, {"cu_seq_lens_k": ends}, same & causal),
    ):  # fmt: skip
        out, _ = huggingface.attention_forward(layer, q, q, q, given, cu_seq_lens_q=ends, max_length_q=150, **options)
        expected = fastattn.attention(q, q, q, mask=allowed).transpose(1, 2)
        exact = fastattn.attention(*[q.double()] * 3, mask=allowed).transpose(1, 2)
        assert_parity(out, exact, expected)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected a batch of 1"):
        huggingface.attention_forward(layer, *[torch.cat([q, q])] * 3, None, cu_seq_lens_q=ends)


REFUSED = [
    (
        {"cache": object(), "output_attentions": True},
        ValueError,
        "output_attentions, position_bias: expected None with a paged cache, got one",
    ),
    ({"indices": torch.zeros(1)}, ValueError, "indices: expected None.* does not know this argument"),
    ({"attention_mask": torch.ones(2, 6)}, ValueError, r"attention_mask.shape: expected 4 dim.* got \(2, 6\)"),
    (
        {"attention_mask": torch.ones(2, 1, 6, 6).long()},
        TypeError,
        r"attention_mask.dtype: expected bool \(True.* got torch.int64",
    ),
    ({"softcap": 0.0}, ValueError, "softcap: expected a positive"),
    ({"s_aux": torch.zeros(3)}, ValueError, r"s_aux.shape: expected \(2,\), one for each query head, got \(3,\)"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED, ids=[next(iter(case[0])) for case in REFUSED])
def test_what_cannot_be_honoured_is_an_error(options, error, text):
    q = torch.randn(2, 2, 6, 8)
    with pytest.raises(error, match=text):
        huggingface.attention_forward(torch.nn.Identity(), q, q, q, **{"attention_mask": None, **options})


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_where_they_are_asked_for(name, padding):
    """Those of the eager code, also from models that do not tell their attention layers; then fused again."""
    inputs, valid = batch(name, padding)
    options = {"output_attentions": True, "use_cache": False}
    wide = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Float64():
            exact = copy.deepcopy(model_with(name, "eager")).double()(**wide, **options)
        eager, ours = (model_with(name, which)(**inputs, **options) for which in ("eager", "fastattn"))
    logits = exact.logits[valid]
    assert_parity(ours.logits[valid], logits, eager.logits[valid], "logits", intermediate=logits.abs().max())
    names = [key for key in eager if key.endswith("attentions")]
    assert names
    rows = valid[:, None, :, None] if name not in ENCODER_DECODERS else torch.ones(1, dtype=torch.bool)
    for key in names:
        for mine, truth, theirs in zip(ours[key], exact[key], eager[key], strict=True):
            assert_parity(mine * rows, truth * rows, theirs * rows, key)


def test_weights_are_warned_about_once():
    huggingface_eager._warn.cache_clear()
    inputs = batch("llama", "none")[0]
    with pytest.warns(UserWarning, match="output_attentions=True: .* then computes all weights"):
        logits("llama", "fastattn", inputs, output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits("llama", "fastattn", inputs, output_attentions=True)


def test_what_says_nothing_about_attention_is_accepted():
    q = torch.randn(2, 2, 6, 8)
    plain, _ = huggingface.attention_forward(torch.nn.Identity(), q, q, q, None)
    out, _ = huggingface.attention_forward(
        torch.nn.Identity(), q, q, q, None, output_attentions=False, output_hidden_states=True, cache=None,
        grid_thw=[[1, 2, 3]],
        num_items_in_batch=torch.tensor(7), position_ids=torch.arange(6), use_cache=True,
    )  # fmt: skip
    assert torch.equal(out, plain)


def entries():
    interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    return [dict(interface._global_mapping) for interface in interfaces]


def test_register_twice_and_unregister():
    ours = entries()
    huggingface.register()
    assert entries() == ours
    model = model_with("llama", "eager")
    huggingface.unregister()
    before = entries()
    assert "fastattn" not in before[1]
    huggingface.unregister()
    assert entries() == before
    model.set_attn_implementation("fastattn")
    with pytest.raises(RuntimeError, match=r"got 'fastattn' after unregister\(\); call .*register\(\) again"):
        model(**batch("llama", "none")[0])
    huggingface.register()
    assert entries() == ours
    model(**batch("llama", "none")[0])
    huggingface.unregister()

    def other(*args, **kwargs):
        raise NotImplementedError

    transformers.AttentionInterface.register("fastattn", other)
    before = entries()
    huggingface.register()
    assert entries() == ours
    huggingface.unregister()
    assert entries() == before
    del transformers.AttentionInterface._global_mapping["fastattn"]


def test_without_transformers_or_with_an_old_one(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.9.1")  # transformers swaps that object at times
    with pytest.raises(ImportError, match=r"transformers: expected 5\.23 or later .*, found 5\.9\.1"):
        huggingface.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: expected 5\.23 or later .*, found none"):
        huggingface.register()


def test_compile_to_one_graph():
    """A padded prompt, then one token behind a static cache."""
    inputs, valid = batch("llama", "left")
    model = model_with("llama", "fastattn")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs, use_cache=False).logits[valid], model(**inputs).logits[valid])
        steps = []
        for forward in (model, compiled):
            cache = transformers.StaticCache(model.config, max_cache_len=20)
            model(inputs["input_ids"], past_key_values=cache)
            steps.append(forward(inputs["input_ids"][:, :1], past_key_values=cache).logits)
        ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], 1)
        eager = model_with("llama", "eager")(ids).logits[:, -1:]
        with Float64():
            exact = copy.deepcopy(model).double()(ids).logits[:, -1:]
    for step in steps:
        assert_parity(step, exact, eager, intermediate=exact.abs().max())


def test_chosen_when_a_model_is_made():
    config = built("llama").config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    assert model.config._attn_implementation == "fastattn"


def test_import_leaves_transformers_alone():
    code = "import sys, fastattn, fastattn.integrations.huggingface; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "huggingface.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["Llama", "gpt-oss"]
    assert all(line.endswith(" equal") and "not" not in line for line in lines[1:])

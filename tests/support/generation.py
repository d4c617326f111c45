"""What the tests of generation share: small models and what they compute without a cache."""

import functools

import torch

from fastattn.nn import (
    CausalLM,
    CausalLMConfig,
    DynamicCache,
    EncoderDecoder,
    EncoderDecoderConfig,
    KVCache,
    PagedCache,
    SlidingWindowCache,
    TransformerConfig,
)

VOCAB, NEW = 29, 12
SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "dim_feedforward": 48, "init_std": 0.3}
KINDS = {
    "KVCache": KVCache,
    "DynamicCache": DynamicCache,
    "PagedCache": PagedCache,
    "SlidingWindowCache": SlidingWindowCache,
    "small chunks": functools.partial(SlidingWindowCache, window=3, chunk=2),
}


def language_model(**options):
    """Weights large enough that logits differ by more than rounding, and that texts do not repeat one token."""
    return CausalLM(CausalLMConfig(**SIZES | {"vocab_size": VOCAB} | options)).eval()


def encoder_decoder(**options):
    stack = TransformerConfig(**SIZES, **options)
    return EncoderDecoder(EncoderDecoderConfig(encoder=stack, decoder=stack, source_vocab_size=VOCAB)).eval()


def logits_of(model, prompt, tokens, start=None):
    """What the whole model, without a cache, says after `tokens` (N, T)."""
    if isinstance(model, CausalLM):
        return model(torch.cat([prompt, tokens], 1))[:, -1]
    start = torch.full_like(prompt[:, :1], start)
    return model(prompt, torch.cat([start, tokens], 1))[:, -1]


@torch.no_grad()
def greedy(model, prompt, new=NEW, start=None):
    tokens = prompt[:, :0]
    for _ in range(new):
        tokens = torch.cat([tokens, logits_of(model, prompt, tokens, start).argmax(1, keepdim=True)], 1)
    return tokens


# Prompts


RAGGED = (4, 1, 6)


# Sampling: what is left of the distribution


TRUNCATIONS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_k beyond the vocabulary": {"top_k": VOCAB + 5},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of the best alone": {"min_p": 1.0},
    "all": {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
}

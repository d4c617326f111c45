"""Models of Hugging Face transformers on fastattn: the same weights, one word changed.

``python examples/huggingface.py`` makes a small random Llama (grouped heads) and gpt-oss (sliding windows and sinks;
PyTorch's own attention has no sinks), runs each on transformers' eager attention and on fastattn, and prints how far
apart the results are.
"""

from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastattn.integrations import huggingface

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 131072,
}  # fmt: skip


@torch.no_grad()
def results(model: PreTrainedModel, implementation: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the prompt, and the tokens that greedy decoding adds to it."""
    model.set_attn_implementation(implementation)
    padding = torch.ones_like(tokens)
    padding[1, :5] = 0  # the second prompt is shorter: padded on the left
    options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    logits = model(tokens, attention_mask=padding).logits
    generated = model.generate(tokens, attention_mask=padding, **options)  # pyright: ignore[reportCallIssue]  (a mixin's)
    return logits[padding.bool()], generated


def main():
    huggingface.register()
    torch.manual_seed(0)
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 20))
    models = {
        "Llama": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "gpt-oss": GptOssForCausalLM(GptOssConfig(**SIZES, **GPT_OSS)),
    }
    print(f"{'model':10}{'largest logit':>16}{'difference':>14}{'greedy tokens':>18}")
    for name, model in models.items():
        eager_logits, eager_tokens = results(model.eval(), "eager", tokens)
        logits, generated = results(model, "fastattn", tokens)
        largest, difference = eager_logits.abs().max(), (logits - eager_logits).abs().max()
        same = "equal" if torch.equal(generated, eager_tokens) else "not equal"
        print(f"{name:10}{largest:16.2f}{difference:14.1e}{same:>18}")


if __name__ == "__main__":
    main()

"""Continuous batching of transformers with ``attn_implementation="fastattn"``."""

import pytest
import torch

import fastattn
from fastattn.integrations import huggingface, huggingface_paged

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

VOCAB = 99


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()
    yield
    huggingface.unregister()


def make(name):
    """A random model of two layers, both kinds of layer in those that mix them."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    kinds = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
    config, model = {
        "llama": (transformers.LlamaConfig(**sizes), transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig(**sizes, sliding_window=9), transformers.MistralForCausalLM),
        "gemma2": (transformers.Gemma2Config(**sizes, **kinds, attn_logit_softcapping=2.0, query_pre_attn_scalar=5),
                   transformers.Gemma2ForCausalLM),
        "gpt_oss": (transformers.GptOssConfig(**sizes, **kinds, num_local_experts=2, num_experts_per_tok=1),
                    transformers.GptOssForCausalLM),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    model = model(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.shape[0] == 4:  # sinks
            torch.nn.init.normal_(parameter)
    return model


def prompts(*lengths):
    torch.manual_seed(1)
    return [torch.randint(1, VOCAB, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_generate_batch_gives_the_tokens_of_eager(name, monkeypatch):
    """Prompts longer than a batch, so that chunks of them meet single steps, and a begin that two of them share."""
    asked = prompts(5, 40, 17)
    asked.append(asked[1][:24] + asked[2])
    options = transformers.GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = make(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = [model.generate(torch.tensor([x]), generation_config=options)[0, len(x) :].tolist() for x in asked]

    read = []

    def attend(*args, **kwargs):
        read.append(kwargs["cache_lens"])
        return fastattn.attention_with_kvcache(*args, **kwargs)

    monkeypatch.setattr(huggingface_paged, "attention_with_kvcache", attend)
    model.set_attn_implementation("fastattn")
    batching = transformers.ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=24)
    answers = model.generate_batch(asked, generation_config=options, continuous_batching_config=batching)
    answers = sorted(answers.values(), key=lambda answer: int(answer.request_id.split("_")[-1]))
    assert [answer.error for answer in answers] == [None] * len(asked)
    assert [answer.generated_tokens for answer in answers] == expected
    assert bool(read) == (name != "mistral")  # whose layers all have rings, not pages
    assert model.config._attn_implementation == "fastattn"


def test_unregister_leaves_continuous_batching_as_it_was():
    manager = transformers.generation.continuous_batching.continuous_api.ContinuousBatchingManager
    with_ours = manager.switch_to_cb_friendly_attn
    huggingface.register()
    assert manager.switch_to_cb_friendly_attn is with_ours
    huggingface.unregister()
    theirs = manager.switch_to_cb_friendly_attn
    assert theirs is with_ours.__wrapped__
    huggingface.register()
    assert manager.switch_to_cb_friendly_attn.__wrapped__ is theirs

"""What masks of transformers cost: no tile is visited that holds nothing, and nothing has the size of the scores."""

import os

import pytest
import torch

import fastattn
from benchmarks.harness.device import allocations
from fastattn.backends.cpu import library as cpu_library
from fastattn.integrations import huggingface

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

LENGTH, TILE = 1024, 128
MOST = 1.15
"""Times the tiles that hold something."""


@pytest.fixture(autouse=True)
def registered():
    huggingface.register()
    yield
    huggingface.unregister()


def tiles(mask):
    """Which tiles of a dense mask hold something."""
    count = LENGTH // TILE
    return mask.view(-1, count, TILE, count, TILE).any(4).any(2)


def mask_of(padding=None, packed=None, window=None, blocks=None, chunk=None):
    """What a layer gets for 1024 tokens, and the dense mask of transformers' own."""
    own = transformers.masking_utils
    pattern = own.causal_mask_function if window is None else own.sliding_window_causal_mask_function(window)
    if chunk is not None:
        pattern = own.chunked_causal_mask_function(chunk, torch.zeros(2, dtype=torch.int64))
    if blocks is not None:
        pattern = own.or_masks(pattern, own.blockwise_overlay(blocks))
    if packed is not None:
        pattern = own.packed_sequence_compatibility_function(pattern, packed, own.find_packed_sequence_indices(packed))
    call = {
        "batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": pattern, "attention_mask": padding,
        "use_vmap": blocks is not None and window is not None,  # as Gemma 3 has it
    }  # fmt: skip
    return huggingface.mask(**call), own.sdpa_mask(**call, allow_is_causal_skip=False)


PADDED = torch.arange(LENGTH) >= torch.tensor([[0], [700]])
PACKED = torch.cat([torch.arange(400), torch.arange(624)]).expand(2, -1)
IMAGES = torch.full((2, LENGTH), -1).index_fill_(1, torch.arange(300, 556), 0)
BLOCK_MASKS = {
    "right padding": {"padding": PADDED.flip(1)},
    "right padding and a window": {"padding": PADDED.flip(1), "window": 200},
    "packed": {"packed": PACKED},
    "packed with a window": {"packed": PACKED, "window": 60},
    "chunks": {"chunk": 200},
    "image blocks": {"blocks": IMAGES},
    "image blocks and a window": {"blocks": IMAGES, "window": 100},
}


@pytest.mark.parametrize("name", BLOCK_MASKS)
def test_no_tile_is_visited_that_is_not_needed(name):
    mask, dense = mask_of(**BLOCK_MASKS[name])
    needed = tiles(dense).double().mean().item()
    assert 1 - mask.operands()["block_mask"].sparsity <= MOST * needed < 0.75


ARGUMENTS = {
    "window": ({"window": 200}, {"causal", "q_offset", "window"}),
    "left padding": ({"padding": PADDED}, {"causal", "q_offset", "kv_start"}),
    "left padding and a window": (
        {"padding": PADDED, "window": 200}, {"causal", "q_offset", "window", "kv_start"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("first", [0, 512, 896])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_key_outside_the_needed_tiles_is_read(device, backend, name, first):
    """Windows and left padding are arguments of the operator: in tiles that hold nothing for these queries keys may be
    anything."""
    given, arguments = ARGUMENTS[name]
    mask, dense = mask_of(**given)
    operands = mask.operands()
    assert set(operands) == arguments
    needed = tiles(dense)[:, first // TILE]
    assert needed.double().mean() < 0.75
    unseen = ~needed.repeat_interleave(TILE, 1)[:, None].expand(2, len(dense) // len(needed), LENGTH).to(device)
    q, k, v = (torch.randn(2, 1, n, 16, device=device) for n in (TILE, LENGTH, LENGTH))
    k[unseen] = v[unseen] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*leaves, **operands | {"q_offset": first}, backend=backend)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ["left padding", "window", "packed"])
def test_no_buffer_of_a_step_has_the_size_of_the_scores(name):
    """Forward and backward over 8192 tokens: the largest buffer is far below one byte for each score."""
    if problem := cpu_library.problem():
        pytest.skip(f"the CPU library is {problem}")
    length = 8192
    inputs = {
        "left padding": {"attention_mask": (torch.arange(length) >= 3000).long()[None]},
        "window": {},
        "packed": {"position_ids": torch.cat([torch.arange(5000), torch.arange(length - 5000)])[None]},
    }[name]
    config = transformers.MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=length,
        sliding_window=1000 if name == "window" else None, attn_implementation="fastattn",
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    ids = torch.randint(3, 32, (1, length))
    found = allocations(lambda: model(ids, labels=ids, use_cache=False, **inputs).loss.backward())
    assert found.largest < length**2 / 8
    dense = allocations(lambda: transformers.masking_utils.sdpa_mask(1, length, length, allow_is_causal_skip=False))
    assert dense.largest >= length**2  # what another implementation makes is seen

"""The recipe for x-transformers' weights in docs/migration.md, by their definition and by the package if installed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastattn import nn
from fastattn.testing import assert_parity
from tests.support import code_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
VOCAB, WIDTH, HEADS, DIM, LAYERS = 50, 32, 4, 32, 2


def recipe(*args, **kwargs):
    (block,) = (block for block in code_blocks.blocks(PAGE) if "def from_x_transformers" in block.code)
    names = {}
    block.run(names)
    return names["from_x_transformers"](*args, **kwargs)


def ours(weights, kv_heads, position, dtype=torch.float32):
    model = nn.CausalLM(nn.CausalLMConfig(
        vocab_size=VOCAB, d_model=WIDTH, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=kv_heads, head_dim=DIM,
        dim_feedforward=4 * WIDTH, norm_eps=1e-12, tie_embeddings=False, position=position,
    )).eval().to(dtype)  # fmt: skip
    model.load_state_dict(recipe(weights, LAYERS, HEADS, kv_heads, rotary=position is not None))
    return model


def random_weights(kv_heads):
    """Of an x-transformers decoder, under its names."""
    shapes = {"token_emb.emb.weight": (VOCAB, WIDTH), "attn_layers.final_norm.g": (WIDTH,)}
    shapes["to_logits.weight"] = (VOCAB, WIDTH)
    for layer in range(LAYERS):
        attend, forward = (f"attn_layers.layers.{2 * layer + part}" for part in (0, 1))
        shapes |= {
            f"{attend}.0.0.g": (WIDTH,), f"{attend}.1.to_q.weight": (HEADS * DIM, WIDTH),
            f"{attend}.1.to_k.weight": (kv_heads * DIM, WIDTH), f"{attend}.1.to_v.weight": (kv_heads * DIM, WIDTH),
            f"{attend}.1.to_out.weight": (WIDTH, HEADS * DIM), f"{forward}.0.0.g": (WIDTH,),
            f"{forward}.1.ff.0.proj.weight": (8 * WIDTH, WIDTH), f"{forward}.1.ff.2.weight": (WIDTH, 4 * WIDTH),
        }  # fmt: skip
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def defined(weights, tokens, kv_heads):
    """Its logits, without positions: key heads are repeated as a whole, so query head i uses number i modulo theirs."""

    def norm(x, gain):
        return F.normalize(x, dim=-1) * WIDTH**0.5 * (weights[gain] + 1)

    x = weights["token_emb.emb.weight"][tokens]
    for layer in range(LAYERS):
        attend, forward = (f"attn_layers.layers.{2 * layer + part}" for part in (0, 1))
        own = norm(x, f"{attend}.0.0.g")
        q, k, v = (
            (own @ weights[f"{attend}.1.to_{name}.weight"].T).unflatten(-1, (-1, DIM)).transpose(1, 2) for name in "qkv"
        )
        k, v = (y.repeat(1, HEADS // kv_heads, 1, 1) for y in (k, v))
        hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        p = (q @ k.mT * DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + (p @ v).transpose(1, 2).flatten(2) @ weights[f"{attend}.1.to_out.weight"].T
        up, gate = (norm(x, f"{forward}.0.0.g") @ weights[f"{forward}.1.ff.0.proj.weight"].T).chunk(2, -1)
        x = x + (up * F.silu(gate)) @ weights[f"{forward}.1.ff.2.weight"].T
    return norm(x, "attn_layers.final_norm.g") @ weights["to_logits.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_weights_of_x_transformers_by_its_definition(kv_heads):
    weights, tokens = random_weights(kv_heads), torch.randint(VOCAB, (2, 9))
    exact = defined({name: x.double() for name, x in weights.items()}, tokens, kv_heads)
    found = ours(weights, kv_heads, None)(tokens)
    assert_parity(found, exact, defined(weights, tokens, kv_heads), intermediate=exact.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the other package
def test_weights_of_x_transformers(rotary, kv_heads):
    theirs = pytest.importorskip("x_transformers", reason="pip install x-transformers, then run this again")
    options = {"rotary_pos_emb": True, "rotary_emb_dim": DIM} if rotary else {}
    model = theirs.TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=64, use_abs_pos_emb=False,
        attn_layers=theirs.Decoder(
            dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=DIM, attn_kv_heads=kv_heads, use_rmsnorm=True,
            ff_glu=True, ff_swish=True, ff_no_bias=True, **options,
        ),
    ).eval()  # fmt: skip
    weights = model.state_dict()
    for name in weights:
        if name.endswith("proj.bias"):  # its gated projection keeps a bias
            weights[name].zero_()
    tokens = torch.randint(VOCAB, (2, 9))
    plain = model(tokens)
    exact = model.double()(tokens)
    found = ours({name: x.float() for name, x in weights.items()}, kv_heads, nn.RoPE() if rotary else None)(tokens)
    assert_parity(found, exact, plain, intermediate=exact.abs().max())

"""The model of kind "gpt" with torch.nn's layers, which have all of its parts."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn.nn import CausalLM, Learned, torch_state_dict


class OnTorch(nn.Module):
    """The same function of tokens (N, L) as `model`, with copies of its weights."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        config, position = model.config, model.decoder.position
        assert isinstance(config.position, Learned) and position is not None
        layer = nn.TransformerEncoderLayer(
            config.d_model, config.num_heads, config.ff_dim, config.dropout, config.activation,
            layer_norm_eps=config.norm_eps, batch_first=True, norm_first=True, bias=config.bias,
        )  # fmt: skip
        norm = nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias)
        self.stack = nn.TransformerEncoder(layer, config.num_layers, norm, enable_nested_tensor=False)
        self.stack.load_state_dict(torch_state_dict(model.decoder))
        self.embedding = nn.Embedding.from_pretrained(model.embedding.weight.detach().clone(), freeze=False)
        self.position = nn.Embedding(config.position.max_len, config.d_model)
        self.position.load_state_dict({"weight": position.table})
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L) -> logits (N, L, V)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        return self.head(self.stack(self.embedding(tokens) + self.position.weight[:length], mask=mask, is_causal=True))

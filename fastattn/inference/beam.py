"""Beam search.

Dimensions in comments: N prompts, T new tokens, B beams, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastattn import _check as check
from fastattn.inference.decoding import Decoding, Generated, NonFinite

__all__ = ["BeamSearch", "beam_search"]


@dataclass(frozen=True)
class BeamSearch:
    """Keep the `num_beams` most probable beginnings at each step; the best finished text wins.

    The score of a text is its log-probability divided by length ** `length_penalty` (Wu et al. 2016, arXiv:1609.08144,
    without the constants). Rules and results are those of transformers' `generate`.

    Args:
        num_beams: beams per prompt.
        length_penalty: above 0 favours long texts, below 0 short ones.
        early_stopping: True ends a prompt's search as soon as `num_beams` texts are finished. False searches on until
            no beam, at its present length, scores better than the worst of them.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        check.integer("num_beams", self.num_beams, 1)
        check.number("length_penalty", self.length_penalty, "(-inf, inf)")
        check.flag("early_stopping", self.early_stopping)

    def check_length(self, max_new_tokens: int) -> None:
        """Refuse a penalty that takes the score of a text of this length out of float32's range.

        Raises:
            ValueError: naming the largest penalty that fits.
        """
        most = math.inf if max_new_tokens == 1 else 30 / math.log10(max_new_tokens)
        if abs(self.length_penalty) > most:
            raise ValueError(
                f"length_penalty: expected at most {most:.3g} in size for max_new_tokens == {max_new_tokens}, since "
                f"scores are divided by length ** length_penalty, got {self.length_penalty}"
            )


def beam_search(run: Decoding, beams: BeamSearch, pad: int) -> Generated:
    N, B, T, V = run.target.shape[0], beams.num_beams, run.max_new_tokens, run.vocab_size
    device = run.target.device
    stop = torch.empty(0, dtype=torch.int64, device=device) if run.stop is None else run.stop
    # Each beam has at most len(stop) continuations that end, so this many candidates include B that go on.
    candidates = min((1 + max(1, stop.shape[0])) * B, B * V)
    row_start = (torch.arange(N, device=device) * B)[:, None]  # of a prompt's beams

    cache = run.make_cache()
    check_finite = NonFinite()
    logits = run.prefill(run.target, cache, run.lengths).float()
    check_finite(~logits.logsumexp(1).isfinite())
    logits = logits.repeat_interleave(B, 0)
    cache.select(torch.arange(N, device=device).repeat_interleave(B))

    # -inf marks what does not exist: at first all beams but one, and texts that are not finished.
    scores = torch.full((N, B), -math.inf, device=device)
    scores[:, 0] = 0.0
    tokens = torch.full((N, B, T), pad, device=device)
    best_scores = torch.full((N, B), -math.inf, device=device)
    best_tokens, best_lengths = tokens, torch.zeros(N, B, dtype=torch.int64, device=device)
    improvable = torch.ones(N, 1, dtype=torch.bool, device=device)

    for index in range(T):
        length = index + 1
        total = (scores[:, :, None] + logits.log_softmax(-1).view(N, B, V)).flatten(1)
        total, place = total.topk(candidates, dim=1)
        beam, token = place // V, place % V
        text = tokens.gather(1, beam[:, :, None].expand(-1, -1, T)).index_copy(
            2, torch.tensor([index], device=device), token[:, :, None]
        )
        ended = (token[:, :, None] == stop).any(2) if length < T else torch.ones_like(token, dtype=torch.bool)

        # Finished texts count only among the first B candidates, and only while they may still win.
        accepted = ended & improvable & (torch.arange(candidates, device=device) < B)
        if beams.early_stopping:
            accepted &= (best_scores == -math.inf).any(1, keepdim=True)
        finished = (total / length**beams.length_penalty).masked_fill(~accepted, -math.inf)
        best_scores, kept = torch.cat([best_scores, finished], 1).topk(B, dim=1)
        best_tokens = torch.cat([best_tokens, text], 1).gather(1, kept[:, :, None].expand(-1, -1, T))
        best_lengths = torch.cat([best_lengths, torch.full_like(token, length)], 1).gather(1, kept)

        # The beams that go on.
        scores, kept = total.masked_fill(ended, -math.inf).topk(B, dim=1)
        tokens = text.gather(1, kept[:, :, None].expand(-1, -1, T))
        worst = best_scores[:, -1:]
        improvable = improvable & (scores[:, :1] / length**beams.length_penalty > worst)
        open_ = improvable.any() & (scores[:, :1] > -math.inf).any()
        if beams.early_stopping:
            open_ &= (worst == -math.inf).any()
        if length == T or not open_:
            break
        cache.select((beam.gather(1, kept) + row_start).flatten())
        cache.reserve(1)
        logits = run.step(tokens[:, :, index].reshape(-1, 1), cache=cache)[:, -1].float()
        bad = ~logits.logsumexp(1).isfinite().view(N, B)
        check_finite((bad & (scores > -math.inf) & improvable).any(1))

    check_finite.check()
    lengths = best_lengths[:, 0]
    tokens = best_tokens[:, 0, : int(lengths.max())]
    return Generated(tokens, lengths, best_scores[:, 0], "beam search has work of the host between steps")

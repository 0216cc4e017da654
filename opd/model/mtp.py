"""Multi-token prediction of depth 1: one more layer, which looks at the token after a state and predicts the one after
that (V4 report 4.2.2; the depth-1 form of V3 report 2.2).

The one idea: the trunk's residual streams before their collapse, each joined with the embedding of the next token, go
through an ordinary layer, window-only and with learned routing, and through a collapse and a final norm of its own.
Embedding and output head are the trunk's: this module is lent the one and returns what the other multiplies, so it owns
neither. Its loss trains the trunk too; nothing in it is detached.

Left out: deeper prediction (the released models have one block), and drafting tokens with it while sampling.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opd.kernels.products import Linear
from opd.model.block import WINDOW_ONLY, Block
from opd.model.hyper_connection import HyperHead
from opd.model.layers import RMSNorm


class MtpBlock(Block):
    """A layer with two projections before it and a head's collapse and norm behind it.

    A subclass, against the house rule, because the released checkpoint keeps a layer's tensors beside the block's own.
    """

    def __init__(self, config: Any, quantized: bool) -> None:
        super().__init__(config, WINDOW_ONLY, is_hash=False, quantized=quantized)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = (RMSNorm(hidden, eps) for _ in range(3))
        self.e_proj, self.h_proj = (Linear(hidden, hidden, bias=False) for _ in range(2))
        self.hc_head = HyperHead(config.hc_mult, hidden, config.hc_eps, eps)

    def forward(
        self, streams_nND: Tensor, next_ids_BT: Tensor, embed: nn.Embedding, rotation: Tensor, frequencies: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences: the trunk's streams [n, B T, D] after its last layer and, at each place, the token that
        follows -> hidden [B, T, D], affinities [B T, E], expert ids [B T, K].

        `embed` is the trunk's embedding; `rotation` and `frequencies` are those of window-only layers, at t. Index t of
        `hidden` predicts token t + 2 and depends on tokens 0 to t + 1 alone.
        """
        ahead = self.e_proj(self.enorm(embed(next_ids_BT.flatten())))
        streams = ahead + self.h_proj(self.hnorm(streams_nND))
        site = self.attn_hc.collapse(streams)
        mixed, _ = self.self_attn(self.input_layernorm(site.hidden).view(*next_ids_BT.shape, -1), rotation, frequencies)
        streams = self.attn_hc.expand(site, mixed.flatten(0, 1))
        streams, scores, chosen = self.mix_experts(streams, next_ids_BT)
        return self.norm(self.hc_head(streams)).view(*next_ids_BT.shape, -1), scores, chosen

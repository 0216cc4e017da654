"""One layer of DeepSeek-V4, built from the published configuration: of the trunk, or of the block that predicts ahead.

The layer type decides everything: window only, CSA or HCA, and learned or hashed routing. Left out: the order in which
the two halves run, which whole sequences and cached ones each have their own way through.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opd.model.attention import Attention, Compressor, Indexer
from opd.model.hyper_connection import HyperConnection
from opd.model.layers import RMSNorm
from opd.model.moe import Experts, MoE, Router, SharedExpert

CSA, HCA, WINDOW_ONLY = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"


class Block(nn.Module):
    """Attention and MoE, each between its own norm and its own hyper-connection.

    `config` is the published configuration, `kind` one of its `layer_types`; with `is_hash` experts are looked up by
    token id, with `quantized` their weights are used as MXFP4 values.
    """

    def __init__(self, config: Any, kind: str, is_hash: bool, quantized: bool) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(
            hidden_size=hidden,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            query_rank=config.q_lora_rank,
            groups=config.o_groups,
            group_rank=config.o_lora_rank,
            window=config.sliding_window,
            eps=eps,
            compressor=_compressor(config, kind),
        )
        self.mlp = MoE(
            Router(
                config.n_routed_experts,
                config.num_experts_per_tok,
                hidden,
                config.scoring_func,
                config.routed_scaling_factor,
                config.vocab_size if is_hash else None,
            ),
            Experts(
                config.n_routed_experts, hidden, config.moe_intermediate_size, config.swiglu_limit, quantized=quantized
            ),
            SharedExpert(hidden, config.moe_intermediate_size, config.swiglu_limit),
        )
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.attn_hc, self.ffn_hc = (
            HyperConnection(config.hc_mult, hidden, config.hc_sinkhorn_iters, config.hc_eps, eps) for _ in range(2)
        )

    def mix_experts(
        self, streams: Tensor, token_ids: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The MoE half: streams [n, B T, D] after it, affinities [B T, E], expert ids [B T, K]; `given` as in
        `Router.forward`."""
        site = self.ffn_hc.collapse(streams)
        out, scores, chosen = self.apply_experts(site.hidden, token_ids, given)
        return self.ffn_hc.expand(site, out), scores, chosen

    def apply_experts(
        self, hidden: Tensor, token_ids: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and MoE: [B T, D], int64 [B, T] -> output [B T, D], and the others as in `mix_experts`."""
        return self.mlp(self.post_attention_layernorm(hidden), token_ids.flatten(), given)


def _compressor(config: Any, kind: str) -> Compressor | None:
    if kind == WINDOW_ONLY:
        return None
    hidden, eps, ratio = config.hidden_size, config.rms_norm_eps, config.compress_rates[kind]
    compressor = Compressor(hidden, config.head_dim, ratio, overlap=kind == CSA, eps=eps)
    if kind == CSA:
        compressor.indexer = Indexer(
            hidden, config.q_lora_rank, config.index_n_heads, config.index_head_dim, ratio, config.index_topk, eps
        )
    return compressor

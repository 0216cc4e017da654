"""A copy from far outside the window: learnt through compressed entries, and not without them; the indexer's recall.

A tiny model reads random tokens, among them a mark and two tokens after it, and must say those two at the end. The mark
is always farther away than the windows of all layers together reach. Three trainings on the same data: with CSA, with
its compressed branches off (window-only layers), and with CSA but the indexer's loss off. The first steps attend to all
blocks, as V3.2's warm-up does; then each query has the few blocks its indexer picks.

key=value: steps (of each training), warmup (of them, dense), seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import opd.model.indexer
from opd.model import DeepseekV4
from opd.model.transformer import CSA, HCA, WINDOW_ONLY, initialize, v4_config
from scripts.benchmarks import Figure, report, split_arguments, whole_numbers

VOCAB = 20  # symbols; two more ids are the mark and the question
MARK, ASK = VOCAB, VOCAB + 1
LENGTH, SPAN, WINDOW, TOPK, ROWS = 96, 2, 8, 4, 64
LAYERS = 3
SETTINGS = {"steps": 400, "warmup": 200, "seed": 0}


def main(argv: list[str]) -> int:
    as_json, arguments = split_arguments(argv)
    settings = whole_numbers(arguments, SETTINGS, 0)
    return report("needle: copy two tokens from outside the window", figures(**settings), as_json)


def figures(steps: int, warmup: int, seed: int) -> list[Figure]:
    """Exact-match of the copied tokens on fresh rows, and recall at the questions, for the three trainings."""
    accuracy, recall, before = train(CSA, steps, warmup, seed, index_weight=1.0)
    blind, _, _ = train(WINDOW_ONLY, steps, warmup, seed, index_weight=0.0)
    unguided, unguided_recall, unguided_before = train(CSA, steps, warmup, seed, index_weight=0.0)
    return [
        Figure(name="accuracy with CSA", value=accuracy, unit="share", bar=">= 0.9", ok=accuracy >= 0.9),
        Figure(name="accuracy without entries", value=blind, unit="share", bar="<= 0.15", ok=blind <= 0.15),
        Figure(
            name="recall gained, indexer trained",
            value=recall - before,
            unit="share",
            bar=">= 0.2",
            ok=recall - before >= 0.2,
        ),
        Figure(
            name="recall gained, indexer not trained",
            value=unguided_recall - unguided_before,
            unit="share",
            bar="<= 0.05",
            ok=unguided_recall - unguided_before <= 0.05,
        ),
        Figure(name="recall, indexer trained", value=recall, unit="share"),
        Figure(name="recall, indexer not trained", value=unguided_recall, unit="share"),
        Figure(name="accuracy, indexer not trained", value=unguided, unit="share"),
    ]


def train(kind: str, steps: int, warmup: int, seed: int, index_weight: float) -> tuple[float, float, float]:
    """(accuracy, recall at the questions, the recall that the untrained indexer has of the final model's attention)."""
    model = new_model(kind, seed)
    untrained = {name: value.clone() for name, value in model.state_dict().items() if ".indexer." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
    )
    generator = torch.Generator().manual_seed(seed + 1)
    for step in range(steps):
        rows = draw(generator)
        output = model(rows, torch.full((ROWS,), rows.shape[1]), "dense" if step < warmup else "sparse")
        loss = F.cross_entropy(answers(model, output.hidden).flatten(0, 1), rows[:, -SPAN:].flatten())
        if output.index_loss is not None:
            loss = loss + index_weight * output.index_loss / ROWS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    rows = draw(generator)
    accuracy, recall = examine(model, rows)
    model.load_state_dict(untrained, strict=False)
    return accuracy, recall, examine(model, rows)[1]


@torch.no_grad()
def examine(model: DeepseekV4, rows: Tensor) -> tuple[float, float]:
    """Share of tokens copied right, attending to picks, and the recall at the positions that copy (0 without CSA)."""
    all_queries = opd.model.indexer.RECALL_QUERIES
    try:
        # Most queries of a random text attend to nothing in particular: recall is asked where the copy is made.
        opd.model.indexer.RECALL_QUERIES = SPAN
        output = model(rows[:, :-1], torch.full((ROWS,), rows.shape[1] - 1), "sparse")
    finally:
        opd.model.indexer.RECALL_QUERIES = all_queries
    found = output.hidden[:, -SPAN:] @ model.head.T
    accuracy = (found.argmax(-1) == rows[:, -SPAN:]).float().mean().item()
    recall = output.index_recall
    return accuracy, 0.0 if recall is None else (recall[0] / recall[1]).item()


def answers(model: DeepseekV4, hidden: Tensor) -> Tensor:
    """Logits [B, SPAN, V] of the positions before the copied tokens."""
    return hidden[:, -SPAN - 1 : -1] @ model.head.T


def draw(generator: torch.Generator) -> Tensor:
    """Rows [ROWS, LENGTH]: noise, mark and span somewhere early, the question, the span again."""
    rows = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    question = LENGTH - SPAN - 1
    reach = LAYERS * (WINDOW - 1)  # how far windows carry a token through all layers
    marks = torch.randint(0, question - reach - SPAN, (ROWS,), generator=generator)
    every = torch.arange(ROWS)
    rows[every, marks], rows[:, question] = MARK, ASK
    for offset in range(SPAN):
        rows[:, question + 1 + offset] = rows[every, marks + 1 + offset]
    return rows


def new_model(kind: str, seed: int) -> DeepseekV4:
    fields = {
        "vocab_size": VOCAB + 2,
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": WINDOW,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": [WINDOW_ONLY, *[kind] * (LAYERS - 1)],
        "compress_rates": {CSA: 4, HCA: 8},
        "mlp_layer_types": ["moe"] * LAYERS,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": TOPK,
        "max_position_embeddings": 128,
        "num_nextn_predict_layers": 0,
    }
    torch.manual_seed(seed)
    model = DeepseekV4(v4_config(fields))
    initialize(model, seed)
    return model

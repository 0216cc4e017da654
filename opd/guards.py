"""What a step refuses to learn from, and what it leaves behind when its numbers go wrong.

A wrong normaliser changes the learning rate, tokens of a policy long gone bias the gradient, ranks with different plans
wait for each other: each would train on in silence. A loss that is not finite is skipped, and the micro-batch it came
from written out, so that it can be looked at when the run is over. Left out: rules on metrics (`opd.health`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from opd.batching import MicroBatch, Plan, collate
from opd.group import exchange
from opd.objective import Work

MAX_DUMPS = 8  # micro-batches that one rank writes out in a stage


def check_normaliser(plan: Plan) -> None:
    """Raises ValueError unless the plan divides by what its ranks have: each trajectory's loss tokens counted once,
    each item one row, and as many micro-batches on every rank."""
    items = [item for rank in plan.ranks for batch in rank for item in batch.items]
    tokens = {item.trajectory.id: item.trajectory.num_loss_tokens for item in items}
    if plan.num_loss_tokens != sum(tokens.values()):
        raise ValueError(
            f"the plan divides the loss by num_loss_tokens={plan.num_loss_tokens}, and the {len(tokens)} trajectories "
            f"of its ranks have {sum(tokens.values())} loss tokens"
        )
    if plan.num_rows != len(items):
        raise ValueError(f"the plan says num_rows={plan.num_rows}, and its ranks have {len(items)} rows")
    if len(counts := {len(rank) for rank in plan.ranks}) != 1:
        raise ValueError(f"ranks of a plan must have equally many micro-batches; this one's have {sorted(counts)}")


def check_age(plan: Plan, version: int, max_staleness: int) -> None:
    """Raises ValueError for a token that was sampled by weights more than `max_staleness` versions before `version`,
    those that learn from it, or by weights that do not exist yet."""
    for item in (item for rank in plan.ranks for batch in rank for item in batch.items):
        for span in item.trajectory.version_spans:
            if not 0 <= version - span.policy_version <= max_staleness:
                raise ValueError(
                    f"trajectory {item.trajectory.id} has tokens of policy version {span.policy_version}; weights of "
                    f"version {version} with max_staleness={max_staleness} learn from {version - max_staleness} to "
                    f"{version}"
                )


def check_same_plan(plan: Plan, step: int) -> None:
    """Raises ValueError on all ranks unless all have the same plan and are at the same step."""
    rows = [[[item.trajectory.id for item in batch.items] for batch in rank] for rank in plan.ranks]
    said = json.dumps([step, plan.num_loss_tokens, plan.num_rows, rows]).encode()
    answers = [json.loads(answer) for answer in exchange(json.dumps([step, hashlib.sha256(said).hexdigest()]))]
    if any(answer != answers[0] for answer in answers):
        steps = [answer[0] for answer in answers]
        raise ValueError(
            f"learner ranks were given different plans, or are at different steps ({min(steps)} to {max(steps)})"
        )


def dump(folder: str, name: str, batch: MicroBatch, work: Work | None, about: dict[str, Any]) -> None:
    """Writes `folder`/`name`.safetensors, the micro-batch's tensors as the loss saw them (without `work`, its rows
    alone), and `name`.json with `about` and its trajectories."""
    os.makedirs(folder, exist_ok=True)
    if work is None:
        tensors = _tensors(collate([item.trajectory for item in batch.items], pad_id=0))
    else:
        tensors = _tensors(work.batch) | _tensors(work.task) | {"weights": work.weights}
    path = os.path.join(folder, name)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, f"{path}.safetensors")
    described = {
        **about,
        "signal": type(batch.items[0].signal).__name__,
        "teacher": batch.teacher,
        "trajectories": [
            {"id": item.trajectory.id, "domain": item.trajectory.domain, "tokens": len(item.trajectory.token_ids)}
            for item in batch.items
        ],
    }
    with open(f"{path}.json", "w", encoding="utf-8") as file:
        json.dump(described, file, indent=2)


def _tensors(record: Any) -> dict[str, Tensor]:
    assert is_dataclass(record)
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def too_many_skipped(in_a_row: int, limit: int, last: Sequence[str], folder: str) -> RuntimeError:
    """What a run stops with."""
    where = f"; the micro-batches are in {folder}" if folder else ""
    return RuntimeError(
        f"{in_a_row} steps in a row were skipped (learner.max_skipped_steps={limit}): the last one because "
        f"{'; '.join(last)}{where}. Weights are those before them; a lower learning rate, learner.grad_clip or a look "
        "at that data may help"
    )

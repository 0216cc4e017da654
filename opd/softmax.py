"""Sums over a vocabulary that merge: of one softmax, and of two that are compared.

The one idea: kept relative to the largest logit of their own part, sums over parts of a vocabulary give those over the
whole by a few operations per token, whatever the parts are: tiles, blocks of a kernel, shards of ranks. Logits are in
bits (`opd.logits`); p is the student, q the teacher, z and u are their logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.logits import NATS, Tiling


@dataclass(slots=True)
class Softmax:
    """Softmax of n rows over a part of the vocabulary, relative to each row's largest logit: nothing overflows."""

    top: Tensor  # [n] m, the largest logit
    mass: Tensor  # [n] sum of 2^(z-m)
    moment: Tensor  # [n] sum of 2^(z-m) (z-m)
    at_ids: Tensor  # [n, K] logits of the ids that are asked for, 0 where an id lies in another part

    def lifted(self, top: Tensor) -> Softmax:
        """The same relative to another `top`, not below its own."""
        shift = self.top - top
        scale = shift.exp2()
        return Softmax(top, scale * self.mass, scale * (self.moment + self.mass * shift), self.at_ids)

    def merge(self, other: Softmax) -> Softmax:
        top = torch.maximum(self.top, other.top)
        one, two = self.lifted(top), other.lifted(top)
        return Softmax(top, one.mass + two.mass, one.moment + two.moment, self.at_ids + other.at_ids)

    @staticmethod
    def of_rows(parts: list[Softmax]) -> Softmax:
        """Tiles of tokens, one after the other."""
        columns = ("top", "mass", "moment", "at_ids")
        return Softmax(*(torch.cat([getattr(part, column) for part in parts]) for column in columns))

    def over_ranks(self, tiling: Tiling) -> Softmax:
        """Of the whole vocabulary, whose shards the ranks hold."""
        (top,) = tiling.max_over_ranks([self.top])
        whole = self if tiling.shard is None else self.lifted(top)
        return Softmax(top, *tiling.sum_over_ranks([whole.mass, whole.moment, whole.at_ids]))

    def logprobs(self) -> Tensor:
        """[n, K], in nats."""
        return ((self.at_ids - self.top[:, None]) - self.mass.log2()[:, None]) * NATS

    def entropy(self) -> Tensor:
        return (self.mass.log2() - self.moment / self.mass) * NATS


@dataclass(slots=True)
class Pair:
    """Student and teacher over the same part of the vocabulary."""

    student: Softmax  # p
    teacher: Softmax  # q
    # With z and u relative to their largest: differences first, so that close logits do not cancel.
    reverse: Tensor  # [n] sum of 2^z (z - u)
    forward: Tensor  # [n] sum of 2^u (u - z)
    agree: Tensor  # [n] 1 if some entry is the largest of both, else 0

    def lifted(self, student_top: Tensor, teacher_top: Tensor) -> Pair:
        by_student, by_teacher = self.student.top - student_top, self.teacher.top - teacher_top
        step = by_student - by_teacher
        return Pair(
            self.student.lifted(student_top),
            self.teacher.lifted(teacher_top),
            by_student.exp2() * (self.reverse + self.student.mass * step),
            by_teacher.exp2() * (self.forward - self.teacher.mass * step),
            self.agree * ((by_student == 0) & (by_teacher == 0)),
        )

    def merge(self, other: Pair) -> Pair:
        tops = [torch.maximum(getattr(self, s).top, getattr(other, s).top) for s in ("student", "teacher")]
        one, two = self.lifted(*tops), other.lifted(*tops)
        return Pair(
            one.student.merge(two.student),
            one.teacher.merge(two.teacher),
            one.reverse + two.reverse,
            one.forward + two.forward,
            one.agree + two.agree,
        )

    @staticmethod
    def of_rows(parts: list[Pair]) -> Pair:
        """Tiles of tokens, one after the other."""
        columns = ("reverse", "forward", "agree")
        return Pair(
            Softmax.of_rows([part.student for part in parts]),
            Softmax.of_rows([part.teacher for part in parts]),
            *(torch.cat([getattr(part, column) for part in parts]) for column in columns),
        )

    def over_ranks(self, tiling: Tiling) -> Pair:
        """Of the whole vocabulary, whose shards the ranks hold."""
        if tiling.shard is None:
            return self
        student, teacher = self.student.over_ranks(tiling), self.teacher.over_ranks(tiling)
        lifted = self.lifted(student.top, teacher.top)
        return Pair(student, teacher, *tiling.sum_over_ranks([lifted.reverse, lifted.forward, lifted.agree]))

    def log_mass_gap(self) -> Tensor:
        return self.student.mass.log2() - self.teacher.mass.log2()

    def reverse_kl(self) -> Tensor:
        """In bits, as is `forward_kl`."""
        return self.reverse / self.student.mass - self.log_mass_gap()

    def forward_kl(self) -> Tensor:
        return self.forward / self.teacher.mass + self.log_mass_gap()

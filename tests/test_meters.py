"""What is logged beside a loss."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_logits.meters import compare
from two_rows import random


def obvious(student, teacher, labels):
    def entropy(row):
        return -sum(p * math.log(p) for p in row.softmax(-1).tolist() if p > 0)

    agreement = sum(int(s.argmax()) == int(t.argmax()) for s, t in zip(student, teacher, strict=True))
    return {
        "cross_entropy": float(cross_entropy(student, labels, reduction="sum")),
        "student_entropy": sum(map(entropy, student)),
        "teacher_cross_entropy": float(cross_entropy(teacher, labels, reduction="sum")),
        "agreement": agreement,
    }


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_sums_over_rows(shift):
    student, teacher, labels = random(40, 5), random(40, 5, seed=1), torch.arange(40) % 5
    student[:7, 3] = teacher[3:9, 2] = -math.inf
    labels[:9] = 0
    expected = obvious(student, teacher, labels)
    assert 0 < expected["agreement"] < 40
    for dtype in (torch.float64, torch.float32):
        found = compare((student + shift).to(dtype), (teacher - shift).to(dtype), labels)
        assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def test_a_certain_student_has_no_entropy():
    student = torch.full((2, 4), -math.inf)
    student[:, 1] = 3.0
    found = compare(student, None, torch.tensor([1, 1]))
    assert {name: float(value) for name, value in found.items()} == {"cross_entropy": 0.0, "student_entropy": 0.0}


def test_a_label_that_is_ruled_out_costs_infinitely_much():
    student = torch.tensor([[0.0, -math.inf]])
    assert float(compare(student, None, torch.tensor([1]))["cross_entropy"]) == math.inf

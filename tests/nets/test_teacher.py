import pytest
import torch
from torch import nn

from medseg_ssl.nets.teacher import Teacher


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, vector_BE):
        return self.norm(self.drop(self.linear(vector_BE)))


def test_it_begins_as_the_student_and_shares_nothing():
    student = Network()
    teacher = Teacher(student)
    for mine, its in zip(teacher.network.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()
        assert not mine.requires_grad
        assert its.requires_grad


def test_a_step_towards_the_student():
    student = Network()
    teacher = Teacher(student)
    with torch.no_grad():
        for parameter in teacher.network.parameters():
            parameter.fill_(1.0)
        for parameter in student.parameters():
            parameter.fill_(2.0)
        student.norm.running_mean.fill_(5.0)
    teacher.follow(student, momentum=0.75)
    assert all((p == 1.25).all() for p in teacher.network.parameters())
    assert (teacher.network.norm.running_mean == 5.0).all(), "statistics are taken over"
    teacher.follow(student, momentum=1.0)
    assert all((p == 1.25).all() for p in teacher.network.parameters())
    teacher.follow(student, momentum=0.0)
    assert all((p == 2.0).all() for p in teacher.network.parameters())
    assert all((p == 2.0).all() for p in student.parameters())
    with pytest.raises(ValueError, match=r"decay.*1\.5"):
        teacher.follow(student, momentum=1.5)


def test_it_stays_in_eval_mode():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = Network()
            self.teacher = Teacher(self.student)

    pair = Pair().train()
    assert pair.student.training
    assert not any(module.training for module in pair.teacher.modules())
    before = pair.teacher.network.norm.running_mean.clone()
    image = torch.randn(4, 2)
    with torch.no_grad():
        assert torch.equal(pair.teacher.network(image), pair.teacher.network(image))
    assert torch.equal(pair.teacher.network.norm.running_mean, before)
    assert {f"teacher.network.{name}" for name in pair.student.state_dict()} <= set(pair.state_dict())

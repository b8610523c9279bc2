import itertools

import pytest

from medseg_ssl import draws, schedules


def test_ends_of_schedules():
    assert schedules.cosine(0.0, 1.0, 0.1) == 1.0
    assert schedules.cosine(1.0, 1.0, 0.1) == pytest.approx(0.1)
    assert schedules.cosine(0.5, 1.0, 0.0) == pytest.approx(0.5)
    assert schedules.linear(0.25, 0.0, 4.0) == 1.0
    assert schedules.momentum(0.0, 0.99) == pytest.approx(0.99)
    assert schedules.momentum(1.0, 0.99) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "poly"])
def test_learning_rate_warms_up_and_is_continuous(kind):
    rate = [schedules.learning_rate(i / 1000, kind=kind, warmup_fraction=0.1) for i in range(1001)]
    assert rate[0] == 0.0
    assert rate[50] == pytest.approx(0.5)
    assert max(rate) == pytest.approx(1.0)
    assert max(abs(a - b) for a, b in itertools.pairwise(rate)) < 0.02
    if kind != "constant":
        assert rate[-1] == pytest.approx(0.0, abs=1e-9)


def test_wrong_schedule_names_the_choices():
    with pytest.raises(ValueError, match="no schedule named 'cos'; known: constant, cosine, linear, poly"):
        schedules.learning_rate(0.5, kind="cos", warmup_fraction=0.0)
    with pytest.raises(ValueError, match="progress must lie in"):
        schedules.cosine(1.5, 0, 1)


def test_draws_depend_on_the_triple_alone():
    a = draws.numpy_generator(1, 2, "crop").random(3)
    assert (a == draws.numpy_generator(1, 2, "crop").random(3)).all()
    for other in [(2, 2, "crop"), (1, 3, "crop"), (1, 2, "noise")]:
        assert (a != draws.numpy_generator(*other).random(3)).all()
    assert draws.key(0, 1, "a") == 8448945352516839587, "a changed key would change every published run"

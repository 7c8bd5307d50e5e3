"""Methods of pruning as the command line gives them."""

from __future__ import annotations

import pytest

import vnm_compile as vnm
from vnm_compile.cli.method import method_with_options


def test_options_are_text_and_the_rest_keeps_its_defaults():
    assert method_with_options("magnitude", []) == vnm.prune.Magnitude()
    assert method_with_options("magnitude", ["norm=l2"]) == vnm.prune.Magnitude(norm="l2")
    found = method_with_options("second_order", ["damping=0.5", "sequential=false"])
    assert found == vnm.prune.SecondOrder(damping=0.5, sequential=False)
    assert method_with_options("fisher", ["steps=3"]) == vnm.prune.Fisher(steps=3)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("magic", "norm=l2", "unknown method"),
        ("magnitude", "damping=1", "magnitude has the options norm"),
        ("magnitude", "norm", "norm=''"),
        ("magnitude", "norm=l3", "norm='l3'"),
        ("wanda", "sequential=maybe", "sequential is such as True"),
        ("second_order", "damping=much", "damping is such as 0.01"),
        ("second_order", "damping=-1", "damping=-1"),
        ("fisher", "steps=0", "steps=0"),
        ("fisher", "steps=1.5", "steps is such as 1"),
        ("fisher", "retrain=print", "fisher has the options num_grads, block_size, damping, steps, memory"),
    ],
)
def test_mistakes_are_named(name, option, message):
    with pytest.raises(vnm.VNMError, match=message):
        method_with_options(name, [option])

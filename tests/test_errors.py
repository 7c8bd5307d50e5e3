"""Each kind of mistake is a class of its own, and says its parts to programs too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import vnm_compile as vnm
from tests.support import make_sparse_
from vnm_compile import errors
from vnm_compile.hardware import find_target
from vnm_compile.prune.calibration.batches import as_batches

MISTAKES = {
    "pattern": (lambda: vnm.compress(torch.ones(64, 64), "64:2:8"), errors.PatternViolation),
    "dtype": (lambda: vnm.compress(torch.ones(64, 64, dtype=torch.int8), "64:2:8"), errors.UnsupportedWeight),
    "dimensions": (lambda: vnm.compress(torch.ones(64), "64:2:8"), errors.UnsupportedWeight),
    "data": (lambda: as_batches("a text"), errors.BadCalibration),
    "spec": (lambda: vnm.Spec.parse("64:2"), errors.BadOption),
    "target": (lambda: find_target("sm_70"), errors.BadOption),
    "model": (lambda: vnm.annotate("a model", "64:2:8"), errors.BadModel),
    "selection": (lambda: vnm.annotate(nn.Sequential(nn.ReLU()), "64:2:8"), errors.NothingSelected),
    "write": (lambda: vnm.compress(torch.zeros(64, 64), "64:2:8").zero_(), errors.RefusedWrite),
    "arrays": (lambda: vnm.VNMTensor(*[torch.zeros(2)] * 3, vnm.Spec(64, 2, 8), (64, 64)), errors.DamagedWeight),
    "scores": (lambda: vnm.prune.project(torch.full((64, 64), torch.nan), "64:2:8"), errors.BadScores),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_its_kind(name):
    make, kind = MISTAKES[name]
    with pytest.raises(vnm.VNMError) as caught:
        make()
    assert type(caught.value) is kind
    assert isinstance(caught.value, ValueError)


def test_a_broken_pattern_is_told_in_parts():
    with pytest.raises(errors.PatternViolation) as caught:
        vnm.compress(torch.ones(64, 64), "64:2:8")
    error = caught.value
    assert (error.layer, error.expected) == (None, "64:2:8")
    assert error.found is not None
    assert error.way_out is not None
    assert error.found in str(error)
    assert str(error).endswith(error.way_out)
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))


def test_the_kind_and_the_parts_pass_through_compilation():
    model = nn.Sequential(make_sparse_(nn.Linear(64, 64), "16:2:8")).eval()
    vnm.annotate(model, "16:2:8")
    with torch.no_grad():
        model[0].weight.fill_(1)
        with pytest.raises(errors.PatternViolation) as caught:
            torch.compile(model, backend="vnm")(torch.randn(2, 64))
        assert (caught.value.layer, caught.value.expected) == ("0", "16:2:8")
        torch._dynamo.reset()
        with pytest.raises(errors.BadOption, match="no_such"):
            torch.compile(model, backend="vnm", options={"vnm.no_such": 1})(torch.randn(2, 64))

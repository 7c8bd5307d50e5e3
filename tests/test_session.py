"""What the process remembers: counted, forgotten together, and never needed for an answer to be right."""

from __future__ import annotations

import threading
import warnings

import torch
from torch import nn

import vnm_compile as vnm
from tests.support import make_sparse_
from vnm_compile.session import Session, session

OPTIONS = {"vnm.policy": "memory"}


def compiled_model():
    torch._dynamo.reset()
    model = make_sparse_(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), "16:2:8", 1)
    model.eval().requires_grad_(False)
    return model, torch.compile(model, backend="vnm", options=OPTIONS), torch.randn(3, 64)


def test_what_is_remembered_is_counted_and_forgotten():
    session.reset()
    model, run, x = compiled_model()
    vnm.annotate(model, "16:2:8")
    expected = model(x)
    torch.testing.assert_close(run(x), expected)
    counts = session.counts()
    assert counts["packed weights"] == 2
    assert counts["weights looked at"] == 2
    assert counts["compiled graphs"] >= 1
    session.reset()
    after = session.counts()
    assert {after[what] for what in ("packed weights", "weights looked at", "patterns found", "timings")} == {0}
    assert after["annotations"] >= 2, "the user's word is not forgotten"
    torch.testing.assert_close(run(x), expected)
    assert session.counts()["packed weights"] == 2


def test_a_write_before_and_after_a_reset_is_seen():
    model, run, x = compiled_model()
    run(x)
    for _ in range(2):
        model[0].weight.data.mul_(-2)
        session.reset()
        torch.testing.assert_close(run(x), model(x))
        model[2].weight.data.mul_(-2)
        torch.testing.assert_close(run(x), model(x))


def test_resets_beside_calls():
    model, run, x = compiled_model()
    expected = model(x)
    run(x)
    wrong, done = [], threading.Event()

    def call():
        with torch.no_grad():
            while not done.is_set():
                wrong.append(not torch.allclose(run(x), expected, atol=1e-5))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(wrong) < 20 and any(thread.is_alive() for thread in threads):
        session.reset()
    done.set()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a reset and a call wait for each other"
    assert len(wrong) >= 20
    assert not any(wrong)


def test_a_warning_is_given_once_until_a_reset():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Session()
        assert [own.first_time("one"), own.first_time("one"), own.first_time("other")] == [True, False, True]
        own.reset()
        assert own.first_time("one")


def test_lasting_memories_and_the_order_of_forgetting():
    own, forgotten = Session(), []

    class Memory(list):
        def clear(self):
            forgotten.append(self[0])
            super().clear()

    own.keep("first", Memory(["first"]))
    own.keep("kept", Memory(["kept"]), lasting=True)
    own.keep("last", Memory(["last"]))
    own.keep("first", Memory(["first again"]))
    assert own.counts() == {"warnings given": 0, "first": 2, "kept": 1, "last": 1}
    own.reset()
    assert forgotten == ["last", "first again", "first"]
    assert own.counts()["kept"] == 1

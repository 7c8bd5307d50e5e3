"""A short run of what `python -m tests.load` measures at length."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.load.threads import serve


@pytest.mark.parametrize(
    "how",
    [
        {"locked": True},
        {"locked": True, "write": lambda m, new: [p.data.copy_(new[n]) for n, p in m.named_parameters()]},
        {"locked": False, "assign": True, "layers": 1},
    ],
    ids=["in place", "behind torch's back", "assigned, no lock"],
)
def test_every_answer_is_that_of_one_set_of_weights(how):
    served = serve(calls=150, threads=8, **how)
    assert served.calls == 8 * 150
    assert served.reloads > 0
    assert served.wrong == served.stale_at_the_end == 0


def test_nothing_stays_stale_where_reloads_and_calls_run_into_each_other():
    for _ in range(3):
        assert serve(calls=60, threads=8, locked=False, reloads_a_second=500).stale_at_the_end == 0


def test_a_refresh_while_another_thread_packs_is_not_lost():
    import vnm_compile as vnm
    from tests.load.threads import SPARSE, chain

    model, x = chain(0), torch.randn(4, 64)
    run = torch.compile(model, backend="vnm", options=SPARSE)
    with torch.no_grad():
        run(x)
        for i in range(40):
            weight = model[0].weight
            row, column = weight.nonzero()[i].tolist()
            weight.mul_(1.0)  # makes the next call look, and pack
            caller = threading.Thread(target=run, args=(x,))
            caller.start()
            weight.data[row, column] += 1
            vnm.refresh(model)
            caller.join()
            torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)

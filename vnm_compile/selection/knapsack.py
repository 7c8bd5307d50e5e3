"""One option a layer, the least total error within a budget of time: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

from vnm_compile.errors import MissingPackage, NoCandidate

_GAP = 1e-4  # of the optimum that is left on the table for the sake of a bounded run time
_MOST_SECONDS = 60.0


def assign(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """Return the number of the option that each layer takes, or None where no assignment keeps to the budget.

    Args:
        errors, costs: of each option of each layer.
        budget: for the sum of the costs of the options taken.

    Raises:
        VNMError: scipy is not installed, or its solver gave up.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag
    except ModuleNotFoundError as missing:
        raise MissingPackage("a pattern per layer needs scipy: pip install 'vnm-compile[prune]'.") from missing
    if sum(min(row) for row in costs) > budget * (1 + 1e-9):
        return None
    flat_errors, flat_costs = np.concatenate(errors), np.concatenate(costs)
    one_each = block_diag([np.ones((1, len(row))) for row in errors], format="csr")
    result = milp(
        flat_errors,
        integrality=np.ones_like(flat_errors),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            # In shares of the budget: the solver's tolerances are absolute.
            LinearConstraint(flat_costs[None] / budget, -np.inf, 1 + 1e-9),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _MOST_SECONDS},
    )
    if result.x is None:
        raise NoCandidate(f"the solver found no assignment of patterns: {result.message}")
    ends = np.cumsum([len(row) for row in errors])[:-1]
    return [int(part.argmax()) for part in np.split(result.x, ends)]

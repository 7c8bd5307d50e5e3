"""Options and modes that do not exist: one sentence, as our own error, straight from torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vnm_compile import VNMError
from vnm_compile.codegen.inductor import check_options
from vnm_compile.options import split_options

WRONG = {
    "ours": ({"options": {"vnm.polcy": "memory"}}, r"unknown option vnm\.polcy; there are vnm\.policy"),
    "value": ({"options": {"vnm.policy": "speed"}}, r"vnm\.policy='speed'; it takes one of"),
    "list": ({"options": {"vnm.policy": ["memory"]}}, r"vnm\.policy=\['memory'\]"),
    "Inductor's": ({"options": {"max_autotun": True}}, r"unknown option max_autotun: .* mean max_autotune\?"),
    "without our prefix": ({"options": {"policy": "memory"}}, r"unknown option policy: .*"),
    "Inductor's value": ({"options": {"max_autotune": "yes"}}, r"max_autotune='yes'; Inductor takes bool"),
    "mode": ({"mode": "fastest"}, r"unknown mode 'fastest'; there are default"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_unknown_options_are_our_error(kind):
    arguments, message = WRONG[kind]
    layer = nn.Linear(4, 4)
    with pytest.raises(VNMError, match=message), torch.no_grad():
        torch.compile(layer, backend="vnm", **arguments)(torch.randn(1, 4))


def test_what_is_no_mapping_of_text_is_refused():
    for options in (5, ["vnm.policy"], {3: True}):
        with pytest.raises(VNMError, match="options"):
            split_options(options)


def test_inductors_keys_may_be_written_with_dashes():
    assert check_options({"max-autotune": True, "triton.cudagraphs": False}) == {
        "max_autotune": True,
        "triton.cudagraphs": False,
    }

"""The canonical arrays: exact round trips, the padding rules, and a slow oracle for matches and detect."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import random_sparse
from vnm_compile import Spec, VNMError, detect, matches
from vnm_compile.codegen.triton.prepack import AlignedRows
from vnm_compile.format import pack, unpack, unpack_indices
from vnm_compile.layout import Layout

SPECS = st.builds(
    Spec,
    st.sampled_from([1, 8, 16, 32, 64, 128, 256]),
    st.sampled_from([1, 2]),
    st.one_of(st.integers(4, 20), st.sampled_from([32, 100, 256, 257, 300])),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32]


def follows(weight: torch.Tensor, spec: Spec) -> bool:
    """The definition of the pattern, with loops."""
    for row in range(0, weight.shape[0], spec.v):
        for column in range(0, weight.shape[1], spec.m):
            block = weight[row : row + spec.v, column : column + spec.m] != 0
            if int(block.any(0).sum()) > 4 or any(int(line.sum()) > spec.n for line in block):
                return False
    return True


@settings(max_examples=120, deadline=None)
@given(
    spec=SPECS,
    out=st.integers(0, 300),
    width=st.integers(1, 320),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact_and_small(spec, out, width, dtype, seed):
    weight = (random_sparse(out, width, spec, seed=seed) * 20).to(dtype)
    packed = pack(weight, spec)
    assert torch.equal(unpack(packed, Layout(spec, out, width)), weight)
    assert packed.nbytes == Layout(spec, out, width).nbytes(dtype)
    rows, groups = spec.rows(out), spec.groups(width)
    assert packed.values.shape == (rows, groups * spec.n)
    assert packed.values.dtype == dtype
    assert packed.metadata.shape == (rows, -(-groups * spec.n // 4))
    assert packed.columns.shape == (rows // spec.v, groups, 4)
    assert packed.columns.dtype == (torch.uint8 if spec.m <= 256 else torch.uint16)
    assert bool((packed.columns.int().diff(dim=-1) > 0).all())
    assert bool((packed.columns.int() < spec.m).all())
    indices = unpack_indices(packed.metadata, groups * spec.n).view(rows, groups, spec.n).int()
    assert bool((indices.diff(dim=-1) > 0).all())


@settings(max_examples=80, deadline=None)
@given(spec=SPECS, out=st.integers(1, 70), width=st.integers(1, 60), flips=st.integers(0, 3), seed=st.integers(0, 99))
def test_matches_agrees_with_the_definition(spec, out, width, flips, seed):
    weight = random_sparse(out, width, spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(flips):
        row = int(torch.randint(out, (1,), generator=generator))
        weight[row, int(torch.randint(width, (1,), generator=generator))] = 1.0
    expected = follows(weight, spec)
    assert matches(weight, spec) == expected
    if expected:
        pack(weight, spec)
    else:
        with pytest.raises(VNMError, match=f"is not {spec}"):
            pack(weight, spec)


@settings(max_examples=25, deadline=None)
@given(spec=st.sampled_from(["1:2:4", "16:2:8", "32:2:5", "8:1:6", "64:2:16", "16:1:4"]), seed=st.integers(0, 50))
def test_detect_finds_the_sparsest_pattern(spec, seed):
    spec = Spec.parse(spec)
    weight = random_sparse(128, 240, spec, seed=seed)
    found = detect(weight)
    assert found is not None
    assert follows(weight, found)
    assert found.density <= spec.density
    # Nothing smaller fits, and no larger V does.
    for m in range(4, 241):
        for n in (1, 2):
            if n / m < found.density:
                assert not follows(weight, Spec(1, n, m))
    assert not any(follows(weight, Spec(v, found.n, found.m)) for v in (16, 32, 64, 128) if v > found.v)


def test_a_dense_weight_has_no_pattern():
    assert detect(torch.randn(64, 64)) is None
    assert detect(torch.empty(0, 64)) is None
    assert detect(torch.empty(64, 0)) is None


def test_v_never_exceeds_the_rows():
    found = detect(random_sparse(40, 64, "8:2:8"))
    assert found is not None
    assert found.v <= 40


def test_negative_zero_is_zero():
    weight = random_sparse(32, 32, "16:2:8")
    signed = torch.where(weight == 0, torch.tensor(-0.0), weight)
    assert matches(signed, "16:2:8")
    packed = pack(signed, Spec(16, 2, 8))
    assert not bool((torch.signbit(packed.values) & (packed.values == 0)).any())
    assert torch.equal(unpack(packed, Layout(Spec(16, 2, 8), 32, 32)), weight)


def test_nan_is_kept():
    weight = random_sparse(16, 16, "16:2:8")
    place = tuple(weight.nonzero()[0])
    weight[place] = torch.nan
    back = unpack(pack(weight, Spec(16, 2, 8)), Layout(Spec(16, 2, 8), 16, 16))
    assert back[place].isnan()


def test_strides_do_not_matter():
    weight = random_sparse(48, 40, "16:2:8")
    for view in (weight.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0]):
        assert not view.is_contiguous()
        for one, other in zip(pack(view, Spec(16, 2, 8)), pack(weight, Spec(16, 2, 8)), strict=True):
            assert torch.equal(one, other)


def test_short_rows_are_filled_with_zeros_at_unused_indices():
    weight = torch.zeros(2, 8)
    weight[0, 5] = 3.0
    packed = pack(weight, Spec(2, 2, 8))
    assert packed.columns.tolist() == [[[0, 1, 2, 5]]]
    assert packed.values.tolist() == [[0.0, 3.0], [0.0, 0.0]]
    assert unpack_indices(packed.metadata, 2).tolist() == [[0, 3], [0, 1]]


@pytest.mark.parametrize(
    ("spec", "place", "shown"),
    [
        ("64:2:8", (70, slice(8, 14)), "block rows 64-99, columns 8-15 has 6 non-zero columns"),
        ("1:2:4", (7, slice(4, 7)), "row 7, columns 4-7 has 3 non-zeros"),
    ],
)
def test_the_error_shows_the_place(spec, place, shown):
    weight = torch.zeros(100, 30)
    weight[place] = 1.0
    with pytest.raises(VNMError) as raised:
        pack(weight, Spec.parse(spec), "encoder.dense")
    assert str(raised.value).startswith(f"encoder.dense: weight [100, 30] is not {spec}: {shown}")
    assert "vnm.sparsify" in str(raised.value)


@pytest.mark.parametrize("text", ["", "64:2", "64:2:8:1", "a:b:c", "64-2-8", None])
def test_unreadable_patterns(text):
    with pytest.raises(VNMError, match="64:2:8"):
        Spec.parse(text)


@pytest.mark.parametrize("numbers", [(0, 2, 8), (64, 3, 8), (64, 0, 8), (64, 2, 3), (64, 2, 70000), (64.0, 2, 8)])
def test_impossible_patterns(numbers):
    with pytest.raises(VNMError):
        Spec(*numbers)


def test_a_weight_is_a_matrix():
    for shape in ((3,), (2, 3, 4)):
        with pytest.raises(VNMError, match="2 dimensions"):
            pack(torch.zeros(shape), Spec(16, 2, 8))
        with pytest.raises(VNMError, match="2 dimensions"):
            matches(torch.zeros(shape), "16:2:8")


def test_rows_are_aligned_where_they_are_not():
    spec = Spec.parse("16:2:5")
    packed = pack(random_sparse(32, 4096, spec, torch.bfloat16), spec)
    aligned = AlignedRows().prepare(packed)
    assert aligned.values is packed.values
    assert packed.metadata.stride(0) == 410
    assert aligned.metadata.stride(0) == 416
    assert torch.equal(aligned.metadata, packed.metadata)
    assert torch.equal(unpack(aligned, Layout(spec, 32, 4096)), unpack(packed, Layout(spec, 32, 4096)))

"""A compressed weight in ordinary code: results are those of the dense weight, writes are taken or refused."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import operator
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vnm_compile as vnm
from tests.support import make_sparse_, random_sparse
from vnm_compile import Spec, VNMError, VNMTensor, compress, compress_model
from vnm_compile.tensor import _rebuild

SPEC = "16:2:8"


def pair(dtype=torch.float32, seed=0):
    dense = random_sparse(64, 48, SPEC, dtype, seed) * 0.3
    return dense, compress(dense, SPEC)


def assert_same(actual, expected):
    """Equal in value, dtype, shape and strides."""
    if isinstance(expected, torch.Tensor):
        if isinstance(actual, VNMTensor):
            actual = actual.to_dense()
        assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(actual, expected) or (actual.isnan() & expected.isnan()).any()
    elif isinstance(expected, tuple | list):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


USES = {
    "linear": lambda w, x: F.linear(x, w),
    "linear with bias": lambda w, x: F.linear(x, w, w.new_ones(64)),
    "linear by keyword": lambda w, x: F.linear(weight=w, input=x, bias=w.new_ones(64)),
    "linear of 3 dimensions": lambda w, x: F.linear(x.expand(2, *x.shape), w, w.new_ones(64)),
    "linear of a vector": lambda w, x: F.linear(x[0], w),
    "linear of a transposed activation": lambda w, x: F.linear(x.t().contiguous().t(), w),
    "matmul": lambda w, x: x @ w.t(),
    "matmul by keyword": lambda w, x: torch.matmul(input=x, other=w.t()),
    "matmul with an output": lambda w, x: torch.matmul(x, w.t(), out=torch.empty(5, 64)),
    "mm": lambda w, x: torch.mm(x, mat2=w.T),
    "mm method": lambda w, x: x.mm(mat2=w.mT),
    "matmul method": lambda w, x: x.matmul(w.transpose(0, 1)),
    "permuted": lambda w, x: x @ w.permute(1, 0),
    "permuted by nothing": lambda w, x: x @ w.permute(0, 1).t(),
    "addmm": lambda w, x: torch.addmm(w.new_ones(64), x, w.t()),
    "addmm scaled": lambda w, x: torch.addmm(w.new_ones(64), x, w.t(), beta=0.5, alpha=2),
    "addmm by keyword": lambda w, x: torch.addmm(input=w.new_ones(64), mat1=x, mat2=w.t(), alpha=3),
    "addmm with a matrix": lambda w, x: torch.addmm(w.new_ones(5, 64), x, w.t()),
    "addmm method": lambda w, x: w.new_ones(64).addmm(x, w.t()),
    "addmm with an output": lambda w, x: torch.addmm(w.new_ones(64), x, w.t(), out=torch.empty(5, 64)),
    "from the left": lambda w, x: w @ x.t(),
    "mv": lambda w, x: torch.mv(w, x[0]),
    "bmm": lambda w, x: torch.bmm(x[None], w.t()[None]),
    "baddbmm": lambda w, x: torch.baddbmm(w.new_ones(1), x[None], w.t()[None]),
    "embedding": lambda w, x: F.embedding(torch.tensor([3, 1]), w),
    "einsum": lambda w, x: torch.einsum("ti,oi->to", x, w),
    "tensordot": lambda w, x: torch.tensordot(x, w, dims=([1], [1])),
    "bilinear": lambda w, x: F.bilinear(x, x, w[None, :48].contiguous()),
    "row": lambda w, x: w[3],
    "slice": lambda w, x: w[4:9, ::2],
    "gather": lambda w, x: w[torch.tensor([3, 1])],
    "mask": lambda w, x: w[w > 0],
    "rows": lambda w, x: list(w)[:2],
    "split": lambda w, x: w.split(16),
    "chunk": lambda w, x: w.chunk(3, 1),
    "view": lambda w, x: w.view(-1),
    "reshape": lambda w, x: w.t().reshape(-1),
    "flatten": lambda w, x: w.flatten(),
    "contiguous": lambda w, x: w.t().contiguous(),
    "arithmetic": lambda w, x: 2 * w + w.abs() / 3 - w**2,
    "with dense": lambda w, x: w + x[:1],
    "sum": lambda w, x: w.sum(1, keepdim=True),
    "norm": lambda w, x: w.norm(),
    "amax": lambda w, x: w.amax(0),
    "topk": lambda w, x: w.topk(3),
    "equal": lambda w, x: torch.equal(w, w),
    "compared": lambda w, x: w == w.t().t(),
    "nonzero": lambda w, x: w.count_nonzero(),
    "cast": lambda w, x: (w.int(), w.bool(), w.half(), w.to(torch.complex64)),
    "cat": lambda w, x: torch.cat([w, x]),
    "stack": lambda w, x: torch.stack([w, w]),
    "where": lambda w, x: torch.where(w > 0, w, 0),
    "like": lambda w, x: (torch.zeros_like(w), torch.ones_like(w), w.new_zeros(3)),
    "sizes": lambda w, x: (w.numel(), w.dim(), w.element_size(), len(w), w.size(1), w.stride(), w.is_contiguous()),
    "vector": lambda w, x: nn.utils.parameters_to_vector([w]),
    "numpy": lambda w, x: torch.from_numpy(w.numpy()),
    "list": lambda w, x: w.tolist(),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_use_gives_what_the_dense_weight_gives(mode):
    dense, weight = pair()
    x = x_of(5, 48)
    with mode():
        for name, use in USES.items():
            expected = use(dense, x)
            try:
                assert_same(use(weight, x), expected)
            except Exception as error:
                raise AssertionError(f"{name} under {mode.__name__}") from error
    with mode():
        inside = compress(dense, SPEC)
    assert_same(F.linear(x.clone().requires_grad_(), inside).detach(), F.linear(x, dense))


DIFFERENTIABLE = [name for name in USES if name.startswith(("lin", "mat", "mm", "addmm", "from", "bmm", "ein", "mv"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_weight(dtype):
    dense, weight = pair(dtype)
    for name in DIFFERENTIABLE:
        if "output" in name:
            continue
        grads = []
        for kind in (dense, weight):
            kind = kind.detach().requires_grad_()
            x = x_of(5, 48, dtype=dtype).requires_grad_()
            y = USES[name](kind, x)
            y.backward(torch.ones_like(y) * 0.5)
            grads.append((y.detach(), x.grad, kind.grad))
        assert_same(grads[1], grads[0])


def test_a_weight_that_requires_grad_gets_its_gradient_and_no_update():
    dense = make_sparse_(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)), SPEC)
    compressed = copy.deepcopy(dense)
    compress_model(compressed)
    assert not any(p.requires_grad for name, p in compressed.named_parameters() if "weight" in name)
    compressed.requires_grad_(True).train()
    for each in (dense, compressed):
        each(x_of(5, 48)).square().sum().backward()
    for one, other in zip(compressed.parameters(), dense.parameters(), strict=True):
        assert_same(one.grad, other.grad)
    before = compressed[0].weight.to_dense()
    for make in (torch.optim.SGD, torch.optim.AdamW):
        for fused in (False, True):
            with pytest.raises(VNMError, match="decompress_model"):
                make(compressed.parameters(), lr=0.1, fused=fused).step()
    assert torch.equal(compressed[0].weight.to_dense(), before)
    # What trains beside frozen compressed weights trains as ever.
    compressed.requires_grad_(False)
    compressed[2].bias.requires_grad_(True)
    compressed.zero_grad()
    compressed(x_of(5, 48)).sum().backward()
    torch.optim.AdamW(compressed.parameters(), lr=0.1).step()


def test_to_dense_is_differentiable():
    dense, weight = pair()
    for kind in (dense.requires_grad_(), weight.requires_grad_()):
        (kind.to_dense() if kind is weight else kind).square().sum().backward()
    assert_same(weight.grad, dense.grad)
    assert weight.to_dense(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(dtype):
    dense, weight = pair(dtype)
    for x in (x_of(5, 48), x_of(2, 5, 48), x_of(5, 48).bfloat16()):
        for bias in (None, torch.ones(64), torch.ones(64).bfloat16(), torch.ones(64).half()):
            with torch.autocast("cpu", torch.bfloat16):
                assert_same(F.linear(x, weight, bias), F.linear(x, dense, bias))
                assert_same(x @ weight.t(), x @ dense.t())
                with torch.autocast("cpu", enabled=False):
                    assert_same(F.linear(x.to(dtype), weight), F.linear(x.to(dtype), dense))


def test_what_does_not_fit_is_the_error_of_the_dense_weight():
    dense, weight = pair()
    for use in (
        lambda w: F.linear(x_of(5, 47), w),
        lambda w: F.linear(x_of(5, 48).bfloat16(), w),
        lambda w: F.linear(x_of(5, 48), w, torch.ones(64).bfloat16()),
        lambda w: F.linear(x_of(5, 48), w, torch.ones(63)),
        lambda w: w.view(7, 7),
        lambda w: w[99],
    ):
        messages = []
        for kind in (dense, weight):
            with pytest.raises((RuntimeError, IndexError)) as caught:
                use(kind)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_function_transforms():
    dense, weight = pair()
    x = x_of(5, 48)
    for use in (
        lambda w: torch.vmap(lambda row: F.linear(row, w))(x),
        lambda w: torch.func.grad(lambda x: F.linear(x, w).square().sum())(x),
        lambda w: torch.func.jacrev(lambda x: F.linear(x, w))(x[0]),
        lambda w: torch.func.jacfwd(lambda x: F.linear(x, w))(x[0]),
        lambda w: torch.func.jvp(lambda x: F.linear(x, w), (x,), (x,)),
        lambda w: torch.func.hessian(lambda x: F.linear(x, w).square().sum())(x[0]),
        lambda w: torch.func.grad(lambda w: F.linear(x, w).square().sum())(w),
        lambda w: torch.func.functional_call(nn.Linear(48, 64, bias=False), {"weight": w}, x),
    ):
        torch.testing.assert_close(use(weight), use(dense))


WRITES = {
    "item": lambda w: w.__setitem__(3, 0.0),
    "a row": lambda w: w[3].zero_(),
    "a block": lambda w: w.narrow(0, 0, 16).copy_(torch.ones(16, 48)),
    "a view of a view": lambda w: w[:16].view(-1)[3:].mul_(2),
    "in place": lambda w: w.mul_(2),
    "through the transpose": lambda w: w.t().mul_(2),
    "one of several": lambda w: torch._foreach_mul_([w, torch.ones(3)], 2.0),
    "an output": lambda w: torch.add(w.to_dense(), 1, out=w),
    "diagonal": lambda w: w.fill_diagonal_(1.0),
    "init": lambda w: nn.init.normal_(w),
    "storage": lambda w: w.set_(torch.ones(3)),
    "size": lambda w: w.resize_(3),
    "data": lambda w: setattr(w, "data", w.to_dense()),
    "vector": lambda w: nn.utils.vector_to_parameters(torch.ones(64 * 48), [w]),
    "apply": lambda w: w.apply_(lambda v: v),
    "typed storage": lambda w: w.storage(),
    "dlpack": lambda w: torch.from_dlpack(w),
}


@pytest.mark.parametrize("kind", WRITES)
def test_writes_are_refused(kind):
    _, weight = pair()
    before = [array.clone() for array in weight.packed]
    with torch.no_grad(), pytest.raises(VNMError, match=r"compressed weight"):
        WRITES[kind](weight)
    with torch.inference_mode(), pytest.raises(VNMError, match=r"compressed weight"):
        WRITES[kind](weight)
    for array, old in zip(weight.packed, before, strict=True):
        assert torch.equal(array, old)


def test_views_are_ordinary_tensors_otherwise():
    dense, weight = pair()
    assert type(weight[3] + 1) is torch.Tensor
    assert_same(copy.deepcopy(weight[3]).zero_(), torch.zeros(48))
    assert_same(weight[3].clone().zero_(), torch.zeros(48))
    file = io.BytesIO()
    torch.save(weight[3], file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), dense[3])
    weight.requires_grad_()
    weight[3].square().sum().backward()
    assert torch.equal(weight.grad[3], 2 * dense[3])


def test_data_can_be_read_written_and_replaced():
    dense, weight = pair()
    other, replacement = pair(seed=7)
    assert isinstance(weight.data, VNMTensor)
    weight.data.copy_(other)
    assert torch.equal(weight.to_dense(), other)
    parameter = nn.Parameter(weight, requires_grad=False)
    parameter.data = compress(dense, SPEC)
    assert_same(F.linear(x_of(5, 48), parameter), F.linear(x_of(5, 48), dense))
    # As with a dense weight, another dtype, pattern and shape come along.
    parameter.data = compress(random_sparse(32, 40, "8:2:4").double(), "8:2:4")
    assert (parameter.shape, parameter.dtype, str(parameter.spec)) == ((32, 40), torch.float64, "8:2:4")
    assert isinstance(parameter, nn.Parameter)
    # Nothing is shared but the arrays.
    parameter.data = replacement
    parameter.data.copy_(dense)
    assert torch.equal(replacement.to_dense(), dense)


def test_copies_and_pickles():
    dense, weight = pair()
    weight.requires_grad_()
    weight.grad = torch.ones_like(dense)
    parameter = nn.Parameter(compress(dense, SPEC), requires_grad=False)
    file = io.BytesIO()
    torch.save(parameter, file)
    copies = [copy.copy(parameter), pickle.loads(pickle.dumps(parameter)), copy.deepcopy(parameter)]
    for weights_only in (True, False):
        file.seek(0)
        copies.append(torch.load(file, weights_only=weights_only))
    file.seek(0)
    copies.append(torch.load(file, map_location="cpu", mmap=False))
    for each in copies:
        assert isinstance(each, nn.Parameter)
        assert isinstance(each, VNMTensor)
        assert not each.requires_grad
        assert_same(each, dense)
    assert copies[0].values.data_ptr() == parameter.values.data_ptr()
    assert copies[2].values.data_ptr() != parameter.values.data_ptr()
    again = copy.deepcopy(weight)
    assert again.requires_grad
    assert_same(again.grad, weight.grad)
    assert_same(pickle.loads(pickle.dumps(weight.t().detach())), dense.t())
    model = nn.ModuleList([nn.Linear(48, 64), nn.Linear(48, 64)])
    model[0].weight = model[1].weight = parameter
    for tied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tied[0].weight is tied[1].weight


def test_moves_keep_what_a_kernel_trusts():
    dense, weight = pair()
    model = nn.Sequential(nn.Linear(48, 64))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    for change in ("half", "bfloat16", "double", "float", "cpu"):
        getattr(model, change)()
        getattr(dense, change)()
    weight = model[0].weight
    assert isinstance(weight, VNMTensor)
    assert_same(weight, dense.half().bfloat16().float())
    model.to("meta")
    assert weight.is_meta
    assert weight.columns.is_meta
    model.to_empty(device="cpu")
    assert isinstance(weight, VNMTensor)
    assert torch.equal(weight.to_dense(), torch.zeros(64, 48))
    VNMTensor(*weight.packed, weight.spec, weight.shape)  # passes the checks
    model[0].weight.data.copy_(dense)
    assert torch.equal(model[0].weight.to_dense(), dense)
    # Two weights change places.
    one, other = nn.Parameter(pair()[1], False), nn.Parameter(pair(seed=7)[1], False)
    torch.utils.swap_tensors(one, other)
    assert torch.equal(one.to_dense(), pair(seed=7)[0])
    fake = FakeTensorMode().from_tensor(weight)
    assert F.linear(torch.empty(5, 48, device="meta"), weight.to("meta")).shape == (5, 64)
    assert (type(fake), fake.shape) == (VNMTensor, weight.shape)


@pytest.mark.parametrize("change", ["to", "half", "float", "to_empty"])
def test_garbage_that_refers_to_a_weight_is_in_nobodys_way(change):
    """Module.to swaps tensors, which torch refuses while anything refers to one weakly: Dynamo's leavings do."""
    layer = nn.Linear(32, 32, bias=False)
    layer.weight = nn.Parameter(compress(random_sparse(32, 32, "16:2:8"), "16:2:8"), requires_grad=False)
    gc.disable()
    try:
        leavings = [weakref.ref(layer.weight)]
        leavings.append(leavings)
        del leavings
        getattr(layer, change)(**{"device": "cpu"} if "to" in change else {})
    finally:
        gc.enable()
    assert layer.weight.dtype == (torch.float16 if change == "half" else torch.float32)


@pytest.mark.parametrize("swap", [False, True])
def test_state_dicts(swap):
    dense = make_sparse_(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32)), SPEC)
    x, state = x_of(5, 48), copy.deepcopy(dense.state_dict())
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for assign in (False, True):
            one = make_sparse_(copy.deepcopy(dense), SPEC, seed=5)
            compress_model(one)
            one.load_state_dict(dict(state), assign=assign)
            assert_same(one(x).detach(), dense(x).detach())
            assert isinstance(one[0].weight, VNMTensor) != assign
            compress_model(one)
            packed = one.state_dict()
            assert isinstance(packed["0.weight"], VNMTensor)
            plain = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
            plain.load_state_dict(dict(packed), assign=assign)
            assert isinstance(plain[0].weight, VNMTensor) == assign
            assert_same(plain(x).detach(), dense(x).detach())
            one.load_state_dict({key: value.double() for key, value in state.items()}, assign=assign)
        other = make_sparse_(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32)), "32:2:8")
        compress_model(other, "32:2:8")
        with pytest.raises(RuntimeError, match="pattern 16:2:8 cannot be copied into one"):
            other.load_state_dict(packed)
        with pytest.raises(RuntimeError, match="is not 32:2:8"):
            other.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def double(queue, shared):
    weight = queue.get(timeout=60)
    assert torch.equal(weight.to_dense(), shared[0].weight.to_dense())
    weight.data.copy_(weight.to_dense() * 2)
    queue.task_done()


def test_shared_memory():
    dense, weight = pair()
    model = nn.Sequential(nn.Linear(48, 64))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    model.share_memory()
    assert model[0].weight.is_shared()
    assert_same(model[0].weight, dense)
    context = torch.multiprocessing.get_context("fork")
    queue = context.JoinableQueue()
    process = context.Process(target=double, args=(queue, model))
    process.start()
    queue.put(model[0].weight)
    queue.join()
    process.join()
    assert process.exitcode == 0
    assert_same(model[0].weight, dense * 2)
    # As spawned processes get it.
    received = multiprocessing.reduction.ForkingPickler.loads(
        multiprocessing.reduction.ForkingPickler.dumps(model[0].weight)
    )
    assert received.is_shared()
    assert_same(received, dense * 2)


def hostile(**change):
    """The arguments that a pickle gives, with some of them changed."""
    weight = compress(random_sparse(60, 45, SPEC), SPEC)
    given = {
        "values": weight.values,
        "metadata": weight.metadata,
        "columns": weight.columns,
        "spec": (16, 2, 8),
        "shape": (60, 45),
        "transposed": False,
        "requires_grad": False,
        "is_parameter": False,
    }
    return {name: change[name](value) if name in change else value for name, value in given.items()}


def at(index, value):
    def change(array):
        array = array.clone()
        array[index] = value
        return array

    return change


HOSTILE = {
    "offset beyond the group": {"columns": at((0, 0, 3), 200)},
    "offset just beyond": {"columns": at((0, 0, 3), 8)},
    "offsets decreasing": {"columns": lambda c: c.flip(-1)},
    "offsets equal": {"columns": at((1, 2), 5)},
    "indices decreasing": {"metadata": at((0, 0), 0b00011011)},
    "indices equal": {"metadata": at((7, 1), 0)},
    "value in a column past the last": {"values": lambda v: torch.ones_like(v)},
    "value in a row past the last": {"values": at((61, 0), 1.0)},
    "values too short": {"values": lambda v: v[:, :-1]},
    "metadata too short": {"metadata": lambda a: a[:32]},
    "columns too short": {"columns": lambda a: a[:2]},
    "columns of one dimension": {"columns": lambda a: a.flatten()},
    "values of integers": {"values": lambda v: v.int()},
    "values complex": {"values": lambda v: v.to(torch.complex64)},
    "metadata signed": {"metadata": lambda a: a.to(torch.int8)},
    "columns wide": {"columns": lambda a: a.long()},
    "columns elsewhere": {"columns": lambda a: a.to("meta")},
    "values sparse": {"values": lambda v: v.to_sparse()},
    "no values": {"values": lambda v: None},
    "a list": {"values": lambda v: v.tolist()},
    "values compressed": {"values": lambda v: compress(random_sparse(64, 12, "1:2:4"), "1:2:4")},
    "larger shape": {"shape": lambda s: (6000, 45)},
    "wider shape": {"shape": lambda s: (60, 4500)},
    "negative shape": {"shape": lambda s: (60, -45)},
    "huge shape": {"shape": lambda s: (2**62, 2**62)},
    "shape of three": {"shape": lambda s: (60, 45, 1)},
    "shape of text": {"shape": lambda s: ("a", "b")},
    "no shape": {"shape": lambda s: None},
    "transposed": {"transposed": lambda t: True},
    "transposed maybe": {"transposed": lambda t: "no"},
    "larger group": {"spec": lambda s: (16, 2, 9)},
    "smaller block": {"spec": lambda s: (8, 2, 8)},
    "one of two": {"spec": lambda s: (16, 1, 8)},
    "negative spec": {"spec": lambda s: (-16, 2, 8)},
    "huge spec": {"spec": lambda s: (2**70, 2, 8)},
    "fractional spec": {"spec": lambda s: (16.0, 2, 8)},
    "spec of two": {"spec": lambda s: (16, 2)},
    "spec of text": {"spec": lambda s: "16:2:8"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_arrays_are_refused(kind):
    given = hostile(**HOSTILE[kind])
    with pytest.raises(VNMError):
        _rebuild(*given.values())
    *arguments, _, _ = given.values()
    with pytest.raises(VNMError):
        VNMTensor(*arguments)
    if kind in ("no values", "values sparse") or "spec" in kind:
        return
    arguments[3] = Spec(*given["spec"])
    with pytest.raises(VNMError):
        VNMTensor(*arguments)


def test_a_hostile_file_is_refused_and_what_is_in_it_cannot_be_changed_later():
    assert _rebuild(*hostile().values()).shape == (60, 45)
    weight = compress(random_sparse(60, 45, SPEC), SPEC)
    weight.columns.fill_(255)
    for weights_only in (True, False):
        file = io.BytesIO()
        torch.save({"weight": weight}, file)
        file.seek(0)
        with pytest.raises(VNMError, match="column offset is 255"):
            torch.load(file, weights_only=weights_only)
    with pytest.raises(VNMError, match="column offset is 255"):
        pickle.loads(pickle.dumps(weight))
    # A tensor that the file shrinks or moves after it was checked is not the one that was checked.
    given = hostile()
    weight = _rebuild(*given.values())
    given["columns"].set_()
    assert weight.columns.shape == (4, 6, 4)
    # Nor do attributes that a file sets count.
    for name in ("values", "metadata", "columns"):
        spoiled = compress(random_sparse(60, 45, SPEC), SPEC)
        setattr(spoiled, name, None)
        with pytest.raises(VNMError, match=name):
            F.linear(x_of(5, 45), spoiled)
    spoiled = compress(random_sparse(60, 45, SPEC), SPEC)
    spoiled.columns = spoiled.columns.flip(-1)
    file = io.BytesIO()
    torch.save(spoiled, file)
    file.seek(0)
    for use in (lambda: torch.load(file, weights_only=True), spoiled.to_dense, lambda: F.linear(x_of(5, 45), spoiled)):
        with pytest.raises(VNMError, match="not increasing"):
            use()
    spoiled.columns = spoiled.__dict__["_stored"].packed.columns.flip(-1)
    spoiled.values = spoiled.values * 2
    assert_same(spoiled, random_sparse(60, 45, SPEC) * 2)
    with pytest.raises(AttributeError):
        spoiled.spec = Spec(1, 1, 4)
    weight._stored = ("values", "metadata", "columns", Spec(1, 1, 4), 1, 1, False)
    with pytest.raises(VNMError, match="holds no arrays"):
        F.linear(x_of(5, 45), weight)
    bare = torch.ones(60, 45).as_subclass(VNMTensor)
    with pytest.raises(VNMError, match="holds no arrays"):
        F.linear(x_of(5, 45), bare)


def test_files_whose_storages_come_later_are_refused():
    file = io.BytesIO()
    torch.save(compress(random_sparse(64, 48, SPEC), SPEC), file, _use_new_zipfile_serialization=False)
    file.seek(0)
    with pytest.raises(VNMError, match=r"before 1\.6"):
        torch.load(file, weights_only=True)


def test_pickles_of_attributes_are_checked():
    """The form before this one: a bare tensor, and a state that held the arrays."""
    good = hostile()
    state = {name: good[name] for name in ("values", "metadata", "columns")}
    state |= {"spec": Spec(16, 2, 8), "_transposed": False}
    arguments = VNMTensor, torch.float32, (60, 45), (45, 1), 0, torch.strided, torch.device("cpu"), False
    make = torch._tensor._rebuild_from_type_v2
    wrapper = torch._utils._rebuild_wrapper_subclass
    assert_same(make(wrapper, VNMTensor, arguments, state), random_sparse(60, 45, SPEC))
    for wrong in ({}, None, state | {"columns": hostile(columns=at((0, 0, 3), 200))["columns"]}, state | {"spec": 3}):
        with pytest.raises(VNMError):
            make(wrapper, VNMTensor, arguments, wrong)


WRITES_INTO_VIEWS = {
    "rows": lambda w: w[:8].zero_(),
    "row": lambda w: w[0].add_(1),
    "data": lambda w: w.data[:, 1:].mul_(2),
    "flat": lambda w: w.view(-1)[3:].fill_(0),
    "T": lambda w: w.T[3].fill_(0),
    "mT": lambda w: w.mT[:3].neg_(),
    "detached": lambda w: w.detach()[:, 3].exp_(),
    "transposed": lambda w: w.t()[:3].copy_(torch.ones(3, 32)),
    "out": lambda w: torch.mul(w[1], 2, out=w[1]),
    "item of a chunk": lambda w: operator.setitem(w.chunk(2)[1], ..., 0),
    "unbound": lambda w: w.unbind(0)[1].relu_(),
}


@pytest.mark.parametrize("write", WRITES_INTO_VIEWS.values(), ids=WRITES_INTO_VIEWS)
def test_a_write_into_a_view_inside_a_compiled_function_is_refused(write):
    layer = compressed_linear()

    def call(x):
        with torch.no_grad():
            write(layer.weight)
        return layer(x)

    before = layer.weight.to_dense()
    torch._dynamo.reset()
    with pytest.raises(VNMError, match=r"writes into a (view of a )?compressed weight"):
        torch.compile(call, backend="vnm")(torch.randn(3, 32))
    assert torch.equal(layer.weight.to_dense(), before)


# A write into what is made of a weight: refused where eager mode refuses it, and nowhere else.
MADE_OF_A_WEIGHT = {
    "converted to the dtype that it has": lambda w: w[:3].float(),
    "moved to where it is": lambda w: w[:3].to(torch.float32),
    "made contiguous, as it is": lambda w: w[:3].contiguous(),
    "converted": lambda w: w[:3].double(),
    "converted by the op": lambda w: torch.ops.aten.to.dtype(w[:3], torch.float64),
    "a view of a converted weight": lambda w: w.double()[:3],
    "a view of a copy": lambda w: w.clone()[:3],
    "turned round and made contiguous": lambda w: w.t().contiguous(),
    "turned round and flat": lambda w: w.t().reshape(-1),
    "flat": lambda w: w.reshape(-1),
    "expanded and copied": lambda w: w[:1].expand(4, -1).clone(),
    "rows by index": lambda w: w[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("make", MADE_OF_A_WEIGHT.values(), ids=MADE_OF_A_WEIGHT)
def test_writes_are_refused_in_a_graph_exactly_where_eager_refuses_them(make):
    layer, x = compressed_linear(), torch.randn(3, 32)

    def call(x):
        with torch.no_grad():
            made = make(layer.weight).add_(1)
        return made, layer(x)

    def outcome(run):
        try:
            return [y.detach() for y in run(x)]
        except VNMError as error:
            return str(error)

    torch._dynamo.reset()
    ours, eager = outcome(torch.compile(call, backend="vnm")), outcome(call)
    if isinstance(eager, str):
        for message in (ours, eager):
            assert "writes into a view of a compressed weight" in message
    else:
        torch.testing.assert_close(ours, eager)


def test_explain_refuses_what_compiling_refuses():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = compressed_linear()

        def forward(self, x):
            self.layer.weight[:8].zero_()
            return self.layer(x)

    with pytest.raises(VNMError, match=r"layer: zero_ writes into a view of a compressed weight"):
        vnm.explain(Writes(), torch.randn(3, 32))


@pytest.mark.parametrize("pick", [lambda w: w[2:5], lambda w: w[2], lambda w: w.t()[:3]])
def test_the_gradient_of_a_view_that_a_compiled_function_returns(pick):
    layer, x = compressed_linear(), torch.randn(3, 32)
    layer.weight.requires_grad_()
    grads = []

    def call(x):
        return pick(layer.weight), layer(x)

    torch._dynamo.reset()
    for run in (torch.compile(call, backend="vnm"), call):
        layer.weight.grad = None
        rows, y = run(x)
        (rows.square().sum() + y.square().sum()).backward()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_write_into_what_is_computed_from_a_compressed_weight_is_none_into_it():
    layer, x = compressed_linear(), torch.randn(3, 32)

    def call(x):
        with torch.no_grad():
            layer.weight.to_dense().zero_()
            layer.weight[:3].clone().zero_()
            row = (layer.weight[:3] * 2).add_(1)
        return layer(x), row

    torch._dynamo.reset()
    for ours, eager in zip(torch.compile(call, backend="vnm")(x), call(x), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("later", ["eager", "compiled"])
def test_a_view_that_a_compiled_function_returns_is_read_only(later):
    layer = compressed_linear()
    torch._dynamo.reset()
    rows, _ = torch.compile(lambda x: (layer.weight[2:5], layer(x)), backend="vnm")(torch.randn(3, 32))
    assert torch.equal(rows * 1, layer.weight.to_dense()[2:5])
    write = rows.zero_ if later == "eager" else torch.compile(lambda: rows.add_(1) * 2, backend="vnm")
    with pytest.raises(VNMError, match="writes into a view of a compressed weight"):
        write()


def test_what_a_checkpointed_block_computes_from_a_compressed_weight_is_no_view_of_it():
    layer, x = compressed_linear(), torch.randn(3, 32, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(lambda t: checkpoint(lambda u: torch.tanh(layer(u)), t, use_reentrant=False), backend="vnm")(x)
    y.sum().backward()
    ours, x.grad = x.grad, None
    torch.tanh(layer(x)).sum().backward()
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiled_function_that_copies_into_a_compressed_weight(mode):
    """A graph break: the copy packs, outside of any graph."""
    layer, x = compressed_linear(), torch.randn(3, 32)
    twin = copy.deepcopy(layer)

    def call(layer, x):
        y = layer(x)
        layer.weight.copy_(layer.weight * 0.75)
        return y, layer(x), F.linear(x, layer.weight) * layer.weight.spec.n

    torch._dynamo.reset()
    run = torch.compile(call, backend="vnm", dynamic=True)
    for _ in range(2):
        with mode():
            for ours, eager in zip(run(layer, x), call(twin, x), strict=True):
                torch.testing.assert_close(ours, eager)
    assert torch.equal(layer.weight.to_dense(), twin.weight.to_dense())


def compressed_linear():
    layer = make_sparse_(nn.Linear(32, 32), "16:2:8", 1).requires_grad_(False)
    layer.weight = nn.Parameter(compress(layer.weight, "16:2:8"), requires_grad=False)
    return layer


@pytest.mark.parametrize("shape", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_that_multiplies_the_other_way_round_than_it_is_stored(shape, turned):
    """Tied projections use one weight both ways; compressed, one of the two is unpacked."""
    dense = random_sparse(*shape, "16:2:8")
    weight = compress(dense, "16:2:8")
    one, other = (weight.t(), dense.t()) if turned else (weight, dense)
    x, y = torch.randn(3, shape[0]), torch.randn(3, shape[1])
    if turned:
        x, y = y, x

    def products(w):
        return lambda x, y: (
            x @ w,
            F.linear(y, w),
            y @ w.t(),
            torch.mm(x, w),
            torch.addmm(torch.ones(x.shape), y, w.t()),
        )

    torch._dynamo.reset()
    for ours, exact in zip(torch.compile(products(one), backend="vnm")(x, y), products(other)(x, y), strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_weight_that_is_turned_round_between_calls():
    dense = random_sparse(32, 32, "16:2:8")
    holder = nn.ParameterList([nn.Parameter(compress(dense, "16:2:8"), requires_grad=False)])
    torch._dynamo.reset()
    run, x = torch.compile(lambda x: F.linear(x, holder[0]), backend="vnm"), torch.randn(3, 32)
    torch.testing.assert_close(run(x), F.linear(x, dense))
    holder[0].data = compress(dense, "16:2:8").t()
    torch.testing.assert_close(run(x), F.linear(x, dense.t()))

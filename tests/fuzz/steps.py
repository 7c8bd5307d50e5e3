"""What programs are made of: every kind of step, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fuzz.program import Step, Weight

SPECS = ("16:2:8", "16:1:8", "32:2:5", "1:2:4", "64:2:8", "8:2:16", "8:2:8", "1:1:4", "16:2:8", "8:2:8")
SIZES = (16, 24, 40)
_BIASES = ("none", "row", "row", "row")
_ODD_BIASES = ("one", "scalar", "matrix")


class Draw:
    """Random choices for one step, and the weights it came to need."""

    def __init__(self, rng: random.Random, index: int, width: int, spec: str) -> None:
        self.rng, self.index, self.width, self.spec = rng, index, width, spec
        self.weights: list[Weight] = []

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def weight(self, out: int, in_: int, bias: str | None = None, form: str | None = None) -> Weight:
        form = form or self.pick("linear", "linear", "linear", "param", "conv1d")
        if bias is None:
            odd = form == "param" and self.chance(0.25)
            bias = self.pick(*(_ODD_BIASES if odd else _BIASES))
        spec = self.rng.choice(SPECS) if self.chance(0.1) else self.spec
        weight = Weight(f"w{self.index}_{len(self.weights)}", form, out, in_, bias, None if self.chance(0.07) else spec)
        self.weights.append(weight)
        return weight

    def linear(self, x: str, out: int, in_: int | None = None, weight: Weight | None = None, **kwargs: str) -> str:
        """An expression for `x` times a new weight (or a given one), in one of the ways people write it."""
        weight = weight or self.weight(out, in_ or self.width, **kwargs)
        return apply(self, weight, x)

    def siblings(self, x: str, outs: list[int], bias: str | None = None) -> list[str]:
        """Linears of one form over one activation."""
        form = self.pick("linear", "linear", "linear", "param")
        odd = form == "param" and self.chance(0.6)
        bias = bias or self.pick(*(_ODD_BIASES if odd else _BIASES))
        same = self.chance(0.8)
        return [self.linear(x, out, form=form, bias=bias if same else self.pick(*_BIASES)) for out in outs]

    def back(self, expression: str) -> str:
        """h from an expression of its shape; magnitudes stay near 1."""
        w = self.width
        return self.pick(
            f"h = {expression}",
            f"h = h + 0.5 * ({expression})",
            f"h = {expression} + h",
            f"h = F.layer_norm(h + {expression}, ({w},))",
            f"h = F.rms_norm({expression}, ({w},))",
            f"h = torch.tanh({expression})",
            f"h = F.gelu({expression}) + e",
            f"h = ({expression}).mul(0.7).add(h)",
        )


def apply(d: Draw, weight: Weight, x: str) -> str:
    name, bias = f"self.{weight.name}", f"self.{weight.name}_bias"
    out, in_ = weight.out_features, weight.in_features
    if weight.form == "linear":
        return f"{name}({x})"
    if weight.form == "conv1d":
        if weight.bias == "row" and d.chance(0.7):
            return f"torch.addmm({bias}, ({x}).reshape(-1, {in_}), {name}).view(*({x}).shape[:-1], {out})"
        y = d.pick(f"torch.matmul({x}, {name})", f"(({x}) @ {name})", f"torch.matmul(input={x}, other={name})")
        return y if weight.bias == "none" else f"({y} + {bias})"
    if weight.bias == "none":
        return d.pick(
            f"F.linear({x}, {name})",
            f"F.linear(input={x}, weight={name})",
            f"(({x}) @ {name}.T)",
            f"torch.matmul({x}, {name}.t())",
            f"torch.matmul(input={x}, other={name}.mT)",
            f"({x}).matmul({name}.transpose(0, 1))",
            f"torch.mm(({x}).reshape(-1, {in_}), {name}.t()).view(*({x}).shape[:-1], {out})",
        )
    return d.pick(
        f"F.linear({x}, {name}, {bias})",
        f"F.linear({x}, weight={name}, bias={bias})",
        f"F.linear(input={x}, weight={name}, bias={bias})",
        f"(F.linear({x}, {name}) + {bias})",
        f"(({x}) @ {name}.T + {bias})",
    )


def activation(d: Draw) -> str:
    return d.pick("F.silu", "F.gelu", "torch.sigmoid", "F.relu", "torch.relu", "F.silu")


def chain(d: Draw) -> list[str]:
    o = d.rng.choice(SIZES)
    return [f"t = {activation(d)}({d.linear('h', o)})", d.back(d.linear("t", d.width, o))]


def residual(d: Draw) -> list[str]:
    return [d.back(d.linear("h", d.width)), d.pick("h = h + e", "h = h.add(e, alpha=0.5)", "e = h", "e = h + x")]


def attention(d: Draw) -> list[str]:
    w = d.width
    q, k, v = d.siblings("h", [w, w, w])
    heads = d.pick(".view(*h.shape[:2], 2, -1).transpose(1, 2)", ".unflatten(-1, (2, -1)).transpose(1, 2)")
    lines = [f"q, k, v = {q}, {k}, {v}", f"q, k, v = (each{heads} for each in (q, k, v))"]
    lines.append(
        d.pick(
            "t = F.scaled_dot_product_attention(q, k, v)",
            "t = torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v",
        )
    )
    lines.append(d.pick("t = t.transpose(1, 2).reshape(h.shape)", "t = t.transpose(1, 2).contiguous().view(h.shape)"))
    return [*lines, d.back(d.linear("t", w))]


def gated(d: Draw) -> list[str]:
    o = d.rng.choice(SIZES)
    gate, up = d.siblings("h", [o, o], bias=d.pick("none", "none", "row"))
    act = activation(d)
    product = d.pick(f"{act}({gate}) * {up}", f"{up} * {act}({gate})", f"torch.mul({act}({gate}), {up})")
    return [f"t = {product}", d.back(d.linear("t", d.width, o))]


def gated_written(d: Draw) -> list[str]:
    """A gated look-alike whose activation changes between gate and up."""
    o = d.rng.choice(SIZES)
    gate, up = d.siblings("h", [o, o], bias=d.pick("none", "row"))
    write = _write_h(d)
    return ["h = h.clone()", f"g = {activation(d)}({gate})", *write, f"t = g * {up}", d.back(d.linear("t", d.width, o))]


def _write_h(d: Draw) -> list[str]:
    return d.rng.choice(
        [
            ["h.add_(1)"],
            ["h.mul_(-1)"],
            ["u = h[:, 1:]", "u.mul_(2)"],
            ["u = h.view(-1)", "u.add_(0.5)"],
            ["h.copy_(e.flip(-1))"],
            ["h[:, :, 0] = 2"],
            ["h[..., ::2] = e[..., 1::2]"],
            ["h.masked_fill_(x > 0, 0.5)"],
            ["torch.add(h, 1, out=h)"],
            ["h.transpose(1, 2).mul_(0.5)"],
            ["h.data.mul_(2)"],
            ["h += e"],
            ["h.relu_()"],
            ["h.unbind(-1)[0].fill_(1)"],
            ["h.chunk(2, -1)[1].neg_()"],
            ["h.zero_()"],
            ["torch._foreach_mul_([h], 1.5)"],
        ]
    )


def siblings_written(d: Draw) -> list[str]:
    w = d.width
    names = d.siblings("h", [w, w])
    y = [f"a = {names[0]}", *_write_h(d), f"b = {names[1]}"]
    return ["h = h.clone()", *y, d.pick("h = a + 0.5 * b", "h = torch.tanh(a) - b + h", "h = a.sub(b)")]


def siblings(d: Draw) -> list[str]:
    w, o = d.width, d.rng.choice(SIZES)
    a, b, c = d.siblings("h", [w, o, w])
    lines = [f"a, b, c = {a}, {b}, {c}"]
    if d.chance(0.6):
        lines.append(
            d.pick("outs.append(b)", "outs += [a, b]", "outs.append(b.view(b.shape[0], -1))", "outs += [c, b]")
        )
    else:
        lines.append("outs.append(b.sum(-1))")
    return [*lines, d.pick("h = a * torch.sigmoid(c)", "h = a + c", "h = torch.where(x > 0, a, c)")]


def rows(d: Draw) -> list[str]:
    """Activations that start at an offset, or have a stride of their own."""
    w = d.width
    return d.rng.choice(
        [
            lambda: [f"t = {d.linear('h[:, -1]', w)}", "h = h + 0.5 * t[:, None]"],
            lambda: [f"t = {d.linear('h[:, 1:]', w)}", "h = torch.cat([h[:, :1], t], 1)"],
            lambda: [f"t = {d.linear('x[:, -1:]', w)}", "h = h + t"],
            lambda: [f"t = {d.linear('x[1:]', w)}", "h = torch.cat([h[:1], t])"],
            lambda: [f"t = {d.linear('x[-1]', w)}", "h = h + t"],
            lambda: [
                "p, q = h.chunk(2, 1) if h.shape[1] > 1 else (h, h)",
                f"t = {d.linear('q', w)}",
                "h = h + t[:, :1]",
            ],
            lambda: [f"t = [{d.linear('r', w)} for r in h.unbind(0)]", "h = torch.stack(t)"],
            lambda: [f"t = [{d.linear('x[i]', w)} for i in range(x.shape[0])]", "h = torch.stack(t) + h"],
            lambda: [f"t = {d.linear('h.narrow(1, h.shape[1] - 1, 1)', w)}", "h = h * 0.5 + t"],
            lambda: [f"t = {d.linear('h.select(1, -1)', w)}", "h = h + t.unsqueeze(1)"],
            lambda: [f"t = {d.linear('x.split(1, 0)[-1]', w)}", "h = h + t"],
            lambda: [f"t = {d.linear('h[:, ::2]', w)}", "outs.append(t)"],
            lambda: [f"t = {d.linear('x[:, 1::2]', w)}", "outs.append(t)"],
            lambda: [f"t = {d.linear('h[0, 0]', w)}", "h = h + t"],
            lambda: [f"t = {d.linear('h[-1]', w)}", "h = h + t"],
        ]
    )()


def layouts(d: Draw) -> list[str]:
    w, half = d.width, d.width // 2
    form = d.rng.choice(
        [
            ("h.transpose(1, 2).contiguous().transpose(1, 2)", w),
            ("h.transpose(0, 1)", w),
            ("x.transpose(0, 1)", w),
            ("h.flip(1)", w),
            ("h[:, :1].expand(-1, 3, -1)", w),
            ("x[:1].expand(2, -1, -1)", w),
            ("x[:, :1, :1].expand(-1, 2, 24)", 24),
            (f"h[..., {half}:]", half),
            (f"x[..., :{half}]", half),
            ("h[..., ::2]", half),
            ("torch.as_strided(x, (x.shape[0], 1, 16), (x.stride(0), 16, 1), x.storage_offset())", 16),
            ("torch.as_strided(x, (1, 16), (16, 1), x.storage_offset() + 8)", 16),
            ("h[None]", w),
            ("h.unsqueeze(2)", w),
            (f"h.permute(2, 0, 1).reshape({w}, -1).t()", w),
            ("h.roll(1, 1)", w),
            ("h[0]", w),
            ("h.movedim(0, 1)", w),
            ("torch.cat([h, e], -1)", 2 * w),
            ("F.pad(h, (0, 8))[..., 8:]", w),
        ]
    )
    o = d.rng.choice(SIZES)
    return [f"t = {d.linear(form[0], o, form[1])}", d.pick("outs.append(t)", f"outs.append({activation(d)}(t))")]


def epilogues(d: Draw) -> list[str]:
    w = d.width
    tail = d.rng.choice(
        [
            ["outs += [t, (t * h).transpose(-1, -2).contiguous()]"],
            ["outs.append((t * t).flatten(0, 1).t().contiguous())", "h = t"],
            ["t[..., 1:].mul_(2)", "h = t"],
            ["t[:, :1] = 0.5", "h = h + t"],
            ["t.add_(1)", "h = t.tanh_()"],
            ["outs.append(t.transpose(1, 2))", "h = t + h"],
            ["outs.append(t.unflatten(-1, (2, -1)).transpose(1, 2))", "h = F.gelu(t)"],
            ["outs.append(t.flip(-1))", "outs.append(t)"],
            ["outs.append(t.permute(2, 0, 1).contiguous() * 2)", "outs.append(t.relu())"],
            ["outs.append(torch.softmax(t, -1))", "h = t * h"],
            ["outs.append(t.sum(-1))", "outs.append(t.amax(1) if t.shape[1] else t.sum(1))"],
            ["outs.append(t.cumsum(1))", "h = t + e"],
            ["outs.append(torch.cat([t, h], -1))", "h = t.mul(e)"],
            ["h = F.dropout(t, 0.5, training=False) + e.flip(1)"],
            ["h = t + t.transpose(0, 1).reshape(t.shape)"],
            ["h = t * e.mean(-1, keepdim=True) + t"],
            ["outs.append(t.clone())", "t.zero_()", "h = h + t"],
            ["outs.append((F.gelu(t) + h).to(BF16))", "outs.append(t.to(F32))"],
            ["h = t.square().neg().exp() + t.reshape(-1, t.shape[-1]).reshape(t.shape)"],
            ["outs.append(t.view(t.shape[0], -1)[:, ::3])", "h = t"],
            ["outs.append(t.repeat_interleave(2, 1))", "h = h - t"],
        ]
    )
    return [f"t = {d.linear('h', w)}", *tail]


def product_channels_first(d: Draw) -> list[str]:
    w = d.width
    a, b = d.siblings("h", [w, w])
    moved = d.pick(
        ".transpose(1, 2)",
        ".movedim(-1, 1).contiguous()",
        ".flatten(0, 1).t()",
        ".unflatten(-1, (4, -1)).transpose(1, 2)",
    )
    return [f"t = ({a} * {b}){moved}", "outs.append(t)"]


def regions(d: Draw) -> list[str]:
    w = d.width
    a, b = d.siblings("h", [w, w])
    region = d.pick(
        "torch.no_grad()",
        "torch.enable_grad()",
        'torch.autocast("cpu", enabled=False)',
        'torch.autocast("cpu", dtype=torch.bfloat16)',
        "torch.set_grad_enabled(False)",
    )
    if d.chance(0.5):
        lines = [f"a = {a}", f"with {region}:", f"    b = {b}"]
    else:
        lines = [f"with {region}:", f"    a = {a}", f"b = {b}"]
    if d.chance(0.3):
        lines += ["outs += [a, b]"]
    return [*lines, "h = (a.to(h.dtype) + b.to(h.dtype)) * 0.5"]


def gated_regions(d: Draw) -> list[str]:
    o = d.rng.choice(SIZES)
    gate, up = d.siblings("h", [o, o], bias="none")
    region = d.pick("torch.no_grad()", 'torch.autocast("cpu", enabled=False)', "torch.enable_grad()")
    lines = [f"with {region}:", f"    g = {activation(d)}({gate})", f"t = (g * {up}).to(h.dtype)"]
    return [*lines, d.back(d.linear("t", d.width, o) + ".to(h.dtype)")]


def nested_grad(d: Draw) -> list[str]:
    return [
        "with torch.no_grad():",
        "    with torch.enable_grad():",
        f"        t = {d.linear('h', d.width)}",
        "h = h + t.to(h.dtype)",
    ]


def checkpointed(d: Draw) -> list[str]:
    o = d.rng.choice(SIZES)
    inner = f"{activation(d)}({d.linear('t', o)})"
    if d.chance(0.5):
        a, b = d.siblings("t", [o, o])
        inner = f"{a} * {b}"
    return [
        "def block(t):",
        f"    u = {inner}",
        f"    return {d.linear('u', d.width, o)}",
        d.back("checkpoint(block, h, use_reentrant=False)"),
    ]


def shared(d: Draw) -> list[str]:
    w = d.width
    weight = d.weight(w, w)
    one, two = apply(d, weight, "h"), apply(d, weight, d.pick("e", "h.flip(1)", "t", "F.gelu(t)"))
    return [f"t = {one}", f"u = {two}", "h = F.layer_norm(t + u, (h.shape[-1],))"]


def tied(d: Draw) -> list[str]:
    w = d.width
    weight = d.weight(w, w, form="param", bias="none")
    name = f"self.{weight.name}"
    other = d.pick(
        f"F.embedding(torch.arange(h.shape[1]) % 16, {name})",
        f"{name}.sum(0)",
        f"{name}[0]",
        f"({name} * 2)[3]",
        f"F.linear(h, {name}[:8]).sum(-1, keepdim=True)",
        f"F.linear(h, torch.cat([{name}, {name}])).sum(-1, keepdim=True)",
        f"F.linear(h, {name} + 0)",
        f"(h @ {name})",
    )
    return [f"t = {apply(d, weight, 'h')}", f"h = t + 0.3 * {other}"]


def weight_written(d: Draw) -> list[str]:
    """The module writes to its own weight, before, between or after its uses."""
    w = d.width
    weight = d.weight(w, w, bias="none")
    name = f"self.{weight.path}"
    write = d.pick(f"{name}.mul_(-0.5)", f"{name}.copy_({name} * 0.75)", f"{name}.data.neg_()", f"{name}[:8].zero_()")
    write_lines = ["with torch.no_grad():", f"    {write}"]
    one, two = f"t = {apply(d, weight, 'h')}", f"u = {apply(d, weight, 'e')}"
    order = d.rng.choice([[*write_lines, one, two], [one, *write_lines, two], [one, two, *write_lines]])
    return [*order, "h = torch.tanh(t) + u"]


def branch(d: Draw) -> list[str]:
    w = d.width
    a, b = d.siblings("h", [w, w])
    return ["if flag:", f"    h = h + {a}", "else:", f"    h = torch.tanh({b})"]


def graph_break(d: Draw) -> list[str]:
    w = d.width
    a, b = d.siblings("h", [w, w])
    lines = [f"a, b = {a}, {b}", "torch._dynamo.graph_break()"]
    if d.chance(0.5):
        lines.append("outs.append(b.view(b.shape[0], -1))")
    return [*lines, d.pick("h = a + b.view(-1).view(h.shape)", "h = torch.tanh(a) * b", d.back(d.linear("a", w)))]


def transforms(d: Draw) -> list[str]:
    w = d.width
    use = d.linear("t", w)
    return d.rng.choice(
        [
            lambda: [f"h = torch.vmap(lambda t: {use})(h)"],
            lambda: [f"h = torch.vmap(lambda t: {use}, in_dims=1, out_dims=1)(h)"],
            lambda: [f"g = torch.func.grad(lambda t: {use}.square().mean())(h)", "h = h + g"],
            lambda: [f"y, g = torch.func.jvp(lambda t: {use}, (h,), (e,))", "h = y + g"],
            lambda: [f"g = torch.func.jacrev(lambda t: {use})(h[0, 0])", "h = h + g[0]"],
        ]
    )()


def out_argument(d: Draw) -> list[str]:
    w = d.width
    weight = d.weight(w, w, form="param", bias="none")
    name = f"self.{weight.name}"
    return d.rng.choice(
        [
            ["t = torch.empty_like(h)", f"torch.matmul(h, {name}.t(), out=t)", "h = t + e"],
            [f"t = {apply(d, weight, 'h')}", "torch.mul(t, 2, out=t)", "h = t"],
            [f"t = {apply(d, weight, 'h')}", "u = torch.empty_like(t)", "torch.add(t, e, out=u)", "h = u * t"],
        ]
    )


def placed(d: Draw) -> list[str]:
    """Results written into a larger buffer."""
    w = d.width
    return [
        f"t = h.new_zeros(*h.shape[:-1], {w + 3})",
        d.pick(
            f"t[..., 2:{w + 2}] = {d.linear('h', w)}",
            f"t[..., 2:{w + 2}].copy_({d.linear('h', w)})",
            f"t.narrow(-1, 2, {w}).add_({d.linear('h', w)})",
        ),
        d.pick("outs.append(t)", f"h = t[..., 2:{w + 2}]", f"h = t[..., 1:{w + 1}].contiguous()"),
    ]


def precisions(d: Draw) -> list[str]:
    w = d.width
    a = d.linear("h", w)
    return d.rng.choice(
        [
            [
                'with torch.autocast("cpu", dtype=torch.bfloat16):',
                f"    t = {a}",
                "outs.append(t)",
                "h = h + t.to(h.dtype)",
            ],
            ['with torch.autocast("cpu", dtype=torch.bfloat16):', f"    t = {a} + h", "h = t.to(h.dtype)"],
            [f"t = {a}.to(F32)", "outs.append(t)", "h = (h + t).to(h.dtype)"],
            [f"t = F.layer_norm({a}.to(F32), ({w},)).to(h.dtype)", "h = h + t"],
        ]
    )


def matrix_bias(d: Draw) -> list[str]:
    """F.linear and addmm whose bias is a matrix."""
    w = d.width
    weight = d.weight(w, w, form="param", bias="none")
    other = d.weight(w, w, form="param", bias="none")
    flat = f"h.reshape(-1, {w})"
    form = f"t = torch.addmm(e.reshape(-1, {w}), {flat}, self.{{}}.t())"
    if d.chance(0.5):
        form = f"t = torch.addmm({flat}, {flat}, self.{{}}.t(), beta=0.5, alpha=2)"
    return [form.format(weight.name), f"u = {apply(d, other, flat)}", "h = torch.tanh(t + u).view(h.shape)"]


def unpacked(d: Draw) -> list[str]:
    """One projection cut into three, as fused qkv layers are."""
    w = d.width
    cut = d.pick(".chunk(3, -1)", f".split({w}, -1)", ".unflatten(-1, (3, -1)).unbind(-2)")
    tail = d.pick("h = q * torch.sigmoid(k) + v", "q.add_(v)\nh = q + k", "outs.append(k)\nh = q + v")
    return [f"q, k, v = {d.linear('h', 3 * w)}{cut}", *tail.split("\n")]


KINDS: dict[str, Callable[[Draw], list[str]]] = {
    each.__name__: each
    for each in (
        chain, residual, attention, gated, gated_written, siblings_written, siblings, rows, layouts, epilogues,
        product_channels_first, regions, gated_regions, nested_grad, checkpointed, shared, tied, weight_written,
        branch, graph_break, transforms, out_argument, placed, precisions, matrix_bias, unpacked,
    )
}  # fmt: skip
_RARE = {"transforms": 0.4, "weight_written": 0.4, "matrix_bias": 0.5, "nested_grad": 0.5, "graph_break": 0.7}


def draw_step(rng: random.Random, index: int, width: int, spec: str, kinds: list[str]) -> Step:
    kind = rng.choices(kinds, [_RARE.get(kind, 1.0) for kind in kinds])[0]
    draw = Draw(rng, index, width, spec)
    lines = KINDS[kind](draw)
    text = "\n".join(lines)
    used = [weight for weight in draw.weights if f"self.{weight.name}" in text]
    return Step(kind, tuple(lines), tuple(used))

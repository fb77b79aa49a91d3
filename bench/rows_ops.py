"""The rows of `cpu.py` for each op: its cases, bars, and the work that a case takes."""

import memory
import test_attention
import test_cross_entropy
import test_ffn
import test_linear_cross_entropy
import test_norm
import test_rotary
import test_softmax
import torch

DTYPES = memory.DTYPES
# case: (forward, backward) bars, torch's time over fastattn's, by dtype; None where there is none.
ATTENTION = {
    "full": {"fp32": (1.4, 1.5), "bf16": (2.6, 2.0), "fp16": (1.8, 10)},
    "full, d128": {"fp32": (1.4, 1.5), "bf16": (2.6, 2.0)},
    "causal": {"fp32": (1.7, 1.7), "bf16": (3.0, 2.5)},
    "causal, GQA, d128": {"fp32": (1.7, 1.7), "bf16": (3.0, 2.5)},
    "short": {"fp32": (1.5, 1.6), "bf16": (3.0, 2.5)},
    "medium": {"fp32": (1.5, 1.6), "fp16": (3.0, 10)},
    "window": {"fp32": (20, 20), "bf16": (20, 20)},
    "lengths": {"fp32": (2.0, 2.0), "bf16": (3.5, 2.0)},
    "bias": {"fp32": (1.4, 1.4), "bf16": (2.2, 1.4)},
    "dropout": {"fp32": (8, 3)},
    "d80": {"fp32": (1.25, 1.3), "bf16": (2.2, 1.8)},
    "d96": {"fp32": (1.25, 1.3), "bf16": (2.2, 1.8)},
    "cross": {"fp32": (1.25, 1.3), "bf16": (2.2, 1.8)},
    "packed": {"fp32": (2.0, 2.0)},
    "decode": {"fp32": (1.0, None), "bf16": (1.0, None), "fp16": (1.0, None)},
    "decode, GQA, d128": {"fp32": (1.0, None), "bf16": (1.0, None), "fp16": (1.0, None)},
    "decode, GQA, d128, batch 8": {"fp32": (1.0, None), "bf16": (1.0, None)},
}
SOFTMAX_BAR = 1.3
# Into a result allocated before, that bar; where x and the result take more bytes than this, a
# share of the speed of copying x into it instead.
BEYOND_CACHES = 50e6
COPY_BAR = 0.9
NORM_BAR = 1.3
ROTARY_BAR = 1.3
FFN_BARS = {"fp32": 1.2, "bf16": 1.1}
CROSS_ENTROPY_SHAPES = [(4096, 512), (2048, 4096), (512, 32000)]
CROSS_ENTROPY_BAR = 1.3
VOCABULARY = 32000
LINEAR_CROSS_ENTROPY_BAR = 1.0
MEMORY_BAR = 10.0


def attention(compare):
    for case, by_dtype in ATTENTION.items():
        for dtype, bars in by_dtype.items():
            for direction, bar in zip(("forward", "backward"), bars, strict=True):
                if bar is not None:
                    yield attention_row(compare, case, dtype, direction, bar)


def attention_row(compare, case, dtype, direction, bar):
    inputs, functions = test_attention.build(case, DTYPES[dtype])
    flops, kv_bytes = test_attention.work(case)
    row = labels("attention", case, dtype, direction) | {"bar": bar}
    if direction == "forward":
        with torch.no_grad():
            row |= compare(row, functions)
    else:
        for tensor in inputs:
            tensor.requires_grad_()
        outs = {name: call() for name, call in functions.items()}
        dout = torch.randn_like(outs["fastattn"])
        rivals = {
            name: lambda out=out: torch.autograd.grad(out, inputs, dout, retain_graph=True)
            for name, out in outs.items()
        }
        row |= compare(row, rivals)
        flops *= 2.5
    if case.startswith("decode"):
        row["read_per_second"] = kv_bytes * DTYPES[dtype].itemsize / row["fastattn"]
    else:
        row["flops_per_second"] = flops / row["fastattn"]
    errors = test_attention.errors(case, DTYPES[dtype], direction)
    return row | {"error": errors["fastattn"], "error_torch": errors["torch"]}


def softmax(compare):
    directions = ((test_softmax.forward, 2), (test_softmax.backward, 3))
    plain = {name: test_softmax.plain(name) for name in test_softmax.LIBRARIES}
    cases = [(shape, size(shape), plain) for shape in test_softmax.SHAPES]
    cases += [
        (test_softmax.SCORES, f"{size(test_softmax.SCORES)} {variant}", functions)
        for variant, functions in test_softmax.VARIANTS.items()
    ]
    for dtype in ("fp32", "bf16"):
        for shape, case, functions in cases:
            x = torch.randn(shape).to(DTYPES[dtype])
            for direction, tensors in directions:
                row = labels("softmax", case, dtype, direction.__name__) | {"bar": SOFTMAX_BAR}
                row |= compare(row, {n: direction(call, x) for n, call in functions.items()})
                yield row | {"bytes_per_second": tensors * x.nbytes / row["fastattn"]}
            if functions is plain:
                yield softmax_into_row(compare, case, dtype, x)


def softmax_into_row(compare, case, dtype, x):
    row = labels("softmax", case, dtype, "into") | {"bar": SOFTMAX_BAR}
    if 2 * x.nbytes >= BEYOND_CACHES:
        row |= {"bar": COPY_BAR, "bar_of": "of_peak"}
    rivals = {name: test_softmax.into(name, x) for name in ("torch", "fastattn", "copy")}
    row |= compare(row, rivals)
    return row | {"of_peak": row["copy"] / row["fastattn"]}


def norm(compare):
    for dtype in ("fp32", "bf16"):
        for op, (torchs, ours, tensors) in test_norm.OPS.items():
            for shape in test_norm.SHAPES:
                args = test_norm.inputs(shape, DTYPES[dtype])
                directions = (test_norm.forward, test_norm.backward)
                for direction, touched in zip(directions, tensors, strict=True):
                    row = labels(op, size(shape), dtype, direction.__name__) | {"bar": NORM_BAR}
                    functions = {"torch": torchs, "fastattn": ours}
                    row |= compare(row, {n: direction(call, args) for n, call in functions.items()})
                    yield row | {"bytes_per_second": touched * args[0].nbytes / row["fastattn"]}


def rotary(compare):
    module = test_rotary
    for dtype in ("fp32", "bf16"):
        for form, functions in module.FORMS.items():
            for shape in module.SHAPES:
                x, tables = module.inputs(form, "bshd", shape, DTYPES[dtype])
                for direction in (module.forward, module.backward):
                    case = f"{size(shape)} {form}"
                    row = labels("rotary", case, dtype, direction.__name__) | {"bar": ROTARY_BAR}
                    rivals = {n: direction(call, x, *tables[n]) for n, call in functions.items()}
                    row |= compare(row, rivals)
                    yield row | {"bytes_per_second": 2 * x.nbytes / row["fastattn"]}


def ffn(compare):
    for dtype, bar in FFN_BARS.items():
        for form, functions in test_ffn.LIBRARIES.items():
            for shape in test_ffn.SIZES:
                for direction, passes in ((test_ffn.forward, 1), (test_ffn.training, 3)):
                    args = test_ffn.tensors(form, shape, DTYPES[dtype])
                    op = "ffn" if form == "plain" else "gated_ffn"
                    row = labels(op, size(shape), dtype, direction.__name__) | {"bar": bar}
                    row |= compare(row, {n: direction(call, args) for n, call in functions.items()})
                    rows, d_model, d_ff = shape
                    weights = (2 if form == "plain" else 3) * d_model * d_ff
                    yield row | {"flops_per_second": 2 * passes * rows * weights / row["fastattn"]}


def cross_entropy(compare):
    module = test_cross_entropy
    for dtype in ("fp32", "bf16"):
        for shape in CROSS_ENTROPY_SHAPES:
            x, targets = module.draw(shape, DTYPES[dtype])
            for direction, touched in ((module.forward, 1), (module.training, 3)):
                row = labels("cross_entropy", size(shape), dtype, direction.__name__)
                row["bar"] = CROSS_ENTROPY_BAR
                rivals = {name: direction(name, x, targets) for name in module.LIBRARIES}
                row |= compare(row, rivals)
                yield row | {"bytes_per_second": touched * x.nbytes / row["fastattn"]}


def linear_cross_entropy(compare):
    module = test_linear_cross_entropy
    shapes = [shape for shape in module.SHAPES if shape[-1] == VOCABULARY]
    for dtype in ("fp32", "bf16"):
        for shape in shapes:
            tensors = module.draw(shape, DTYPES[dtype])
            rows, d_model, vocabulary = shape
            for direction, products in ((module.forward, 1), (module.step, 3)):
                row = labels("linear_cross_entropy", size(shape), dtype, direction.__name__)
                row["bar"] = LINEAR_CROSS_ENTROPY_BAR
                row |= compare(row, {name: direction(name, *tensors) for name in module.LIBRARIES})
                flops = 2 * products * rows * d_model * vocabulary
                yield row | {"flops_per_second": flops / row["fastattn"]}
            row = labels("linear_cross_entropy", size(shape), dtype, "step, memory")
            row |= memory.peaks(shape, dtype, torch.get_num_threads())
            row |= {"bar": MEMORY_BAR, "unit": "bytes", "ratio": row["torch"] / row["fastattn"]}
            yield row


def labels(op, case, dtype, direction):
    return {"op": op, "case": case, "dtype": dtype, "direction": direction}


def size(shape):
    return "x".join(map(str, shape))

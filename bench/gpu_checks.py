"""What must hold on a GPU beside the numbers: CUDA graphs, streams, compilation, other devices."""

import functools

import gpu_rows
import torch

import fastattn


def samples(device, sizes):
    """{op: (function, inputs)}: a call of each public function, training included."""
    draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    rows, d_model, d_ff = (128, 128, 256) if sizes is gpu_rows.FULL else (16, 64, 96)
    heads = (2, 2, rows, 64)
    cos, sin = draw(2, rows, 32)
    targets = torch.randint(d_ff, (rows,), device=device)
    return {
        "attention": (
            lambda q, k, v: fastattn.attention(q, k, v, causal=True, deterministic=True),
            [draw(heads) for _ in "qkv"],
        ),
        "softmax": (fastattn.softmax, [draw(rows, d_ff)]),
        "layer_norm": (fastattn.layer_norm, [draw(rows, d_model), draw(d_model), draw(d_model)]),
        "rms_norm": (fastattn.rms_norm, [draw(rows, d_model), draw(d_model)]),
        "rotary": (lambda x: fastattn.rotary(x, cos, sin), [draw(heads)]),
        "cross_entropy": (
            lambda logits: fastattn.cross_entropy(logits, targets),
            [draw(rows, d_ff)],
        ),
        "linear_cross_entropy": (
            lambda x, weight: fastattn.linear_cross_entropy(x, weight, targets),
            [draw(rows, d_model), draw(d_ff, d_model)],
        ),
        "ffn": (
            fastattn.ffn,
            [draw(rows, d_model), draw(d_ff, d_model), draw(d_ff), draw(d_model, d_ff),
             draw(d_model)],
        ),
        "gated_ffn": (
            fastattn.gated_ffn,
            [draw(rows, d_model), draw(d_ff, d_model), draw(d_ff, d_model), draw(d_model, d_ff)],
        ),
    }  # fmt: skip


def training(function, inputs):
    """The result and the gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def check_graph(function, inputs):
    """A captured step gives the same bits on new inputs as an eager one."""
    inputs = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            training(function, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training(function, inputs)
    for tensor in inputs:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    return same(captured, training(function, inputs))


def check_streams(function, inputs):
    """Two streams at once give the same bits as one after the other."""
    others = [torch.randn_like(tensor) for tensor in inputs]
    wanted = training(function, inputs), training(function, others)
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(20):
        got = []
        for stream, given in zip(streams, (inputs, others), strict=True):
            with torch.cuda.stream(stream):
                got.append(training(function, given))
        torch.cuda.synchronize()
        verdicts = [same(*pair) for pair in zip(got, wanted, strict=True)]
        if not all(ok for ok, _ in verdicts):
            return verdicts[0] if not verdicts[0][0] else verdicts[1]
    return True, ""


def check_compile(function, inputs):
    """Compiled as one graph, the op gives the same bits."""
    on_gpu = inputs[0].is_cuda
    torch._dynamo.reset()
    compiled = torch.compile(
        function, fullgraph=True, backend="inductor" if on_gpu else "aot_eager"
    )
    return same(training(compiled, inputs), training(function, inputs))


def check_device(function, inputs):
    """Tensors of one device while another is current."""
    wanted = training(function, inputs)
    with torch.cuda.device(1):
        got = training(function, inputs)
    return same(got, wanted)


def same(got, wanted):
    """Whether the results are the same bits, and by how much they differ."""
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if not torch.equal(one, other):
            difference = float((one.double() - other.double()).abs().max())
            return False, f"result {index} differs by {difference:.1e}"
    return True, ""


CHECKS = {
    "graph": (check_graph, 1),  # and how many GPUs it needs
    "streams": (check_streams, 1),
    "compile": (check_compile, 0),
    "device": (check_device, 2),
}


def refuses(function, inputs):
    """Whether the backend in force has no kernel of the call."""
    return any(choice.backend is None for choice in fastattn.explain(function, *inputs))


def run(backend, device, sizes):
    """Rows of {backend, check, op, ok, detail}; ok is None for what this machine cannot check."""
    rows = []
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    for name, (check, needed) in CHECKS.items():
        for op, (function, inputs) in samples(device, sizes).items():
            if refuses(function, inputs):
                continue
            if gpus < needed:
                ok, detail = None, f"needs {needed} GPU{'s' * (needed > 1)}"
            else:
                try:
                    ok, detail = check(function, inputs)
                except Exception as error:
                    ok, detail = False, f"{type(error).__name__}: {error}"[:300]
            row = {"backend": backend, "check": name, "op": op, "ok": ok, "detail": detail}
            rows.append(row)
            verdict = {True: "ok", False: "FAILED", None: "left out"}[ok]
            print(f"check {backend:7} {name:10} {op:24} {verdict} {detail}", flush=True)
    return rows

"""What was built, what this machine has, and what is missing: ``python -m fastattn info``."""

import ctypes
import importlib
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.backends import BACKENDS
from fastattn.backends.cuda import device as cuda_device
from fastattn.kernels import tuning

ENVIRONMENT = (
    "FASTATTN_BACKEND",
    "FASTATTN_ISA",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)


def collect() -> dict[str, Any]:
    """The facts, in a form that JSON can hold."""
    native = _native()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "fastattn": fastattn.__version__,
        "path": str(Path(fastattn.__file__).parent),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "native": native,
        "cuda": {
            "driver": _cuda_driver(),
            "torch": torch.version.cuda,
            "devices": devices,
            "idle": cuda_device.idle(),
        },
        "tuned": {
            "folder": str(tuning.folder()),
            "configurations": {gpu: len(tuning.load(gpu)) for gpu in devices},
        },
        "backends": _backends() if native.get("isa", "") is not None else {},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def render(facts: dict[str, Any]) -> str:
    """The facts for a reader."""
    native, cuda = facts["native"], facts["cuda"]
    rows = [
        ("fastattn", f"{facts['fastattn']} in {facts['path']}"),
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("torch", f"{facts['torch']}, {facts['threads']} threads"),
        ("triton", facts["triton"] or "not installed"),
    ]
    if native["built"]:
        rows += [
            ("native module", f"built by {native['compiler']}"),
            ("instruction set", native["isa"] or native["reason"]),
            ("  available", " ".join(native["isas_available"])),
            ("  built", " ".join(native["isas"])),
        ]
    else:
        rows.append(("native module", f"missing: {native['reason']}"))
    built = "built" if native["cuda"] else "not built"
    idle = f", idle: {'; '.join(cuda['idle'])}" if native["cuda"] and cuda["idle"] else ""
    rows += [
        ("CUDA kernels", built + idle),
        ("CUDA driver", cuda["driver"] or "none"),
        ("CUDA in torch", cuda["torch"] or "none"),
        ("CUDA devices", ", ".join(cuda["devices"]) or "none"),
    ]
    tuned = facts["tuned"]
    counts = [f"{count} for {gpu}" for gpu, count in tuned["configurations"].items()]
    rows.append(("tuned kernels", f"{', '.join(counts) or 'no GPU'}, in {tuned['folder']}"))
    rows += [(name, value) for name, value in facts["environment"].items()]
    lines = [f"{name:<18} {value}" for name, value in rows]
    lines += ["", f"{'backend':<18} {'available':<10} runs, or why not"]
    for name, backend in facts["backends"].items():
        available = "yes" if backend["runs"] else "no"
        lines.append(f"{name:<18} {available:<10} {_abilities(backend)}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    try:
        module = importlib.import_module("fastattn._C")
    except ModuleNotFoundError:
        return {"built": False, "reason": _not_built(), "cuda": False}
    except ImportError as error:
        return {"built": False, "reason": str(error), "cuda": False}
    isa, reason = None, None
    try:
        isa = module.isa()
    except ValueError as error:
        reason = str(error)
    return {
        "built": True,
        "reason": reason,
        "compiler": module.compiler,
        "isas": module.isas(),
        "isas_available": module.isas_available(),
        "isa": isa,
        "cuda": hasattr(module, "cuda"),
    }


def _not_built() -> str:
    root = Path(fastattn.__file__).parent.parent
    if (root / "setup.py").is_file():
        return (
            f"{root} is a checkout where it is not built; run elsewhere to use the installed "
            "package, or python setup.py build_ext --inplace"
        )
    return "installed with FASTATTN_NATIVE=off; every op runs on the reference backend"


def _cuda_driver() -> str | None:
    """The newest CUDA version that the installed driver runs."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "present, but it does not answer"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _backends() -> dict[str, dict[str, Any]]:
    """Which backends run a small call of each op, on the devices of this machine."""
    backends: dict[str, dict[str, Any]] = {}
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    with torch.no_grad():
        for device, dtype in itertools.product(devices, (torch.bfloat16, torch.float32)):
            x = torch.ones(8, 64, device=device, dtype=dtype)
            samples: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
                "attention": (fastattn.attention, (x.view(1, 1, 8, 64),) * 3),
                "softmax": (fastattn.softmax, (x,)),
                "ffn": (fastattn.ffn, (x, x.new_ones(64, 64), None, x.new_ones(64, 64), None)),
                "gated_ffn": (fastattn.gated_ffn, (x, *(x.new_ones(64, 64),) * 3)),
                "layer_norm": (fastattn.layer_norm, (x, x.new_ones(64))),
                "rms_norm": (fastattn.rms_norm, (x, x.new_ones(64))),
                "cross_entropy": (fastattn.cross_entropy, (x, x[:, 0].long())),
                "linear_cross_entropy": (fastattn.linear_cross_entropy, (x, x, x[:, 0].long())),
                "rotary": (fastattn.rotary, (x.view(1, 1, 8, 64), x[:, :32], x[:, :32])),
            }
            for op, (function, arguments) in samples.items():
                refusals = fastattn.explain(function, *arguments)[0].refusals
                for backend in BACKENDS:
                    facts = backends.setdefault(backend.NAME, {"runs": [], "refusals": {}})
                    if backend.NAME in refusals:
                        facts["refusals"].setdefault(op, refusals[backend.NAME])
                    elif op not in facts["runs"]:
                        facts["runs"].append(op)
    return backends


def _abilities(backend: dict[str, Any]) -> str:
    """The ops that the backend runs, then each reason why it does not run the others."""
    refused: dict[str, list[str]] = {}
    for op, reasons in backend["refusals"].items():
        if op not in backend["runs"]:
            refused.setdefault("; ".join(reasons), []).append(op)
    if not backend["runs"] and len(refused) == 1:
        return next(iter(refused))
    parts = [", ".join(backend["runs"])] if backend["runs"] else []
    return "; ".join(parts + [f"not {', '.join(ops)}: {why}" for why, ops in refused.items()])

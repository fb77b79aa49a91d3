"""The command line, ``python -m fastattn`` or ``fastattn``: info, demo, train, generate, tune."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import fastattn
from fastattn import tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastattn", description="Fused attention, softmax and FFN kernels for PyTorch."
    )
    parser.add_argument("--version", action="version", version=fastattn.__version__)
    commands = parser.add_subparsers(metavar="command", required=True)

    info = commands.add_parser("info", help="what is built, available and missing")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="speed up stock models, then train one, and report")
    demo.add_argument("--quick", action="store_true", help="less training, about a minute")
    demo.add_argument(
        "--out", type=Path, default=Path("fastattn-demo"), metavar="DIR", help="for the report"
    )
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a model as a file or a recipe says")
    train.add_argument("config", help=".toml, .yaml or .json file, or a recipe's name")
    train.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="such as training.steps=100",
    )
    train.add_argument("--out", type=Path, metavar="DIR", help="of the run; default fastattn-NAME")
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    train.set_defaults(run=_train)

    generate = commands.add_parser("generate", help="text from a model that train has made")
    generate.add_argument("folder", type=Path, help="of the run, or of its model")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="to continue or translate")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    generate.add_argument("--temperature", type=float, help="draw the tokens, flatter above 1")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw of the K most probable")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw of the most probable P")
    generate.add_argument("--min-p", type=float, metavar="P", help="P of the most probable's")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    generate.add_argument("--beams", type=int, default=1, metavar="N", help="of a beam search")
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    generate.set_defaults(run=_generate)

    tuned = commands.add_parser("tune", help="choose the Triton kernels' configurations by timing")
    tuned.add_argument("--ops", nargs="+", choices=tune.OPS, default=list(tune.OPS), metavar="OP")
    tuned.add_argument("--dtype", nargs="+", choices=tune.DTYPES, default=list(tune.DTYPES[:2]))
    tuned.add_argument("--quick", action="store_true", help="fewer problems")
    tuned.set_defaults(run=_tune)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from fastattn import info

    facts = info.collect()
    print(json.dumps(facts, indent=2) if arguments.json else info.render(facts))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    return tune.run(arguments.ops, arguments.dtype, arguments.quick)


def _train(arguments: argparse.Namespace) -> int:
    try:
        from fastattn import training
    except ModuleNotFoundError as error:
        return _missing("train", error)
    return training.run(arguments.config, arguments.set, arguments.out, arguments.resume)


def _generate(arguments: argparse.Namespace) -> int:
    try:
        from fastattn.training import text
    except ModuleNotFoundError as error:
        return _missing("train", error)
    options = vars(arguments).copy()
    del options["run"]
    return text.run(**options)


def _missing(extra: str, error: ModuleNotFoundError) -> int:
    if (error.name or "").startswith("fastattn"):
        raise error
    print(f"this needs {error.name}: pip install 'fastattn[{extra}]'", file=sys.stderr)
    return 1


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from fastattn.demo import run
    except ModuleNotFoundError as error:
        return _missing("demo", error)
    return run(quick=arguments.quick, out=arguments.out)

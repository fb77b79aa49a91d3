"""``python -m fastattn``."""

try:
    from fastattn.cli import main
except ModuleNotFoundError as error:
    if error.name != "fastattn.kernels":
        raise
    raise SystemExit(
        "fastattn: the sources of a checkout are in the way of the installed package; call it from "
        "another folder, or as `fastattn`"
    ) from None

raise SystemExit(main())

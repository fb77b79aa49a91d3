"""``python -m fastattn``."""

from fastattn.cli import main

raise SystemExit(main())

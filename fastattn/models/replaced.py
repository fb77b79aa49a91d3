"""Files that are replaced whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to beside `path`, whose file it becomes when the block ends without error.

    Whoever is stopped in between leaves the old file.
    """
    part = path.with_name(f"{path.name}.part")
    yield part
    os.replace(part, path)

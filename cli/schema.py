"""``python -m cli.schema`` writes again what is made from the model (``inventory.schema``), with all
kinds of sections."""

from __future__ import annotations

import cli.composition  # noqa: F401 - what there is
from inventory.schema import main

if __name__ == "__main__":
    main()

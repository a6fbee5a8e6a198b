"""The options of `list`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class List:
    """Describe the norms, models, schemes, data sets and questions that there are."""

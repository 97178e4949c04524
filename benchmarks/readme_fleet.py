"""The README's lines on fleets."""

from __future__ import annotations

from typing import Any

from readme_tables import spread


def fleet(found: dict[str, Any]) -> list[str]:
    """What being one of many costs, and how fast a worker knows what is left."""
    overhead, listing = found["overhead"], found["listing"]
    chip = found["hardware"]
    line = (
        f"One worker of a fleet takes {spread(overhead['over_loop'], '.2f')} of the time of a "
        f"plain loop over {overhead['models']} models of 4 million parameters on "
        f"{overhead['texts']} texts, one of a Ray cluster that has started "
        f"{spread(overhead['ray_over_loop'], '.2f')}; all store the same bits. What a compacted "
        f"store lacks of {listing['names']:,} names is known in "
        f"{spread(listing['seconds'], '.1f')} seconds. "
        f"{chip['threads']} threads of {chip['processor']}; medians, least to most in brackets. "
        f"Command: `{found['command']}`."
    )
    return [line]

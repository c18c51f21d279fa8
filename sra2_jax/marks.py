"""How a run's folder is marked, for those who write it and `status`; without jax."""

import hashlib
import json
from typing import Any

ASIDE = "damaged-"  # and the step: what a damaged checkpoint is renamed to
# Without a beat of lock.json until a run counts as dead: it gives one every ten.
STALE_SECONDS = 60.0


def digest(facts: dict[str, Any]) -> str:
    """SHA-256 of what is saved beside a checkpoint's arrays."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

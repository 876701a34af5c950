"""Mixed lengths in few wasted tokens: sorted by length, batches bounded by a token budget.

Texts of log-normal lengths padded to the longest cost several times what sorted batches cost (compare ``mlflow.onnx``
in the benchmark), so every bulk request goes through here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Most padded tokens in a batch where nobody says otherwise: activations of a small transformer then stay in the
#: cache of one core, and time per token grows with larger ones.
DEFAULT_TOKEN_BUDGET = 256
#: Below this many padded tokens a batch is not worth splitting over several workers.
MIN_SPLIT_TOKENS = 128


def plan_batches(
    lengths: Sequence[int], *, max_batch: int, token_budget: int, workers: int = 1, pads: bool = True
) -> list[list[int]]:
    """Group items into batches of similar length.

    Args:
        lengths: Tokens per item.
        max_batch: Most items in a batch.
        token_budget: Most padded tokens in a batch; a single longer item is a batch by itself.
        workers: How many batches can run at once: work that is large enough is split so that all have some.
        pads: Whether items of different lengths may be in one batch.

    Returns:
        Lists of indices into ``lengths``; every index exactly once, longest batches first so that workers
        end at about the same time.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    total = sum(lengths)
    if workers > 1 and total >= 2 * MIN_SPLIT_TOKENS:
        token_budget = min(token_budget, max(MIN_SPLIT_TOKENS, math.ceil(total / workers)))
    batches: list[list[int]] = []
    batch: list[int] = []
    width = 0
    for index in order:
        full = len(batch) >= max_batch or (len(batch) + 1) * width > token_budget
        if batch and (full or not (pads or lengths[index] == lengths[batch[0]])):
            batches.append(batch)
            batch = []
        if not batch:
            width = max(1, lengths[index])  # sorted: the first is the longest
        batch.append(index)
    batches.append(batch)
    return batches

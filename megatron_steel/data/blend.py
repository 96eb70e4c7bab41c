"""How the draws of several data sets interleave: exact quotas, and who draws at place i, without a table.

1. `apportion` cuts N samples by weight into whole quotas (largest remainder, in exact arithmetic).
2. `Interleave` spreads the quotas evenly. Data sets are the leaves of a binary tree; a node of quota n whose left
   child has quota a gives the left child round(i * a / n) of its first i draws (Bresenham's line), the right child
   the others. Walking down from the root finds the data set of draw i; nothing is stored but the tree.

**Deviation.** Rounding errs by at most 1/2 at a node, and what a parent errs reaches a child times the child's
share of it. After any i draws a data set of quota q is therefore off its share i * q / N by at most
1/2 * sum(q / q_v) over the nodes v from its leaf up to the root's child. The tree is Huffman's: quotas grow at
least like Fibonacci numbers towards the root, so this is **below 1.68 samples for any number of data sets** and
any weights (1/2 of the sum of reciprocal Fibonacci numbers; 1/2 for two data sets). The depth is at
most about 1.44 * log2(N); the average draw takes about as many steps as the blend has bits of entropy.

Past draw N everything repeats: counts(i + N) = counts(i) + quotas. Knows nothing of tokens, epochs or samples.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias

DEVIATION_BOUND = 1.68
"""No prefix of a blend is further than this many samples from any data set's share."""


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole quotas that sum to `total`, each within one of its exact share (ties: the earlier one gets more)."""
    scale = Fraction(total) / sum(map(Fraction, weights))
    shares = [Fraction(w) * scale for w in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (quotas[k] - shares[k], k))
    for k in by_remainder[: total - sum(quotas)]:
        quotas[k] += 1
    return quotas


class _Node(NamedTuple):
    left: "_Tree"
    right: "_Tree"
    left_quota: int
    quota: int

    def left_draws(self, draws: int) -> int:
        """How many of this node's first `draws` are the left child's."""
        return (draws * self.left_quota + self.quota // 2) // self.quota


_Tree: TypeAlias = _Node | int  # a leaf is the number of its data set


class Interleave:
    """The order of draws for given quotas (whole numbers, not all zero)."""

    def __init__(self, quotas: Sequence[int]):
        self._members = len(quotas)
        self._root = _huffman(quotas)

    def locate(self, draw: int) -> tuple[int, int]:
        """(data set that takes this draw, how many draws it took before)."""
        node = self._root
        while isinstance(node, _Node):
            before = node.left_draws(draw)
            if node.left_draws(draw + 1) > before:
                node, draw = node.left, before
            else:
                node, draw = node.right, draw - before
        return node, draw

    def counts(self, draws: int) -> list[int]:
        """How many of the first `draws` each data set took."""
        counts = [0] * self._members
        todo = [(self._root, draws)]
        while todo:
            node, draws = todo.pop()
            if isinstance(node, _Node):
                left = node.left_draws(draws)
                todo += [(node.left, left), (node.right, draws - left)]
            else:
                counts[node] = draws
        return counts


def _huffman(quotas: Sequence[int]) -> _Tree:
    """Join the two smallest until one is left; equal quotas in the order of their first data set."""
    heap: list[tuple[int, int, _Tree]] = [(quota, k, k) for k, quota in enumerate(quotas) if quota]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, i, left), (b, j, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, min(i, j), _Node(left, right, a, a + b)))
    return heap[0][2]

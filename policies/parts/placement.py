"""Which experts to have on the GPU from the start: pairs (layer, expert) in order of priority.

A pair is one number, layer * experts + expert.
"""

import numpy as np

from moesim.policies.api import Setting
from moesim.types import WHOLE, IntArray


def resident(setting: Setting, pairs: IntArray) -> IntArray:
    """Return (layers, experts): these pairs whole, nothing of the others."""
    parts = np.zeros(setting.layers * setting.experts, np.int64)
    parts[pairs] = WHOLE
    return parts.reshape(setting.layers, setting.experts)


def across_layers(setting: Setting) -> IntArray:
    """Return all pairs: expert 0 of every layer, then expert 1, so that layers get equally many."""
    pairs = np.arange(setting.layers * setting.experts)
    return pairs.reshape(setting.layers, setting.experts).T.ravel()


def by_popularity(setting: Setting) -> IntArray:
    """Return all pairs, the most used first, equal ones by layer and id."""
    order: IntArray = np.argsort(-setting.popularity, axis=None, kind="stable")
    return order

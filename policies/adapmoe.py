"""AdapMoE, arXiv 2408.10284: LRU caches of unequal sizes, and one load ahead of its layer."""

from math import comb
from typing import Literal, NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.policies.api import (
    Placement,
    Plan,
    Prediction,
    Setting,
    Table,
    View,
    even_split,
    fetch,
    gate_after,
    layer_caches,
)
from moesim.policies.dali import rank_guesses
from moesim.policies.parts.guesses import predictions
from moesim.policies.parts.loading import DemandCache, full_demand_cache, run_replacing
from moesim.types import DECODE, NONE, WHOLE, FloatArray, IntArray

MIXTRAL_ACCURACY = (
    0.0, 0.566, 0.721, 0.789, 0.866, 0.859, 0.830, 0.840, 0.849, 0.801, 0.898, 0.898, 0.893, 0.910,
    0.925, 0.881, 0.915, 0.939, 0.905, 0.879, 0.876, 0.893, 0.879, 0.876, 0.888, 0.884, 0.922,
    0.913, 0.886, 0.900, 0.903, 0.850,
)  # fmt: skip
"""By layer, as the released code has them for Mixtral-8x7B, top-2 of 8 experts."""

MOST_AHEAD = 3
"""Layers ahead that the paper looks; and as many experts as gates can wait for."""

UNIT = 1 << 40
"""Of an expected load: integers, so that equal gains are equal and no sum depends on its order."""


class AdapMoe(NamedTuple):
    """GPU only: LRU caches, larger where guesses are worse; one guessed expert is loaded ahead.

    P: the paper, second-hand; C: the released code (PKU-SEC-Lab/AdapMoE); I: inferred.

    * Cache split: the sizes with the least expected loads per token, found by dynamic programming
      over layers [C]; see `expected_loads` for a model of any shape [I].
    * Cache: LRU in each layer, at first the experts with the highest ids [C]. All active experts
      count as used before any is loaded, and the victim may be one that this step has used [C].
    * Guess: the next layer's gate on this layer's gate input, after this layer's gate; of its first
      two experts the first that is absent is loaded, in decode only, and none from the last layer
      for the next token [C]. Two are what Mixtral's tokens choose; here as many as the model's [I].
      If all are there, the paper looks up to 3 layers ahead (`ahead`); the code does not.
      Several sequences: the experts guessed for most of them count as first [I]; the code then
      loads nothing ahead, nor does it in decode steps of more than one token.
    * Order: cached experts, then loads in their order, then the one ahead, on one copy stream [C].
      A layer waits for the expert that was loaded ahead for it, used or not [C]: after its gate;
      here before it, which costs the gate's time. Unused it leaves with the layer, used it takes
      the place of the one used least recently [C].

    Deviations: an expert is used when all of it is there; in the code each of its matrices is,
    which saves up to two thirds of its time on the GPU. Experts of a layer that are equally near
    run in the router's order, in the code by id. The code has 6 buffers for loads beside the
    experts that it caches; here there is one for each layer looked ahead, out of the budget, and a
    load waits for the last run of its victim.

    Left out: adaptive gating, which drops a token's second expert and changes the output: here
    every expert that was chosen runs (it is off by default in the code, too); the first layer's
    trained gate [P], which the code does not have.
    """

    cache: DemandCache
    ahead: int
    staging: int
    resident: IntArray
    """(layers, experts): at the start."""
    accuracy: FloatArray
    """(layers,): share of the experts chosen that a guess names."""
    nobody: IntArray
    """(experts,): zeros; no expert is safe from being the victim."""
    candidates: IntArray
    listed: IntArray
    """(experts,): scratch space."""
    predictions: tuple[Prediction, ...]
    notice: str

    @classmethod
    def new(
        cls,
        setting: Setting,
        split: Literal["dp", "even"] = "dp",
        accuracy: Literal["measured", "mixtral"] = "measured",
        ahead: int = 1,
        predictor: str = "auto",
        recall: float = 0.9,
    ) -> "AdapMoe":
        """`accuracy`: of guesses, for the split; `ahead`: so many layers, 0 to 3.

        `predictor=gate` is gate1, gate2, gate3; `recall` is of predictor=noisy-oracle.
        """
        if ahead > MOST_AHEAD:
            raise InputError(f"policy adapmoe: ahead={ahead} is not legal; 0..{MOST_AHEAD} is")
        guesses = predictions(predictor, ahead, recall)
        staging = max(1, min(ahead, setting.slots))
        slots = max(0, setting.slots - staging)
        rates = np.zeros(setting.layers)
        notice = ""
        if split == "dp" and ahead > 0:
            rates, notice = accuracy_of(setting, accuracy, guesses[0])
        if rates.any():
            loads = expected_loads(setting.experts, setting.top_k, rates)
            capacity = best_split(loads, slots)
        else:
            capacity = np.minimum(even_split(slots, setting.layers), setting.experts)
        first = setting.experts - capacity[:, np.newaxis]
        resident = np.where(np.arange(setting.experts) >= first, WHOLE, 0)
        return cls(
            cache=full_demand_cache(resident),
            ahead=ahead,
            staging=staging,
            resident=resident,
            accuracy=rates,
            nobody=np.zeros(setting.experts, np.int64),
            candidates=np.zeros(setting.experts, np.int64),
            listed=np.zeros(setting.experts, np.int64),
            predictions=guesses,
            notice=notice,
        )

    def place(self, setting: Setting) -> Placement:
        """Fill the caches with the last experts of each layer."""
        return layer_caches(
            setting,
            cached=self.resident,
            slots=self.cache.capacity,
            staging_slots=self.staging,
            predictions=self.predictions,
            link="fifo",
            notices=(self.notice,) if self.notice else (),
        )

    def plan(self, setting: Setting) -> tuple[Table, ...]:
        """Show the split, and what each layer is expected to load, beside an even split."""
        loads = expected_loads(setting.experts, setting.top_k, self.accuracy)
        sizes = self.cache.capacity
        even = even_split(int(sizes.sum()), setting.layers)
        layer = np.arange(setting.layers)
        ours, theirs = (loads[layer, kept] / UNIT for kept in (sizes, even))
        columns = (layer, self.accuracy, sizes, ours, even, theirs)
        return (
            Table(
                "Cache split, and loads expected per token",
                ("layer", "accuracy", "experts", "loads", "even split", "its loads"),
                tuple(zip(*(column.tolist() for column in columns), strict=True)),
                f"{sizes.sum()} of {setting.layers * setting.experts} experts are kept. Loads per "
                f"token: {ours.sum():.3f}, with an even split {theirs.sum():.3f}. A cache is taken "
                "to hold any of the layer's experts with equal chance.",
            ),
        )

    def before_gate(self, view: View, plan: Plan) -> None:
        """Let the gate wait for what was loaded ahead for this layer."""
        for expert in range(len(self.nobody)):
            if view.staged[view.layer, expert] == WHOLE:
                gate_after(plan, expert)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run what is there, load and run the rest, then load one expert ahead."""
        run_replacing(view, plan, self.cache, self.nobody)
        if view.phase == DECODE:
            for distance in range(1, self.ahead + 1):
                target = view.layer + distance
                if target == len(view.cached):
                    return
                n = rank_guesses(view, self.candidates, self.listed, distance - 1)
                expert = first_absent(view, target, self.candidates, n)
                if expert != NONE:
                    fetch(plan, target, expert)
                    return


def first_absent(view: View, target: int, candidates: IntArray, n: int) -> int:
    """Return the likeliest expert that is neither in a layer nor on its way, or NONE.

    Of as many as one token chooses.
    """
    for i in range(min(n, view.ids.shape[1])):
        expert: int = candidates[i]
        if (
            view.cached[target, expert] == 0
            and view.staged[target, expert] == 0
            and view.pending[target, expert] == 0
        ):
            return expert
    return NONE


def accuracy_of(setting: Setting, source: str, prediction: Prediction) -> tuple[FloatArray, str]:
    """Return the accuracy of guesses by layer, zeros where it is not known, and a notice or none.

    Measured beforehand: the share of the experts chosen that are among as many first guesses.
    Nothing is guessed for the first layer.
    """
    is_mixtral = (setting.layers, setting.experts, setting.top_k) == (len(MIXTRAL_ACCURACY), 8, 2)
    if source == "mixtral":
        if not is_mixtral:
            raise InputError(
                "policy adapmoe: accuracy=mixtral is for 32 layers of 8 experts, top-2; this model "
                f"has {setting.layers} of {setting.experts}, top-{setting.top_k}"
            )
        return np.array(MIXTRAL_ACCURACY), ""
    seen = setting.offline(prediction)
    guesses = seen.guesses[:, :, : setting.top_k]
    if len(seen.ids) > 0:
        found = (seen.ids[..., np.newaxis] == guesses[..., np.newaxis, :]).any(axis=3)
        chosen = seen.ids != NONE
        right = (found & chosen).sum(axis=(0, 2))
        rates = right / np.maximum(chosen.sum(axis=(0, 2)), 1)
        rates[0] = 0
        if rates.any():
            return rates, ""
    missing = "no guess was right beforehand" if len(seen.ids) > 0 else "nothing is left of it"
    measured = (
        "adapmoe measures the accuracy of guesses on the part of the trace that is not replayed, "
        f"and {missing}: "
    )
    if is_mixtral:
        return np.array(MIXTRAL_ACCURACY), measured + "the released code's for Mixtral are taken"
    return np.zeros(setting.layers), measured + "the caches are of equal size"


def expected_loads(experts: int, top_k: int, accuracy: FloatArray) -> IntArray:
    """Return what a token loads on demand in each layer by the size of its cache, in `UNIT`.

    (layers, experts + 1). Of a token's experts, drawn at random, M are absent from a cache of t;
    the one loaded ahead is one of them with probability b, the accuracy, if M > 0. Hence
    E[M] - b P(M > 0) = k (N - t) / N - b (1 - C(t, k) / C(N, k)), which for 8 experts, top-2, is
    the released code's f without adaptive gating (a = 0).

    Given as sums of rounded gains: each further place gains k / N - b C(t, k - 1) / C(N, k), never
    more than the one before.
    """
    share = np.array([comb(t, top_k - 1) / comb(experts, top_k) for t in range(experts)])
    gains = top_k / experts - accuracy[:, np.newaxis] * share
    loads = np.zeros((len(accuracy), experts + 1), np.int64)
    units = np.rint(gains * UNIT).astype(np.int64)
    loads[:, :-1] = np.cumsum(units[:, ::-1], axis=1)[:, ::-1]
    return loads


def best_split(loads: IntArray, slots: int) -> IntArray:
    """Return how many of `slots` each layer gets (layers,), for the least loads in all.

    The recursion of the released code: dp[i][j] is the least over k of dp[i - 1][j - k] + f(i, k),
    of equals with the smallest k, from 1 on. There k = 0 is for j = 0 only; here it may be less, as
    it is at top-1 alone. Places that all layers together do not fill stay empty.
    """
    layers, sizes = loads.shape
    slots = min(slots, layers * (sizes - 1))
    least = np.zeros(slots + 1, np.int64)
    chosen = np.zeros((layers, slots + 1), np.int64)
    for layer in range(layers):
        best = np.full(slots + 1, np.iinfo(np.int64).max)
        for size in [*range(1, min(sizes, slots + 1)), 0]:
            found = least[: slots + 1 - size] + loads[layer, size]
            better = found < best[size:]
            best[size:][better] = found[better]
            chosen[layer, size:][better] = size
        least = best
    capacity = np.zeros(layers, np.int64)
    for layer in range(layers - 1, -1, -1):
        capacity[layer] = chosen[layer, slots]
        slots -= capacity[layer]
    return capacity

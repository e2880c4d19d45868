import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.jit.store import disabled
from moesim.sim.curves import CLOCKS, LOOKUPS_PER_S, PATIENCE_S, RULES, Curves, curves
from moesim.traces.format import MISSING, Trace
from moesim.traces.importers import load_trace
from moesim.traces.stats import lru_hits
from moesim.traces.synthetic import synthesize

SHARED = Path(__file__).resolve().parents[3] / "shared/traces"
GENERAL = SHARED / "qwen3-30b-a3b-general.npz"
REFERENCE = SHARED / "reference-cache-general.csv"
NEVER = (1 << 63) - 1
EXPERTS = 6
SIZES = range(1, EXPERTS + 1)


@pytest.fixture(scope="module", autouse=True)
def _folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESIM_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def trace_of(tokens: list[list[int]], experts: int = EXPERTS) -> Trace:
    """Return a trace of one layer."""
    rows = len(tokens)
    return Trace(
        experts=np.array(tokens, np.uint16).reshape(rows, 1, -1),
        layer_ids=np.zeros(1, np.int32),
        phase=np.zeros(rows, np.uint8),
        sequence=np.zeros(rows, np.int32),
        position=np.arange(rows, dtype=np.int32),
        meta={"num_experts": experts},
    )


def hits_of(rule: str, tokens: list[list[int]], size: int, clock: str = "token") -> int:
    return int(curves(trace_of(tokens), [rule], [size], clock, compiled=False).hits[0, 0, 0])


@pytest.mark.parametrize(
    ("rule", "hits"),
    [
        ("lru", 1),  # 0, 1, 0 hits; 2 for 1; 1 for 0; 0 for 2
        ("fifo", 2),  # 2 for 0; 1 hits; 0 for 1
        ("belady", 2),  # 2 for 0, which is used after 1; 1 hits; 0 for 1
        ("lfu", 2),  # 2 for 1; 1 for 2; 0 hits
    ],
)
@pytest.mark.parametrize("clock", CLOCKS)
def test_each_rule_by_hand(rule: str, hits: int, clock: str) -> None:
    assert hits_of(rule, [[0], [1], [0], [2], [1], [0]], 2, clock) == hits


def test_lfu_by_token_counts_for_ever_and_by_access_from_admission_on() -> None:
    """2 replaces 1, 1 returns in place of 2, 2 in place of 0 (3 uses, as 1 has) or of 1 (1 use)."""
    tokens = [[1], [1], [0], [0], [0], [2], [1], [2], [1]]

    assert hits_of("lfu", tokens, 2, "token") == 4
    assert hits_of("lfu", tokens, 2, "access") == 3


def test_experts_of_one_token_tie_and_the_lowest_id_leaves() -> None:
    """2 takes the place of 0, which its own token is about to use; by access that of 1."""
    assert hits_of("lru", [[1, 0], [2, 0]], 2, "token") == 0
    assert hits_of("lru", [[1, 0], [2, 0]], 2, "access") == 1


def test_belady_by_token_looks_beyond_the_token() -> None:
    """By token, 2 takes the place of 0, which no later token uses; by access that of 1."""
    assert hits_of("belady", [[0, 1], [2, 0], [1, 2]], 2, "token") == 1
    assert hits_of("belady", [[0, 1], [2, 0], [1, 2]], 2, "access") == 2


def simulated(rule: str, tokens: list[list[int]], size: int, clock: str) -> int:
    """Return the hits of one cache, written down as the rules are said."""
    rows = [(row, e) for row, token in enumerate(tokens) for e in token if e != MISSING]
    if clock == "access":
        rows = list(enumerate(e for _, e in rows))
    cache: list[int] = []  # in order of admission
    last: dict[int, int] = {}
    uses: Counter[int] = Counter()

    def worth(expert: int, now: int) -> tuple[int, ...]:
        if rule == "lru":
            return last[expert], expert
        if rule == "fifo":
            return (cache.index(expert),)
        if rule == "lfu":
            return uses[expert], (last[expert] if clock == "access" else expert)
        return -min((row for row, e in rows if e == expert and row > now), default=NEVER), expert

    hits = 0
    for now, expert in rows:
        if expert in cache:
            hits += 1
        else:
            if len(cache) == size:
                victim = min(cache, key=lambda e: worth(e, now))
                cache.remove(victim)
                if clock == "access":
                    del uses[victim]
            cache.append(expert)
        last[expert] = now
        uses[expert] += 1
    return hits


token = st.lists(st.integers(0, EXPERTS - 1), min_size=3, max_size=3, unique=True)
some_missing = token.flatmap(
    lambda ids: st.integers(0, 3).map(lambda n: ids[:n] + [MISSING] * (3 - n))
)
token_lists = st.lists(some_missing, min_size=1, max_size=40)


@given(token_lists, st.sampled_from(CLOCKS))
def test_hits_are_those_of_the_rules_as_they_are_said(tokens: list[list[int]], clock: str) -> None:
    plain = curves(trace_of(tokens), RULES, SIZES, clock, compiled=False)
    compiled = curves(trace_of(tokens), RULES, SIZES, clock, compiled=True)

    said = [[simulated(rule, tokens, size, clock) for size in SIZES] for rule in RULES]
    assert plain.hits[:, :, 0].tolist() == said
    assert compiled.hits.tolist() == plain.hits.tolist()


def synthetic(experts: int = 32) -> Trace:
    return synthesize(
        layers=3, experts=experts, top_k=4, sequences=3, prompt=30, generate=50, seed=5
    )


@given(token_lists)
def test_laws(tokens: list[list[int]]) -> None:
    used = np.array(tokens)
    distinct = len(np.unique(used[used != MISSING]))
    for clock in CLOCKS:
        made = curves(trace_of(tokens), RULES, SIZES, clock, compiled=False)
        hits = dict(zip(RULES, made.hits[:, :, 0], strict=True))
        assert made.lookups.tolist() == [(used != MISSING).sum()]
        for rule in RULES:
            # A cache of everything misses each expert once.
            assert hits[rule][-1] == made.lookups[0] - distinct
        for rule in ("lru", "belady"):
            assert (np.diff(hits[rule]) >= 0).all()
        if clock == "access":
            assert all((hits["belady"] >= hits[rule]).all() for rule in RULES)


def test_a_layer_is_a_cache_of_its_own() -> None:
    trace = synthetic()
    made = curves(trace, RULES, [5], compiled=False)

    for layer in range(trace.layers):
        alone = curves(trace_of(trace.experts[:, layer].tolist(), 32), RULES, [5], compiled=False)
        assert (made.hits[:, :, layer] == alone.hits[:, :, 0]).all()


def test_lru_by_access_equals_the_statistics() -> None:
    trace = synthetic()
    made = curves(trace, ["lru"], [1, 4, 9, 32], "access", compiled=False)

    assert made.hit_rates()[0].tolist() == lru_hits(trace, [1, 4, 9, 32], protect=False).tolist()


def libcachesim_hits(rule: str, accesses: list[int], size: int) -> int:
    import libcachesim

    name = {"lru": "LRU", "lfu": "LFU", "fifo": "FIFO", "belady": "Belady"}[rule]
    cache = getattr(libcachesim, name)(cache_size=size, hashpower=8)
    hits = 0
    for at, expert in enumerate(accesses):
        later = accesses[at + 1 :]
        next_use = at + 1 + later.index(expert) if expert in later else NEVER
        hits += cache.get(
            libcachesim.Request(obj_id=expert, obj_size=1, next_access_vtime=next_use)
        )
    return hits


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@settings(max_examples=50)
@given(token_lists, st.sampled_from(SIZES))
def test_by_access_all_rules_equal_libcachesim(tokens: list[list[int]], size: int) -> None:
    accesses = [e for row in tokens for e in row if e != MISSING]

    for rule in RULES:
        assert hits_of(rule, tokens, size, "access") == libcachesim_hits(rule, accesses, size)


@pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")
@pytest.mark.parametrize("size", [1, 4, 9, 20])
@pytest.mark.parametrize("rule", RULES)
def test_by_access_it_equals_libcachesim_on_a_longer_trace(rule: str, size: int) -> None:
    trace = synthetic()
    made = curves(trace, [rule], [size], "access", compiled=False)

    accesses = trace.experts[:, 1].ravel().tolist()
    assert made.hits[0, 0, 1] == libcachesim_hits(rule, accesses, size)


@pytest.mark.skipif(not GENERAL.is_file(), reason="needs the recorded trace")
def test_misses_agree_with_the_published_ones() -> None:
    """Of which ties went by the order of a Python set: most at the smallest cache."""
    with REFERENCE.open() as file:
        published = [row for row in csv.DictReader(file) if row["policy"] in RULES]
    sizes = sorted({int(row["capacity"]) for row in published})
    made = curves(load_trace(GENERAL), RULES, sizes, compiled=True)
    misses = (made.lookups - made.hits)[:, :, 24] / 8000

    assert len(published) == 18
    for row in published:
        size = int(row["capacity"])
        ours = misses[RULES.index(row["policy"]), sizes.index(size)]
        expected = float(row["demand_miss_per_tok"])
        assert ours == pytest.approx(expected, rel=0.015 if size == 8 else 0.005), row


def test_a_layer_without_lookups_has_no_hit_rate() -> None:
    for compiled in (False, True):
        made = curves(trace_of([[MISSING, MISSING]]), RULES, SIZES, compiled=compiled)
        assert made.hits.sum() == 0
        assert np.isnan(made.hit_rates()).all()


@pytest.mark.skipif(disabled(), reason="nothing compiles")
def test_nothing_is_compiled_for_a_short_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path))
    said: list[str] = []
    row = [0, 1, 2]

    curves(trace_of([row] * 100), RULES, SIZES, say=said.append)
    assert said == []
    assert list(tmp_path.iterdir()) == []

    rows = PATIENCE_S * LOOKUPS_PER_S // (3 * len(RULES) * len(SIZES)) + 1
    long = trace_of([row] * rows)
    first = curves(long, RULES, SIZES, say=said.append)
    assert len(said) == 1
    assert "once" in said[0]
    second = curves(long, RULES, SIZES, say=said.append)
    assert len(said) == 1
    assert (first.hits == second.hits).all()
    assert first.hits[0, 2, 0] == 3 * rows - 3


@pytest.mark.parametrize(
    ("rules", "sizes", "clock", "message"),
    [
        (["lruu"], [1], "token", "no cache rule named 'lruu'; there are: lru, lfu, fifo, belady"),
        (["lru"], [0], "token", "a cache of 0 experts; legal are 1..6"),
        (["lru"], [2, 7], "token", "a cache of 7 experts; legal are 1..6"),
        (["lru"], [1], "second", "no clock named 'second'; there are: token, access"),
    ],
)
def test_refusals(rules: list[str], sizes: list[int], clock: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        curves(trace_of([[0, 1, 2]]), rules, sizes, clock)


def test_the_result_says_what_was_asked() -> None:
    made = curves(trace_of([[0, 1, 2]]), ["fifo", "lru"], [2, 1], compiled=False)

    assert isinstance(made, Curves)
    assert made.rules == ("fifo", "lru")
    assert made.sizes == (2, 1)
    assert made.hits.shape == (2, 2, 1)

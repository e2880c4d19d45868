"""Check a log against the laws of the machine and of a forward pass, from the log alone.

Two machines that agree can both be wrong, so these files share no code with what they judge. Each
law is a function whose docstring states it; `audit` runs them in order and raises at the first
breach. An operation may always start in the very instant in which what it waits for ends.
"""

from moesim.audit.form import read
from moesim.audit.lanes import check_lanes, check_queues, check_starts, check_work, measure
from moesim.audit.passes import (
    check_attention,
    check_combine,
    check_cpu_attention,
    check_cpu_results,
    check_dense,
    check_experts,
    check_head,
    check_kv,
    check_synchronised,
)
from moesim.audit.weights import check_disk, check_weights
from moesim.log import Log


def audit(log: Log) -> None:
    """Raise AuditError, in one line, at the first law that a log breaks."""
    run = read(log)
    check_lanes(run)
    check_starts(run)
    work = measure(run)
    check_queues(run, work)
    check_work(run, work)
    check_weights(run)
    check_disk(run)
    for step in range(log.loads.shape[0]):
        check_head(run, step)
        for layer in range(log.loads.shape[1]):
            check_attention(run, step, layer)
            check_cpu_attention(run, step, layer)
            check_experts(run, step, layer)
            check_cpu_results(run, step, layer)
            check_combine(run, step, layer)
            check_dense(run, step, layer)
    check_kv(run)
    check_synchronised(run)

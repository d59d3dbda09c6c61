"""Names for the parts of a step, which a profiler's trace shows."""

from torch.profiler import record_function

PREFIX = "ssast::"


def span(part: str) -> record_function:
    """A context: what happens in it belongs to this part of the step. Costs nothing worth counting unless a profiler
    records.
    """
    return record_function(PREFIX + part)

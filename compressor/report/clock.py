"""Which clock a figure is by, and whether it sent the search on; in words."""

from compressor.values import Basis, Clock, PairedLatency, Result


def clock_of(pair: PairedLatency) -> list[str]:
    """Which clock a ratio comes from and how busy the machine was, in a line; or nothing."""
    if pair.basis is Basis.ESTIMATE or pair.interrupted is None:
        return []
    share = f"other work interrupted {pair.interrupted:.0%} of the runs"
    if pair.clock is Clock.THREAD_CPU:
        return [f"CPU time of the thread, because {share}"]
    return [f"the wall's; {share}"]


def went_on(result: Result) -> str:
    """How often the search went on, as the end of a sentence; or nothing."""
    n = result.search.get("n_corrections", 0)
    return f", which went on {'once' if n == 1 else f'{n} times'} after measuring again" * bool(n)

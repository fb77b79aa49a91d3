"""Times rivals in turn, so that a noisy machine disturbs all of them alike."""

import statistics
import time

# A comparison that takes more seconds than this makes do with fewer rounds, at least three.
LONGEST = 5.0


def medians(rivals, rounds=15, budget=0.02):
    """Median seconds a call of each function in `rivals` ({name: function})."""
    for call in rivals.values():
        call()
    start = time.perf_counter()
    for call in rivals.values():
        call()
    once = (time.perf_counter() - start) / len(rivals)
    calls = max(1, int(budget / max(once, 1e-7)))
    rounds = min(rounds, max(3, int(LONGEST / (calls * once * len(rivals)))))
    seconds = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}

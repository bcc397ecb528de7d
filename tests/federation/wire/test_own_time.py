"""Who was stopped does not blame others for the time it missed."""

from __future__ import annotations

from coterie.federation.wire.own_time import OwnTime


def test_own_time_stands_still_while_nobody_reads_it() -> None:
    now = 100.0
    own = OwnTime(lambda: now)
    begun = own.now()
    for _ in range(20):
        now += 0.2
        own.now()
    assert abs(own.now() - begun - 4.0) < 1e-9
    now += 3600.0  # stopped for an hour
    assert own.now() - begun - 4.0 < 1.1

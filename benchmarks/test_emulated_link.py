"""What is measured of an emulated link, beside what it is throttled to."""

import os

import pytest

from moesim.calibrate.copies import copy_series, fit_channel
from moesim.calibrate.plausible import hold_throttle
from moesim.calibrate.series import Bench
from moesim.calibrate.timing import Limits
from moesim.real.emulated import Emulated, Throttle

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("how", ["single", "queued"])
@pytest.mark.parametrize(
    "link", [Throttle(20_000, 2e9), Throttle(10_000, 8e9)], ids=["2 GB/s", "8 GB/s"]
)
def test_a_throttled_link(link: Throttle, how: str) -> None:
    device = Emulated(512 << 20, link)
    found = copy_series(Bench(device, Limits(seconds=0.2), True), "h2d", pinned=True, how=how)
    device.close()
    hold_throttle(found, link.latency_ns, link.bytes_per_s)
    fitted = fit_channel(found)
    latency_ns, rate = fitted.channel.latency_ns, fitted.channel.bytes_per_s
    print(
        f"\n{how}: latency {latency_ns / 1e3:.1f} us for {link.latency_ns / 1e3:g} "
        f"({latency_ns / link.latency_ns - 1:+.1%}), rate {rate / 1e9:.3f} GB/s for "
        f"{link.bytes_per_s / 1e9:g} ({rate / link.bytes_per_s - 1:+.1%}), held-out points off by "
        f"{fitted.fit.error:.1%}, load {os.getloadavg()[0]:.1f}"
    )
    assert sum(p.held_out for p in found.points) == len(fitted.fit.held_out) > 0

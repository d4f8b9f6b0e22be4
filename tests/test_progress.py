"""Progress on stderr: the rate counts this time only, the time left what is missing."""

from __future__ import annotations

import pytest

from mimo_jax import progress


def test_clock() -> None:
    assert [progress.clock(s) for s in (4.4, 59.6, 125, 3600 * 3 + 60 * 7 + 9)] == ["4s", "1m00s", "2m05s", "3h07m"]


def test_a_meter_prints_when_it_is_time_and_leaves_work_of_before_out_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    meter = progress.Meter(100, lambda done, rate: f"{done:.0f} done, {rate:.1f}/s")
    silent = progress.Meter(100, lambda done, rate: "silent", on=False)
    meter.resume(40)
    now += 4
    meter.step(20)
    assert capsys.readouterr().err == ""
    now += 6
    meter.step(10)
    silent.step()
    meter.say()
    assert capsys.readouterr().err == "70 done, 3.0/s, ETA 10s\n" * 2

"""A signal that would end the process at once ends the block as Ctrl-C does."""

from __future__ import annotations

import os
import signal

import pytest

from attnguide.cli._ending import Ended, ending_like_ctrl_c


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_raised_once_and_then_ignored(number: int) -> None:
    steps = []

    def interrupted() -> None:
        with ending_like_ctrl_c():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                steps.append("cleaned")

    with pytest.raises(KeyboardInterrupt) as ended:
        interrupted()
    assert steps == ["cleaned"]
    assert isinstance(ended.value, Ended)
    assert ended.value.signal == number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_like_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

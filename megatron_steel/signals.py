"""Which signals ask a process to stop. Must not know what is stopped, or how."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def stop_signals() -> list[signal.Signals]:
    """Signals that ask this process to stop: a closed terminal (SIGHUP) too, unless `nohup` has said otherwise."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]

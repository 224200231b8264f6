"""For all tests."""

import signal

# nohup and a shell's background ignore these, which would be inherited by what tests start, and send them to.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)

"""Read by Python as it starts: turns the emulated device on where the environment says so."""

import os

if os.environ.get("HUBPATH_EMULATED_DEVICE"):
    from bench.emulated.device import start

    start.start()

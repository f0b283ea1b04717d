"""What every test stands on: one thread, no network, and shapes checked at every call.

The import hook must be in place before any module of the package is imported, hence the order of this file.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

_early = sorted(name for name in sys.modules if name.partition(".")[0] == "metamorph")
if _early:
    raise RuntimeError(f"{_early} imported before the shape checks were installed. Import the package in tests and fixtures only.")

# Every annotated function and dataclass of the package checks shapes, dtypes and types while tests run (about 50 microseconds a call).
# Names imported under TYPE_CHECKING only are left unchecked: lazy modules stay lazy. The tower lets an int pass where a float is asked for.
install_import_hook("metamorph", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Deadlines measure the machine, not the code; CI machines are slow and shared.
settings.register_profile("metamorph", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("metamorph")

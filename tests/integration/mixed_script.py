"""A run of a configuration, started by tests under torchrun."""

import sys
from pathlib import Path

from metamorph.training import RunConfig
from metamorph.training.run import run
from metamorph.training.trackers import SilentTracker

if __name__ == "__main__":
    run(RunConfig.load(Path(sys.argv[1])), resume=sys.argv[2] == "resume", tracker=lambda stage: SilentTracker())

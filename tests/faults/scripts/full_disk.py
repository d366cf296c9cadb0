"""Resume a run where no file may grow beyond some bytes: `full_disk.py DIRECTORY BYTES error|kill`.

The kernel refuses to write more, as on a full disk, or kills the process in the middle of the file.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import torch

from tests.faults.kill_loop import train

root, size, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if what == "kill":
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
train(root, root / "checkpoints" / "last.ckpt")

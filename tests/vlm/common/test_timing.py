"""Peak memory is a process's own."""

import subprocess
import sys

CODE = (
    "import torch; from vlm_prune.vlm.common.timing import peak_bytes\n"
    "small = peak_bytes(torch.device('cpu')); held = b'x' * 10**9; print(small, peak_bytes(torch.device('cpu')))"
)


def test_what_the_parent_held_does_not_count():
    held = b"x" * 2 * 10**9
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    small, large = map(int, done.stdout.split())
    assert small < len(held) / 2 and 0.9e9 < large - small < 1.2e9

#!/usr/bin/env bash
# torch 2.14.1: `torch.manual_seed` writes three stack traces at each call, so that seeding per image can cost more than the image.
#
# It seeds CUDA, XPU and MTIA beside the CPU. A backend that is not in use queues its seed together with `traceback.format_stack()`, to
# name the caller should the seed fail later. A call takes milliseconds and more the deeper it stands, in a data loader about
# 6 ms, and `torch.default_generator.manual_seed`, which draws the same numbers on a CPU, takes a microsecond. A training of a
# small CLIP that seeded the augmentation of each image spent a third of its time there. Once CUDA is in use, its trace is gone.
#
# Seen with torch 2.14.1 on a CPU, Python 3.11:
#   stack traces per call: 3
#   frames above the call: 5, torch.manual_seed 1700 us, torch.default_generator.manual_seed 1 us
#   frames above the call: 35, torch.manual_seed 5700 us, torch.default_generator.manual_seed 1 us
#   same numbers: True
# The script fails if that changes; times differ between machines, and it asks for a factor of 50.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy
cat >"$folder/run.py" <<'PY'
import time
import traceback

import torch


def microseconds(seed, calls=200):
    begin = time.perf_counter()
    for number in range(calls):
        seed(number)
    return 1e6 * (time.perf_counter() - begin) / calls


def below(frames, call):
    return call() if not frames else below(frames - 1, call)


format_stack, written = traceback.format_stack, []
traceback.format_stack = lambda *given: written.append(1) or format_stack(*given)
torch.manual_seed(0)
traceback.format_stack = format_stack
print("stack traces per call:", len(written))
ratios = []
for frames in (5, 35):
    both = [
        below(frames, lambda seed=seed: microseconds(seed))
        for seed in (torch.manual_seed, torch.default_generator.manual_seed)
    ]
    ratios.append(both[0] / both[1])
    print(f"frames above the call: {frames}, torch.manual_seed {both[0]:.0f} us, "
          f"torch.default_generator.manual_seed {both[1]:.0f} us")
torch.manual_seed(7)
first = torch.rand(5)
torch.default_generator.manual_seed(7)
same = torch.equal(first, torch.rand(5))
print("same numbers:", same)
assert len(written) == 3, "the number of stack traces changed"
assert min(ratios) > 50, "seeding no longer costs more than the CPU's generator alone"
assert same, "the two no longer draw the same numbers"
PY
"$folder/env/bin/python" -W ignore "$folder/run.py"
echo "as described: each call of torch.manual_seed writes stack traces"

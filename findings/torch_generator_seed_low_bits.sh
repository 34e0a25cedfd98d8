#!/usr/bin/env bash
# torch 2.13.0: a CPU generator's `manual_seed` accepts 64 bits and uses the low 32 only.
#
# `torch.Generator().manual_seed(seed)` takes any 64-bit number and `initial_seed()` gives all of it back, but seeds that agree in
# their low 32 bits give the same numbers. A seed that is put together from two parts, the run's number in the high bits and the
# sample's in the low ones (`run << 32 | sample`), is a common way to make every row of a batch reproducible by itself: on a CPU the
# run's number then changes nothing, all "seeds" of an experiment are one, and intervals over seeds have width zero. Mix the parts
# into 32 bits instead, for instance with zlib.crc32 or numpy.random.SeedSequence.
#
# Seen with torch 2.13.0:
#   seed 7 after manual_seed(7): [15, 4, 9]
#   seed 4294967303 after manual_seed(4294967303): [15, 4, 9]
#   seed 12884901895 after manual_seed(12884901895): [15, 4, 9]
#   seed 8 after manual_seed(8): [3, 4, 1]
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import torch

drawn = {}
for seed in (7, 7 + 2**32, 7 + 3 * 2**32, 8):
    generator = torch.Generator().manual_seed(seed)
    drawn[seed] = torch.randint(16, (3,), generator=generator).tolist()
    print(f"seed {generator.initial_seed()} after manual_seed({seed}): {drawn[seed]}")
    assert generator.initial_seed() == seed
same, other = [drawn[seed] for seed in drawn if seed % 2**32 == 7], drawn[8]
assert same[0] == same[1] == same[2] != other, "the behavior has changed"
PY
"$folder/env/bin/python" "$folder/run.py"
echo "as described: the high 32 bits of a seed are ignored"

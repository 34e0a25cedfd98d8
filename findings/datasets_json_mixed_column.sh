#!/usr/bin/env bash
# datasets 5.2.0: in a JSON column that holds strings and other values, strings come back decoded.
#
# A data set of questions whose answers are sometimes numbers and sometimes text is common: {"answer": "007"} in one row,
# {"answer": 7} in another. `load_dataset("json")` stores such a column as `Json(decode=True)` and decodes the strings in it too:
# "007" becomes the number 7, "null" becomes None, "1e3" becomes 1000.0, without a warning. Scores of string metrics change, and a
# missing answer cannot be told from the answer "null". Quoted text that is no JSON ("cat") stays text.
#
# Seen with datasets 5.2.0, pyarrow 26.0.1:
#   {'id': Value('int64'), 'answer': Json(decode=True)}
#   [7, 7, None, None, 1000.0, 'cat']
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cat >"$folder/run.py" <<'PY'
import json
import sys
from pathlib import Path

from datasets import load_dataset

folder = Path(sys.argv[1])
answers = ["007", 7, None, "null", "1e3", "cat"]
lines = [json.dumps({"id": number, "answer": answer}) for number, answer in enumerate(answers)]
(folder / "rows.jsonl").write_text("\n".join(lines))
rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))
print(rows.features)
print(rows["answer"][:])
assert rows["answer"][:] == [7, 7, None, None, 1000.0, "cat"], "the behavior has changed"
PY
HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/run.py" "$folder"
echo "as described: strings of a mixed column are decoded"

#!/usr/bin/env bash
# lmms_eval 0.7.3: POPE's "yes ratio" is that of the answers that would be right, so it is the same for every model.
#
# POPE reports beside accuracy how often a model says yes, which shows models that affirm whatever they are asked. lmms-eval's
# `pope_yes_ratio` counts `ground_truth` and never looks at the prediction: a model that always says yes, one that always says no
# and one that is always right get the same number, the share of questions to be answered with yes. A pruned model that lost sight
# of the image and says yes to everything looks unbiased. Its recall of 1 and precision of 0.5 tell.
#
# Seen with lmms_eval 0.7.3, on two questions to be answered with yes and two with no:
#   always yes: accuracy 0.5, yes ratio 0.5
#   always no: accuracy 0.5, yes ratio 0.5
#   always right: accuracy 1.0, yes ratio 0.5
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
# the functions of this task need none of the packages that lmms-eval asks for
"$folder/env/bin/pip" install --quiet --no-deps lmms_eval==0.7.3
cat >"$folder/run.py" <<'PY'
import runpy
import sys
from pathlib import Path

file = next(path for p in sys.path if (path := Path(p) / "lmms_eval/tasks/pope/utils.py").is_file())
task = runpy.run_path(str(file))
answers = ["yes", "yes", "no", "no"]
ratios = []
for name, replies in (("always yes", ["yes"] * 4), ("always no", ["no"] * 4), ("always right", answers)):
    rows = [
        task["pope_process_results"]({"question_id": str(number), "answer": answer}, [reply])
        for number, (answer, reply) in enumerate(zip(answers, replies))
    ]
    accuracy = task["pope_aggregate_accuracy"]([row["pope_accuracy"] for row in rows])
    ratios.append(task["pope_aggregate_yes_ratio"]([row["pope_yes_ratio"] for row in rows]))
    print(f"{name}: accuracy {accuracy}, yes ratio {ratios[-1]}")
    said = replies.count("yes"), sum(row["pope_yes_ratio"]["prediction"] == "yes" for row in rows)
    assert said[0] == said[1]
assert ratios == [0.5] * 3, "the yes ratio is the model's now"
PY
"$folder/env/bin/python" "$folder/run.py"
echo "as described: the yes ratio does not depend on the replies"

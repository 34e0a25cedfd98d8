#!/usr/bin/env bash
# msgspec 0.22.0: defaults of a decoded dataclass are lost when it is encoded again.
#
# `msgspec.json.decode` into a dataclass leaves a field that the JSON lacks, and that has a plain default, off the instance: reading it
# finds the class's attribute, so the object prints and compares as usual. `msgspec.json.encode` and `msgspec.to_builtins` write what the
# instance itself holds, so the field is missing there, while the equal object that was made by calling the class has it. Whoever adds a
# field to a configuration, reads an older file and writes it back gets a file without the field. A default of a factory stays, and so
# does everything in a `msgspec.Struct`.
#
# Seen with msgspec 0.22.0:
#   decoded: Config(model='tiny', engine='hf', tasks=[]) -> {"model":"tiny","tasks":[]}
#   called:  Config(model='tiny', engine='hf', tasks=[]) -> {"model":"tiny","engine":"hf","tasks":[]}
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet msgspec==0.22.0
cat >"$folder/run.py" <<'PY'
from dataclasses import dataclass, field

import msgspec


@dataclass
class Config:
    model: str
    engine: str = "hf"
    tasks: list[str] = field(default_factory=list)


decoded, called = msgspec.json.decode(b'{"model": "tiny"}', type=Config), Config("tiny")
assert decoded == called
written = [msgspec.json.encode(config).decode() for config in (decoded, called)]
for name, config, text in zip(("decoded:", "called: "), (decoded, called), written):
    print(name, config, "->", text)
assert written == ['{"model":"tiny","tasks":[]}', '{"model":"tiny","engine":"hf","tasks":[]}'], "the behavior has changed"
assert msgspec.to_builtins(decoded) == {"model": "tiny", "tasks": []}, "the behavior has changed"
PY
"$folder/env/bin/python" "$folder/run.py"
echo "as described: a default that decoding filled in is lost in encoding"

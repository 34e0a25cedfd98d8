#!/usr/bin/env bash
# sparsevlm 0.1.3 (PyPI) installs a second top-level package `kernels` over that of the Hub's kernels 0.16.0, and takes it along when it goes.
#
# Its Triton kernels lie in a folder of that name beside its own package. pip writes them into the other distribution's folder without a word:
# `kernels/__init__.py` is replaced, so that `kernels.get_kernel`, by which transformers loads kernels from the Hub, is no longer there, and
# `pip check` finds nothing. Uninstalling sparsevlm removes the file; `import kernels` then gives a package without content. A project
# with kernels of its own keeps them below its own name.
#
# Seen with kernels 0.16.0, sparsevlm 0.1.3 and pip on Python 3.11:
#   (whether kernels/__init__.py has get_kernel, and the distributions that claim the file)
#   kernels alone: True kernels
#   with sparsevlm: False kernels, sparsevlm
#   after its removal: missing
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/pip" --quiet --disable-pip-version-check)
cat >"$folder/look.py" <<'PY'
import ast
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

path = Path(sysconfig.get_path("purelib"), "kernels/__init__.py")
if path.exists():
    tree = ast.parse(path.read_text())
    names = {alias.asname or alias.name for node in ast.walk(tree)
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    owners = sorted(d.name for d in distributions()
                    if any(str(file) == "kernels/__init__.py" for file in d.files or ()))
    print("get_kernel" in names, ", ".join(owners))
else:
    print("missing")
PY
# Neither needs what it asks for to be looked at.
"${pip[@]}" install --no-deps kernels==0.16.0
alone=$("$folder/env/bin/python" "$folder/look.py")
"${pip[@]}" install --no-deps sparsevlm==0.1.3
both=$("$folder/env/bin/python" "$folder/look.py")
"${pip[@]}" uninstall --yes sparsevlm
after=$("$folder/env/bin/python" "$folder/look.py")
printf 'kernels alone: %s\nwith sparsevlm: %s\nafter its removal: %s\n' "$alone" "$both" "$after"
[ "$alone/$both/$after" = "True kernels/False kernels, sparsevlm/missing" ] || { echo "this changed" >&2; exit 1; }

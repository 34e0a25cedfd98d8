#!/usr/bin/env bash
# visionzip 0.1.3 (PyPI): `pip install visionzip` succeeds and installs no code, from the wheel and from the source alike.
#
# Its setup.py looks for packages inside the folder `visionzip`, where there are none, so that the wheel holds its metadata only
# and `import visionzip` fails; 0.1 and 0.1.1 are the same. The modules are in the source archive: who wants to run the authors'
# code unpacks that next to the installed packages.
#
# Seen with visionzip 0.1.3 and pip on Python 3.11:
#   modules in the wheel: 0
#   modules in the source archive: 5
#   modules of a wheel built from the source archive: 0
#   import visionzip: ModuleNotFoundError
# The script fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install "setuptools<81" wheel
"${pip[@]}" install --no-deps visionzip==0.1.3
"${pip[@]}" download --no-deps --dest "$folder/wheel" visionzip==0.1.3
"${pip[@]}" download --no-deps --no-binary visionzip --no-build-isolation --dest "$folder/source" visionzip==0.1.3
"${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$folder/built" "$folder"/source/*.tar.gz
"$folder/env/bin/python" - "$folder" <<'PY'
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])


def modules(names):
    return sum(name.endswith(".py") and not name.endswith("setup.py") for name in names)


def in_wheel(part):
    (wheel,) = (folder / part).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return modules(archive.namelist())


with tarfile.open(next((folder / "source").glob("*.tar.gz"))) as archive:
    in_source = modules(archive.getnames())
done = subprocess.run([sys.executable, "-c", "import visionzip"], capture_output=True, text=True)
failure = done.stderr.strip().splitlines()[-1].split(":")[0] if done.returncode else "none"
print("modules in the wheel:", in_wheel("wheel"))
print("modules in the source archive:", in_source)
print("modules of a wheel built from the source archive:", in_wheel("built"))
print("import visionzip:", failure)
seen = (in_wheel("wheel"), in_source > 0, in_wheel("built"), failure)
assert seen == (0, True, 0, "ModuleNotFoundError"), f"this changed: {seen}"
PY

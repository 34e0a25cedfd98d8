"""Nothing happens at import: importing every module changes nothing outside the package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = '''
import ast, importlib, json, logging, os, pkgutil, random, signal, sys, warnings
from pathlib import Path

import numpy, torch, transformers
from PIL import Image, ImageFile

import vlm_prune
from vlm_prune.vlm.common.errors import InputError


def modules():
    """Every module of the package that can be imported here, with its file."""
    for folder in ("vlm", "pruning", "kernels", "learners", "continual", "benchmarks"):
        root = Path(sys.argv[1], folder)
        for path in sorted(root.rglob("*.py")):
            parts = [part for part in path.relative_to(root.parent).with_suffix("").parts]
            if parts[-1] != "__main__":
                name = [part for part in parts if part != "__init__"]
                yield ".".join(["vlm_prune", *name]), path


def load_others(path):
    """Import what a module imports from other packages at its top level."""
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [(node.module, alias.name) for alias in node.names]
        for module, name in names:
            if not module.startswith("vlm_prune"):
                try:
                    getattr(importlib.import_module(module), name or "__name__", None)
                except ImportError:
                    pass


def state():
    """What an import could change for everyone."""
    from transformers.activations import ACT2FN
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    loggers = {
        name: (logger.level, len(logger.handlers), logger.disabled, logger.propagate)
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and not name.startswith("vlm_prune")
    }
    return {
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
        "activations": sorted(ACT2FN),
        "configs": sorted(CONFIG_MAPPING._extra_content),
        "models": sorted(map(str, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._extra_content)),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": [torch.initial_seed(), hash(torch.get_rng_state().numpy().tobytes())],
        "numpy random": hash(str(numpy.random.get_state())),
        "python random": hash(random.getstate()),
        "printing": str(numpy.get_printoptions()),
        "cuda": torch.cuda.is_initialized(),
        "warnings": [str(entry) for entry in warnings.filters],
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "loggers": loggers,
        "environment": dict(os.environ),
        "pictures": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "hooks": [id(sys.excepthook), id(sys.displayhook), id(warnings.showwarning)],
        "signals": {s.name: str(signal.getsignal(s)) for s in signal.valid_signals() if hasattr(s, "name")},
        "folder": os.getcwd(),
        "path": list(sys.path),
    }


found = list(modules())
for _, path in found:
    load_others(path)
before, imported, missing = state(), [], []
for name, _ in found:
    try:
        importlib.import_module(name)
        imported.append(name)
    except ImportError as error:
        if (error.name or "").startswith("vlm_prune"):
            raise
        missing.append(name)
after = state()
known = set(before["loggers"])
after["loggers"] = {name: value for name, value in after["loggers"].items() if name in known}
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "imported": len(imported), "missing": missing,
}))
'''


def test_importing_every_module_changes_nothing():
    import json

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT)], capture_output=True, check=False, text=True, cwd="/"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["changed"] == []
    assert found["imported"] > 150


def test_pruning_and_evaluation_load_nothing_that_only_training_needs():
    """peft imports bitsandbytes where that is installed, which takes seconds and prints lines."""
    program = (
        "import sys; import vlm_prune.pruning, vlm_prune.pruning.attention, vlm_prune.vlm; "
        "import vlm_prune.benchmarks.evaluation.engine, vlm_prune.benchmarks.cli.commands; "
        "print(*sorted({'peft', 'bitsandbytes', 'sklearn', 'skimage', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""

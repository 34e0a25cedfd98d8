"""Training state: tensors come back bit for bit, and whatever else a file holds is refused."""

import resource

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from vlm_prune.vlm.common.errors import InputError
from vlm_prune.vlm.common.state import (
    load_tensors,
    newest,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
    seed_step,
    writing,
)


def optimizer(steps):
    """AdamW of two parameters after some steps, and the parameters."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    adamw = torch.optim.AdamW([{"params": [w], "lr": 0.1} for w in weights])
    for step in range(steps):
        seed_step(0, step, 0)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        adamw.step()
    return adamw, weights


def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path):
    adamw, weights = optimizer(3)
    save_tensors(tmp_path / "moments.safetensors", optimizer_tensors(adamw))
    fresh = torch.optim.AdamW([{"params": [w], "lr": 0.1} for w in weights])
    restore_optimizer(tmp_path / "moments.safetensors", fresh)
    gradients = [torch.ones_like(weight) for weight in weights]
    ends = []
    before = [weight.detach().clone() for weight in weights]
    for each in (adamw, fresh):
        with torch.no_grad():
            for weight, start in zip(weights, before, strict=True):
                weight.copy_(start)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        each.step()
        ends.append([weight.detach().clone() for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["2|exp_avg", "x|exp_avg", "-1|exp_avg", "exp_avg", "0|exp_avg"])
def test_moments_of_other_parameters_are_refused(name, tmp_path):
    path = tmp_path / "moments.safetensors"
    save_file({name: torch.ones(5)}, path)
    with pytest.raises(InputError, match="is of another run"):
        restore_optimizer(path, optimizer(1)[0])


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "x.safetensors", {"a": whole, "b": whole[2:], "c": whole.view(2, 3).T})
    back = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["b"], whole[2:]) and torch.equal(back["c"], whole.view(2, 3).T)


def test_steps_and_processes_draw_apart_and_again_the_same():
    def drawn(*place):
        seed_step(*place)
        return torch.rand(3)

    assert torch.equal(drawn(1, 2, 0), drawn(1, 2, 0))
    first = drawn(1, 2, 0)
    assert not any(torch.equal(first, drawn(*p)) for p in ((1, 2, 1), (1, 3, 0), (2, 2, 0)))


def test_the_newest_is_the_largest_number_of_a_whole_name(tmp_path):
    for name in ("step-2", "step-10", "step-11.partial", "step-x", "steps-99", "step-3-4"):
        (tmp_path / name).mkdir()
    assert newest(tmp_path, "step-N") == (10, tmp_path / "step-10")
    assert newest(tmp_path, "step-3-N") == (4, tmp_path / "step-3-4")
    assert newest(tmp_path, "checkpoint-N") == (0, None)


def test_a_full_disk_is_an_os_error_whichever_library_writes(tmp_path):
    """A limit on the size of files stands for the disk."""
    tokenizer = Tokenizer(WordLevel({f"word-{n}": n for n in range(4000)}, unk_token="word-0"))
    writers = {
        "x.safetensors": lambda path: save_file({"x": torch.ones(10_000)}, path),
        "tokenizer.json": lambda path: tokenizer.save(str(path)),
        "x.txt": lambda path: path.write_text("x" * 10_000),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"), writing(tmp_path / name):
                write(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(ValueError, match="of our own"), writing(tmp_path):
        raise ValueError("of our own")

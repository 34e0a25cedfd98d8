"""The calibrate command, and its file given to eval."""

from vlm_prune.benchmarks.evaluation.engine import samples_of
from vlm_prune.benchmarks.experiments.calibrate import accuracy_on
from vlm_prune.pruning.attention import HeadCalibration
from vlm_prune.vlm import PrunedVLM
from vlm_prune.vlm.load import load

FEW = ("--tasks", "exist", "--limit", "2")


def test_sale_s_thresholds_go_from_one_command_to_the_other(run, checkpoint, tmp_path):
    path, sizes = tmp_path / "sale.safetensors", "minimum=1,block=64"
    code, out, err = run(
        "calibrate", "sale", path, "--model", checkpoint, *FEW, "--attention-args", sizes
    )
    assert (code, err) == (0, "") and "thresholds of" in out
    found = HeadCalibration.read(path, "sale")
    assert found.about["prompts"] == 2 and found.about["method_options"]["block"] == 64
    given = out.split("--attention-args ")[1].split()[0] + f",{sizes}"
    evaluated = ("eval", "--model", checkpoint, *FEW, "--attention", "sale", "--attention-args")
    code, out, err = run(*evaluated, given)
    assert (code, err) == (0, "") and "exist" in out
    code, _, err = run(*evaluated, given.replace("density=null,", ""))
    assert code == 2 and "give density=null" in err
    for arguments, says in (
        (("pooled", path), "unknown method to calibrate 'pooled'"),
        (("sale", path, "--attention-args", "blok=3"), "did you mean 'block'"),
        (("sale", tmp_path), "is a folder; give the name of a file"),
        (("act", path, "--tasks", "exist,count", "--limit", "1"), "below one question for 2 tasks"),
        (("sale", path, "--steps", "3"), "leave them out with sale"),
        (("seer", path, "--attention-args", f"calibration={path}"), "is what this finds"),
        (("act", path, *FEW), "no prompt has the 2048 tokens"),
    ):
        code, _, err = run("calibrate", *arguments, "--model", checkpoint)
        assert code == 2 and says in err and err.count("\n") == 1


def test_accuracy_is_that_of_the_answers():
    model, processor = load("tiny")
    samples = samples_of(("exist", "attribute"), 4, 0, "val")
    ours = accuracy_on(model, processor, samples, 2)()
    plain = PrunedVLM(model, processor)
    replies = [plain.answer(s.images[0], s.turns[0].text, max_new_tokens=16) for s in samples]
    right = [reply == s.answer for reply, s in zip(replies, samples, strict=True)]
    assert ours == sum(right) / 4 > 0

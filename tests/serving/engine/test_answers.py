"""vLLM answers and keeps what the Hugging Face route does, for every method on every family."""

from served_methods import served

from vlm_prune.vlm.families import FAMILIES

ARGUMENTS = {"vispruner": {"step": 64}}


def without_repeats(chosen):
    """Pairs of images and token indices without those that were there before."""
    return [pair for number, pair in enumerate(chosen) if pair not in chosen[:number]]


def test_one_engine_serves_every_method(engine, pictures, prompts, choices, pruner_of):
    """The method changes under one encoder cache and one prefix cache, which must not mix them."""
    lacks, seeds = FAMILIES[engine.family].lacks, engine.seeds(pictures)
    for method in served():
        for budget in (8, 0.3):
            values = {"method": method, "budget": budget, "arguments": ARGUMENTS.get(method, {})}
            pruner = pruner_of(values)
            if pruner.needs & lacks:
                continue
            engine.use(**values)
            expected = [engine.reference(prompt, pictures, pruner) for prompt in prompts]
            del choices[:]
            together = engine.answers(prompts, pictures)
            assert together == [answer for answer, _ in expected], (method, budget)
            # of each image in the order of the prompts, one that repeats once
            kept = [
                (seeds[number], indices)
                for (numbers, _), (_, own) in zip(prompts, expected, strict=True)
                for number, indices in zip(numbers, own, strict=True)
            ]
            if pruner.stage != "input":  # nothing is chosen of a smaller image
                assert without_repeats(choices) == without_repeats(kept), (method, budget)
            alone, cached = [], []
            for prompt in prompts:
                alone += engine.answers([prompt], pictures)
                cached += engine.cached
            assert alone == together, (method, budget)
            assert max(cached) > 0, "nothing was taken from the prefix cache"

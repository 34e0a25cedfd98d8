"""vLLM's engines of `eval`, started once for a test, in this process and without compilation."""

from contextlib import contextmanager

from vlm_prune.benchmarks.evaluation import served


@contextmanager
def light_engines(monkeypatch):
    """Engines stay open while the block is; yields how many questions each call of one answers."""
    from vllm.distributed.ec_transfer import ec_transfer_state

    start, complete = served.ServedVLM.__init__, served.ServedVLM.complete
    engines, counts = {}, []

    def once(self, model, variant, *arguments, **options):
        if variant.method not in engines:
            start(
                self, model, variant, *arguments, **options, enforce_eager=True,
                max_model_len=1024, distributed_executor_backend="uni",
            )  # fmt: skip
            engines[variant.method] = vars(self)
            ec_transfer_state._EC_CONNECTOR_AGENT = None  # one process, two engines
        vars(self).update(engines[variant.method])

    def counted(self, chats, *rest, **options):
        counts.append(len(chats))
        return complete(self, chats, *rest, **options)

    monkeypatch.setattr(served.ServedVLM, "__init__", once)
    monkeypatch.setattr(served.ServedVLM, "complete", counted)
    monkeypatch.setattr(served.ServedEngines, "close", lambda self: None)
    try:
        yield counts
    finally:
        for engine in engines.values():
            engine["llm"].llm_engine.engine_core.shutdown()

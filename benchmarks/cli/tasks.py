"""`vlm-prune tasks`."""


def tasks() -> None:
    """List evaluation tasks."""
    from importlib import import_module

    from vlm_prune.benchmarks.stats.table import as_table, show
    from vlm_prune.benchmarks.tasks import TASKS

    rows = [["task", "image", "what", "for example"]]
    for name, task in TASKS.items():
        doc = (import_module(f"vlm_prune.benchmarks.tasks.{name}").__doc__ or "").strip()
        sample = task.sample(0)
        example = f"{sample.turns[-1].text} -> {sample.answer}"
        rows.append([name, "yes" if task.visual else "no", doc.split("\n\n")[0], example])
    show(as_table(rows))

"""`python -m vlm_prune.benchmarks.cli`, for launchers that start modules."""

from vlm_prune.benchmarks.cli.app import main

if __name__ == "__main__":
    main()

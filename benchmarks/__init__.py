"""Speed and memory benchmarks, each run from the root of the repository: `python -m benchmarks.NAME [--quick]`."""

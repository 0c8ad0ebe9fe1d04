"""How it runs: fast paths, threads, processes, checkpoints, memory, progress. No equation lives here."""

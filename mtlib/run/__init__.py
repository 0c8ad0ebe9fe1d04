"""How it runs: fast paths, threads, processes, draws ahead, checkpoints, memory, progress. No equation lives here."""

"""Data: small synthetic problems drawn from a seed, and real sets, one file each; `download` fetches and verifies."""

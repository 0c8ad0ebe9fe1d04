"""Data: small synthetic problems drawn from a seed, and real sets, one file each; `own` reads yours; `download` fetches and verifies."""

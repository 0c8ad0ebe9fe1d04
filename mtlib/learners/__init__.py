"""Learners: what happens inside one task. Each is a function that returns a `mtlib.core.Learner`."""

"""Pillar II in depth: aligning domains, weighing data sets, unseen domains, which source and which model."""

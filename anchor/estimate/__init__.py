"""Estimate a step's memory, work and traffic: pure arithmetic, before a run and for its utilisation."""

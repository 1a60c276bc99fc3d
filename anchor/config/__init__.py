"""Sections of the two recipes, and the strict loader.

All sections are frozen and forbid unknown keys. A field has a default only if the default suits everyone; coefficients
from a paper have none. The field name or its description states the unit.
"""

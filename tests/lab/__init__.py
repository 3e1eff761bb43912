"""Tests that need the lab of namespaces, which laboratory.py builds."""

from laboratory import Lab

__all__ = ["Lab"]

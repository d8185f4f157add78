"""Formats: where an object's samples lie, from as few of its bytes as the format allows, and how to get them.

    runs(source)            the object's runs: samples that lie side by side and are read together
    table(data, run, …)     the samples of one run as an Arrow table, a row each

The rule: indexing reads heads and feet, never payload; and a format names what it cannot read, and why.
"""

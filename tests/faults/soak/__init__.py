"""Faults of every kind at random on a real cluster under load, for as long as one likes.

    python -m tests.faults.soak --minutes 30 --seed 1

    content.py     what every byte of every object must be
    plan.py        which fault happens when: a pure function of the seed
    reader.py      a process that reads in every way there is, and compares every byte
    origin.py      the S3 server, behind a proxy that fails on purpose
    world.py       the cluster, its datasets and its readers
    chaos.py       the plan, carried out
    verdict.py     what may go wrong, and by which fault; everything else is a defect
    report.py      the figures

The rule: a wrong byte is a defect whatever else happens, and an error is one unless the faults of that very moment
explain it.
"""

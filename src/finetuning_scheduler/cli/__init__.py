"""The command ``fts``: schedules looked at, made and compared from a terminal.

A module each command; ``models`` says what a model consists of without its weights, ``output`` how answers and errors
are said, ``shapes`` what ``--json`` prints. Nothing here is imported by a program that trains.
"""

"""The engine that runs a program of roles: in this process today, by the same declarations in several processes later.

A loop is ordinary Python in one controller. What it asks of models goes through *groups* of *roles*; each role's method declares how its batch is
split over the group's workers and how the parts are collected. The inline backend keeps everything in this process (a debugger works, nothing is
copied); because split and collect are part of the declaration, a program written on it needs no change to run on more workers.
"""

from telos.dataflow.groups import Backend, Group, Inline, make_backend
from telos.dataflow.roles import Role, transfer

__all__ = ["Backend", "Group", "Inline", "Role", "make_backend", "transfer"]

"""Eagleray: reward models, preference data, attention sharing and speech translation on Ray.

`eagleray.platform`, `.models`, `.jobs`, `.serve` and `.tune_spaces` are links to the folders of the same
name in the repository root (docs/decisions/0001-layout.md says why).
"""

__version__ = "0.1.0"

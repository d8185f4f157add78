"""What people use instead of Shoal, each with the settings that its own documentation names as its best.

One file a peer: functions that run in its worker, what starts its servers, and `SETTINGS`, the note for the table.
"""

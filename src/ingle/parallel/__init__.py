"""One model on several devices: a process, or rank, for each of them.

Rank 0 is the engine's process. It plans, and tells the others what it does itself (`ring`, `messages`); `group` is what
they compute together, `team` who they are and whether they live, `device` all of them as one device.
"""

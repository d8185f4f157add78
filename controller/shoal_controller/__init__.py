"""The controller: datasets, snapshots, membership, cluster map and prefetch jobs. It is never on the path of a read.

    a gRPC request, a node's report or a tick becomes an event
    → `core.Core.handle(event, now)` decides: pure, no clock, no I/O
    → `shell.Shell` makes the actions durable, then publishes, then answers

The rule: what was answered or published is already in the record, so `kill -9` at any moment loses nothing that anybody
was told.
"""

"""Every host resource is written down, and flushed to disk, before it is made; clean removes by it, and only by it.

One file per owner (a run, a kept target, a sandbox) under the ledger's folder. The owner holds an flock on its file
for as long as it lives, so liveness needs no process id and works across PID namespaces. Lines are JSON:
{"owner": {...}} first, then {"add": n, "kind": ..., ...}, {"drop": n}, {"note": {...}}. A torn last line is a
resource that was not yet made.
"""

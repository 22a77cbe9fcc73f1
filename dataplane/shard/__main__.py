"""`python -m dataplane.shard`: the shard server, imported at low priority."""

from __future__ import annotations

from engine.ipc.background import import_in_background

if __name__ == "__main__":
    import_in_background("dataplane.shard.main")
    from dataplane.shard.main import main

    main()

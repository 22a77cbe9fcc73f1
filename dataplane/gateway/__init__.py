"""The gateway, from its clients to the replicas' leaders.

- `server`, `http`, `openai`, `openai_answer`: what clients speak. `normalize`: a request into a journal.
- `gateway`: the facade behind both protocols. `live`: a live request and its single reader.
- `dispatcher`: all decisions, as `instructions`. It uses `journal` (the tokens of a request), `router` (which
  replica is next), `search` (which replica holds a resumed request), `silence` (which stream has timed out).
- `replicas`, `replica_stream`: the open streams to the leaders.
- `resume`, `resumption`: a resume token, and how its request is found.
- `checkpoint_plan`, `checkpoints`: what this gateway writes to the store of its own long requests.

What keeps a stale frame out: `dispatcher` compares each frame's epoch and the attempt of each of its parts.
"""

"""The gateway, from its clients to the replicas' leaders.

- `server`, `http`, `openai`, `openai_answer`: the client protocols. `normalize`: a request into a journal.
- `gateway`: the facade behind both protocols. `live`: a live request and its single reader.
- `dispatcher`: all decisions, as `instructions`. It uses `journal` (the tokens of a request), `router` (which
  replica is next), `search` (which replica holds a resumed request), `silence` (which stream has timed out).
- `replicas`, `replica_stream`: the open streams to the leaders.
- `resume`, `resumption`: a resume token, and how its request is found.
- `checkpoint_plan`, `checkpoints`: copies of this gateway's long requests in the store.

Stale output is dropped in one place: `dispatcher` checks the epoch of each frame and the attempt of each part
of it.
"""

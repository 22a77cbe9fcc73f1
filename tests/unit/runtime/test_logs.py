from __future__ import annotations

import json
import logging

from phalanx.runtime.logs import JsonFormatter


def test_a_record_is_one_line_with_its_fields() -> None:
    record = logging.makeLogRecord({"msg": "request\nfailed over", "request": "r1", "epoch": 7})
    line = JsonFormatter("gateway", "gateway-0").format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["role"], fields["event"], fields["request"], fields["epoch"]) == (
        "gateway",
        "request\nfailed over",
        "r1",
        7,
    )

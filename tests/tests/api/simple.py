"""Simple captures by the official Python client; prints which file has which capture."""

import json
import os
import time
from datetime import datetime, timedelta, timezone

import cloudflare
from cloudflare import Cloudflare

ACCOUNT = os.environ["ACCOUNT"]
BETWEEN = datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=int(os.environ["BETWEEN"]))
pcaps = Cloudflare(api_token=os.environ["TOKEN"]).magic_transit.pcaps
ids = {}


def requests():
    with open(os.environ["DAEMON_LOG"]) as log:
        return log.read().count('"message":"request"')


def ask(name, packet_limit=10000, **more):
    """Asks, waits for the answer, and downloads it."""
    created = pcaps.create(account_id=ACCOUNT, packet_limit=packet_limit, system="magic-transit",
                           time_limit=300, type="simple", **more)
    assert type(created).__name__ == "PCAP" and created.status == "pending", created
    deadline = time.time() + 10
    while (got := pcaps.get(created.id, account_id=ACCOUNT)).status == "pending":
        assert time.time() < deadline, got
    assert type(got).__name__ == "PCAP" and got.status == "success", got
    pcaps.download.get(created.id, account_id=ACCOUNT).write_to_file(
        os.path.join(os.environ["FOLDER"], name))
    ids[name] = created.id
    return got


# A time without a zone is UTC.
got = ask("window", offset_time=BETWEEN.replace(tzinfo=None))
assert got.offset_time == BETWEEN, (got.offset_time, BETWEEN)
ask("filter", filter_v1={"source_port": 1001.0, "protocol": 17.0, "source_address": "10.0.0.1"})
ask("newest", packet_limit=30)
ask("nothing", filter_v1={"protocol": 132})
before = requests()
for offset in (BETWEEN - timedelta(hours=25), BETWEEN + timedelta(hours=1)):
    try:
        ask("refused", offset_time=offset)
        raise AssertionError(offset)
    except cloudflare.BadRequestError as error:
        assert "24 hours" in error.errors[0].message, error
assert requests() == before + 2, "no request was repeated"
print(json.dumps(ids))

"""A full capture to a bucket by the official Python client, from adding the bucket to the end."""

import os
import sys
import time

import cloudflare
from cloudflare import Cloudflare

ACCOUNT = os.environ["ACCOUNT"]
DESTINATION = os.environ["DESTINATION"]
KNOWN_AS = os.environ["KNOWN_AS"]

pcaps = Cloudflare(api_token=os.environ["TOKEN"]).magic_transit.pcaps
ownership = pcaps.ownership

added = ownership.create(account_id=ACCOUNT, destination_conf=DESTINATION)
assert added.destination_conf == KNOWN_AS, added
if added.status != "success":
    assert added.status == "pending" and added.validated == "", added
    print("challenge", added.filename, flush=True)
    challenge = sys.stdin.readline()
    # As the client's own example has it, and its documentation says.
    try:
        ownership.validate(account_id=ACCOUNT, destination_conf=KNOWN_AS, ownership_challenge=added.filename)
        raise AssertionError("the name of the file is taken for what is in it")
    except cloudflare.BadRequestError as error:
        assert [item.code for item in error.errors] == [1114], error
    proved = ownership.validate(account_id=ACCOUNT, destination_conf=KNOWN_AS, ownership_challenge=challenge)
    assert proved.id == added.id and proved.status == "success" and proved.validated, proved
listed = ownership.get(account_id=ACCOUNT).result
assert [(item.id, item.status, item.destination_conf) for item in listed] == [(added.id, "success", KNOWN_AS)]

created = pcaps.create(account_id=ACCOUNT, colo_name="ORD", destination_conf=KNOWN_AS,
                       system="magic-transit", time_limit=300, type="full")
assert type(created).__name__ == "MagicVisibilityPCAPsPCAPsResponseFull", type(created)
assert created.status == "running" and created.destination_conf == KNOWN_AS, created
print("created", created.id, flush=True)
_, count = sys.stdin.readline().split()
deadline = time.time() + 30
while (got := pcaps.get(created.id, account_id=ACCOUNT)).packets_captured < int(count):
    assert time.time() < deadline, got
assert pcaps.stop(created.id, account_id=ACCOUNT) is None
while (got := pcaps.get(created.id, account_id=ACCOUNT)).status not in ("success", "failed"):
    assert got.status in ("running", "conversion_pending", "conversion_running"), got
    assert time.time() < deadline, got
print("done", created.id, flush=True)

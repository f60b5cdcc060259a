"""The official Python client against taplined: by base URL only, unchanged."""

import os
import subprocess
import sys
import time

import cloudflare
from cloudflare import Cloudflare

ACCOUNT = os.environ["ACCOUNT"]
DESTINATION = os.environ["DESTINATION"]
LOG = os.environ["DAEMON_LOG"]
SYSTEM = "magic-transit"


def requests():
    with open(LOG) as log:
        return log.read().count('"message":"request"')


def refused(kind, code, call):
    """A call that must be refused so, after exactly one request on the wire."""
    before = requests()
    try:
        call()
    except cloudflare.APIStatusError as error:
        assert type(error) is kind, (type(error), error)
        codes = [item.code for item in error.errors]
        assert code in codes, (code, codes)
        assert requests() == before + 1, (requests(), before)
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def is_full(result):
    """Its class is that of full captures, not the one of simple ones."""
    return type(result).__name__ == "MagicVisibilityPCAPsPCAPsResponseFull"


def full(client, **more):
    body = {"colo_name": "ORD", "destination_conf": DESTINATION, "system": SYSTEM,
            "time_limit": 300.0, "type": "full"}
    return client.magic_transit.pcaps.create(account_id=ACCOUNT, **{**body, **more})


client = Cloudflare(api_token=os.environ["TOKEN"])
pcaps = client.magic_transit.pcaps

# Create, get, list, stop.
created = full(client, byte_limit=1000000.0, filter_v1={"destination_port": 2000.0, "protocol": 17})
assert is_full(created), type(created)
assert created.filter_v1.destination_port == 2000 and created.status == "running", created
assert created.byte_limit == 1000000 and created.time_limit == 300 and created.colo_name == "ORD"
print("created", created.id, flush=True)
assert sys.stdin.readline() == "sent\n"
deadline = time.time() + 10
while (got := pcaps.get(created.id, account_id=ACCOUNT)).packets_captured < 100:
    assert time.time() < deadline, got
assert is_full(got), type(got)
listed = pcaps.list(account_id=ACCOUNT).result
assert [item.id for item in listed] == [created.id], listed
assert is_full(listed[0]), type(listed[0])

# It is not finished yet.
refused(cloudflare.ConflictError, 1151, lambda: pcaps.download.get(created.id, account_id=ACCOUNT))

# The daemon's limit is one.
refused(cloudflare.ConflictError, 1140, lambda: full(client))
assert pcaps.stop(created.id, account_id=ACCOUNT) is None
while (ended := pcaps.get(created.id, account_id=ACCOUNT)).status not in ("success", "failed"):
    assert time.time() < deadline, ended
assert ended.status == "success" and ended.packets_captured == 100, ended
assert ended.stop_requested is not None and is_full(ended), ended

# Refusals.
error = refused(cloudflare.BadRequestError, 1103,
                lambda: full(client, time_limit=0, packet_limit=0, colo_name="ams01"))
assert len(error.errors) == 3, error.errors
assert {item.source.pointer for item in error.errors} == {"/time_limit", "/packet_limit", "/colo_name"}
refused(cloudflare.BadRequestError, 1111, lambda: full(client, destination_conf="s3://bucket?region=us-east-1"))
refused(cloudflare.BadRequestError, 1107, lambda: full(client, destination_conf="file:///etc"))
unknown = "0" * 32
refused(cloudflare.NotFoundError, 1130, lambda: pcaps.get(unknown, account_id=ACCOUNT))
refused(cloudflare.NotFoundError, 1130, lambda: pcaps.get("a/b?c", account_id=ACCOUNT))
refused(cloudflare.NotFoundError, 1130, lambda: pcaps.stop(unknown, account_id=ACCOUNT))
refused(cloudflare.NotFoundError, 1130, lambda: pcaps.download.get(unknown, account_id=ACCOUNT))
# The file of a full capture: its header, and what was captured of each packet behind 16 bytes.
assert len(pcaps.download.get(created.id, account_id=ACCOUNT).read()) == 24 + 100 * (16 + 60)
assert pcaps.ownership.get(account_id=ACCOUNT).result == []
refused(cloudflare.BadRequestError, 1107, lambda: pcaps.ownership.create(
    account_id=ACCOUNT, destination_conf="s3://bucket"))
refused(cloudflare.BadRequestError, 1111, lambda: pcaps.ownership.validate(
    account_id=ACCOUNT, destination_conf="s3://bucket?region=us-east-1", ownership_challenge="x"))
refused(cloudflare.NotFoundError, 1131, lambda: pcaps.ownership.delete(unknown, account_id=ACCOUNT))
refused(cloudflare.PermissionDeniedError, 10000, lambda: pcaps.list(account_id=unknown))
reader = Cloudflare(api_token=os.environ["READER"])
assert reader.magic_transit.pcaps.list(account_id=ACCOUNT).result[0].id == created.id
refused(cloudflare.PermissionDeniedError, 10000, lambda: full(reader))

# An email and a key, which the client prefers to a token.
by_key = Cloudflare(api_token="x", api_email="user@example.com", api_key="secret")
assert by_key.magic_transit.pcaps.get(created.id, account_id=ACCOUNT).id == created.id

# A simple capture: what has passed already.
simple = pcaps.create(account_id=ACCOUNT, packet_limit=40, system=SYSTEM, time_limit=300, type="simple",
                      filter_v1={"destination_port": 2000.0, "protocol": 17.0})
assert type(simple).__name__ == "PCAP" and simple.status == "pending", simple
while (got := pcaps.get(simple.id, account_id=ACCOUNT)).status == "pending":
    assert time.time() < deadline, got
assert type(got).__name__ == "PCAP" and got.status == "success", got
assert len(pcaps.download.get(simple.id, account_id=ACCOUNT).read()) == 24 + 40 * (16 + 60)
listed = pcaps.list(account_id=ACCOUNT).result
assert [item.id for item in listed] == [simple.id, created.id], listed
assert [is_full(item) for item in listed] == [False, True], listed
refused(cloudflare.BadRequestError, 1145, lambda: pcaps.stop(simple.id, account_id=ACCOUNT))
refused(cloudflare.BadRequestError, 1103, lambda: pcaps.create(
    account_id=ACCOUNT, packet_limit=1, system=SYSTEM, time_limit=1, type="simple",
    offset_time="2020-01-01T08:00:00Z"))

# What is not the client's fault, and what is: guessing.
subprocess.run(["ip", "link", "del", os.environ["INTERFACE"]], check=True)
refused(cloudflare.InternalServerError, 1171, lambda: full(client))
wrong = Cloudflare(api_token="wrong").magic_transit.pcaps
for _ in range(3):
    refused(cloudflare.AuthenticationError, 10000, lambda: wrong.list(account_id=ACCOUNT))
refused(cloudflare.RateLimitError, 1141, lambda: wrong.list(account_id=ACCOUNT))
print("done", flush=True)

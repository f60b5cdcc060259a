// The official Node client against taplined: by base URL only, unchanged.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import Cloudflare from "cloudflare";

const { ACCOUNT: account_id, DESTINATION, DAEMON_LOG, TOKEN, READER, INTERFACE } = process.env;
const requests = () => readFileSync(DAEMON_LOG, "utf8").split('"message":"request"').length - 1;

// A call that must be refused so, after exactly one request on the wire.
async function refused(kind, code, call) {
  const before = requests();
  const error = await call().then(() => assert.fail(`${kind.name} was expected`), (error) => error);
  assert.ok(error instanceof kind, error);
  assert.ok(error.errors.some((item) => item.code === code), JSON.stringify(error.errors));
  assert.equal(requests(), before + 1);
  return error;
}

const full = (client, more = {}) =>
  client.magicTransit.pcaps.create({
    account_id, colo_name: "ord02", destination_conf: DESTINATION, system: "magic-transit",
    time_limit: 300, type: "full", ...more,
  });

const client = new Cloudflare({ apiToken: TOKEN });
const { pcaps } = client.magicTransit;

const created = await full(client, { filter_v1: { destination_port: 2000, protocol: 17 } });
assert.equal(created.status, "running");
assert.equal(created.packets_captured, 0);
console.log("created", created.id);
const [sent] = await createInterface({ input: process.stdin })[Symbol.asyncIterator]().next().then((line) => [line.value]);
assert.equal(sent, "sent");
const deadline = Date.now() + 10_000;
let got;
while ((got = await pcaps.get(created.id, { account_id })).packets_captured < 100) assert.ok(Date.now() < deadline);
const listed = [];
for await (const item of pcaps.list({ account_id })) listed.push(item.id);
assert.deepEqual(listed, [created.id]);
await refused(Cloudflare.ConflictError, 1151, () => pcaps.download.get(created.id, { account_id }));
await refused(Cloudflare.ConflictError, 1140, () => full(client));
assert.ok((await pcaps.stop(created.id, { account_id })) == null);
const ends = ["success", "failed"];
while (!ends.includes((got = await pcaps.get(created.id, { account_id })).status)) assert.ok(Date.now() < deadline);
assert.equal(got.status, "success");
assert.equal(got.packets_captured, 100);
assert.ok(got.stop_requested);

const { BadRequestError, NotFoundError, PermissionDeniedError } = Cloudflare;
const invalid = await refused(BadRequestError, 1103, () => full(client, { time_limit: 0, packet_limit: 1.5 }));
assert.deepEqual(invalid.errors.map((item) => item.source.pointer).sort(), ["/packet_limit", "/time_limit"]);
await refused(BadRequestError, 1104, () => full(client, { extra: 1 }));
const simple = await pcaps.create({
  account_id, packet_limit: 40, system: "magic-transit", time_limit: 300, type: "simple",
  filter_v1: { destination_port: 2000 },
});
assert.equal(simple.status, "pending");
while (!ends.includes((got = await pcaps.get(simple.id, { account_id })).status)) assert.ok(Date.now() < deadline);
assert.equal(got.status, "success");
const length = async (id) => (await (await pcaps.download.get(id, { account_id })).arrayBuffer()).byteLength;
assert.equal(await length(simple.id), 24 + 40 * (16 + 60));
await refused(BadRequestError, 1145, () => pcaps.stop(simple.id, { account_id }));
const unknown = "0".repeat(32);
await refused(NotFoundError, 1130, () => pcaps.get(unknown, { account_id }));
await refused(NotFoundError, 1130, () => pcaps.get("../x", { account_id }));
await refused(NotFoundError, 1130, () => pcaps.stop(unknown, { account_id }));
await refused(NotFoundError, 1130, () => pcaps.download.get(unknown, { account_id }));
assert.equal(await length(created.id), 24 + 100 * (16 + 60));
await refused(NotFoundError, 1131, () => pcaps.ownership.delete(unknown, { account_id }));
await refused(PermissionDeniedError, 10000, () => pcaps.get(created.id, { account_id: unknown }));
const reader = new Cloudflare({ apiToken: READER });
await refused(PermissionDeniedError, 10000, () => full(reader));
// It sends every credential that it has.
const both = new Cloudflare({ apiToken: TOKEN, apiEmail: "user@example.com", apiKey: "secret" });
assert.equal((await both.magicTransit.pcaps.get(created.id, { account_id })).id, created.id);

execFileSync("ip", ["link", "del", INTERFACE]);
await refused(Cloudflare.InternalServerError, 1171, () => full(client));
const wrong = new Cloudflare({ apiToken: "wrong" }).magicTransit.pcaps;
for (let at = 0; at < 3; at += 1) {
  await refused(Cloudflare.AuthenticationError, 10000, () => wrong.get(unknown, { account_id }));
}
await refused(Cloudflare.RateLimitError, 1141, () => wrong.get(unknown, { account_id }));
console.log("done");
process.exit(0);

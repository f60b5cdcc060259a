// A full capture to a bucket by the official Node client, from adding the bucket to the end.

import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import Cloudflare from "cloudflare";

const { ACCOUNT: account_id, DESTINATION, KNOWN_AS, TOKEN } = process.env;
const { pcaps } = new Cloudflare({ apiToken: TOKEN }).magicTransit;
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const line = async () => (await lines.next()).value;

const added = await pcaps.ownership.create({ account_id, destination_conf: DESTINATION });
assert.equal(added.status, "pending");
assert.equal(added.destination_conf, KNOWN_AS);
console.log(`challenge ${added.filename}`);
const proved = await pcaps.ownership.validate({
  account_id, destination_conf: KNOWN_AS, ownership_challenge: await line(),
});
assert.equal(proved.id, added.id);
assert.equal(proved.status, "success");
const listed = [];
for await (const item of pcaps.ownership.get({ account_id })) listed.push(item.id);
assert.deepEqual(listed, [added.id]);

const created = await pcaps.create({
  account_id, colo_name: "ORD", destination_conf: KNOWN_AS, system: "magic-transit", time_limit: 300, type: "full",
});
assert.equal(created.destination_conf, KNOWN_AS);
console.log(`created ${created.id}`);
const [, count] = (await line()).split(" ");
const deadline = Date.now() + 30_000;
const get = () => {
  assert.ok(Date.now() < deadline);
  return pcaps.get(created.id, { account_id });
};
while ((await get()).packets_captured < Number(count));
await pcaps.stop(created.id, { account_id });
let got;
while (!["success", "failed"].includes((got = await get()).status)) {
  assert.ok(["running", "conversion_pending", "conversion_running"].includes(got.status), got.status);
}
console.log(`done ${created.id}`);
process.exit(0);

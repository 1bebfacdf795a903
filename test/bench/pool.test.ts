/** What else needs libuv's pool (looking up the database's address, say) must not wait behind all that wait to hash. */
import assert from 'node:assert/strict';
import { lookup } from 'node:dns/promises';
import { it } from 'node:test';
import { Wait } from '../../src/call.ts';
import { chooseEngine } from '../../src/password/engine.ts';
import { Slots } from '../../src/password/slots.ts';

const SLOTS = 3;
const HASHES = 200;
/** Those under way when it came, as many again that took their slots, and one that ended while it was answered. */
const HASHES_BEFORE_A_LOOKUP = 2 * SLOTS + 1;

it(`a look-up of a host's address waits for a few hashes at most while ${HASHES} wait for their turn`, async (t) => {
  const { engine } = await chooseEngine('auto');
  const slots = new Slots(SLOTS, HASHES, 0);
  const parameters = { memoryKib: 19_456, iterations: 2, parallelism: 1 };
  let done = 0;
  const all = Array.from({ length: HASHES }, () =>
    slots.run({ path: ['app', 'peer', 'user'], wait: Wait.forMs(600_000), hashes: 1 }, async () => {
      await engine.argon2id('password', Buffer.alloc(16), undefined, 32, parameters);
      done++;
    }),
  );
  const waited: number[] = [];
  while (done < HASHES / 2) {
    const before = done;
    await lookup('localhost');
    waited.push(done - before);
  }
  await Promise.all(all);
  t.diagnostic(
    `${waited.length} look-ups, each after ${Math.min(...waited)} to ${Math.max(...waited)} hashes`,
  );
  assert.ok(waited.length > 0 && Math.max(...waited) <= HASHES_BEFORE_A_LOOKUP, waited.join());
});

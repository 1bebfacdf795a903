/** Whom there is no time for costs nothing: the admission that stands before all other work of a call. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { Wait } from '../../src/call.ts';
import { Slots } from '../../src/password/slots.ts';

const HASH_MS = 100;
const applicant = (app: string, deadlineMs: number, session = 'session') => ({
  path: [app, 'peer', session],
  wait: new Wait(new AbortController().signal, performance.now() + deadlineMs),
  hashes: 2,
});

describe('admission', () => {
  /** As many calls of one application under way as fill two slots for ten seconds. */
  const flooded = () => {
    const slots = new Slots(2, 1000, HASH_MS);
    const { promise, resolve } = Promise.withResolvers<void>();
    const flood = Array.from({ length: 100 }, () => slots.admit(applicant('flooder', 60_000), () => promise));
    return { slots, end: () => Promise.all([resolve(), ...flood]) };
  };

  it('refuses who could not be served in time, before any work is done', async () => {
    const { slots, end } = flooded();
    await assert.rejects(slots.admit(applicant('flooder', 2_000), assert.fail), { reason: 'OVERLOADED' });
    await end();
  });

  it('refuses who would be in time only if all went as expected', async () => {
    const slots = new Slots(2, 1000, HASH_MS);
    const { promise, resolve } = Promise.withResolvers<void>();
    const flood = Array.from({ length: 15 }, () => slots.admit(applicant('flooder', 60_000), () => promise));
    // 16 before it, two at a time, two hashes each: 1,800 ms.
    await assert.rejects(slots.admit(applicant('flooder', 2_000), assert.fail), { reason: 'OVERLOADED' });
    assert.equal(await slots.admit(applicant('flooder', 5_000), async () => 'served'), 'served');
    await Promise.all([resolve(), ...flood]);
  });

  it('lets in whom the flood of another application leaves room for', async () => {
    const { slots, end } = flooded();
    assert.equal(await slots.admit(applicant('other', 2_000), async () => 'served'), 'served');
    await end();
  });

  it('lets in whom the flood of another session of the same peer leaves room for', async () => {
    const { slots, end } = flooded();
    assert.equal(await slots.admit(applicant('flooder', 2_000, 'another'), async () => 'served'), 'served');
    await end();
  });

  it('forgets calls that are over, however they ended', async () => {
    const { slots, end } = flooded();
    await end();
    await assert.rejects(slots.admit(applicant('flooder', 2_000), async () => assert.fail('of its own')));
    assert.equal(await slots.admit(applicant('flooder', 300), async () => 'served'), 'served');
  });

  it('lets in as many as there are slots whatever the estimate says, so that it can be mended', async () => {
    const slots = new Slots(2, 1000, 600_000);
    assert.equal(await slots.admit(applicant('any', 1_000), async () => 'served'), 'served');
  });
});
